"""How much memory an evaluation takes: `python tests/memory.py [--command [--jax]] [PICTURES [DETECTIONS [CLASSES]]]`, 40,000 × 300 × 80 when nothing is said (minutes).

With `--command` it is `retinanet_evaluate` itself, in a process of its own with TensorFlow in it: a COCO file and as many pictures are read, the carried detector is loaded and
asked once, and what it would answer from then on is made up from a seed; report, figures and page are written as ever. JAX is hidden unless `--jax` is said: TensorFlow
imports it where it is installed (110 MB), and whoever installs the package with TensorFlow alone has none. Without `--command` the same steps are called one by one, and no
engine is loaded. Printed is the largest resident size during each step (`VmHWM`, or `ru_maxrss` where there is none: then it is that of all steps so far).

The last whole run of the command, 40,000 × 300 × 80 on two shared cores: 1,481 MB at most, while the gallery was written (counting for COCO: 1,406 MB), in 2,818 s.
"""

import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIDE = 160  # pixels of the one picture that all records show
OBJECTS = 7  # a picture, on average


def peak():
    "Megabytes that this process held at most so far."
    try:  # Linux's ru_maxrss also knows of the parent, which may be larger
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    except (OSError, StopIteration):
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size / (1e6 if sys.platform == "darwin" else 1e3)


def forget():
    "Begin anew with the largest size, where the system can."
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Steps:
    "Prints a line for every step: its name, the seconds that it took, the peak inside it."

    def __init__(self):
        self.out, self.start = os.fdopen(os.dup(1), "w"), time.time()
        forget()

    def done(self, name):
        seconds, self.start = time.time() - self.start, time.time()
        print(json.dumps([name, round(seconds, 1), round(peak())]), file=self.out, flush=True)
        forget()

    def follow(self, module, name):
        "Say when a function of a module is done."
        function = getattr(module, name)

        @functools.wraps(function)
        def followed(*args, **kwargs):
            self.done(f"before {name}")
            try:
                return function(*args, **kwargs)
            finally:
                self.done(name)

        setattr(module, name, followed)


def shares(classes):
    "How often each class occurs: the first most, as people do in COCO."
    weights = 1 / np.arange(1, classes + 1)
    return weights / weights.sum()


def boxes_of(rng, n):
    "`n` random boxes inside the picture, float32."
    size = rng.uniform(8, SIDE * 0.7, (n, 2))
    corner = rng.uniform(0, 1, (n, 2)) * (SIDE - size)
    return np.concatenate([corner, corner + size], 1).astype(np.float32)


class Truth:
    "The objects of a made-up data set, picture after picture."

    def __init__(self, pictures, classes):
        rng, self.pictures = np.random.default_rng(0), pictures
        self.share = shares(classes)
        self.class_names = tuple(f"class {k}" for k in range(classes))
        self.ends = np.cumsum([0, *rng.poisson(OBJECTS, pictures)])
        n = self.ends[-1]
        self.boxes, self.labels = boxes_of(rng, n), rng.choice(classes, n, p=self.share)
        self.difficult = rng.random(n) < 0.05

    def rows(self, i):
        "Where the objects of picture `i` are."
        return slice(self.ends[i], self.ends[i + 1])


class DataSet(list):
    "Records that all show one picture."

    def __init__(self, truth, picture):
        from retinanet_nb.records import Record

        self.class_names = truth.class_names
        for rows in map(truth.rows, range(truth.pictures)):
            flags = truth.difficult[rows]
            self.append(Record(picture, SIDE, SIDE, truth.boxes[rows], truth.labels[rows], difficult=flags))


def grey(folder):
    "A grey picture."
    from retinanet_nb.pictures import write_image

    return write_image(folder / "grey.png", np.full((SIDE, SIDE, 3), 127, np.uint8))


class Detector:
    "Answers by the seed: boxes near the objects and anywhere, most of them unsure, as a network's are."

    def __init__(self, truth, detections):
        from types import SimpleNamespace

        self.class_names, self.detections, self.truth = truth.class_names, detections, truth
        self.hyperparameters = SimpleNamespace(image_size=(SIDE, SIDE))
        self.asked, self.rng = 0, np.random.default_rng(1)

    def predict_on_batch(self, images):
        "Boxes (B, D, 4), scores (B, D), labels (B, D)."
        answers = [self.answer(self.asked + i) for i in range(len(images))]
        self.asked += len(images)
        return tuple(np.stack(column) for column in zip(*answers))

    def answer(self, picture):
        "The detections of one picture, by falling score."
        rng, n, truth = self.rng, self.detections, self.truth
        boxes, labels = boxes_of(rng, n), rng.choice(len(truth.share), n, p=truth.share)
        rows = truth.rows(min(picture, truth.pictures - 1))  # the last batch is filled up
        own, near = truth.labels[rows], n // 3
        if len(own):
            some = rng.integers(0, len(own), near)
            boxes[:near] = truth.boxes[rows][some] + rng.normal(0, 4, (near, 4))
            labels[:near] = own[some]
        scores = np.sort(0.05 + 0.95 * rng.beta(0.4, 6, n))[::-1]
        return boxes, scores.astype(np.float32), labels.astype(np.int32)


