"""The detector: the network's outputs through the oracles give its detections; it saves, loads and serves pictures of any kind."""

import json
from dataclasses import dataclass

import keras
import numpy as np
import pytest

import oracles
from helpers import archive_text, excite, head_weights, noise, numpy, python, same_detections, small
from retinanet_nb.anchors import AnchorGenerator, Part
from retinanet_nb.boxes import CornerCoder
from retinanet_nb.filtering import DetectionFilter, filter_detections
from retinanet_nb.hyperparameters import AnchorParameters
from retinanet_nb.retinanet import retinanet_model
from retinanet_nb.retinanet_box import detect, load_detector, retinanet_box, snapshot

NAMES = ("ball", "brick", "leaf")


@pytest.fixture(scope="module")
def model():
    return excite(retinanet_model(3, small(), class_names=NAMES), 3)


@pytest.fixture(scope="module")
def box(model):
    return retinanet_box(model, max_detections=50)


def outputs(detector, pictures):
    return [numpy(x) for x in detector(pictures)]


def well_formed(found, batch, d, threshold):
    boxes, scores, labels = found
    assert boxes.shape == (batch, d, 4) and scores.shape == (batch, d) and labels.shape == (batch, d)
    assert boxes.dtype == np.float32 and scores.dtype == np.float32 and labels.dtype == np.int32
    for b, s, k in zip(*found):
        n = (k >= 0).sum()
        assert (b[n:] == -1).all() and (s[n:] == -1).all() and (k[n:] == -1).all()
        assert (np.diff(s[:n]) <= 0).all() and (s[:n] > threshold).all()


def clear_case(model, shape, **options):
    """Pictures, and what the oracles detect in them: pictures in which no IoU lies so near the threshold that rounding decides."""
    for seed in range(10):
        pictures = noise(2, shape, seed)
        out = {name: numpy(value) for name, value in model(pictures, training=False).items()}
        threshold = options.get("nms_threshold", 0.5)
        results = [
            oracles.detect(
                out["classification"],
                out["regression"],
                *shape,
                **{**options, "nms_threshold": threshold + d},
            )
            for d in (0, -2e-5, 2e-5)
        ]
        if all(np.array_equal(a, b) for other in results[1:] for a, b in zip(results[0], other)):
            return pictures, results[0]
    raise AssertionError("ten times a case for rounding: something else is wrong")


@pytest.mark.parametrize(
    "shape, options",
    [
        ((128, 128), {}),
        ((100, 130), dict(class_specific_filter=False)),
        ((96, 160), dict(nms=False, max_detections=20)),
        ((75, 50), dict(score_threshold=0.5, nms_threshold=0.2, max_detections=400)),
    ],
)
def test_the_whole_way_from_outputs_to_detections(model, shape, options):
    same = {"nms_on" if k == "nms" else k: v for k, v in options.items()}
    pictures, wanted = clear_case(model, shape, **same)
    found = outputs(retinanet_box(model, **options), pictures)
    d = options.get("max_detections", 300)
    well_formed(found, 2, d, options.get("score_threshold", 0.05))
    assert (found[2] >= 0).sum() > 10
    same_detections(found, wanted, pixels=2e-3, score=1e-5)
    boxes = found[0][found[2] >= 0]
    assert boxes.min() >= 0 and boxes[:, [0, 2]].max() <= shape[1] and boxes[:, [1, 3]].max() <= shape[0]


def test_box_std_and_anchors_are_those_of_the_model():
    from retinanet_nb.hyperparameters import AnchorParameters

    hp = small(
        box_std=(0.2, 0.3, 0.4, 0.1),
        anchors=AnchorParameters(sizes=(16, 32, 64, 128, 256), ratios=(1, 0.4), scales=(1, 1.3)),
        score_threshold=0.25,
    )
    model = excite(retinanet_model(2, hp), 2, num_anchors=4)
    pictures, wanted = clear_case(
        model,
        (90, 70),
        std=hp.box_std,
        score_threshold=0.25,
        anchor_options=dict(sizes=(16, 32, 64, 128, 256), ratios=(1, 0.4), scales=(1, 1.3)),
    )
    same_detections(outputs(retinanet_box(model), pictures), wanted, pixels=2e-3, score=1e-5)


