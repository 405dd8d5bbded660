"""Parts of one's own in `train`: each does its work, a run remembers them, and a resumed run is the same to the last bit."""

import json
import signal

import keras
import numpy as np
import pytest
from retinanet_nb.anchors import AnchorGenerator
from retinanet_nb.boxes import CornerCoder
from retinanet_nb.filtering import DetectionFilter
from retinanet_nb.parts import OwnParts, check_parts, own_measure
from retinanet_nb.progress import _averaged
from retinanet_nb.retinanet import read_model
from retinanet_nb.retinanet_box import load_detector
from retinanet_nb.shapes import make_shapes
from retinanet_nb.targets import Matcher
from retinanet_nb.training import RetinaNetTrainer, build_trainer, make_optimizer, train
from retinanet_nb.voc import VOCDataset

from helpers import short_backbone, small

FAST = small(
    backbone=short_backbone(),
    image_size=(64, 64),
    feature_size=16,
    batch_norm_momentum=0.9,
    batch_size=2,
    epochs=2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = make_shapes(tmp_path_factory.mktemp("data") / "s", train=12, val=2, test=1, size=(64, 64), seed=3)
    return VOCDataset(root, "train"), VOCDataset(root, "val")


def noisy(image, boxes, labels, rng):
    return image ^ rng.integers(0, 16, image.shape, np.uint8), boxes, labels


class Doubled(RetinaNetTrainer):
    "Its box loss counts twice, and a weight of its own has a say in it."

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.balance = self.add_weight(shape=(), initializer="zeros", name="balance")

    def losses_of(self, images, truth, outputs):
        classification, box = super().losses_of(images, truth, outputs)
        return classification, 2 * box * keras.ops.exp(-self.balance) + self.balance


def fewest(detector, validation):
    "The fewer detections above 0.3, the better; a metric for a test."
    seen.append((type(detector).__name__, len(validation)))
    return 1.0 / len(seen)


seen = []


def parts():
    "As a program would make them, afresh for each run."
    return {
        "transform": noisy,
        "optimizer": keras.optimizers.Lion(
            1e-2, gradient_accumulation_steps=3, use_ema=True, ema_momentum=0.5
        ),
        "trainer": Doubled,
        "metric": fewest,
        "anchors": AnchorGenerator(FAST.anchors),
        "coder": CornerCoder((0.2, 0.2, 0.2, 0.2)),
        "matcher": Matcher.of(FAST.replace(positive_overlap=0.45)),
        "weights": [1.5, 0.5] * 6,
        "filter": DetectionFilter(score_threshold=0.001, max_detections=7),
    }


class Cut(keras.callbacks.Callback):
    "Ctrl-C after one step of six, with one batch's gradients gathered and an epoch to come after this one."

    steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == 1:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A run with all of them."
    return train(
        data[0], FAST, data[1], run=tmp_path_factory.mktemp("runs") / "whole", progress=False, **parts()
    )


def test_all_of_them_in_a_run_cut_and_resumed(data, whole, tmp_path):
    training, validation = data
    begun = train(
        training, FAST, validation, run=tmp_path / "cut", progress=False, callbacks=[Cut()], **parts()
    )
    assert (begun.interrupted, begun.step) == (True, 1)
    resumed = train(training, FAST, validation, run=tmp_path / "cut", progress=False, resume=True, **parts())
    for a, b in zip(whole.history, resumed.history):
        assert a["loss"] == b["loss"] and "val_own_fewest" in a
    models = [read_model(run.folder / "last.keras") for run in (whole, resumed)]
    for a, b in zip(*(model.get_weights() for model in models)):
        np.testing.assert_array_equal(a, b)
    # the metric fell with each call, so the first epoch is the best
    assert {kind for kind, _ in seen} == {"Detector"} and {n for _, n in seen} == {2}
    config = json.loads((whole.folder / "config.json").read_text())
    assert config["parts"].keys() == parts().keys() and config["parts"]["trainer"] == "Doubled"
    assert config["parts"]["optimizer"].startswith("Lion(") and config["parts"]["transform"] == "noisy"
    assert config["hyperparameters"]["best_metric"] == "own:fewest"
    detector = load_detector(whole.detector)
    assert detector.predict_on_batch(np.zeros((1, 64, 64, 3), np.uint8))[0].shape == (1, 7, 4)


def test_a_run_is_not_resumed_with_others(data, whole):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in whole.folder.iterdir() if p.is_file())
    for changes, why in (
        ({"transform": None}, r"begun with transform noisy \(now built in\)"),
        ({"transform": lambda i, b, l, rng: (i, b, l)}, "noisy .now .*lambda"),
        ({"weights": [0.5, 1.5] * 6}, "weights "),
        ({"optimizer": keras.optimizers.Lion(1e-3)}, r"optimizer Lion\("),
        ({"matcher": Matcher.of(FAST), "trainer": None}, "matcher Matcher.*trainer Doubled .now built in"),
    ):
        with pytest.raises(ValueError, match=why):
            train(
                data[0],
                FAST,
                data[1],
                run=whole.folder,
                resume=True,
                progress=False,
                **{**parts(), **changes},
            )
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in whole.folder.iterdir() if p.is_file())


