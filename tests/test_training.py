"""Training: schedules, runs that survive, what is kept and what starts afresh."""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from helpers import ROOT, drawn, python, short_backbone, small

from retinanet_nb.anchors import Part, anchors_for_shape
from retinanet_nb.boxes import CornerCoder, overlaps
from retinanet_nb.hyperparameters import HyperParameters, preset
from retinanet_nb.losses import focal_loss, smooth_l1_loss
from retinanet_nb.retinanet import model_card, read_model, retinanet_model
from retinanet_nb.retinanet_box import load_detector, retinanet_box
from retinanet_nb import checkpoints, progress, runs, training
from retinanet_nb.files import MANIFEST, claim, save_atomically
from retinanet_nb.records import Record
from retinanet_nb.shapes import make_shapes
from retinanet_nb.targets import assign_targets
from retinanet_nb.training import (
    RUN_FILES,
    Checkpoint,
    RetinaNetTrainer,
    Run,
    State,
    Stopped,
    Terminated,
    build_trainer,
    learning_rate_schedule,
    make_optimizer,
    out_of_memory,
    plot_history,
    train,
)
from retinanet_nb.voc import VOCDataset

FAST = small(
    backbone=short_backbone(),
    image_size=(96, 96),
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=1e-4,
    batch_norm_momentum=0.9,
    batch_size=4,
    epochs=2,
    feature_size=16,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=12, val=4, test=4, size=(96, 96), seed=3
    )


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    "One uninterrupted run of two epochs."
    return train(
        VOCDataset(data, "train"),
        FAST,
        VOCDataset(data, "val"),
        run=tmp_path_factory.mktemp("runs") / "whole",
        progress=False,
    )


def rates(h, steps):
    schedule = learning_rate_schedule(h, steps)
    return [float(schedule(i)) if callable(schedule) else schedule for i in range(steps + 1)]


def test_the_documented_rate_is_constant():
    assert rates(HyperParameters(), 10) == [1e-5] * 11


def test_warmup_rises_linearly_and_cosine_falls_to_a_hundredth():
    h = HyperParameters(learning_rate=0.1, warmup_steps=10, schedule="cosine")
    got = rates(h, 110)
    assert np.allclose(np.diff(got[:11]), (0.1 - 0.01) / 10, rtol=1e-4)
    want = [0.1 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * i / 100))) for i in range(101)]
    assert np.allclose(got[10:], want, rtol=1e-4)
    flat = rates(h.replace(schedule="constant"), 50)
    assert np.allclose(flat[10:], 0.1) and np.allclose(np.diff(flat[:11]), 0.009, rtol=1e-4)


@pytest.mark.parametrize(
    "name, kind",
    [("adam", keras.optimizers.Adam), ("adamw", keras.optimizers.AdamW), ("sgd", keras.optimizers.SGD)],
)
def test_the_optimizer_asked_for(name, kind):
    optimizer = make_optimizer(
        HyperParameters(optimizer=name, weight_decay=1e-4, clip_norm=3.0, ema_momentum=0.9), 10
    )
    assert type(optimizer) is kind and optimizer.global_clipnorm == 3.0 and optimizer.use_ema


def test_gradients_of_several_batches_count_as_those_of_one():
    """Decay, clipping, warm-up, cosine and moving average go by moves: n batches with one gradient are one batch."""
    h = HyperParameters(
        optimizer="adamw", learning_rate=0.1, weight_decay=0.1, clip_norm=1.0, ema_momentum=0.9
    )
    slow = h.replace(schedule="cosine", warmup_steps=8)

    def way(h, n, moves=40):
        optimizer = make_optimizer(h.replace(accumulate_steps=n), moves * n)
        assert optimizer.gradient_accumulation_steps == (n if n > 1 else None)
        weight, places, rates = keras.Variable([1.0, 2.0], name="kernel"), [], []
        for k in range(moves):
            gradient = keras.ops.convert_to_tensor([3.0 * math.sin(k), 1.0])
            rates.append(float(optimizer.learning_rate))
            for _ in range(n):
                optimizer.apply([gradient], [weight])
            places.append(np.array(weight))
        optimizer.finalize_variable_values([weight])
        return np.array(places), np.array(weight), np.array(rates)

    (one, average, _), (three, gathered, _) = way(h, 1), way(h, 3)
    assert np.abs(np.diff(one, axis=0)).max() > 0.01
    np.testing.assert_allclose(three, one, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gathered, average, atol=0.1)  # one move behind at most
    np.testing.assert_allclose(way(slow, 3)[2][[8, 20, 39]], way(slow, 1)[2][[8, 20, 39]], rtol=1e-5)
    np.testing.assert_allclose(way(slow, 3)[2][:8], 0.1 / 24 + (0.1 - 0.1 / 24) * np.arange(8) / 8, rtol=1e-5)
    assert preset("paper").batch_size * preset("paper").accumulate_steps == 16


def test_training_learns_two_pictures_and_no_object_is_no_accident():
    keras.utils.set_random_seed(0)
    trainer = RetinaNetTrainer(retinanet_model(2, small(backbone=short_backbone(), batch_norm_momentum=0.9)))
    trainer.compile(optimizer=keras.optimizers.AdamW(2e-3), jit_compile=False)
    images, boxes, labels = drawn(2)
    truth = {"boxes": boxes, "labels": labels}
    losses = [float(trainer.train_on_batch(images, truth, return_dict=True)["loss"]) for _ in range(30)]
    trainer.reset_metrics()
    after = float(trainer.train_on_batch(images, truth, return_dict=True)["loss"])
    assert after < 0.3 * losses[0]
    trainer.reset_metrics()
    none = {"boxes": np.full_like(boxes, -1), "labels": np.full_like(labels, -1)}
    logs = trainer.train_on_batch(images, none, return_dict=True)
    assert math.isfinite(float(logs["loss"])) and float(logs["box"]) == 0


