"""How much memory an evaluation takes: `python tests/memory.py [--command] [PICTURES [DETECTIONS [CLASSES]]]`, 40,000 × 300 × 80 when nothing is said (minutes).

With `--command` it is `retinanet_evaluate` itself, in a process of its own with TensorFlow in it: a COCO file and as many pictures are read, the carried detector is loaded and
asked once, and what it would answer from then on is made up from a seed; report, figures and page are written as ever. Without, the same steps are called one by one, and no
engine is loaded. Printed is the largest resident size during each step (`VmHWM`, or `ru_maxrss` where there is none: then it is that of all steps so far).
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


class DataSet(list):
    "Records that all show one picture."

    def __init__(self, pictures, classes, folder):
        from retinanet_nb.pictures import write_image
        from retinanet_nb.records import Record

        rng, share = np.random.default_rng(0), shares(classes)
        path = write_image(Path(folder) / "grey.png", np.full((SIDE, SIDE, 3), 127, np.uint8))
        self.class_names = tuple(f"class {k}" for k in range(classes))
        for n in rng.poisson(OBJECTS, pictures):
            labels = rng.choice(classes, n, p=share)
            self.append(Record(path, SIDE, SIDE, boxes_of(rng, n), labels, difficult=rng.random(n) < 0.05))


class Detector:
    "Answers by the seed: boxes near the objects and anywhere, most of them unsure, as a network's are."

    def __init__(self, dataset, detections):
        from types import SimpleNamespace

        self.class_names, self.detections = dataset.class_names, detections
        self.hyperparameters = SimpleNamespace(image_size=(SIDE, SIDE))
        self.records, self.rng = iter(dataset), np.random.default_rng(1)
        self.share = shares(len(self.class_names))

    def predict_on_batch(self, images):
        "Boxes (B, D, 4), scores (B, D), labels (B, D)."
        answers = [self.answer(next(self.records, None)) for _ in images]
        return tuple(np.stack(column) for column in zip(*answers))

    def answer(self, record):
        "The detections of one picture, by falling score."
        rng, n = self.rng, self.detections
        boxes, labels = boxes_of(rng, n), rng.choice(len(self.share), n, p=self.share)
        if record is not None and len(record.labels):
            near = rng.integers(0, len(record.labels), n // 3)
            boxes[: n // 3] = record.boxes[near] + rng.normal(0, 4, (n // 3, 4))
            labels[: n // 3] = record.labels[near]
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
        dataset = DataSet(pictures, classes, folder)
        done("records")
        report = evaluate(Detector(dataset, detections), dataset, batch_size=16, progress=False)
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


def coco_file(dataset, folder):
    "A COCO file over the records of `dataset`, and a name of its own for the picture of each."
    images, annotations = [], []
    for i, record in enumerate(dataset, 1):
        os.link(record.image, folder / f"{i:06}.png")
        images.append({"id": i, "file_name": f"{i:06}.png", "width": SIDE, "height": SIDE})
        for (x1, y1, x2, y2), label in zip(record.boxes.tolist(), record.labels.tolist()):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            rest = {
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
                "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
            }
            annotations.append(
                {"id": len(annotations), "image_id": i, "category_id": label, "bbox": bbox, **rest}
            )
    categories = [{"id": k, "name": name} for k, name in enumerate(dataset.class_names)]
    path = folder / "made_up.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def command(pictures, detections, classes, folder):
    "`retinanet_evaluate` as a terminal would call it, but for what the detector answers."
    import retinanet_nb
    from retinanet_nb import cli, demo, evaluation, retinanet_box

    steps = Steps()
    for module, name in (
        (cli, "open_dataset"),
        (evaluation, "stack_detections"),
        (evaluation, "_curves"),
        (evaluation, "coco_metrics"),
        (demo, "curves_figure"),
        (demo, "write_gallery"),
        (cli, "_write_evaluation"),
        (cli, "_told_evaluation"),
    ):
        steps.follow(module, name)
    load = retinanet_box.load_detector

    def made_up(path):
        real = load(path)
        real.predict_on_batch(np.zeros((8, *real.hyperparameters.image_size, 3), np.uint8))
        steps.done("detector")
        return Detector(DataSet(pictures, classes, folder), detections)

    retinanet_box.load_detector = made_up
    model = Path(retinanet_nb.__file__).parent / "assets" / "shapes.keras"
    data = folder / "pictures" / "made_up.json"
    with contextlib.redirect_stdout(sys.stderr):
        cli.retinanet_evaluate(str(model), str(data), out=str(folder / "out"))
    steps.done("end")


def measured(pictures, detections, classes, as_command=False):
    "Run `evaluation` or `command` in a new process; its steps as (name, seconds, megabytes)."
    with tempfile.TemporaryDirectory() as folder:
        if as_command:  # here, so that making the file up does not count
            within = Path(folder) / "pictures"
            within.mkdir()
            coco_file(DataSet(pictures, classes, within), within)
        run = subprocess.run(
            [
                sys.executable,
                __file__,
                "--here",
                folder if as_command else "",
                *map(str, (pictures, detections, classes)),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "KERAS_BACKEND": "tensorflow",
                "CUDA_VISIBLE_DEVICES": "-1",
                "MPLBACKEND": "Agg",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


def main():
    given = sys.argv[1:]
    if given[:1] == ["--here"]:
        folder, *sizes = given[1:]
        sizes = map(int, sizes)
        command(*sizes, Path(folder)) if folder else evaluation(*sizes)
        return
    as_command = "--command" in given
    given = [int(a) for a in given if a != "--command"]
    sizes = given + [40_000, 300, 80][len(given) :]
    what = "retinanet_evaluate" if as_command else "without an engine"
    print("{} pictures, {} detections each, {} classes, {}".format(*sizes, what))
    steps = measured(*sizes, as_command)
    for name, seconds, megabytes in steps:
        print(f"{name:26}{seconds:8.1f} s{megabytes:8} MB")
    print(f"{'at most':26}{sum(s for _, s, _ in steps):8.1f} s{max(m for _, _, m in steps):8} MB")


if __name__ == "__main__":
    main()