def test_a_trainers_own_weights_are_averaged_for_the_examination_only():
    h = FAST.replace(ema_momentum=0.9)
    trainer = build_trainer(["a", "b"], h, make_optimizer(h, 10), parts=OwnParts(trainer=Doubled))
    assert any(w is trainer.balance for w in trainer.trainable_weights)
    learned = [np.array(w) + 3 for w in trainer.get_weights()]
    trainer.set_weights(learned)  # and the averages are as they were
    with _averaged(trainer) as model:
        assert float(trainer.balance) == 0
        assert any(np.array(w).min() != a.min() for w, a in zip(model.weights, learned))
    for w, a in zip(trainer.weights, learned, strict=True):
        np.testing.assert_array_equal(np.array(w), a, err_msg=w.path)


def used():
    optimizer = keras.optimizers.SGD()
    optimizer.build([keras.Variable([0.0])])
    return optimizer


class Lambda:
    "Something that Keras cannot write."

    def __call__(self, *rest):
        return rest


@pytest.mark.parametrize(
    "given, kind, why",
    [
        ({"transform": "flip"}, TypeError, "transform must be something to call"),
        ({"optimizer": "lion"}, TypeError, "chosen by the hyperparameter optimizer"),
        ({"optimizer": used()}, ValueError, "trained another network"),
        ({"optimizer": lambda steps: None}, TypeError, "must give a Keras optimizer"),
        ({"trainer": keras.Model}, TypeError, "derived from RetinaNetTrainer"),
        ({"metric": fewest}, ValueError, "fewest needs pictures for validation"),
        ({"coder": 3}, TypeError, "encode and decode"),
        ({"matcher": 0.5}, TypeError, "matcher must be something to call"),
        ({"filter": Lambda()}, ValueError, "can't be written into a detector's file"),
    ],
)
def test_what_cannot_work_is_refused(data, tmp_path, given, kind, why):
    with pytest.raises(kind, match=why):
        train(data[0], FAST, run=tmp_path / "never", progress=False, **given)
    if "lambda" not in repr(given):
        assert not (tmp_path / "never").exists()


def test_a_metric_without_its_function():
    h = FAST.replace(best_metric="own:mine")
    with pytest.raises(ValueError, match="hand the function in as metric"):
        check_parts(OwnParts(), h, [], RetinaNetTrainer)
    assert type(h).from_json(h.to_json()) == h
    for wrong in ("own:", "mine"):
        with pytest.raises(ValueError, match="best_metric must be one of"):
            FAST.replace(best_metric=wrong)


def test_what_a_metric_gives():
    for value in (0.5, np.float32(0.5), np.array(0.5)):
        assert own_measure(lambda d, v, value=value: value, None, None) == 0.5
    assert np.isnan(own_measure(lambda d, v: float("nan"), None, None))
    for value in ("0.5", None, [0.5, 1.0], float("inf")):
        with pytest.raises(ValueError, match="must give a finite number"):
            own_measure(lambda d, v, value=value: value, None, None)