def test_predict_on_batch_predict_and_calling_agree(box):
    pictures = noise(3, (128, 128), seed=5)
    called = outputs(box, pictures)
    boxes, scores, labels = box.predict_on_batch(pictures)
    same_detections((np.asarray(boxes), np.asarray(scores), np.asarray(labels)), called)
    same_detections([np.asarray(x) for x in box.predict(pictures, verbose=0)], called)
    same_detections([np.asarray(x) for x in box.predict(pictures, batch_size=1, verbose=0)], called)
    well_formed([np.asarray(boxes), np.asarray(scores), np.asarray(labels)], 3, 50, 0.05)


@pytest.mark.parametrize("shape", [(100, 130), (333, 500), (32, 32), (40, 300), (1, 1)])
def test_any_size(box, shape):
    pictures = noise(1, shape, seed=7)
    found = outputs(box, pictures)
    well_formed(found, 1, 50, 0.05)
    same_detections([np.asarray(x) for x in box.predict_on_batch(pictures)], found)


def test_float_and_uint8_pictures(box):
    pictures = noise(2, (100, 130), seed=8)
    wanted = outputs(box, pictures)
    for kind in ("float32", "int32"):
        same_detections(outputs(box, pictures.astype(kind)), wanted)
    same_detections([np.asarray(x) for x in box.predict_on_batch(pictures.astype("float32"))], wanted)


def test_the_order_of_pictures(box):
    pictures = noise(3, (128, 128), seed=9)
    found, turned = outputs(box, pictures), outputs(box, pictures[::-1].copy())
    same_detections([x[::-1] for x in turned], found)


def test_an_untrained_network_detects_nothing():
    found = outputs(retinanet_box(retinanet_model(2, small(pre_nms_top_k=50))), noise(2, (128, 128)))
    assert all((x == -1).all() for x in found)


def test_the_weights_are_the_models_own():
    model = excite(retinanet_model(3, small(pre_nms_top_k=50)), 3)
    box = retinanet_box(model)
    pictures = noise(1, (96, 96))
    assert (outputs(box, pictures)[2] >= 0).any()
    _, bias, _, _ = head_weights(model, 3)
    bias.assign(np.full(bias.shape, -20, "float32"))
    assert (outputs(box, pictures)[2] == -1).all()


def test_class_names(model, box):
    assert tuple(box.class_names) == NAMES
    assert tuple(retinanet_box(model, class_names=("a", "b", "c")).class_names) == ("a", "b", "c")
    with pytest.raises(ValueError, match="2.*3|3.*2"):
        retinanet_box(model, class_names=("a", "b"))
    unnamed = retinanet_box(retinanet_model(2, small()))
    assert unnamed.class_names is None or len(unnamed.class_names) == 2


def test_bfloat16_training_gives_a_float32_detector():
    previous = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        half = retinanet_model(3, small(pre_nms_top_k=200), class_names=NAMES)
        keras.config.set_dtype_policy("float32")
        full = excite(retinanet_model(3, small(pre_nms_top_k=200), class_names=NAMES), 3, seed=4)
        for a, b in zip(half.weights, full.weights, strict=True):
            assert a.shape == b.shape
        half.set_weights(full.get_weights())
        pictures = noise(2, (100, 130), seed=11)
        rough = numpy(half(pictures, training=False)["classification"])
        assert (
            np.abs(rough - numpy(full(pictures, training=False)["classification"])).max() > 1e-4
        )  # it did compute in bfloat16
        keras.config.set_dtype_policy("mixed_bfloat16")  # as it is while a run is going on
        box = retinanet_box(half)
        found = outputs(box, pictures)
        keras.config.set_dtype_policy("float32")
        wanted = outputs(retinanet_box(full), pictures)
    finally:
        keras.config.set_dtype_policy(previous)
    well_formed(found, 2, 300, 0.05)
    assert (found[2] >= 0).any()
    same_detections(found, wanted)