def test_room_for_more_objects_changes_no_loss():
    h = small()
    trainer = build_trainer(["ball", "brick"], h, keras.optimizers.Adam(1e-3))
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    boxes = np.float32([[[5, 5, 40, 40], [20, 8, 60, 30], [-1, -1, -1, -1]], [[-1, -1, -1, -1]] * 3])
    labels = np.int32([[0, 1, -1], [-1, -1, -1]])
    outputs = trainer(images)
    expected = [float(x) for x in trainer.losses_of(images, {"boxes": boxes, "labels": labels}, outputs)]
    assert min(expected) > 0
    for more in (1, 13, 30):
        truth = {
            "boxes": np.pad(boxes, [[0, 0], [0, more], [0, 0]], constant_values=-1),
            "labels": np.pad(labels, [[0, 0], [0, more]], constant_values=-1),
        }
        found = [float(x) for x in trainer.losses_of(images, truth, outputs)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    nothing = {"boxes": boxes[:, :0], "labels": labels[:, :0]}
    assert float(trainer.losses_of(images, nothing, outputs)[1]) == 0


def test_a_run_leaves_everything_in_its_folder(run):
    files = {p.name for p in run.folder.iterdir()}
    assert files == {
        "config.json",
        "history.json",
        "curves.png",
        "best.keras",
        "last.keras",
        "detector.keras",
        "checkpoints",
        ".retinanet_nb.json",
        ".retinanet_nb.lock",
    }
    assert set(run.files) == set(RUN_FILES)
    config = json.loads((run.folder / "config.json").read_text())
    assert HyperParameters.from_json(json.dumps(config["hyperparameters"])) == FAST
    history = json.loads((run.folder / "history.json").read_text())
    assert history == run.history and [e["epoch"] for e in history] == [1, 2]
    assert all(0 <= e["val_voc07_map"] <= 1 and math.isfinite(e["loss"]) for e in history)
    assert abs(history[0]["loss"] - history[0]["classification"] - history[0]["box"]) < 1e-4
    detector = load_detector(run.detector)
    assert detector.class_names == config["class_names"] and detector.hyperparameters == FAST
    assert [p.name for p in Checkpoint(run.folder).states()] == ["epoch-0002", "epoch-0001"]


def test_another_run_in_the_same_folder_is_refused_and_leaves_it_alone(run, data):
    before = (run.folder / "history.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        train(VOCDataset(data, "train"), FAST, run=run.folder)
    with pytest.raises(ValueError, match="learning_rate"):
        train(VOCDataset(data, "train"), FAST.replace(learning_rate=0.5), run=run.folder, resume=True)
    assert (run.folder / "history.json").read_bytes() == before


def test_a_folder_in_which_nothing_was_trained_may_begin_again(data, tmp_path, monkeypatch):
    "But not where there is a state or a result, and not where somebody has edited the configuration."
    sets, folder = VOCDataset(data, "train"), tmp_path / "run"

    def build(*args, **kwargs):
        raise RuntimeError("as far as the network")

    monkeypatch.setattr(training, "build_trainer", build)
    with pytest.raises(ValueError, match="lower image_size or batch_size"):
        train(sets, FAST.replace(batch_size=200_000), run=folder, progress=False)
    config = folder / "config.json"
    for h in (FAST, FAST.replace(seed=3)):
        with pytest.raises(RuntimeError, match="as far as the network"):
            train(sets, h, run=folder, progress=False)
        assert json.loads(config.read_text())["hyperparameters"] == json.loads(h.to_json())
    text = config.read_bytes()
    for name in ("history.json", "last.keras", "checkpoints/epoch-0001-good", "checkpoints/.epoch-0001"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        with pytest.raises(ValueError, match="holds a run already"):
            train(sets, FAST, run=folder, progress=False)
        path.unlink()
        assert config.read_bytes() == text
    config.write_bytes(text + b" ")
    with pytest.raises(ValueError, match="changed it since"):
        train(sets, FAST, run=folder, progress=False)
    assert config.read_bytes() == text + b" "


class Send(keras.callbacks.Callback):
    "A signal to this process after so many steps."

    def __init__(self, number, steps):
        super().__init__()
        self.number, self.left = number, steps

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            signal.raise_signal(self.number)


@pytest.fixture
def listening():
    "Signals are ignored where the tests run in the background."
    before = {n: signal.signal(n, h) for n, h in HANDLERS.items()}
    yield
    for number, handler in HANDLERS.items():
        assert signal.getsignal(number) is handler, "the usual behaviour was not given back"
        signal.signal(number, before[number])


HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def losses(history):
    return [{k: v for k, v in e.items() if k not in ("seconds", "waiting")} for e in history]


def test_stopped_inside_epochs_and_resumed_equals_the_whole_run(run, data, tmp_path, capsys, listening):
    "SIGTERM in the first epoch, Ctrl-C in the second: every step is done once, one seed is one run, to the last bit."
    datasets, folder = (VOCDataset(data, "train"), FAST, VOCDataset(data, "val")), tmp_path / "cut"
    with pytest.raises(Terminated) as ended:
        train(*datasets, run=folder, progress=False, callbacks=[Send(signal.SIGTERM, 2)])
    first = ended.value.run
    assert ended.value.code == 143 and isinstance(ended.value, SystemExit)
    assert first.interrupted and first.step == 2 and first.history == [] and first.detector is None
    assert set(first.files) == {"config.json"}, "an untrained detector was written"
    said = capsys.readouterr().err
    assert "finishing this step" in said and "2 of 3 steps" in said and first.hint in said
    assert Checkpoint(folder).newest().name == "epoch-0000-step-000002"
    (folder / "checkpoints" / ".epoch-0001").mkdir()  # what a kill in the middle of writing would leave

    counting = Send(signal.SIGINT, 3)
    second = train(*datasets, run=folder, progress=False, resume=True, callbacks=[counting], hint=False)
    assert second.interrupted and len(second.history) == 1 and second.step == 2
    assert second.detector.exists() and "resume=True" not in capsys.readouterr().err
    third = train(*datasets, run=folder, progress=False, resume=True)
    assert not third.interrupted and losses(third.history) == losses(run.history)
    assert not list(folder.glob("checkpoints/.*"))
    for name in ("last.keras", "best.keras"):
        for a, b in zip(read_model(run.folder / name).weights, read_model(folder / name).weights):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)


class End(keras.callbacks.Callback):
    "`stop_training` after so many steps, or at the end of an epoch."

    def __init__(self, steps=None):
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):
        if self.left is not None:
            self.left -= 1
            self.model.stop_training = self.left == 0

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training |= self.left is None


def test_a_callback_that_ends_the_run_is_obeyed_and_no_picture_is_lost(run, data, tmp_path, capsys):
    "In mid-epoch, and at the end of the epoch in which it was resumed; then it ends as the whole run did."
    sets, kept = (VOCDataset(data, "train"), FAST, VOCDataset(data, "val")), {"run": tmp_path / "cut"}
    cut = train(*sets, **kept, progress=False, callbacks=End(2))
    assert (cut.history, cut.step, cut.interrupted) == ([], 2, False)
    assert "2 of 3 steps" in capsys.readouterr().err
    assert Checkpoint(cut.folder).newest().name == "epoch-0000-step-000002"
    one = train(*sets, **kept, progress=False, resume=True, callbacks=[End()])
    assert (len(one.history), one.step) == (1, 0) and one.detector.exists()
    assert "stopped" not in capsys.readouterr().err
    all = train(*sets, **kept, progress=False, resume=True, callbacks=None)
    assert losses(all.history) == losses(run.history)


def test_other_pictures_are_another_run(run, data):
    fewer = VOCDataset(data, "train")[:8]
    with pytest.raises(ValueError, match="began with 12 pictures.* now 8"):
        train(fewer, FAST, VOCDataset(data, "val"), run=run.folder, resume=True)
    others = VOCDataset(data, "train+val")[4:]
    with pytest.raises(ValueError, match="of other names"):
        train(others, FAST, VOCDataset(data, "val"), run=run.folder, resume=True)


def test_what_is_said_on_resuming_is_remembered(run, data, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    for path in ("old", "new"):
        about = {"data": {"path": path}}
        sets = VOCDataset(data, "train"), FAST, VOCDataset(data, "val")
        train(*sets, run=tmp_path / "run", progress=False, resume=True, about=about)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["data"] == {"path": path} and config["pictures"] == 12


def test_resuming_nothing_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        train(VOCDataset(data, "train"), FAST, run=tmp_path / "none", resume=True)


def test_a_loss_that_is_not_finite_names_the_pictures(data, tmp_path):
    wild = FAST.replace(optimizer="sgd", learning_rate=1e38, clip_norm=None, weight_decay=0.0)
    with pytest.raises(FloatingPointError, match=r"train_\d+\.jpg"):
        train(VOCDataset(data, "train"), wild, run=tmp_path / "wild", progress=False)


def test_weights_that_are_not_finite_end_the_run_before_they_are_saved(data, tmp_path):
    "A ReLU may turn NaN into 0 and hide ruined kernels from the loss."

    class Ruin(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                self.model.trainable_variables[0].assign(self.model.trainable_variables[0] * float("nan"))

    with pytest.raises(FloatingPointError, match="no longer finite after epoch 1"):
        train(VOCDataset(data, "train"), FAST, run=tmp_path / "ruin", progress=False, callbacks=[Ruin()])
    assert not list((tmp_path / "ruin").glob("*.keras")) and Checkpoint(tmp_path / "ruin").newest() is None


def test_a_picture_that_vanishes_during_the_run_is_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "shapes")
    dataset = VOCDataset(tmp_path / "shapes", "train")
    dataset[5].image.write_bytes(b"no picture any more")
    with pytest.raises(ValueError, match=dataset[5].image.name):
        train(dataset, FAST, run=tmp_path / "run", progress=False)


def test_a_run_cut_in_its_first_epoch_starts_again_from_the_weights_asked_for(run, data, tmp_path, capsys):
    class AtOnce(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    h = FAST.replace(weights=str(run.folder / "last.keras"), epochs=1)
    cut = train(VOCDataset(data, "train"), h, run=tmp_path / "cut", progress=False, callbacks=[AtOnce()])
    assert cut.history == [] and cut.interrupted and Checkpoint(tmp_path / "cut").newest() is None
    resumed = train(VOCDataset(data, "train"), h, run=tmp_path / "cut", progress=False, resume=True)
    assert resumed.history[0]["loss"] < run.history[0]["loss"]


def test_other_classes_keep_the_body_and_make_the_head_afresh(run, capsys):
    before = read_model(run.folder / "last.keras")
    after = retinanet_model(2, FAST, ["cat", "dog"], weights=run.folder / "last.keras")
    assert "starts afresh" in capsys.readouterr().out
    old = {w.path: np.asarray(w) for w in before.weights}
    for w in after.weights:
        if "classification_subnet_output" in w.path:
            assert w.shape[-1] == 18
        else:
            np.testing.assert_array_equal(np.asarray(w), old[w.path])


def test_frozen_stages_and_batch_norm_stay_as_they_are(data, tmp_path):
    keras.utils.set_random_seed(FAST.seed)
    start = {w.path: np.asarray(w) for w in retinanet_model(5, FAST).weights}
    h = FAST.replace(freeze_stages=2, freeze_batch_norm=True, epochs=1)
    run = train(VOCDataset(data, "train"), h, run=tmp_path / "frozen", progress=False)
    moved = {w.path for w in run.model.weights if not np.array_equal(np.asarray(w), start[w.path])}
    assert "c3_conv/kernel" in moved and not any(p.startswith(("c1", "c2")) or "_bn/" in p for p in moved)


@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    "A run of one epoch in bfloat16 and with moving averages, written for TensorBoard where that is installed."
    return train(
        VOCDataset(data, "train"),
        FAST.replace(precision="mixed_bfloat16", epochs=1, ema_momentum=0.9),
        VOCDataset(data, "val"),
        run=tmp_path_factory.mktemp("half") / "run",
        progress=False,
        tensorboard=importlib.util.find_spec("tensorboard") is not None,
        about={"data": {"path": "here"}},
    )


def test_bfloat16_trains_and_its_detector_is_float32(half):
    assert keras.config.dtype_policy().name == "float32"  # the reader's own setting is given back
    assert math.isfinite(half.history[0]["loss"])
    detector, trained = load_detector(half.detector), read_model(half.folder / "best.keras")
    assert {layer.dtype_policy.name for layer in detector._flatten_layers() if layer.weights} == {"float32"}
    for a, b in zip(detector.weights, retinanet_box(trained).weights):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_tensorboard_on_request(run, half):
    pytest.importorskip("tensorboard")
    events = list((half.folder / "tensorboard").rglob("events*"))
    assert events and any(b"voc07_map" in p.read_bytes() for p in events if "validation" in p.parts)
    assert not (run.folder / "tensorboard").exists()


def test_what_is_said_about_a_run_is_in_its_config(half):
    assert json.loads((half.folder / "config.json").read_text())["data"] == {"path": "here"}


def test_a_trainer_is_built_in_its_precision_and_from_its_seed(run):
    h = FAST.replace(precision="mixed_bfloat16", weights=str(run.folder / "last.keras"))
    first, second = (
        build_trainer(["a", "b"], h, make_optimizer(h, 10), load_weights=False) for _ in range(2)
    )
    assert keras.config.dtype_policy().name == "float32"
    assert "mixed_bfloat16" in {
        layer.dtype_policy.name for layer in first.model._flatten_layers() if layer.weights
    }
    for a, b in zip(first.weights, second.weights):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert len(first.optimizer.variables) > len(
        first.trainable_variables
    )  # built: a checkpoint may be loaded


def test_an_empty_data_set_is_refused(tmp_path):
    class Empty(list):
        class_names = ("a",)

    with pytest.raises(ValueError, match="holds no picture"):
        train(Empty(), FAST, run=tmp_path / "x")


def test_atomic_saving_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a.txt"
    save_atomically(target, lambda p: p.write_text("old"))

    def broken(p):
        p.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        save_atomically(target, broken)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


# --- what a run survives -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_run_killed_at_random_moments_ends_as_if_left_alone():
    "`python tests/survival.py 50` does it with fifty."
    pytest.importorskip("h5py")
    done = subprocess.run(
        [sys.executable, "tests/survival.py", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kill ") == 3 and "0 differ" in done.stdout


def test_ctrl_c_while_a_model_is_written_waits_for_its_end(data, tmp_path, listening):
    "A model file that is being written gets a Ctrl-C in the middle; everything about the epoch is there nevertheless."

    class DuringSaving(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            whole = self.model.model.save

            def save(path):
                signal.raise_signal(signal.SIGINT)
                whole(path)

            self.model.model.save = save

    h = FAST.replace(epochs=2)
    cut = train(
        VOCDataset(data, "train"), h, run=tmp_path / "run", progress=False, callbacks=[DuringSaving()]
    )
    assert cut.interrupted and [e["epoch"] for e in cut.history] == [1] and cut.step == 0
    assert Checkpoint(cut.folder).newest().name == "epoch-0001" and read_model(cut.files["last.keras"])


def test_half_files_of_a_killed_process_are_swept_away(run, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / ".12345-678-best.keras").write_bytes(b"half")
    (folder / ".2024-notes").mkdir()  # somebody's own
    (folder / "checkpoints" / "epoch-0001-good").mkdir()
    again = train(
        VOCDataset(data, "train"), FAST, VOCDataset(data, "val"), run=folder, progress=False, resume=True
    )
    left = {p.name for p in folder.glob(".*")}
    assert left == {MANIFEST, ".retinanet_nb.lock", ".2024-notes"} and again.history == run.history
    assert (folder / "checkpoints" / "epoch-0001-good").is_dir()


class Scores:
    "Stands in for `evaluate`: gives the scores it was told, one after another."

    def __init__(self, *scores):
        self.left = list(scores)

    def __call__(self, *args, **kwargs):
        score = self.left.pop(0)
        if isinstance(score, Exception):
            raise score
        return SimpleNamespace(voc07_map=score)


class CutAtEpoch(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise KeyboardInterrupt


def test_patience_stops_a_run_and_counts_on_over_a_resume(data, tmp_path, monkeypatch, capsys):
    h, sets = FAST.replace(epochs=9, patience=2), (VOCDataset(data, "train"), VOCDataset(data, "val"))

    monkeypatch.setattr(progress, "evaluate", Scores(0.3, 0.5))
    train(sets[0], h, sets[1], run=tmp_path / "run", progress=False, callbacks=[CutAtEpoch(2)])
    monkeypatch.setattr(progress, "evaluate", Scores(0.4, 0.5, 0.9))  # 0.5 again is no better: two in vain
    run = train(sets[0], h, sets[1], run=tmp_path / "run", progress=False, resume=True)
    assert [e["val_voc07_map"] for e in run.history] == [0.3, 0.5, 0.4, 0.5]
    best = (run.folder / "best.keras").stat().st_mtime_ns
    again = train(sets[0], h, sets[1], run=tmp_path / "run", progress=False, resume=True)  # it has ended
    assert len(again.history) == 4 and (run.folder / "best.keras").stat().st_mtime_ns == best
    with pytest.raises(ValueError, match="patience"):
        train(sets[0], h, run=tmp_path / "other", progress=False)


def test_time_and_waiting_of_an_interrupted_epoch_add_up(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 104.0)
    books = SimpleNamespace(
        started=100.0, state=State(seconds=12.0, waiting=0.5), generator=SimpleNamespace(waiting=0.1)
    )
    seconds, waiting = progress._spent(books)
    assert seconds == 16 and abs(waiting - (0.5 * 12 + 0.1 * 4) / 16) < 1e-12


def test_a_failed_measurement_costs_nothing_and_a_stale_best_is_not_returned(
    run, data, tmp_path, monkeypatch
):
    h, folder, pictures = FAST.replace(seed=5), tmp_path / "run", VOCDataset(data, "train")
    validation, go_on = VOCDataset(data, "val"), {"run": folder, "progress": False, "resume": True}
    monkeypatch.setattr(progress, "evaluate", Scores(OSError("the disk of the pictures is gone")))
    with pytest.raises(OSError, match="is gone"):
        train(pictures, h, validation, run=folder, progress=False)
    assert Checkpoint(folder).newest().name == "epoch-0001" and (folder / "last.keras").exists()
    (entry,) = json.loads((folder / "history.json").read_text())
    assert entry["loss"] != run.history[0]["loss"], "another seed gave the same run"

    monkeypatch.setattr(progress, "evaluate", Scores(0.5))
    cut = train(pictures, h, validation, callbacks=[CutAtEpoch(1)], **go_on)
    assert cut.interrupted and [e["val_voc07_map"] for e in cut.history] == [0.5]
    best = [np.asarray(w) for w in read_model(folder / "best.keras").weights]

    monkeypatch.setattr(progress, "evaluate", Scores())
    blind = train(pictures, h, **go_on)
    assert len(blind.history) == 2 and "val_voc07_map" not in blind.history[1]
    last = read_model(folder / "last.keras").weights
    assert any(not np.array_equal(a, np.asarray(b)) for a, b in zip(best, last))
    for a, b in zip(blind.model.weights, last):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg="a stale best.keras was returned")

    monkeypatch.setattr(progress, "evaluate", Scores(0.4))  # the last one, worse than the first
    seen = train(pictures, h, validation, **go_on)
    assert [e["val_voc07_map"] for e in seen.history] == [0.5, 0.4]
    for a, b in zip(best, seen.model.weights):
        np.testing.assert_array_equal(a, np.asarray(b))


def test_a_run_of_an_earlier_version_is_resumed(run, data, tmp_path):
    "It kept no manifest, and of its state only weights and history."
    folder = tmp_path / "old"
    shutil.copytree(run.folder, folder)
    (folder / MANIFEST).unlink()
    state = folder / "checkpoints" / "epoch-0002"
    unmeasured = [run.history[0], {k: v for k, v in run.history[1].items() if k != "val_voc07_map"}]
    (state / "history.json").write_text(json.dumps(unmeasured))
    (state / "state.json").unlink(), (state / "state.npz").unlink()
    shutil.rmtree(folder / "checkpoints" / "epoch-0001")
    sets = VOCDataset(data, "train"), FAST, VOCDataset(data, "val")
    for wrong in (
        ["epoch", "loss"],
        [{}, {}],
        unmeasured[::-1],
        [unmeasured[0], {"epoch": 2, "loss": "low"}],
    ):
        (state / "history.json").write_text(json.dumps(wrong))
        with pytest.raises(
            ValueError, match=r"epoch-0002 cannot be read \(its history.json is no list of epochs"
        ):
            train(*sets, run=folder, progress=False, resume=True)
    (state / "history.json").write_text(json.dumps(unmeasured))
    again = train(*sets, run=folder, progress=False, resume=True)
    assert again.history == run.history and not again.interrupted
    assert json.loads((folder / MANIFEST).read_text())["files"]["detector.keras"]


# --- states on disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def toy():
    "A model with an optimizer, a metric and dropout, which a `Checkpoint` can keep in a moment."
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dropout(0.5)])
    model.compile("adam", "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


X, Y = np.ones((8, 4), "float32"), np.zeros((8, 8), "float32")


def test_a_state_holds_the_random_state_and_the_means(toy, tmp_path):
    toy.train_on_batch(X, Y)
    Checkpoint(tmp_path).save(toy, State(0, 1, seconds=3.5, waiting=0.25))
    means = [np.asarray(v) for v in toy.metrics_variables]
    then = [toy.train_on_batch(X, Y) for _ in range(2)]
    state = Checkpoint(tmp_path).load(toy)
    assert (state.epoch, state.step, state.seconds, state.waiting) == (0, 1, 3.5, 0.25)
    for a, b in zip(means, state.means, strict=True):
        np.testing.assert_array_equal(a, b)
    for variable, value in zip(toy.metrics_variables, state.means):
        variable.assign(value)
    assert [toy.train_on_batch(X, Y) for _ in range(2)] == then  # dropout drops the same again


def test_two_states_are_kept_and_other_names_left_alone(toy, tmp_path):
    checkpoint, folder = Checkpoint(tmp_path), tmp_path / "checkpoints"
    assert checkpoint.newest() is None and checkpoint.load(toy) is None
    foreign = [
        "epoch-0001-good",
        "epoch-1",
        "epoch-00001",
        "epoch-0001-step-12",
        "epoch-٠٠٠١",
        "my-epoch-0001",
    ]
    for name in foreign:
        (folder / name).mkdir(parents=True)
    (folder / ".epoch-0009").mkdir()  # half written by a killed process
    (folder / ".epoch-0001-good").mkdir()
    for epoch, step in ((1, 0), (1, 7), (1, 20), (2, 0)):
        saved = checkpoint.save(toy, State(epoch, step, [{}] * epoch))
        assert checkpoint.newest() == saved
    left = {p.name for p in folder.iterdir()} - set(foreign)
    assert left == {"epoch-0002", "epoch-0001-step-000020", ".epoch-0001-good"}
    assert all((folder / name).is_dir() for name in foreign)


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("state.weights.h5", _truncated),
        ("state.weights.h5", _flipped),
        ("state.weights.h5", lambda p: p.unlink()),
        ("state.npz", _truncated),
        ("state.npz", lambda p: p.write_bytes(b"")),
        ("state.json", lambda p: p.write_bytes(b"")),
        ("state.json", lambda p: p.write_text("[" * 100_000)),
        ("state.json", lambda p: p.write_text('{"epoch": "three"}')),
        ("state.json", lambda p: p.write_text('{"epochs": 3}')),
        ("state.json", lambda p: p.unlink()),
    ],
)
def test_a_damaged_state_is_told_and_the_older_one_taken(toy, tmp_path, capsys, name, damage):
    checkpoint = Checkpoint(tmp_path)
    for epoch in (1, 2):
        toy.train_on_batch(X, Y)
        checkpoint.save(toy, State(epoch, history=[{"epoch": e + 1} for e in range(epoch)]))
        if epoch == 1:
            old = [np.asarray(w) for w in toy.weights]
    damage(checkpoint.newest() / name)
    assert checkpoint.load(toy).epoch == 1
    said = capsys.readouterr().err
    assert "epoch-0002 cannot be read" in said and "going on from epoch-0001" in said and len(said) < 600
    for a, b in zip(old, toy.weights):
        np.testing.assert_array_equal(a, np.asarray(b))
    checkpoint.save(toy, State(1, 5, [{}]))  # the unreadable one does not push out the good one
    assert [p.name for p in checkpoint.states()] == ["epoch-0001-step-000005", "epoch-0001"]
    for folder in checkpoint.states():
        damage(folder / name)
    with pytest.raises(ValueError, match="epoch-0001 cannot be read.*no state to go on from"):
        checkpoint.load(toy)


def _saved_under_power_cuts(toy, folder):
    "Three states on a disk that forgets; the power is cut after every operation."
    from survival import LossyDisk, Reader, lay_out

    (folder / "disk" / "run").mkdir(parents=True)
    with LossyDisk(folder / "disk") as disk:
        for epoch in (1, 2, 3):
            Checkpoint(disk.root / "run").save(
                toy, State(epoch, history=[{"epoch": e + 1} for e in range(epoch)])
            )
            disk.promised = epoch
    for n, (image, promised) in enumerate(disk.images):
        lay_out(image, folder / str(n))
        state = Checkpoint(folder / str(n) / "run").load(Reader())
        assert (state.epoch if state else 0) >= (promised or 0), f"cut {n}"
    return len(disk.images)


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")


@needs_proc
def test_a_power_cut_at_any_moment_leaves_the_last_state(toy, tmp_path):
    assert _saved_under_power_cuts(toy, tmp_path) > 20


@needs_proc
@pytest.mark.parametrize("spared", ["file", "folder"])
def test_without_syncing_the_power_cut_would_be_noticed(toy, tmp_path, monkeypatch, spared):
    "The test above can fail: a sync less, of files or of folders, and a state is lost."
    whole = checkpoints.sync

    def sync(path):
        if path.is_dir() != (spared == "folder"):
            whole(path)

    monkeypatch.setattr(checkpoints, "sync", sync)
    with pytest.raises((AssertionError, ValueError), match="cut|no state"):
        _saved_under_power_cuts(toy, tmp_path)


@needs_proc
def test_a_power_cut_during_a_run_costs_nothing_that_was_kept(data, tmp_path):
    from survival import power_cuts

    code = "import sys; from survival import *; print(*power_cuts(Path(sys.argv[1]), sys.argv[2]))"
    cuts, states = map(int, python(code, tmp_path, data).split()[-2:])
    assert cuts > 60 and states > 10


def test_a_full_disk_names_the_state(toy, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    Checkpoint(tmp_path).save(toy, State(1, history=[{"epoch": 1}]))
    monkeypatch.setattr(toy, "save_weights", full)
    with pytest.raises(OSError, match="disk is full.*epoch-0002"):
        Checkpoint(tmp_path).save(toy, State(2, history=[{"epoch": 1}, {"epoch": 2}]))
    assert Checkpoint(tmp_path).load(toy).epoch == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["epoch-0001"]


def test_room_is_looked_for_before_hdf5_ends_the_process(toy, tmp_path, monkeypatch):
    held = [*toy.weights, *toy.optimizer.variables]
    size = sum(np.asarray(v).nbytes for v in held) + checkpoints._RESERVE
    rooms = iter([(size, size - 1), (size, size), (0, 0)])
    monkeypatch.setattr(
        checkpoints.shutil,
        "disk_usage",
        lambda folder: SimpleNamespace(**dict(zip(("total", "free"), next(rooms)))),
    )
    save, saved = toy.save_weights, []
    monkeypatch.setattr(toy, "save_weights", lambda path: saved.append(path) or save(path))
    with pytest.raises(OSError, match="disk is full.*epoch-0001") as told:
        Checkpoint(tmp_path).save(toy, State(1, history=[{"epoch": 1}]))
    assert told.value.errno == 28 and not saved and not list((tmp_path / "checkpoints").iterdir())
    for _ in range(2):  # just enough, and a file system that does not count
        Checkpoint(tmp_path).save(toy, State(1, history=[{"epoch": 1}]))
    assert len(saved) == 2


# --- signals -------------------------------------------------------------------------------------------------------


def test_a_second_signal_is_obeyed_at_once(listening, capsys):
    signals = checkpoints._Signals()
    with pytest.raises(KeyboardInterrupt) as ended, signals:
        signal.raise_signal(signal.SIGINT)
        assert "once more stops at once" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(ended.value, Stopped) and signals.asked == signal.SIGINT


def test_a_signal_while_nothing_can_be_lost_is_obeyed_at_once(listening):
    signals = checkpoints._Signals()
    signals.at_once = True
    with pytest.raises(Stopped) as ended, signals:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.number == signal.SIGTERM


@pytest.mark.parametrize("asked", [True, False])
def test_a_signal_that_compiled_code_turns_into_another_error(listening, monkeypatch, asked):
    "As TensorFlow did with one that came during a prediction: SystemError, bad argument to internal function."

    def judged(*_):
        if asked:
            with contextlib.suppress(Stopped):
                signal.raise_signal(signal.SIGTERM)
        raise SystemError("bad argument to internal function")

    monkeypatch.setattr(progress, "_judged", judged)
    monkeypatch.setattr(progress, "_wrapped", lambda *_: None)
    options = SimpleNamespace(team=progress.Team())
    with checkpoints._Signals() as signals, pytest.raises(Stopped if asked else SystemError) as ended:
        judge = progress._Judge(None, signals, options)
        judge.measure(SimpleNamespace(hyperparameters=FAST), [{"epoch": 1}])
    assert not asked or ended.value.number == signal.SIGTERM


def test_handlers_of_others_and_ignored_signals_are_respected(listening):
    heard = []
    own = lambda number, frame: heard.append(number)  # noqa: E731
    signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, own)
    try:
        with checkpoints._Signals() as signals:
            signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGTERM)
        assert signals.asked is None and heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)


# --- refused before the network is built ---------------------------------------------------------------------------


@pytest.fixture
def unbuilt(monkeypatch):
    "Building a network fails the test."

    def build(*args, **kwargs):
        pytest.fail("the network was built")

    monkeypatch.setattr(training, "build_trainer", build)


class Listed(list):
    "Plain records with class names, as somebody's own data set may be."

    class_names = ("a", "b")


def _listed(data, split, **changes):
    import dataclasses

    records = [dataclasses.replace(r, labels=r.labels % 2) for r in VOCDataset(data, split)]
    records[1] = dataclasses.replace(records[1], **changes)
    return Listed(records)


def _with(data, tmp_path, content):
    "Validation pictures of which one has another content, or is missing."
    image = tmp_path / "odd.jpg"
    if content is not None:
        image.write_bytes(content)
    return _listed(data, "val", image=image)


BAD = {
    "validate_every=0": (lambda d, t: {"validate_every": 0}, ValueError, "validate_every .* at least 1, not 0"),
    "validate_every=-1": (lambda d, t: {"validate_every": -1}, ValueError, "validate_every"),
    "validate_every=1.5": (lambda d, t: {"validate_every": 1.5}, ValueError, "validate_every"),
    "minutes=-1": (lambda d, t: {"checkpoint_minutes": -1}, ValueError, "checkpoint_minutes"),
    "minutes=nan": (lambda d, t: {"checkpoint_minutes": math.nan}, ValueError, "checkpoint_minutes"),
    "minutes='x'": (lambda d, t: {"checkpoint_minutes": "x"}, ValueError, "checkpoint_minutes"),
    "workers=-1": (lambda d, t: {"workers": -1}, ValueError, "workers"),
    "a list": (lambda d, t: {"dataset": [1]}, TypeError, "for training is a list; a sequence of Record"),
    "validation a list": (lambda d, t: {"validation": [1]}, TypeError, "for validation is a list"),
    "empty validation": (lambda d, t: {"validation": Listed()}, ValueError, "validation holds no picture"),
    "no records": (lambda d, t: {"dataset": Listed([1])}, ValueError, "a Record was expected"),
    "label beyond": (
        lambda d, t: {"dataset": _listed(d, "train", boxes=[[1, 1, 9, 9]], labels=[2], difficult=None,
                                         crowd=None, truncated=None)},
        ValueError,
        r"train_\d+.jpg: .*label.* 2",
    ),
    "label below": (
        lambda d, t: {"validation": _listed(d, "val", boxes=[[1, 1, 9, 9]], labels=[-1], difficult=None,
                                            crowd=None, truncated=None)},
        ValueError,
        r"val_\d+.jpg: .*label.* -1",
    ),
    "validation missing": (lambda d, t: {"validation": _with(d, t, None)}, FileNotFoundError, "odd.jpg"),
    "validation no picture": (lambda d, t: {"validation": _with(d, t, b"text")}, ValueError, "odd.jpg"),
    "validation cut": (
        lambda d, t: {"validation": _with(d, t, b"\xff\xd8\xff\xe0\x00\x10JFIF")}, ValueError, "odd.jpg"
    ),
    "validation of another size": (
        lambda d, t: {"validation": _listed(d, "val", width=200)}, ValueError, "says 200×96"
    ),
    "training missing": (
        lambda d, t: {"dataset": _listed(d, "train", image=t / "none.jpg")}, FileNotFoundError, "none.jpg"
    ),
    "a class of validation alone": (lambda d, t: {"validation": VOCDataset(d, "val")}, ValueError, "lacks: "),
    "a preset's name": (lambda d, t: {"hyperparameters": "tiny"}, TypeError, r"is 'tiny'.*preset\('tiny'\)"),
    "a class of callbacks": (lambda d, t: {"callbacks": End}, TypeError, "callbacks holds .*were expected"),
    "no callbacks": (lambda d, t: {"callbacks": [End(), 3]}, TypeError, "callbacks holds 3"),
    "resume nothing": (lambda d, t: {"run": None, "resume": True}, ValueError, "needs run"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_is_built_or_written(data, tmp_path, unbuilt, case):
    change, kind, text = BAD[case]
    given = {"dataset": _listed(data, "train"), "validation": _listed(data, "val"), "run": tmp_path / "run"}
    with pytest.raises(kind, match=text):
        train(**{"hyperparameters": FAST, "progress": False, **given, **change(data, tmp_path)})
    assert not (tmp_path / "run").exists()


def test_tf_data_is_no_data_set(tmp_path, unbuilt):
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(TypeError, match="a sequence of Record"):
        train(tf.data.Dataset.range(3), FAST, run=tmp_path / "run")


def test_flags_of_another_length_are_no_record(tmp_path):
    with pytest.raises(ValueError, match="a.jpg"):
        Record(tmp_path / "a.jpg", 9, 9, [[0, 0, 5, 5]], [0], difficult=[False, True])


# --- one owner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RUN_FILES, "checkpoints", "checkpoints/epoch-0001/state.weights.h5"])
def test_files_of_others_are_refused_and_left_alone(data, tmp_path, unbuilt, name):
    own = tmp_path / "run" / name
    own.parent.mkdir(parents=True)
    own.write_bytes(b'{"mine": 1}')
    with pytest.raises(ValueError, match="somebody else|states of a run|is a file"):
        train(_listed(data, "train"), FAST, run=tmp_path / "run")
    assert own.read_bytes() == b'{"mine": 1}'
    with pytest.raises(ValueError, match="config.json|no run to resume"):
        train(_listed(data, "train"), FAST, run=tmp_path / "run", resume=True)
    assert own.read_bytes() == b'{"mine": 1}'


def test_a_result_that_its_owner_replaced_is_not_overwritten(run, data, tmp_path, unbuilt):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "detector.keras").write_bytes(b"my own")
    with pytest.raises(ValueError, match="detector.keras would be replaced"):
        train(VOCDataset(data, "train"), FAST, run=folder, resume=True)
    assert (folder / "detector.keras").read_bytes() == b"my own"


def test_a_second_process_gets_a_sentence(run, data, unbuilt):
    with claim(run.folder), pytest.raises(BlockingIOError, match="another process"):
        train(VOCDataset(data, "train"), FAST, run=run.folder, resume=True)


def test_two_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    class Noon:
        @staticmethod
        def now():
            import datetime

            return datetime.datetime(2024, 1, 1, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "datetime", Noon)
    first, second = runs._folder(None, False), runs._folder(None, False)
    assert first != second and first.is_dir() and second.is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": "abc"},
        {"class_names": [1, 2]},
        {"pictures": "12"},
        {"pictures": None},
        {"files": 3},
        {"hyperparameters": []},
        {"hyperparameters": {"epochs": "many"}},
        {"hyperparameters": {"image_size": [96, 1e400]}},
        {"hyperparameters": {"nonsense": 1}},
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "",
        b"\xff\xfe\x00",
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_config_of_other_types_is_refused_by_name(run, data, tmp_path, unbuilt, change):
    config = json.loads((run.folder / "config.json").read_text())
    text = json.dumps({**config, **change}) if isinstance(change, dict) else change
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="config.json") as error:
        train(VOCDataset(data, "train"), FAST, run=tmp_path, resume=True)
    assert len(str(error.value)) < 1000


# --- sums, measures, memory ----------------------------------------------------------------------------------------


def _trainer(rate, regularizer=None):
    keras.utils.set_random_seed(0)
    model = retinanet_model(2, small(backbone=short_backbone(), image_size=(64, 64), feature_size=16))
    kernel = next(layer for layer in model._flatten_layers() if hasattr(layer, "kernel"))
    kernel.kernel.regularizer = regularizer
    trainer = RetinaNetTrainer(model)
    trainer.compile(keras.optimizers.SGD(rate), jit_compile=False)
    return trainer, kernel.kernel


def test_a_regularizer_counts_in_loss_and_gradient():
    images, boxes, labels = drawn(2, size=(64, 64))
    truth, rate, strength = {"boxes": boxes, "labels": labels}, 1e-3, 0.5
    (plain, free), (held, pulled) = _trainer(rate), _trainer(rate, keras.regularizers.L2(strength))
    before = np.asarray(free)
    np.testing.assert_array_equal(before, np.asarray(pulled))
    loss = [float(t.train_on_batch(images, truth, return_dict=True)["loss"]) for t in (plain, held)]
    assert abs(loss[1] - loss[0] - strength * (before**2).sum()) < 1e-3
    pull = (np.asarray(free) - np.asarray(pulled)) / rate  # the gradient of strength · w² is 2 · strength · w
    np.testing.assert_allclose(pull, 2 * strength * before, atol=2e-3)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow shares a batch like this"
)
def test_the_loss_is_shared_among_devices(monkeypatch):
    import tensorflow as tf

    images, boxes, labels = drawn(1, size=(64, 64))
    truth = {"boxes": boxes, "labels": labels}
    trainer, _ = _trainer(0.1, keras.regularizers.L2(0.5))
    outputs = trainer(images)
    alone = float(trainer.compute_loss(images, truth, outputs))
    strategy = SimpleNamespace(num_replicas_in_sync=4)
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    assert abs(float(trainer.compute_loss(images, truth, outputs)) - alone / 4) < 1e-5


