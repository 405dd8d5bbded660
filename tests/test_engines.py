"""One source, three engines: without TensorFlow on the machine a network is built, trained, wrapped, saved, loaded and used, and a
detector's file means the same everywhere."""

import importlib.util

import keras
import numpy as np
import pytest

from helpers import excite, noise, python, same_detections, small
from retinanet_nb.model_files import save_half
from retinanet_nb.retinanet import retinanet_model
from retinanet_nb.retinanet_box import load_detector, retinanet_box

# `None` in sys.modules makes `import tensorflow` fail as if it weren't installed.
WORK = """
import sys
if sys.argv[1] != "tensorflow":
    sys.modules["tensorflow"] = None
import numpy as np
import retinanet_nb.retinanet_box as rb
import keras
from helpers import drawn, excite, short_backbone, small
from retinanet_nb.anchors import anchors_for_shape
from retinanet_nb.losses import focal_loss, smooth_l1_loss
from retinanet_nb.retinanet import retinanet_model
from retinanet_nb.targets import assign_targets
engine, folder = sys.argv[1:]
assert keras.backend.backend() == engine
to_numpy = keras.ops.convert_to_numpy

def detections(detector, pictures):
    return [np.asarray(to_numpy(x)) for x in detector.predict_on_batch(pictures)]

# a detector written by another engine
pictures = np.load(folder + "/pictures.npy")
written = rb.load_detector(folder + "/box.keras")
for part, value in zip(("boxes", "scores", "labels"), detections(written, pictures)):
    np.save(f"{folder}/{engine}_{part}.npy", value)
# and one in half precision
for whole, half in zip(written.weights, rb.load_detector(folder + "/half.keras").weights):
    whole, half = to_numpy(whole), to_numpy(half)
    assert half.dtype == "float32"
    np.testing.assert_array_equal(half, whole.astype("float16") if whole.ndim > 1 else whole)

# training: the targets of a batch as arrays, both losses by their names
keras.utils.set_random_seed(0)
hp = small(backbone=short_backbone(), feature_size=16, image_size=(64, 64))
model = retinanet_model(2, hp, class_names=("red", "blue"))
images, boxes, labels = drawn(8, (64, 64), seed=1)
deltas, classes = assign_targets(anchors_for_shape((64, 64)), boxes, labels, negative_overlap=0.4, positive_overlap=0.5, force_match=True, std=hp.box_std)
deltas, classes = np.asarray(to_numpy(deltas)), np.asarray(to_numpy(classes))
assert (classes >= 0).any()
focal, smooth = focal_loss(0.25, 2.0), smooth_l1_loss(3.0)
split = lambda y: (keras.ops.cast(y[..., 4], "int32"), y[..., :4])
trained = keras.Model(model.input, model.output)  # the same weights; `model` itself stays uncompiled
trained.compile(keras.optimizers.Adam(1e-3), loss={
    "classification": lambda y, out: focal(split(y)[0], out),
    "regression": lambda y, out: smooth(split(y)[0], split(y)[1], out)})
y = np.concatenate([deltas, classes[..., None].astype("float32")], -1)
history = trained.fit(images, {"classification": y, "regression": y}, batch_size=4, epochs=4, shuffle=False, verbose=0).history["loss"]
assert np.isfinite(history).all() and history[-1] < 0.9 * history[0], history

# wrapped, saved, loaded, used; told apart by their scores, for boxes whose scores are all 1 come in any order
excite(model, 2, feature_size=16, pictures=images)
box = rb.retinanet_box(model, max_detections=40)
before = detections(box, images)
assert (before[2] >= 0).any() and before[0].shape == (8, 40, 4) and before[1].max() < 0.9999
box.save(f"{folder}/{engine}.keras")
after = detections(rb.load_detector(f"{folder}/{engine}.keras"), images)
for a, b in zip(before, after):
    np.testing.assert_array_equal(a, b)
found = rb.detect(box, list(images), score_threshold=0.1)
assert len(found) == 8 and {name for f in found for name in f.names} == {"red", "blue"}
np.savez(f"{folder}/{engine}_own.npz", images=images, boxes=before[0], scores=before[1], labels=before[2])
here = [m for m in sys.modules if m.split(".")[0] == "tensorflow" and sys.modules[m] is not None]
assert bool(here) == (engine == "tensorflow")
print("done", history)
"""