LOAD = """
import json, sys
import numpy as np
import retinanet_nb.retinanet_box as rb
import keras
folder = sys.argv[1]
pictures = np.load(folder + "/pictures.npy")
out = {}
box = keras.models.load_model(folder + "/box.keras")
again = rb.load_detector(folder + "/box.keras")
model = keras.models.load_model(folder + "/model.keras")
bfloat = rb.load_detector(folder + "/half.keras")
for name, detector in (("box", box), ("again", again), ("half", bfloat)):
    for part, value in zip(("boxes", "scores", "labels"), detector.predict_on_batch(pictures)):
        out[name + "_" + part] = np.asarray(value)
for name, value in model.predict_on_batch(pictures).items():
    out["model_" + name] = np.asarray(value)
for part, value in zip(("boxes", "scores", "labels"), rb.retinanet_box(model).predict_on_batch(pictures)):
    out["wrapped_" + part] = np.asarray(value)
np.savez(folder + "/there.npz", **out)
print(json.dumps({"box": list(box.class_names), "again": list(again.class_names), "wrapped": list(rb.retinanet_box(model).class_names)}))
"""


def test_saved_and_loaded_in_a_new_process(model, tmp_path):
    pictures = noise(2, (100, 130), seed=12)
    options = dict(
        class_names=("un", "deux", "trois"),
        score_threshold=0.3,
        nms_threshold=0.35,
        max_detections=23,
        class_specific_filter=False,
    )
    box = retinanet_box(model, **options)
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half_model = excite(retinanet_model(3, small()), 3)
        half = retinanet_box(half_model)
    finally:
        keras.config.set_dtype_policy(previous)
    model.save(tmp_path / "model.keras")
    box.save(tmp_path / "box.keras")
    half.save(tmp_path / "half.keras")
    np.save(tmp_path / "pictures.npy", pictures)
    here = {}
    for name, detector in (("box", box), ("half", half), ("wrapped", retinanet_box(model))):
        for part, value in zip(("boxes", "scores", "labels"), detector.predict_on_batch(pictures)):
            here[f"{name}_{part}"] = np.asarray(value)
    for part in ("boxes", "scores", "labels"):
        here[f"again_{part}"] = here[f"box_{part}"]
    for name, value in model.predict_on_batch(pictures).items():
        here[f"model_{name}"] = np.asarray(value)
    told = json.loads(python(LOAD, tmp_path).strip().splitlines()[-1])
    assert told == {"box": ["un", "deux", "trois"], "again": ["un", "deux", "trois"], "wrapped": list(NAMES)}
    assert here["box_boxes"].shape == (2, 23, 4) and (here["box_labels"] >= 0).any()
    with np.load(tmp_path / "there.npz") as there:
        assert set(there) == set(here)
        for name, value in here.items():
            assert value.dtype == there[name].dtype
            np.testing.assert_array_equal(value, there[name], err_msg=name)


def test_the_file_is_plain(box, tmp_path):
    box.save(tmp_path / "box.keras")
    names, config = archive_text(tmp_path / "box.keras")
    assert not [n for n in names if n.endswith((".pkl", ".pickle", ".py"))]
    assert "__lambda__" not in config and '"Lambda"' not in config
    assert "version" in config and "brick" in config


def test_load_detector_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.keras"):
        load_detector(tmp_path / "nowhere.keras")
    (tmp_path / "text.keras").write_text("this is no model")
    with pytest.raises(ValueError, match="text.keras"):
        load_detector(tmp_path / "text.keras")
    (tmp_path / "empty.keras").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.keras"):
        load_detector(tmp_path / "empty.keras")
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.save(tmp_path / "other.keras")
    with pytest.raises(ValueError, match="other.keras"):
        load_detector(tmp_path / "other.keras")
    with pytest.raises((ValueError, OSError), match=tmp_path.name):
        load_detector(tmp_path)