@pytest.mark.parametrize(
    "metric, key", [("voc07", "val_voc07_map"), ("voc", "val_voc_map"), ("coco", "val_coco_ap")]
)
def test_the_metric_that_decides_is_the_one_asked_for(monkeypatch, metric, key):
    asked = []

    def evaluate(detector, dataset, progress, coco):
        asked.append(coco)
        return SimpleNamespace(voc07_map=0.1, voc_map=0.2, coco={"AP": 0.3})

    monkeypatch.setattr(progress, "evaluate", evaluate)
    got = progress._measured(None, None, metric)
    assert got == {"voc07": 0.1, "voc": 0.2, "coco": 0.3}[metric] and asked == [metric == "coco"]
    h = FAST.replace(best_metric=metric, patience=1)
    assert progress._measure(h) == key
    history = [{"epoch": n, "loss": 1, key: score} for n, score in ((1, 0.4), (2, 0.3))]
    assert progress._exhausted(history, h) and not progress._exhausted(history[:1], h)
    others = [{"epoch": n, "loss": 1, "val_other": 0.1} for n in (1, 2, 3)]
    assert not progress._exhausted(others, h)
    assert len(plot_history(history).axes) == 2 and len(plot_history(others).axes) == 1


def test_a_measurement_without_a_value_is_null(tmp_path):
    history = [
        {"epoch": 1, "loss": 1.0, "val_voc07_map": None},
        {"epoch": 2, "loss": 1.0, "val_voc07_map": 0.0},
    ]
    assert progress._scores(history, "val_voc07_map") == [-math.inf, 0.0]
    assert len(plot_history(history).axes) == 2
    with claim(tmp_path) as mine:
        publisher = progress._Publisher(mine, checkpoints._Signals(), None)
        publisher.detector = object()
        books = {"epoch": 1, "loss": math.nan}
        state = State(1, history=[progress.finite(books)])
        mine.write_json("history.json", state.history)
    assert "NaN" not in (tmp_path / "history.json").read_text()


