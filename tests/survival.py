"""`python tests/survival.py [KILLS]`: a small training run is ended by SIGKILL or SIGTERM at random moments,
also inside an epoch, and resumed until it is done; it must end with the very weights, optimizer, averages
and random states of the run that was left alone. Then the power is cut: a run's file operations are
recorded, and after each of them all is dropped that had not been synced.

One process imports the engine without using it and forks a child for every attempt: a fork costs nothing,
an import ten seconds. Building the network takes longer than the steps of so small a run, and a kill there
proves little, so four of five moments are drawn after the first step. tests/test_training.py does the same
with fewer kills."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

LIMIT = 400  # seconds for one attempt; a machine that needs more has other troubles


def settings(**changes):
    "Of a network that is small, and has of all that a state must hold: averages, BatchNorm, a schedule, dropout."
    from helpers import short_backbone

    from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters

    return HyperParameters(
        **{
            "backbone": short_backbone(dropout=0.2),
            "feature_size": 16,
            "subnet_depth": 1,
            "image_size": (96, 96),
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 4,
            "batch_norm_momentum": 0.9,
            "ema_momentum": 0.9,
            "batch_size": 4,
            "epochs": 6,
            "scale_jitter": (0.8, 1.3),
            "color_jitter": 0.3,
            "anchors": AnchorParameters(sizes=(16, 32, 64, 128, 256)),
            **changes,
        }
    )


def run_once(folder, data, resume):
    "In a child of its own: the run, from its beginning or where it was cut."
    import keras

    from retinanet_nb.training import train
    from retinanet_nb.voc import VOCDataset

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)  # so small a network gains nothing by more
        tf.config.threading.set_inter_op_parallelism_threads(1)

    class Started(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            (Path(folder).parent / "started").touch()

    train(
        VOCDataset(data, "train"),
        settings(),
        VOCDataset(data, "val"),
        run=folder,
        resume=resume,
        progress=False,
        callbacks=[Started()],
        checkpoint_minutes=0.005,
        hint=False,
    )


def child(folder, data, resume):
    "The exit status of `run_once` in a process of its own: what an exception of the run makes of it."
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            run_once(folder, data, resume)
    except SystemExit as stopped:
        return stopped.code
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def attempt(folder, data, kill_after=None, number=signal.SIGKILL):
    """Starts or resumes the run in a child. `kill_after`: seconds after its first step, or, below 0, after its start.
    Returns whether it came to its end, the seconds up to its first step, and those since."""
    resume, sign = (Path(folder) / "config.json").exists(), Path(folder).parent / "started"
    sign.unlink(missing_ok=True)
    started, first, sent = time.monotonic(), None, False
    pid = os.fork()
    if pid == 0:
        os._exit(child(folder, data, resume))
    while True:
        if first is None and sign.exists():
            first = time.monotonic()
        ended, status = os.waitpid(pid, os.WNOHANG)
        now = time.monotonic()
        if ended:
            break
        if kill_after is not None and not sent:
            since = now - started if kill_after < 0 else now - (first or now)
            if since > abs(kill_after):
                os.kill(pid, number)
                sent = True
        if now - started > LIMIT:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"the run had not ended after {LIMIT} s")
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -number, 128 + number), f"the run failed by itself (status {code}), see above"
    return code == 0, (first or now) - started, now - first if first else 0.0


def arrays(folder):
    "Every array of the run's files, by name: the last and the best model, and the state of its end (optimizer, averages, random states too)."
    import h5py
    import numpy as np

    found = {}

    def collect(name, file):
        file.visititems(
            lambda path, item: (
                found.update({f"{name}:{path}": item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )

    for name in ("last.keras", "best.keras"):
        with zipfile.ZipFile(folder / name) as z, z.open("model.weights.h5") as f, h5py.File(f) as file:
            collect(name, file)
    state = max((folder / "checkpoints").glob("epoch-*"))
    with h5py.File(state / "state.weights.h5") as file:
        collect(state.name, file)
    with np.load(state / "state.npz") as rest:
        found.update({f"{state.name}:{key}": value for key, value in rest.items()})
    return found


def losses(folder):
    "The history without its times."
    history = json.loads((folder / "history.json").read_text())
    return [{k: v for k, v in e.items() if k not in ("seconds", "waiting")} for e in history]


def compare(alone, folder):
    "How many arrays are the same; raises `AssertionError` where anything differs."
    import numpy as np

    one, two = arrays(alone), arrays(folder)
    assert one.keys() == two.keys(), "the killed run left other files than the one left alone"
    differ = [name for name in one if not np.array_equal(one[name], two[name])]
    assert not differ, f"{len(differ)} of {len(one)} arrays differ, the first is {differ[0]}"
    assert any("seed" in name for name in one) and len(one) > 100, "too little was compared"
    assert losses(alone) == losses(folder), "the histories differ"
    names = [{p.name for p in run.iterdir()} for run in (alone, folder)]
    assert names[0] == names[1], f"the killed run left {sorted(names[1])}"
    return len(one)


def survive(kills, scratch, seed=0, say=print):
    "The whole experiment in the folder `scratch`. Raises `AssertionError` where the two runs end differently."
    import keras  # noqa: F401  imported before the forks, used only in them
    import retinanet_nb.training  # noqa: F401

    scratch, rng, data = Path(scratch), random.Random(seed), Path(scratch) / "shapes"
    # Drawn elsewhere: what uses threads before a fork may lock up after it.
    draw = (
        "import sys; from retinanet_nb.shapes import make_shapes;"
        " make_shapes(sys.argv[1], train=20, val=2, test=1, size=(96, 96), seed=3)"
    )
    subprocess.run([sys.executable, "-c", draw, data], check=True)
    _, setting_up, working = attempt(scratch / "whole", data)
    say(f"left alone: {setting_up:.1f} s to set up, then {working:.1f} s")
    struck, n, inside = 0, 0, 0
    while struck < kills:  # a run that ends before the last kill is compared, and another one begun
        n, done = n + 1, False
        folder = scratch / f"cut-{n}"
        while not done:
            moment = rng.uniform(0, 0.5) * working
            if rng.random() < 0.2:
                moment = -rng.uniform(0.02, 1) * setting_up
            number = rng.choice((signal.SIGKILL, signal.SIGTERM))
            done, before, after = attempt(folder, data, moment if struck < kills else None, number)
            if done:
                break
            struck += 1
            newest = max((p.name for p in folder.glob("checkpoints/epoch-*")), default="no state")
            inside += "step" in newest
            when = f"{after:.2f} s after the first step" if after else f"{before:.2f} s after the start"
            say(f"kill {struck:2d} {number.name} {when}; newest state: {newest}")
        say(f"run {n} came to its end: {compare(scratch / 'whole', folder)} arrays compared, 0 differ")
    say(f"{struck} kills, {inside} of them left a state inside an epoch")
    return struck


# --- a disk that forgets what was not synced -----------------------------------------------------------------------


class _Node:
    "A file or folder as the disk has it: `held` is its bytes, or its names, as of the last sync."

    def __init__(self, folder):
        self.held = {} if folder else b""


class LossyDisk:
    """Inside the `with` block, watches what this process does below `root`, and keeps `images`: what would be
    left after each operation, had the power failed just then. Two disks are imagined, each the worst of its
    kind. One forgets names until their folder was synced; the other knows names at once, and of files only
    what was synced. An image is {path: bytes, or None for a folder}."""

    CALLS = ("fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir")

    def __init__(self, root):
        self.root, self.nodes, self.images, self.promised = Path(root), {}, [], None

    def __enter__(self):
        self.before = {name: getattr(os, name) for name in self.CALLS}
        self._synced(self.root)
        for name in self.CALLS:
            setattr(os, name, self._watch(name))
        return self

    def __exit__(self, *error):
        for name, call in self.before.items():
            setattr(os, name, call)

    def _watch(self, name):
        def call(*args, **kwargs):
            if name in ("unlink", "remove", "rmdir", "replace", "rename"):
                self._forget(args[-1] if name in ("replace", "rename") else args[0], kwargs.get("dir_fd"))
            result = self.before[name](*args, **kwargs)
            if name == "fsync":
                self._synced(Path(os.readlink(f"/proc/self/fd/{args[0]}")))
            for image in (self._by_folder(self.nodes[self._key(self.root)], ""), self._by_name()):
                if (image, self.promised) not in self.images[-4:]:
                    self.images.append((image, self.promised))
            return result

        return call

    def _key(self, path):
        return os.lstat(path).st_ino

    def _node(self, path):
        return self.nodes.setdefault(self._key(path), _Node(path.is_dir()))

    def _forget(self, path, dir_fd):
        "Another file may get the number of one that goes."
        with contextlib.suppress(FileNotFoundError):
            self.nodes.pop(os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino, None)

    def _synced(self, path):
        if self.root != path and self.root not in path.parents:
            return
        node = self._node(path)
        node.held = {p.name: self._node(p) for p in path.iterdir()} if path.is_dir() else path.read_bytes()

    def _by_folder(self, node, path):
        image = {path: None}
        for name, child in node.held.items():
            below = f"{path}/{name}".lstrip("/")
            image.update(
                self._by_folder(child, below) if isinstance(child.held, dict) else {below: child.held}
            )
        return image

    def _by_name(self):
        image = {"": None}
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            image[name] = None if path.is_dir() else self._node(path).held
        return image


def lay_out(image, folder):
    "Writes an image as real files."
    for name, held in image.items():
        path = Path(folder) / name
        if held is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(held)


def record(scratch, data, epochs=2):
    "A run, with a state after every step, on a disk that forgets; gives the disk."
    from retinanet_nb import progress, training
    from retinanet_nb.voc import VOCDataset

    (Path(scratch) / "disk").mkdir()
    disk, whole, evaluate = LossyDisk(Path(scratch) / "disk"), training.Checkpoint.save, progress.evaluate
    scores = iter(range(1, 1 + epochs))  # every epoch the best so far, without the time to measure it

    def save(self, trainer, state):
        whole(self, trainer, state)
        disk.promised = (state.epoch, state.step)

    training.Checkpoint.save = save
    progress.evaluate = lambda *args, **kwargs: SimpleNamespace(voc07_map=next(scores) / 10)
    try:
        with disk:
            training.train(
                VOCDataset(data, "train")[:12],
                settings(epochs=epochs),
                VOCDataset(data, "val"),
                run=disk.root / "run",
                progress=False,
                checkpoint_minutes=0,
            )
    finally:
        training.Checkpoint.save, progress.evaluate = whole, evaluate
    return disk


class Reader:
    "Stands in for a trainer: reads all of a file of weights and does nothing with it."

    trainable_variables = variables = weights = metrics_variables = ()
    optimizer = SimpleNamespace(build=lambda variables: None)

    def load_weights(self, path):
        import h5py

        with h5py.File(path) as file:
            file.visititems(lambda name, item: item[()] if isinstance(item, h5py.Dataset) else None)


def check_images(disk, scratch):
    "Raises `AssertionError` where a power cut would have cost what was promised; returns how many cuts were tried, and states loaded."
    loaded = {}  # what lies in checkpoints → where the run stands then
    fsync, os.fsync = os.fsync, lambda number: None  # the images themselves need not last
    try:
        for n, (image, promised) in enumerate(disk.images):
            check_image(image, promised, Path(scratch) / "image", loaded)
            shutil.rmtree(Path(scratch) / "image")
    except AssertionError as error:
        raise AssertionError(f"cut {n}: {error}") from None
    finally:
        os.fsync = fsync
    return len(disk.images), len(loaded)


def check_image(image, promised, folder, loaded):
    "Raises `AssertionError` where what was promised isn't in `image`."
    from retinanet_nb.files import MANIFEST, claim
    from retinanet_nb.checkpoints import Checkpoint
    from retinanet_nb.runs import RUN_FILES, _read_config

    lay_out(image, folder)
    run = folder / "run"
    states = frozenset((k, v) for k, v in image.items() if "/checkpoints" in k)
    if promised and states not in loaded:
        state = Checkpoint(run).load(Reader())
        loaded[states] = (state.epoch, state.step) if state else (0, -1)
    assert not promised or loaded[states] >= promised, f"{loaded[states]} is left of {promised}"
    if not (run / "config.json").exists():
        assert not promised, "config.json is lost"
        return
    _read_config(run / "config.json")
    with claim(run, RUN_FILES, adopt=not (run / MANIFEST).exists()):
        for path in run.glob("[!.]*.keras"):
            assert zipfile.is_zipfile(path), f"{path.name} is damaged"
        if (run / "history.json").exists():
            json.loads((run / "history.json").read_text())


def power_cuts(scratch, data):
    "Records a run and tries a power cut after each of its operations; gives how many, and how many different sets of states they left."
    return check_images(record(scratch, data), scratch)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        survive(int(sys.argv[1]) if len(sys.argv) > 1 else 10, scratch)
        cuts, states = power_cuts(Path(scratch), Path(scratch) / "shapes")
        print(f"{cuts} power cuts, which left {states} different sets of states: nothing lost")