def check_detections(found, picture, box, threshold=0.5):
    boxes, scores, labels = np.asarray(found.boxes), np.asarray(found.scores), np.asarray(found.labels)
    n = len(scores)
    assert boxes.shape == (n, 4) and scores.shape == (n,) and labels.shape == (n,) and len(found.names) == n
    assert (scores >= threshold).all() and (np.diff(scores) <= 0).all() and (labels >= 0).all()
    assert [str(name) for name in found.names] == [box.class_names[k] for k in labels]
    assert (
        (boxes >= 0).all()
        and (boxes[:, 2] <= picture.shape[1]).all()
        and (boxes[:, 3] <= picture.shape[0]).all()
    )
    return boxes, scores, labels


def test_detect_one_picture(box):
    picture = noise(1, (128, 128), seed=13)[0]
    boxes, scores, labels = check_detections(detect(box, picture, score_threshold=0.3), picture, box, 0.3)
    assert len(scores) > 0
    raw = [x[0] for x in outputs(box, picture[None])]
    keep = raw[1] > 0.3
    same_detections([boxes[None], scores[None], labels[None]], [x[keep][None] for x in raw], pixels=1e-2)
    few = check_detections(detect(box, picture, score_threshold=0.9), picture, box, 0.9)[1]
    assert 0 < len(few) < len(scores) and (few == scores[: len(few)]).all()
    assert len(detect(box, picture)) == (scores >= 0.5).sum()  # the default
    assert len(detect(box, picture, score_threshold=0.9999).scores) == 0


def test_detect_a_list(box):
    pictures = list(noise(3, (128, 128), seed=14))
    together = detect(box, pictures, score_threshold=0.2)
    assert len(together) == 3
    for found, picture in zip(together, pictures):
        alone = check_detections(detect(box, picture, score_threshold=0.2), picture, box, 0.2)
        both = check_detections(found, picture, box, 0.2)
        same_detections([x[None] for x in both], [x[None] for x in alone], pixels=1e-2)
    assert detect(box, []) == []


def test_detect_pictures_of_several_sizes(box):
    pictures = [noise(1, shape, seed=15)[0] for shape in ((128, 128), (90, 200), (240, 100), (128, 128))]
    found = detect(box, pictures, score_threshold=0.1)
    assert len(found) == 4
    results = [check_detections(f, p, box, 0.1) for f, p in zip(found, pictures)]
    assert all(len(r[1]) for r in results)
    same_detections([x[None] for x in results[0]], [x[None] for x in results[3]], pixels=1e-2)


def test_a_detector_of_a_compiled_model_is_read_back(tmp_path):
    # a file that held losses and optimizer of the training model could not be read in safe mode
    from retinanet_nb.losses import focal_loss

    model = excite(retinanet_model(2, small(pre_nms_top_k=50)), 2)
    model.compile(
        "adam",
        loss={"classification": focal_loss(0.25, 2.0), "regression": lambda y, out: keras.ops.sum(out)},
    )
    box = retinanet_box(model)
    box.save(tmp_path / "box.keras")
    assert "__lambda__" not in archive_text(tmp_path / "box.keras")[1]
    pictures = noise(1, (96, 96))
    for read in (load_detector, keras.models.load_model):
        for a, b in zip(
            box.predict_on_batch(pictures), read(tmp_path / "box.keras").predict_on_batch(pictures)
        ):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_detect_takes_pictures_of_any_number_type(box):
    picture = noise(1, (100, 130), seed=16)[0]
    wanted = check_detections(detect(box, picture.astype("float32"), 0.3), picture, box, 0.3)
    for kind in ("int32", "int64", "float16", "float64"):
        found = check_detections(detect(box, picture.astype(kind), 0.3), picture, box, 0.3)
        np.testing.assert_allclose(
            found[1][:5], wanted[1][:5], atol=0.02
        )  # resizing rounds where the type does


# ---- other anchors, another coding, parts of one's own