def test_a_measurement_without_a_value_is_below_all_others(monkeypatch, capsys):
    "Of a metric of one's own, whose values may lie below zero."
    h = FAST.replace(best_metric="own:mine", patience=2, epochs=9)
    key, given, written = progress._measure(h), [-5.0, math.nan, -3.0, -4.0], []
    monkeypatch.setattr(progress, "_wrapped", lambda *args: None)
    monkeypatch.setattr(progress, "_judged", lambda *args: given[len(history) - 1])
    monkeypatch.setattr(progress, "_write", lambda *args: written.append(len(history)))
    judge = progress._Judge(None, SimpleNamespace(), SimpleNamespace(team=progress.Team()))
    trainer, history = SimpleNamespace(hyperparameters=h, model=None), []
    for epoch in range(1, 5):
        history.append({"epoch": epoch, "seconds": 1.0, "waiting": 0.0})
        judge.measure(trainer, history)
        assert not progress._exhausted(history, h)
    assert written == [1, 3] and [e[key] for e in history] == [-5.0, None, -3.0, -4.0]
    nothing = [dict(entry, **{key: None}) for entry in history[:3]]
    assert progress._exhausted(nothing, h)
    progress._say(nothing, h)
    assert f"stopping: {key} has had no value in the last 2" in capsys.readouterr().out