@pytest.mark.parametrize("engine", ["tensorflow", "jax", "torch"])
def test_engine(engine, tmp_path):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} isn't installed")
    pictures = noise(2, (100, 130), seed=20)
    box = retinanet_box(
        excite(retinanet_model(3, small(), class_names=("a", "b", "c")), 3, seed=6), max_detections=60
    )
    here = [np.asarray(x) for x in box.predict_on_batch(pictures)]
    assert (here[2] >= 0).sum() > 20
    box.save(tmp_path / "box.keras")
    save_half(box, tmp_path / "half.keras")
    np.save(tmp_path / "pictures.npy", pictures)
    assert "done" in python(WORK, engine, tmp_path, KERAS_BACKEND=engine)
    same_detections(
        [np.load(tmp_path / f"{engine}_{part}.npy") for part in ("boxes", "scores", "labels")], here
    )
    # and the way back: what it trained and wrote is read here
    with np.load(tmp_path / f"{engine}_own.npz") as own:
        found = load_detector(tmp_path / f"{engine}.keras").predict_on_batch(own["images"])
        same_detections([np.asarray(x) for x in found], [own["boxes"], own["scores"], own["labels"]])


# Suppression in blocks, against the sequential algorithm in NumPy.
BLOCKS = """
import keras
from test_filtering import test_blocks_give_what_the_sequential_algorithm_gives as check
for kind in ("random", "chains", "heaps", "uneven"):
    check(kind, 200)
print("done", keras.backend.backend())
"""


@pytest.mark.parametrize("engine", ["jax", "torch"])  # TensorFlow's are in test_filtering
def test_suppression_is_the_sequential_one(engine):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} isn't installed")
    assert f"done {engine}" in python(BLOCKS, KERAS_BACKEND=engine)


# A whole run: moving averages, validation, checkpoints; cut in its second epoch and resumed.
RUN = """
import sys
sys.modules["tensorflow"] = None
import keras
import numpy as np
from helpers import short_backbone
from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.retinanet import read_model
from retinanet_nb.shapes import make_shapes
from retinanet_nb.training import train
from retinanet_nb.voc import VOCDataset
engine, folder = sys.argv[1:]
assert keras.backend.backend() == engine
data = make_shapes(folder + "/shapes", train=12, val=2, test=1, size=(96, 96), seed=3)
h = HyperParameters(backbone=short_backbone(), feature_size=16, subnet_depth=1, image_size=(96, 96), optimizer="adamw", learning_rate=1e-3, schedule="cosine",
                    batch_norm_momentum=0.9, ema_momentum=0.9, epochs=2)
sets = VOCDataset(data, "train"), h, VOCDataset(data, "val")

class Cut(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1: raise KeyboardInterrupt

whole = train(*sets, run=folder + "/whole", progress=False)
assert whole.history[1]["loss"] < whole.history[0]["loss"] and "val_voc07_map" in whole.history[0]
assert train(*sets, run=folder + "/cut", progress=False, callbacks=[Cut()]).interrupted
train(*sets, run=folder + "/cut", progress=False, resume=True)
for a, b in zip(*(read_model(folder + run + "/last.keras").weights for run in ("/whole", "/cut"))):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-6, err_msg=a.path)
print("done")
"""


@pytest.mark.parametrize("engine", ["jax", "torch"])
def test_a_whole_run_on_another_engine(engine, tmp_path):
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} isn't installed")
    assert "done" in python(RUN, engine, tmp_path, KERAS_BACKEND=engine)


def test_importing_hyperparameters_is_quick():
    assert "fine" in python(
        "import sys, retinanet_nb.hyperparameters\n"
        "heavy = {'tensorflow', 'keras', 'jax', 'torch', 'cv2', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint('fine')"
    )


def test_default_engine():
    import os

    if not os.environ.get("KERAS_BACKEND"):
        assert keras.backend.backend() == "tensorflow"
