"""Two processes on one machine, or two devices of one process, train as one does: `python tests/machines.py [FOLDER]` (needs JAX;
about five minutes on two cores).

A run by one process is compared with one by two processes that share its batches, with one on two devices (into which XLA divides
the processor), with one that was killed with two processes, resumed and interrupted with one, and resumed again with two, and with
one that was interrupted on one device and went on with two. Everything that is left must be equal to 1e-5. The suite runs the first
three for one epoch."""

import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
# compiling is most of the work here: quick rather than good
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

WORKER = """
import os
import sys
sys.modules["tensorflow"] = None
from retinanet_nb.team import join_team
folder, name, epochs, resume, what, step = sys.argv[1:]
devices = os.environ.get("DEVICES")
devices = int(devices) if devices else None
team = join_team(devices)
import signal
import keras
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.training import train
from retinanet_nb.voc import VOCDataset
from helpers import short_backbone

class Act(keras.callbacks.Callback):
    steps = 0
    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == int(step) and team.rank == team.count - 1:
            if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if what == "interrupt": signal.raise_signal(signal.SIGINT)

h = HyperParameters(
    backbone=short_backbone(), feature_size=16, subnet_depth=1, image_size=(64, 64), optimizer="sgd", learning_rate=1e-3, weight_decay=0.01,
    batch_norm_momentum=0.9, batch_size=4, epochs=int(epochs), ema_momentum=0.9, max_detections=20, pre_nms_top_k=50,
)
data = folder + "/shapes"
val = VOCDataset(data, "val") if int(epochs) > 1 else None
run = train(VOCDataset(data, "train"), h, val, run=folder + "/" + name, resume=resume == "resume", callbacks=[Act()],
            checkpoint_minutes=0, progress=False, devices=devices)
devices = 1 if team.distribution is None else team.distribution.device_mesh.devices.size
print("ended" if not run.interrupted else "interrupted", len(run.history), run.step, "on", devices)
"""


def pictures(folder, train=16, val=3):
    "Where all runs find their pictures."
    from retinanet_nb.shapes import make_shapes

    return make_shapes(Path(folder) / "shapes", train=train, val=val, test=1, size=(64, 64), seed=3)


def _port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(folder, name, processes, epochs=2, resume=False, what="nothing", step=0, devices=None, timeout=900):
    "One run by that many processes; (status, output, errors) of each. `what` happens to the last one at `step`."
    arguments = [str(folder), name, str(epochs), "resume" if resume else "fresh", what, str(step)]
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "XLA_FLAGS": QUICK + (f" --xla_force_host_platform_device_count={devices}" if devices else ""),
        "DEVICES": str(devices or ""),
        # what is the same in two runs is compiled once
        "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    if processes > 1:
        environment["KERAS_DISTRIBUTION_NUM_PROCESSES"] = str(processes)
        environment["KERAS_DISTRIBUTION_JOB_ADDRESSES"] = f"127.0.0.1:{_port()}"
    begun = []
    for rank in range(processes):
        own = {**environment, "KERAS_DISTRIBUTION_PROCESS_ID": str(rank)} if processes > 1 else environment
        begun.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, *arguments],
                env=own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told = [p.communicate(timeout=timeout) for p in begun]
    finally:
        for p in begun:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(begun, told)]


def arrays(path):
    "Every array of a model or of a state."
    import h5py

    found = {}

    def take(name, value):
        if isinstance(value, h5py.Dataset):
            found[name] = np.array(value, np.float64)

    file = path
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as whole:
            file = io.BytesIO(whole.read("model.weights.h5"))
    with h5py.File(file) as f:
        f.visititems(take)
    return found


def difference(folder, first, second):
    "The largest difference between what two runs have left."
    most = 0.0
    names = [
        "last.keras",
        *(p.relative_to(folder / first) for p in (folder / first).glob("checkpoints/*/*.h5")),
    ]
    for name in names:
        one, other = (arrays(folder / run / name) for run in (first, second))
        assert one.keys() == other.keys() and len(one) > 40
        most = max(most, *(np.abs(one[k] - other[k]).max() for k in one))
    return most


def ended(results, words="ended"):
    "All processes ended in that way, or their errors."
    for status, output, errors in results:
        assert status == 0 and words in output, f"{status}\n{output[-500:]}\n{errors[-3000:]}"


def main(folder):
    folder = Path(folder)
    pictures(folder)
    ended(run(folder, "one", 1))
    ended(run(folder, "two", 2))
    print(f"two processes, half the batch each: {difference(folder, 'one', 'two'):.1e}")
    ended(run(folder, "devices", 1, devices=2), "on 2")
    print(f"two devices in one process: {difference(folder, 'one', 'devices'):.1e}")
    (first, output, errors), (second, *_) = run(folder, "cut", 2, what="kill", step=2)
    assert second == -signal.SIGKILL and first == 1 and "another worker of this run has ended" in errors, (
        errors[-2000:]
    )
    print(f"one killed; the other: {errors.strip().splitlines()[-1]}")
    ended(run(folder, "cut", 1, resume=True, what="interrupt", step=2), "interrupted 0 3")
    ended(run(folder, "cut", 2, resume=True))
    print(
        f"killed with two, resumed with one, interrupted, resumed with two: {difference(folder, 'one', 'cut'):.1e}"
    )
    ended(run(folder, "grown", 1, what="interrupt", step=2), "interrupted 0 2")
    ended(run(folder, "grown", 1, resume=True, devices=2), "on 2")
    print(f"interrupted on one device, resumed with two: {difference(folder, 'one', 'grown'):.1e}")
    assert max(difference(folder, "one", other) for other in ("two", "devices", "cut", "grown")) < TOLERANCE
    print(f"equal to {TOLERANCE:g}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(scratch)
