"""Several processes as one: who is told what, what is refused before any work, and on JAX the same weights as one process."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import machines
import numpy as np
import pytest
from helpers import ROOT

from retinanet_nb import runs, team
from retinanet_nb.checkpoints import State
from retinanet_nb.generator import train_generator
from retinanet_nb.hyperparameters import preset
from retinanet_nb.prediction import Found
from retinanet_nb.team import Team, WorkerLost, hurry, join_team, predict_together
from retinanet_nb.training import train
from retinanet_nb.voc import VOCDataset


class Two(Team):
    "The second of two processes; what the first one would say is known beforehand."

    def __new__(cls, said=()):
        two = super().__new__(cls)
        object.__setattr__(two, "said", list(said))
        return two

    def __init__(self, said=()):
        super().__init__(1, 2)

    def gather(self, data):
        return [self.said.pop(0), data]


def test_an_error_of_one_is_an_error_of_all():
    with pytest.raises(WorkerLost, match="worker 0 cannot go on: no disk"):
        with Two([b"no disk"]).agreed():
            pass
    with pytest.raises(KeyError, match="mine"):  # its own comes first
        with Two([b"no disk"]).agreed():
            raise KeyError("mine")
    with Two([b""]).agreed():
        pass
    assert Two([b'{"epoch": 3}']).told(None) == {"epoch": 3}


def test_a_run_of_others_has_no_folder_here(tmp_path):
    said = [b"", b'["there/run", {"pictures": 3, "data": "/a"}]', b""]
    with runs._shared_folder(Two(said), None, False, {"pictures": 3, "data": "/b"}, {"data": "/b"}) as mine:
        assert (
            str(mine.folder) == "there/run" and mine.write("last.keras", None) == mine.folder / "last.keras"
        )
        states = runs._states(mine)
        states.save(None, State(1)), states.mark(State(1))
        assert states.newest() is None and not mine.folder.exists()
    said = [b"", b'["there/run", {"pictures": 4}]', b""]
    with pytest.raises(WorkerLost, match=r"something else than worker 0 \(pictures\)"):
        with runs._shared_folder(Two(said), None, False, {"pictures": 3}, None):
            pass


@pytest.mark.parametrize(
    "error, lost", [("Gloo AllReduce failed: Connection closed by peer", True), ("no such picture", False)]
)
def test_a_lost_worker_is_a_sentence(error, lost):
    first = Team(0, 2)
    try:
        with pytest.raises(
            WorkerLost if lost else ValueError, match="start all of them again" if lost else error
        ):
            with first.watched():
                raise ValueError(error)
        assert not team._EXIT["wait"]  # nobody will come to say goodbye
        with first.watched():
            pass
        assert team._EXIT["wait"]
    finally:
        hurry(False)


def test_the_shares_of_a_batch_are_the_batch(tmp_path):
    shapes = VOCDataset(machines.pictures(tmp_path, train=7, val=1), "train")
    h = preset("from-scratch").replace(image_size=(64, 64), batch_size=6, mosaic=0.5)
    weights = [2, 1, 1, 1, 1, 1, 3]  # a picture that comes twice in an epoch looks different each time
    whole = train_generator(shapes, h, workers=0, weights=weights)
    parts = [train_generator(shapes, h, workers=0, weights=weights, share=(k, 3)) for k in range(3)]
    assert [len(p) for p in parts] == [len(whole)] * 3 and parts[1].files(0) == whole.files(0)
    for i in range(len(whole)):
        images, targets = whole.batch(i, 2)
        some = [p.batch(i, 2) for p in parts]
        np.testing.assert_array_equal(np.concatenate([x for x, _ in some]), images)
        for name, value in targets.items():
            np.testing.assert_array_equal(np.concatenate([t[name] for _, t in some]), value)
    with pytest.raises(ValueError, match="divides the batch"):
        train_generator(shapes, h, share=(0, 4))


def test_a_measurement_shared_out(monkeypatch):
    found = {
        n: Found(np.full((n, 4), n, "f4"), np.full(n, n / 9, "f4"), np.arange(n, dtype="i4"))
        for n in range(5)
    }
    from retinanet_nb import prediction

    monkeypatch.setattr(prediction, "predict", lambda detector, paths, *rest: ((p, found[p]) for p in paths))
    theirs = team._packed([found[n] for n in (0, 2, 4)])
    got = list(predict_together(Two([theirs]), None, range(5)))
    assert [p for p, _ in got] == list(range(5))
    for n, f in got:
        np.testing.assert_array_equal(f.boxes, found[n].boxes)
        np.testing.assert_array_equal(f.labels, found[n].labels)
    with pytest.raises(ValueError, match="a.jpg"):
        list(predict_together(Two([team._packed([OSError("a.jpg is no picture")])]), None, range(5)))


def test_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="says which one this is"):
        join_team()
    monkeypatch.setenv("KERAS_DISTRIBUTION_PROCESS_ID", "0")
    monkeypatch.setenv("KERAS_DISTRIBUTION_JOB_ADDRESSES", "127.0.0.1:1")
    monkeypatch.setattr(team.keras.backend, "backend", lambda: "torch")
    with pytest.raises(ValueError, match="needs the engine JAX, and torch is in use: set KERAS_BACKEND=jax"):
        join_team()
    monkeypatch.delenv("KERAS_DISTRIBUTION_NUM_PROCESSES")
    shapes = VOCDataset(machines.pictures(tmp_path, train=2, val=1), "train")
    with pytest.raises(ValueError, match="needs the engine JAX"):
        train(shapes, preset("tiny"), run=tmp_path / "run", devices=2)
    assert not (tmp_path / "run").exists()
    three = SimpleNamespace(device_mesh=SimpleNamespace(devices=np.zeros(3)))
    with pytest.raises(ValueError, match="make batch_size .* a multiple of 3"):
        Team(0, 1, three).check(8)


def test_the_command_says_which_engine_can(tmp_path):
    said = subprocess.run(
        [sys.executable, "-m", "retinanet_nb", "train", str(tmp_path), "--devices", "2"],
        env={**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1 and said.stderr.strip().splitlines()[-1].startswith(
        "retinanet_train: training on several"
    )


needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax isn't installed")


@needs_jax
def test_two_processes_or_devices_end_with_the_weights_of_one(tmp_path):
    "One epoch of three steps, without a measurement; tests/machines.py shows the rest."
    machines.pictures(tmp_path, train=12, val=1)
    machines.ended(machines.run(tmp_path, "one", 1, epochs=1))
    machines.ended(machines.run(tmp_path, "two", 2, epochs=1))
    machines.ended(machines.run(tmp_path, "devices", 1, epochs=1, devices=2), "on 2")
    for other in ("two", "devices"):
        assert machines.difference(tmp_path, "one", other) < machines.TOLERANCE