def _named(name, base, text):
    return type(name, (base,), {})(text)


@pytest.mark.parametrize(
    "error, yes",
    [
        (MemoryError(), True),
        (_named("ResourceExhaustedError", Exception, "OOM when allocating tensor"), True),
        (
            _named("XlaRuntimeError", RuntimeError, "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
            True,
        ),
        (_named("OutOfMemoryError", RuntimeError, "CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory of things"), False),
    ],
)
def test_out_of_memory_is_a_sentence_with_a_way_out(data, tmp_path, monkeypatch, error, yes):
    def build(*args, **kwargs):
        raise error

    assert out_of_memory(error) is yes
    monkeypatch.setattr(training, "build_trainer", build)
    with pytest.raises(MemoryError if yes else type(error)) as told:
        train(_listed(data, "train"), FAST, run=tmp_path / "run", progress=False)
    assert not yes or ("lower batch_size (--batch_size)" in str(told.value) and "96×96" in str(told.value))


def test_a_run_lists_only_files_that_exist(tmp_path):
    (tmp_path / "config.json").touch()
    run = Run(None, [], tmp_path, None, True)
    assert set(run.files) == {"config.json"} and str(tmp_path) in run.hint and "epochs=0" in repr(run)


# --- parts of one's own ---------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("test")
@dataclass(frozen=True)
class BestK(Part):
    """The k anchors that overlap an object most answer for it; everything else is background."""

    k: int = 9

    def __call__(self, anchors, boxes, valid):
        iou = keras.ops.where(valid[:, None], overlaps(anchors, boxes), 0.0)
        ranked = keras.ops.top_k(keras.ops.transpose(iou, (0, 2, 1)), self.k)[0]
        claim = keras.ops.where((iou >= ranked[:, None, :, -1]) & (iou > 0), iou, -1.0)
        best = keras.ops.cast(keras.ops.argmax(claim, axis=-1), "int32")
        return keras.ops.where(keras.ops.max(claim, axis=-1) > 0, best, -1)


def test_training_with_a_matcher_and_a_coder_of_ones_own():
    keras.utils.set_random_seed(0)
    model = retinanet_model(2, small(backbone=short_backbone(), batch_norm_momentum=0.9))
    trainer = RetinaNetTrainer(model, matcher=BestK(4), coder=CornerCoder())
    trainer.compile(optimizer=keras.optimizers.AdamW(2e-3), jit_compile=False)
    images, boxes, labels = drawn(2)
    truth = {"boxes": boxes, "labels": labels}
    losses = [float(trainer.train_on_batch(images, truth, return_dict=True)["loss"]) for _ in range(25)]
    assert losses[-1] < 0.4 * losses[0]

    # the losses are those of these targets, and not those of the usual ones
    outputs = {name: keras.ops.convert_to_numpy(x) for name, x in model(images).items()}
    found = [float(x) for x in trainer.losses_of(images, truth, outputs)]
    anchors = anchors_for_shape(images.shape[1:3])
    deltas, classes = assign_targets(anchors, boxes, labels, matcher=BestK(4), coder=CornerCoder())
    wanted = (
        focal_loss()(classes, outputs["classification"]),
        smooth_l1_loss()(classes, deltas, outputs["regression"]),
    )
    np.testing.assert_allclose(found, [float(x) for x in wanted], rtol=1e-5)
    usual = RetinaNetTrainer(model).losses_of(images, truth, outputs)
    assert abs(float(usual[0]) - found[0]) > 1e-3

    again = RetinaNetTrainer.from_config(trainer.get_config())
    assert (again.matcher, again.coder) == (BestK(4), CornerCoder())
    assert again.custom[0] is None and again.anchors.parameters == model_card(model).hyperparameters.anchors
