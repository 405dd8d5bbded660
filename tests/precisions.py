"""One detector in float32, half precision and eight bits: `python tests/precisions.py DETECTOR DATA [--split test] [--calibration trainval] [--canvas 256x320] [--json FILE]`. Prints the size of each
exported file, its time a picture (medians; the files take turns) and its average precision on a split; int8 finds its bounds on pictures of another split.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
# file, what it is written in, what the runtime computes in
FILES = (
    ("float32.onnx", "float32", "float32"),
    ("int8.onnx", "int8", "float32"),
    ("float32.xml", "float32", "float32"),
    ("half.xml", "half", "float32"),
    ("float32.xml", "float32", "bfloat16"),
)
RUNTIMES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}
CALIBRATION = 100  # pictures


def canvases(dataset, size, most):
    from retinanet_nb.pictures import fit_to_canvas, read_image

    step = max(1, len(dataset) // most)
    return np.stack(
        [fit_to_canvas(read_image(dataset[k].image), size)[0] for k in range(0, len(dataset), step)][:most]
    )


def written(detector, folder, pictures):
    "Export each file once; its path and size with all that belongs to it."
    from retinanet_nb.export import _files_of, export_detector

    sizes = {}
    for name, precision, _ in FILES:
        path = folder / name
        if name not in sizes:
            export_detector(detector, path, precision=precision, pictures=pictures)
            sizes[name] = sum(p.stat().st_size for p in _files_of(path))
    return sizes


def timed(detectors, pictures, rounds=8, seconds=0.4):
    "Median seconds a picture of each, in turn."
    times = [[] for _ in detectors]
    for detector in detectors:
        detector.predict_on_batch(pictures[:1])
    for _ in range(rounds):
        for mine, detector in zip(times, detectors):
            start = time.perf_counter()
            while time.perf_counter() - start < seconds:
                before = time.perf_counter()
                detector.predict_on_batch(pictures[len(mine) % len(pictures)][None])
                mine.append(time.perf_counter() - before)
    return [statistics.median(mine) for mine in times]


def row(detector, dataset, **about):
    from retinanet_nb.evaluation import evaluate

    report = evaluate(detector, dataset, batch_size=1, progress=False).to_dict()
    return {
        **about,
        "voc07": report["voc07_map"],
        "coco": report["coco"]["AP"],
        "ap50": report["coco"]["AP50"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("detector")
    parser.add_argument("data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--calibration", default="trainval")
    parser.add_argument("--canvas", help="as HEIGHTxWIDTH, in place of the detector's own")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from bench import load, machine, versions
    from retinanet_nb.export import load_exported
    from retinanet_nb.retinanet_box import load_detector
    from retinanet_nb.voc import VOCDataset

    original = load_detector(given.detector)
    if given.canvas:
        card = original.get_layer("detections")
        size = tuple(map(int, given.canvas.split("x")))
        card.hyperparameters = card.hyperparameters.replace(image_size=size)
    size, names = original.hyperparameters.image_size, original.class_names
    test = VOCDataset(given.data, given.split, names)
    pictures = canvases(VOCDataset(given.data, given.calibration, names), size, CALIBRATION)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sizes = written(original, folder, pictures)
        detectors = [original] + [load_exported(folder / name, computed) for name, _, computed in FILES]
        before = load()
        seconds = timed(detectors, pictures[:8])
        size_of = Path(given.detector).stat().st_size
        abouts = [
            {"runtime": "Keras, TensorFlow", "written": "float32", "computed": "float32", "bytes": size_of}
        ]
        for name, precision, computed in FILES:
            runtime = RUNTIMES[Path(name).suffix]
            abouts.append(
                {"runtime": runtime, "written": precision, "computed": computed, "bytes": sizes[name]}
            )
        abouts[2]["computed"] = "int8"
        rows = [row(d, test, **about, seconds=s) for d, about, s in zip(detectors, abouts, seconds)]
    found = {
        "machine": machine(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "load": before,
        "data": f"{Path(given.data).name}, {given.split}",
        "pictures": len(test),
        "rows": rows,
    }
    for r in rows:
        print(
            f"{r['runtime']:18} written {r['written']:8} computed {r['computed']:9} {r['bytes'] / 1e6:6.2f} MB"
            f" {1e3 * r['seconds']:7.1f} ms  VOC07 {r['voc07']:.3f}  COCO AP {r['coco']:.3f}"
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