def evaluation(pictures, detections, classes):
    "The steps of an evaluation, one by one, without an engine."
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from retinanet_nb.evaluation import evaluate
    from retinanet_nb.mistakes import (
        confusion_matrix,
        find_mistakes,
        mistakes_overview,
        plot_confusion,
        worst,
    )

    done = Steps().done
    done("start")
    with tempfile.TemporaryDirectory() as folder:
        truth = Truth(pictures, classes)
        dataset = DataSet(truth, grey(Path(folder)))
        done("records")
        report = evaluate(Detector(truth, detections), dataset, batch_size=16, progress=False)
        done("evaluate")
        report.to_json(Path(folder) / "report.json")
        print(report, file=sys.stderr)
        done("report")
        report.plot(Figure().subplots()).figure.savefig(Path(folder) / "curves.png")
        done("curves")
        print(mistakes_overview(find_mistakes(report, dataset), report.class_names), file=sys.stderr)
        worst(report, dataset)
        done("mistakes")
        matrix = confusion_matrix(report.detections, dataset, classes)
        plot_confusion(matrix, report.class_names, Figure().subplots()).figure.savefig(Path(folder) / "c.png")
        done("confusions")


def coco_file(truth, folder):
    "A COCO file over a made-up truth, and a picture with a name of its own for each entry."
    images, annotations, picture = [], [], grey(folder)
    for i in range(truth.pictures):
        os.link(picture, folder / f"{i:06}.png")
        images.append({"id": i, "file_name": f"{i:06}.png", "width": SIDE, "height": SIDE})
        rows = truth.rows(i)
        for (x1, y1, x2, y2), label in zip(truth.boxes[rows].tolist(), truth.labels[rows].tolist()):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            rest = {
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
                "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
            }
            annotations.append(
                {"id": len(annotations), "image_id": i, "category_id": label, "bbox": bbox, **rest}
            )
    picture.unlink()
    categories = [{"id": k, "name": name} for k, name in enumerate(truth.class_names)]
    path = folder / "made_up.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def command(pictures, detections, classes, folder):
    "`retinanet_evaluate` as a terminal would call it, but for what the detector answers."
    if not os.environ.get("WITH_JAX"):
        sys.modules["jax"] = None
    import retinanet_nb
    from retinanet_nb import cli_detect

    steps, opened = Steps(), cli_detect.open_dataset

    def open_dataset(*args):
        dataset = opened(*args)
        steps.done("data set")
        change()  # the engine is imported after the data set was read, as ever
        return dataset

    def change():
        from retinanet_nb import demo, evaluation, retinanet_box

        steps.done("engine")
        load = retinanet_box.load_detector

        def made_up(path):
            real = load(path)
            real.predict_on_batch(np.zeros((8, *real.hyperparameters.image_size, 3), np.uint8))
            steps.done("detector")
            return Detector(Truth(pictures, classes), detections)

        retinanet_box.load_detector = made_up
        for module, name in (
            (evaluation, "stack_detections"),
            (evaluation, "coco_metrics"),
            (evaluation, "_curves"),
            (demo, "curves_figure"),
            (demo, "write_gallery"),
            (cli_detect, "_told_evaluation"),
        ):
            steps.follow(module, name)

    cli_detect.open_dataset = open_dataset
    model = Path(retinanet_nb.__file__).parent / "assets" / "shapes.keras"
    data = folder / "pictures" / "made_up.json"
    with contextlib.redirect_stdout(sys.stderr):
        cli_detect.retinanet_evaluate(str(model), str(data), out=str(folder / "out"))
    steps.done("end")


def measured(pictures, detections, classes, as_command=False, say=lambda step: None):
    "Run `evaluation` or `command` in a new process; its steps as (name, seconds, megabytes)."
    steps = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        if as_command:  # here, so that making the file up does not count
            within = Path(folder) / "pictures"
            within.mkdir()
            coco_file(Truth(pictures, classes), within)
        sizes = map(str, (pictures, detections, classes))
        process = subprocess.Popen(
            [sys.executable, __file__, "--here", folder if as_command else "", *sizes],
            cwd=ROOT,
            env={
                **os.environ,
                "KERAS_BACKEND": "tensorflow",
                "CUDA_VISIBLE_DEVICES": "-1",
                "MPLBACKEND": "Agg",
            },
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        for line in process.stdout:
            steps.append(tuple(json.loads(line)))
            say(steps[-1])
        if process.wait():
            errors.seek(0)
            raise RuntimeError(errors.read()[-3000:])
    return steps


def main():
    given = sys.argv[1:]
    if given[:1] == ["--here"]:
        folder, *sizes = given[1:]
        sizes = map(int, sizes)
        command(*sizes, Path(folder)) if folder else evaluation(*sizes)
        return
    as_command = "--command" in given
    os.environ["WITH_JAX"] = "1" if "--jax" in given else ""
    given = [int(a) for a in given if not a.startswith("-")]
    sizes = given + [40_000, 300, 80][len(given) :]
    what = "retinanet_evaluate" if as_command else "without an engine"
    print("{} pictures, {} detections each, {} classes, {}".format(*sizes, what))
    say = lambda step: print("{:26}{:8.1f} s{:8} MB".format(*step), flush=True)
    steps = measured(*sizes, as_command, say)
    say(("at most", sum(s for _, s, _ in steps), max(m for _, _, m in steps)))


if __name__ == "__main__":
    main()
