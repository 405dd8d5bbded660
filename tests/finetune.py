"""What a trained detector to start from is worth: the same pictures, network and number of epochs, with and without it.

    RETINANET_DATA=… python tests/finetune.py rare --start some.keras   # 100 pictures of three classes that the start has never seen
    RETINANET_DATA=… python tests/finetune.py cells                     # drawn shapes → blood cells

`some.keras` is what `python tests/photos.py write some.keras --without-held-out` gives. Runs lie in `--folder` (runs/finetune), a run that is there already is not
made again, and `nbs/results/finetune-NAME.json` holds commands and curves.
"""

import argparse
import csv
import json
import os
import resource
import shlex
import subprocess
from pathlib import Path

from retinanet_nb.hyperparameters import VOC_CLASSES
from retinanet_nb.voc import VOCDataset

RARE = ("boat", "cow", "sheep")
TRAINED_ON = 100
RESULTS = Path(__file__).parents[1] / "nbs" / "results"


def rare_tables(data, folder):
    "Two tables of the pictures with RARE in VOC2007's `train`, of these objects alone: 100 to train on, the rest to measure on."
    wanted = {VOC_CLASSES.index(name) for name in RARE}
    found = [r for r in VOCDataset(data / "voc2007", "train", VOC_CLASSES) if wanted & set(r.labels.tolist())]
    found.sort(key=lambda r: r.image.stem[::-1])  # an order that has nothing to do with what they show
    for name, records in (("train", found[:TRAINED_ON]), ("test", found[TRAINED_ON:])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
            for r in records:
                for box, label in zip(r.boxes, r.labels):
                    if label in wanted:
                        rows.writerow([r.image, r.width, r.height, VOC_CLASSES[label], *box.tolist()])
        print(f"{name}: {len(records)} pictures")


def commands(what, data, folder, start, epochs):
    "Name → the command of a run."
    if what == "rare":
        rare_tables(data, folder)
        common = [
            f"{folder}/train.csv",
            "--val_data",
            f"{folder}/test.csv",
            "--image_size",
            "192x192",
            "--anchor_sizes",
            "16,32,64,128,256",
        ]
        network = "feature_size=96,scale_jitter=[0.7,1.4],color_jitter=0.2"
        begins = {
            "nothing": ["--learning_rate", "2e-3"],
            "photographs": ["--learning_rate", "1e-3", "--weights", str(start)],
        }
        common += ["--backbone", "small", "--set", network]
    else:
        common = [str(data / "bccd"), "--split", "trainval", "--val_split", "test", "--image_size", "240x320"]
        begins = {"nothing": [], "shapes": ["--weights", "shapes"]}
    common += ["--preset", "tiny", "--epochs", str(epochs), "--validate_every", "2"]
    return {
        name: ["retinanet_train", *common, *more, "--run", f"{folder}/{what}-{name}"]
        for name, more in begins.items()
    }


def run(command, folder):
    "The history of a run and the minutes of processor time that it took."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = sum(getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime")) / 60
    return json.loads((folder / "history.json").read_text()), round(minutes, 1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rare", "cells"])
    parser.add_argument("--start", type=Path, help="the detector that rare starts from")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--machine", default="two cores", help="what the page says of it")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ["RETINANET_DATA"])
    found = {"machine": a.machine, "runs": {}}
    for name, command in commands(a.what, data, a.folder, a.start, a.epochs).items():
        history, minutes = run(command, a.folder / f"{a.what}-{name}")
        shown = shlex.join(command).replace(f"{data}/", "").replace(f"{a.folder}/", "")
        curve = [
            [e["epoch"], round(e["val_voc07_map"], 4)] for e in history if e.get("val_voc07_map") is not None
        ]
        found["runs"][name] = {"command": shown, "processor_minutes": minutes, "voc07_map": curve}
    path = RESULTS / f"finetune-{a.what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