def test_settings_of_other_networks_reach_every_stage_and_survive_saving(tmp_path):
    theirs = AnchorParameters(offset=0, whole_pixels=True)
    hp = small(
        anchors=theirs, box_coding="corners", box_std=(0.2,) * 4, top_k_per_level=True, pre_nms_top_k=20
    )
    model = excite(retinanet_model(2, hp), 2)
    pictures = noise(2, (96, 128))
    out = {name: numpy(x) for name, x in model(pictures).items()}
    anchors = oracles.torchvision_anchors(96, 128)
    boxes = CornerCoder().decode(anchors[None], out["regression"])
    boxes = np.clip(numpy(boxes), 0, (128, 96, 128, 96))
    sizes = AnchorGenerator(theirs).level_sizes((96, 128))
    wanted = filter_detections(
        boxes, 1 / (1 + np.exp(-out["classification"])), pre_nms_top_k=20, level_sizes=sizes
    )
    detector = retinanet_box(model)
    same_detections(outputs(detector, pictures), [numpy(x) for x in wanted], pixels=2e-3, score=1e-5)

    detector.save(tmp_path / "x.keras")
    again = load_detector(tmp_path / "x.keras")
    for a, b in zip(outputs(detector, pictures), outputs(again, pictures)):
        np.testing.assert_array_equal(a, b)
    assert again.hyperparameters == hp
    changed = load_detector(tmp_path / "x.keras", score_threshold=0.25)
    assert changed.get_layer("filter").levels == AnchorGenerator(theirs)
    assert not load_detector(tmp_path / "x.keras", top_k_per_level=False).hyperparameters.top_k_per_level


@keras.saving.register_keras_serializable("test")
@dataclass(frozen=True)
class OnlyTheBest(Part):
    """A filter that keeps the best n answers as they are."""

    max_detections: int = 3

    def __call__(self, boxes, scores, level_sizes=None):
        assert len(level_sizes) == 5
        return DetectionFilter(nms=False, score_threshold=0.0, max_detections=self.max_detections)(
            boxes, scores
        )


@keras.saving.register_keras_serializable("test")
@dataclass(frozen=True)
class Halves(Part):
    """A coder that puts every box into the left upper quarter of its anchor."""

    def decode(self, anchors, deltas):
        anchors = keras.ops.cast(anchors, "float32") + 0 * deltas
        return keras.ops.concatenate([anchors[..., :2], (anchors[..., :2] + anchors[..., 2:]) / 2], axis=-1)


@keras.saving.register_keras_serializable("test")
@dataclass(frozen=True)
class Moved(Part):
    """The usual anchors, moved to the right."""

    by: float = 8.0

    def level_sizes(self, shape):
        return AnchorGenerator().level_sizes(shape)

    def __call__(self, shape):
        return AnchorGenerator()(shape) + keras.ops.convert_to_tensor([self.by, 0, self.by, 0], "float32")


def test_parts_of_ones_own_are_used_and_saved(model, tmp_path):
    pictures = noise(1, (64, 96), seed=3)
    detector = retinanet_box(model, anchors=Moved(4.0), coder=Halves(), filter=OnlyTheBest(5))
    logits = numpy(model(pictures)["classification"])[0]
    best = np.argsort(-logits.ravel(), kind="stable")[:5]
    anchors = oracles.anchors(64, 96)[best // 3] + (4, 0, 4, 0)
    quarters = np.concatenate([anchors[:, :2], (anchors[:, :2] + anchors[:, 2:]) / 2], 1)
    boxes, scores, labels = outputs(detector, pictures)
    assert boxes.shape == (1, 5, 4)
    np.testing.assert_array_equal(labels[0], best % 3)
    np.testing.assert_allclose(boxes[0], np.clip(quarters, 0, (96, 64, 96, 64)), atol=1e-3)
    detector.save(tmp_path / "x.keras")
    for again in (load_detector(tmp_path / "x.keras"), load_detector(tmp_path / "x.keras", dtype="float32")):
        assert again.get_layer("filter").custom == OnlyTheBest(5)
        assert again.get_layer("anchors").custom == Moved(4.0)
        for a, b in zip(outputs(again, pictures), (boxes, scores, labels)):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="nms_threshold is the filter's"):
        retinanet_box(model, filter=OnlyTheBest(), nms_threshold=0.5)


