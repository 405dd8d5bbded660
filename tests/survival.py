"""`python tests/survival.py [KILLS]`: a small training run is killed (SIGKILL) at random moments and resumed until it is done; it must
end with the very weights of the run that was left alone.

One process imports the engine without using it and forks a child for every attempt: a fork costs nothing, an import ten seconds. Building the
network takes longer than the steps of so small a run, and a kill there proves little, so four of five moments are drawn after the first step.
tests/test_training.py does the same with fewer kills."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


LIMIT = 400  # seconds for one attempt; a machine that needs more has other troubles


def run_once(folder, data, resume):
    "In a child of its own: the run, from its beginning or where it was cut."
    import keras

    from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters
    from retinanet_nb.training import train
    from retinanet_nb.voc import VOCDataset

    h = HyperParameters(
        backbone="tiny",
        feature_size=16,
        subnet_depth=1,
        image_size=(96, 96),
        optimizer="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=4,
        batch_norm_momentum=0.9,
        ema_momentum=0.9,
        batch_size=4,
        epochs=8,
        scale_jitter=(0.8, 1.3),
        color_jitter=0.3,
        anchors=AnchorParameters(sizes=(16, 32, 64, 128, 256)),
    )

    class Started(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            (Path(folder).parent / "started").touch()

    train(
        VOCDataset(data, "train"),
        h,
        VOCDataset(data, "val"),
        run=folder,
        resume=resume,
        progress=False,
        callbacks=[Started()],
    )


def attempt(folder, data, kill_after=None):
    """Starts or resumes the run in a child. `kill_after`: seconds after its first step, or, below 0, after its start.
    Returns whether it came to its end, the seconds up to its first step, and those since."""
    resume, sign = (Path(folder) / "config.json").exists(), Path(folder).parent / "started"
    sign.unlink(missing_ok=True)
    started, first = time.monotonic(), None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_once(folder, data, resume)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    while True:
        if first is None and sign.exists():
            first = time.monotonic()
        ended, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if (
            not ended
            and kill_after is not None
            and (now - started > -kill_after if kill_after < 0 else first and now - first > kill_after)
        ):
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
        if ended:
            break
        if now - started > LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"the run had not ended after {LIMIT} s")
        time.sleep(0.002)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0, "the run failed by itself, see above"
    return not killed, (first or now) - started, now - first if first else 0.0


def weights(folder):
    "Every array of the run's files, by name: the last and the best model, and the state to resume from (optimizer and averages too)."
    import zipfile

    import h5py

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
    for path in sorted((folder / "checkpoints").glob("epoch-*/state.weights.h5")):
        with h5py.File(path) as file:
            collect(path.parent.name, file)
    return found


def survive(kills, scratch, seed=0, say=print):
    "The whole experiment in the folder `scratch`. Raises `AssertionError` where the two runs end differently."
    import keras  # noqa: F401  imported before the forks, used only in them
    import numpy as np
    import retinanet_nb.training  # noqa: F401

    scratch, rng, data = Path(scratch), random.Random(seed), Path(scratch) / "shapes"
    # Drawn elsewhere: what uses threads before a fork may lock up after it.
    draw = "import sys; from retinanet_nb.shapes import make_shapes; make_shapes(sys.argv[1], train=16, val=4, test=1, size=(96, 96), seed=3)"
    subprocess.run([sys.executable, "-c", draw, data], check=True)
    _, setting_up, working = attempt(scratch / "whole", data)
    say(f"left alone: {setting_up:.1f} s to set up, then {working:.1f} s")
    alone, struck, n = weights(scratch / "whole"), 0, 0
    names = {p.name for p in (scratch / "whole").iterdir()}
    assert len(alone) > 100, "the run left too little to compare"
    while (
        struck < kills
    ):  # a run that comes to its end before the last kill is compared, and another one begun
        n, done = n + 1, False
        folder = scratch / f"cut-{n}"
        while not done:
            moment = (
                rng.uniform(0, 0.5) * working if rng.random() < 0.8 else -rng.uniform(0.02, 1) * setting_up
            )
            done, before, after = attempt(folder, data, moment if struck < kills else None)
            if done:
                break
            struck += 1
            newest = max((p.name for p in folder.glob("checkpoints/epoch-*")), default=None)
            if newest:
                json.loads((folder / "checkpoints" / newest / "history.json").read_text())  # it is whole
            say(
                f"kill {struck:2d} {f'{after:.2f} s after the first step' if after else f'{before:.2f} s after the start'}; newest complete checkpoint: {newest}"
            )
        found = weights(folder)
        assert found.keys() == alone.keys(), "the killed run left other files than the one left alone"
        differ = [name for name in alone if not np.array_equal(alone[name], found[name])]
        assert not differ, f"{len(differ)} of {len(alone)} arrays differ, the first is {differ[0]}"
        assert {p.name for p in folder.iterdir()} == names, (
            f"the killed run left {sorted(p.name for p in folder.iterdir())}"
        )
        say(f"run {n} came to its end: {len(alone)} arrays compared, 0 differ")
    return struck


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        survive(int(sys.argv[1]) if len(sys.argv) > 1 else 10, scratch)
