"""The training of the carried detector of photographs: its network in PyTorch is the package's, and what it writes is a detector."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

# in a process of its own: the engine is PyTorch
SCRIPT = """
import sys, photos, torch, keras
import numpy as np
from pathlib import Path
from retinanet_nb.retinanet_box import load_detector

folder = Path(sys.argv[1])
model = photos.fresh()
rng = np.random.default_rng(0)
for v in model.weights:  # BatchNorm's too, so that no two layers can be mistaken for each other
    v.assign(np.abs(rng.normal(0.5, 0.1, v.shape)) if "moving_variance" in v.path else v + rng.normal(0, 0.05, v.shape))
net = photos.Twin(model).eval()
for side in ((64, 96), (160, 224)):
    x = rng.integers(0, 256, (2, *side, 3)).astype("float32")
    theirs = model(x, training=False)
    with torch.no_grad():
        for name, mine in zip(("regression", "classification"), net(torch.from_numpy(x))):
            scale = theirs[name].abs().max()
            assert (theirs[name] - mine).abs().max() < 1e-4 * scale, (name, side)

torch.save(photos.Twin(photos.fresh()).state_dict(), folder / "named.pt")
run = photos.Run(folder)
run.batches.set_epoch(0)
before = {k: v.clone() for k, v in run.net.state_dict().items()}
print(run.learn(*run.batches[0], 0.0))
moved = sum(not torch.equal(before[k], v) for k, v in run.net.state_dict().items())
run.save()
again = photos.Run(folder)
assert again.step == 1 and moved > 100
assert all(torch.equal(v, again.net.state_dict()[k]) for k, v in run.net.state_dict().items())
again.next_part()
photos.write(folder, folder / "some.keras", 96, photos.HELD_OUT)
detector = load_detector(folder / "some.keras")
assert len(detector.class_names) == 17 and "cow" not in detector.class_names
"""


def test_the_twin_of_the_network_learns_and_becomes_a_detector(tmp_path):
    import cv2

    rng = np.random.default_rng(0)
    rows = []
    for k, label in enumerate([14] * 15 + [9]):  # persons, and a cow
        path = str(tmp_path / f"{k}.jpg")
        cv2.imwrite(path, rng.integers(0, 256, (60, 80, 3)).astype(np.uint8))
        rows.append(
            {
                "image": path,
                "width": 80,
                "height": 60,
                "boxes": [[10, 10, 60, 50]],
                "labels": [label],
                "difficult": [False],
            }
        )
    (tmp_path / "small.json").write_text(json.dumps(rows))
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "15 pictures" in ran.stdout and "16 pictures" in ran.stdout