def test_a_filter_for_a_detector_in_a_file(box, tmp_path):
    box.save(tmp_path / "x.keras")
    again = load_detector(tmp_path / "x.keras", filter=OnlyTheBest(5))
    assert again.get_layer("filter").custom == OnlyTheBest(5)
    assert again.class_names == list(NAMES) and outputs(again, noise(1, (64, 96)))[0].shape == (1, 5, 4)
    with pytest.raises(ValueError, match="score_threshold is the filter's"):
        load_detector(tmp_path / "x.keras", filter=OnlyTheBest(5), score_threshold=0.3)


@pytest.mark.parametrize("backbone", ["tiny", "mobilenetv2"])
def test_a_folded_detector_finds_the_same(backbone, tmp_path):
    model = retinanet_model(3, small(backbone=backbone))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if weight.path.endswith(("moving_mean", "beta")):
            weight.assign(rng.normal(0, 0.1, weight.shape))
        if weight.path.endswith(("moving_variance", "gamma")):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    pictures, detector = noise(2, (100, 130), seed=20), retinanet_box(excite(model, 3))
    expected = [np.asarray(x) for x in detector.predict_on_batch(pictures)]
    assert (expected[2] >= 0).sum() > 100
    detector.save(tmp_path / "whole.keras")
    folded = load_detector(tmp_path / "whole.keras", fold=True)
    norms = [w.path for w in folded.weights if "moving" in w.path]
    assert not norms and len(folded.weights) < len(detector.weights)
    same_detections([np.asarray(x) for x in folded.predict_on_batch(pictures)], expected)
    folded.save(tmp_path / "folded.keras")
    again = load_detector(tmp_path / "folded.keras").predict_on_batch(pictures)
    same_detections([np.asarray(x) for x in again], expected)
    # and it is a copy: what the model learns doesn't reach it
    model.weights[0].assign(0 * np.asarray(model.weights[0]))
    same_detections([np.asarray(x) for x in folded.predict_on_batch(pictures)], expected)
    # half the bytes of every weight
    small_file = retinanet_box(model, dtype="bfloat16", fold=True)
    small_file.save(tmp_path / "small.keras")
    read = load_detector(tmp_path / "small.keras")
    assert {w.dtype for w in read.weights} == {"bfloat16"}
    for a, b in zip(read.predict_on_batch(pictures), small_file.predict_on_batch(pictures)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_a_snapshot_finds_the_same_and_keeps_to_it(dtype):
    model = excite(retinanet_model(3, small(), class_names=NAMES), 3)
    detector = retinanet_box(model, dtype=dtype)
    settled = snapshot(detector)
    assert settled.class_names == list(NAMES) and settled.hyperparameters == detector.hyperparameters
    # batches and pictures of several sizes, of whole numbers and others
    for pictures in (noise(2, (100, 130), seed=20), noise(1, (64, 96)).astype("uint8")):
        expected = [np.asarray(x) for x in detector.predict_on_batch(pictures)]
        found = settled.predict_on_batch(pictures)
        assert [np.asarray(x).dtype for x in found] == [x.dtype for x in expected]
        assert (expected[2] >= 0).sum() > 50
        if dtype == "float32":
            same_detections([np.asarray(x) for x in found], expected)
        else:  # rounded elsewhere
            assert np.abs(np.asarray(found[1]) - expected[1])[:, :50].max() < 0.03
    if keras.backend.backend() != "tensorflow":
        assert settled is detector
        return
    assert snapshot(settled) is settled  # it has no weights that could change
    for weight in model.weights:
        weight.assign(0 * weight)
    for mine, its in zip(settled.predict_on_batch(pictures), found):
        np.testing.assert_array_equal(mine, its)
    assert len(detect(settled, pictures[0].astype("uint8"), 0.05))
