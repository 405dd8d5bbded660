"""Training: schedules, runs that survive, what is kept and what starts afresh."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import ROOT, drawn, small

from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.retinanet import read_model, retinanet_model
from retinanet_nb.retinanet_box import load_detector, retinanet_box
from retinanet_nb.files import save_atomically
from retinanet_nb.shapes import make_shapes
from retinanet_nb.training import (
    Checkpoint,
    RetinaNetTrainer,
    build_trainer,
    learning_rate_schedule,
    make_optimizer,
    train,
)
from retinanet_nb.voc import VOCDataset

FAST = small(
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


def test_training_learns_two_pictures_and_no_object_is_no_accident():
    keras.utils.set_random_seed(0)
    trainer = RetinaNetTrainer(retinanet_model(2, small(batch_norm_momentum=0.9)))
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
    }
    config = json.loads((run.folder / "config.json").read_text())
    assert HyperParameters.from_json(json.dumps(config["hyperparameters"])) == FAST
    history = json.loads((run.folder / "history.json").read_text())
    assert history == run.history and [e["epoch"] for e in history] == [1, 2]
    assert all(0 <= e["val_voc07_map"] <= 1 and math.isfinite(e["loss"]) for e in history)
    assert abs(history[0]["loss"] - history[0]["classification"] - history[0]["box"]) < 1e-4
    detector = load_detector(run.detector)
    assert detector.class_names == config["class_names"] and detector.hyperparameters == FAST
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["epoch-0002"]


def test_another_run_in_the_same_folder_is_refused_and_leaves_it_alone(run, data):
    before = (run.folder / "history.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        train(VOCDataset(data, "train"), FAST, run=run.folder)
    with pytest.raises(ValueError, match="learning_rate"):
        train(VOCDataset(data, "train"), FAST.replace(learning_rate=0.5), run=run.folder, resume=True)
    assert (run.folder / "history.json").read_bytes() == before


class Interrupt(keras.callbacks.Callback):
    "Ctrl-C in the middle of the second epoch."

    def on_train_batch_end(self, batch, logs=None):
        if (
            int(
                self.model.optimizer.iterations.numpy()
                if hasattr(self.model.optimizer.iterations, "numpy")
                else self.model.optimizer.iterations
            )
            == 5
        ):
            raise KeyboardInterrupt


def test_interrupted_and_resumed_equals_the_whole_run(run, data, tmp_path, capsys):
    datasets = VOCDataset(data, "train"), FAST, VOCDataset(data, "val")
    first = train(*datasets, run=tmp_path / "cut", progress=False, callbacks=[Interrupt()])
    assert len(first.history) == 1 and "resume=True" in capsys.readouterr().err
    (
        tmp_path / "cut" / "checkpoints" / ".epoch-0002"
    ).mkdir()  # what a kill in the middle of writing would leave
    second = train(*datasets, run=tmp_path / "cut", progress=False, resume=True)
    assert [e["epoch"] for e in second.history] == [1, 2]
    whole, cut = read_model(run.folder / "last.keras"), read_model(second.folder / "last.keras")
    for a, b in zip(whole.weights, cut.weights):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-7, err_msg=a.path)


def test_other_pictures_are_another_run(run, data):
    fewer = VOCDataset(data, "train")[:8]
    with pytest.raises(ValueError, match="began with 12 pictures.* now 8"):
        train(fewer, FAST, VOCDataset(data, "val"), run=run.folder, resume=True)
    others = VOCDataset(data, "train+val")[4:]
    with pytest.raises(ValueError, match="of other names"):
        train(others, FAST, VOCDataset(data, "val"), run=run.folder, resume=True)


def test_what_is_said_on_resuming_is_remembered(data, tmp_path):
    h = FAST.replace(epochs=1)
    train(VOCDataset(data, "train"), h, run=tmp_path / "run", progress=False, about={"data": {"path": "old"}})
    train(
        VOCDataset(data, "train"),
        h,
        run=tmp_path / "run",
        progress=False,
        resume=True,
        about={"data": {"path": "new"}},
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] == {"path": "new"} and config["pictures"] == 12


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
    assert cut.history == []
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
    assert "c3_1_1_conv/kernel" in moved and not any(
        p.startswith(("stem", "c2")) or "_bn/" in p for p in moved
    )


def test_bfloat16_trains_and_its_detector_is_float32(data, tmp_path):
    h = FAST.replace(precision="mixed_bfloat16", epochs=1, ema_momentum=0.9)
    run = train(VOCDataset(data, "train"), h, VOCDataset(data, "val"), run=tmp_path / "half", progress=False)
    assert keras.config.dtype_policy().name == "float32"  # the reader's own setting is given back
    assert math.isfinite(run.history[0]["loss"])
    policies = {
        layer.dtype_policy.name for layer in load_detector(run.detector)._flatten_layers() if layer.weights
    }
    assert policies == {"float32"}
    detector, trained = load_detector(run.detector), read_model(run.folder / "best.keras")
    for a, b in zip(detector.weights, retinanet_box(trained).weights):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


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


def test_the_newest_complete_checkpoint_counts(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.newest() is None
    for name in ("epoch-0002", "epoch-0010", ".epoch-0011"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.newest().name == "epoch-0010"


# --- what a run survives -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_run_killed_at_random_moments_ends_as_if_left_alone():
    "`python tests/survival.py` does it with ten kills."
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


def test_ctrl_c_while_the_books_are_kept_waits_for_their_end(data, tmp_path, capsys):
    "A model file that is being written gets a Ctrl-C in the middle; everything about the epoch is there nevertheless."

    class DuringSaving(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch:
                return
            whole = self.model.model.save

            def save(path):
                os.kill(os.getpid(), signal.SIGINT)
                whole(path)

            self.model.model.save = save

        def on_epoch_end(self, epoch, logs=None):
            pass

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # it is ignored where the tests run in the background
    try:
        cut = train(
            VOCDataset(data, "train"), FAST, run=tmp_path / "run", progress=False, callbacks=[DuringSaving()]
        )
        assert (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )  # the usual behaviour is given back
    finally:
        signal.signal(signal.SIGINT, before)
    assert cut.interrupted and [e["epoch"] for e in cut.history] == [1]
    assert (
        Checkpoint(tmp_path / "run").newest().name == "epoch-0001"
        and (tmp_path / "run" / "last.keras").exists()
    )
    assert not train(
        VOCDataset(data, "train"), FAST, run=tmp_path / "run", progress=False, resume=True
    ).interrupted


def test_half_files_of_a_killed_process_are_swept_away(data, tmp_path):
    first = train(VOCDataset(data, "train"), FAST.replace(epochs=1), run=tmp_path / "run", progress=False)
    (first.folder / ".12345-best.keras").write_bytes(b"half")
    (first.folder / ".2024-notes").mkdir()  # somebody's own
    train(VOCDataset(data, "train"), FAST.replace(epochs=1), run=first.folder, progress=False, resume=True)
    assert [p.name for p in first.folder.glob(".*")] == [".2024-notes"]


class Scores:
    "Stands in for `evaluate`: gives the scores it was told, one after another."

    def __init__(self, *scores):
        self.left = list(scores)

    def __call__(self, *args, **kwargs):
        from types import SimpleNamespace

        return SimpleNamespace(voc07_map=self.left.pop(0))


def test_patience_stops_a_run_and_counts_on_over_a_resume(data, tmp_path, monkeypatch, capsys):
    from retinanet_nb import training

    h, sets = FAST.replace(epochs=9, patience=2), (VOCDataset(data, "train"), VOCDataset(data, "val"))

    class CutAfter(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(training, "evaluate", Scores(0.3, 0.5))
    train(sets[0], h, sets[1], run=tmp_path / "run", progress=False, callbacks=[CutAfter()])
    monkeypatch.setattr(training, "evaluate", Scores(0.4, 0.5, 0.9))  # 0.5 again is no better: two in vain
    run = train(sets[0], h, sets[1], run=tmp_path / "run", progress=False, resume=True)
    assert [e["val_voc07_map"] for e in run.history] == [0.3, 0.5, 0.4, 0.5]
    best = (run.folder / "best.keras").stat().st_mtime_ns
    again = train(sets[0], h, sets[1], run=tmp_path / "run", progress=False, resume=True)  # it has ended
    assert len(again.history) == 4 and (run.folder / "best.keras").stat().st_mtime_ns == best
    with pytest.raises(ValueError, match="patience"):
        train(sets[0], h, run=tmp_path / "other", progress=False)


def test_history_says_how_long_the_network_waited(run):
    assert all(0 < e["waiting"] <= 1 for e in run.history)


def test_tensorboard_on_request(data, tmp_path):
    pytest.importorskip("tensorboard")
    run = train(
        VOCDataset(data, "train"),
        FAST.replace(epochs=1),
        VOCDataset(data, "val"),
        run=tmp_path / "run",
        progress=False,
        tensorboard=True,
        about={"data": {"path": "here"}},
    )
    events = list((run.folder / "tensorboard").rglob("events*"))
    assert events and any(b"voc07_map" in p.read_bytes() for p in events if "validation" in p.parts)
    assert json.loads((run.folder / "config.json").read_text())["data"] == {"path": "here"}


def test_one_seed_one_run(run, data, tmp_path):
    again = train(
        VOCDataset(data, "train"), FAST, VOCDataset(data, "val"), run=tmp_path / "again", progress=False
    )
    for a, b in zip(
        read_model(run.folder / "last.keras").weights, read_model(again.folder / "last.keras").weights
    ):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)
    other = train(VOCDataset(data, "train"), FAST.replace(seed=1), run=tmp_path / "other", progress=False)
    assert other.history[0]["loss"] != run.history[0]["loss"]
