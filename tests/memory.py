"""How much memory an evaluation takes: `python tests/memory.py [PICTURES [DETECTIONS [CLASSES]]]`, 40,000 × 300 × 80 when nothing is said (minutes).

What `retinanet_evaluate` does once its detector is loaded, in a process of its own: pictures are read and a detector is asked, whose answers are made up from a seed; then
VOC's and COCO's figures, the report as text, JSON and curves, the mistakes, the worst pictures, and the confusions. Printed is the largest resident size that the process had
(`ru_maxrss`), after each step.
"""

import json
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
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1e6 if sys.platform == "darwin" else 1e3)


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
    "All steps; yields a name, the seconds that it took and the peak after it."
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

    start, names = time.time(), {}

    def done(name):
        nonlocal start
        seconds, start = time.time() - start, time.time()
        names[name] = round(seconds, 1), round(peak())
        print(json.dumps([name, *names[name]]), flush=True)

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


def measured(pictures, detections, classes):
    "Run `evaluation` in a new process; its steps as (name, seconds, megabytes)."
    run = subprocess.run(
        [sys.executable, __file__, "--here", *map(str, (pictures, detections, classes))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


if __name__ == "__main__":
    here = sys.argv[1:2] == ["--here"]
    given = [int(a) for a in sys.argv[2 if here else 1 :]]
    sizes = given + [40_000, 300, 80][len(given) :]
    if here:
        evaluation(*sizes)
    else:
        print("{} pictures, {} detections each, {} classes".format(*sizes))
        for name, seconds, megabytes in measured(*sizes):
            print(f"{name:12}{seconds:8.1f} s{megabytes:8} MB")
