"""How fast it is on this machine: `make bench`, about ten minutes. Every group compares ways to do one thing, each in a process of its own engine, and the processes take turns in
short rounds, so that a busy machine slows all of them. What counts are the ratios. Nothing here passes or fails; the tests do that.

    make bench                                  # all groups
    make bench ARGS='detect filtering'          # groups whose key contains one of the words
    make bench ARGS='--json nbs/results/speed.json'    # also for the page "How fast"

Peers are left out, and said, where they aren't installed. KerasHub: `pip install --no-deps keras-hub tokenizers`. torchvision: `pip install --no-deps torchvision` beside PyTorch
for processors, with the stand-in for its compiled suppression of tests/torchvision_reference.py. The input pipeline is measured on VOC2007 where RETINANET_DATA has it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("keras", "tensorflow", "jax", "torch", "torchvision", "keras-hub", "openvino", "onnxruntime")


@dataclass
class Line:
    "One way to do the thing of a group."

    name: str
    engine: str  # its process
    part: str  # of tests/bench_lines.py
    given: dict = field(default_factory=dict)  # for the part
    count: int = 1  # things done in one call


@dataclass
class Group:
    "Ways to do one thing, the first one the yardstick."

    key: str
    title: str
    unit: str  # "s" or "ms" for one thing, or "a second" for things
    lines: list
    rounds: int = 5
    seconds: float = 0.5  # a line and round
    most: int = 20  # calls a line and round
    own: bool = False  # processor time of the one thread instead of time on the clock


def detection(precision):
    given = {"precision": precision}
    ours = lambda name, engine, **more: Line(f"ours, {name}", engine, "detect", {**given, **more})
    return Group(
        f"detect-{precision}",
        f"detection, a picture of 512×512, 20 classes, ResNet50, {precision}",
        "s",
        [
            Line("torchvision", "torchvision", "torchvision_detect", given),
            Line(
                "torchvision, channels last",
                "torchvision",
                "torchvision_detect",
                {**given, "channels_last": True},
            ),
            Line("KerasHub, TensorFlow", "kerashub", "kerashub_detect", given),
            ours("TensorFlow", "tensorflow"),
            ours("TensorFlow, BatchNorm folded", "tensorflow", fold=True),
            ours("TensorFlow, a snapshot", "tensorflow", settled=True),
            ours("JAX", "jax"),
            ours("PyTorch", "torch"),
            ours("PyTorch, BatchNorm folded", "torch", fold=True),
            Line("ours, exported to OpenVINO", "openvino", "openvino_detect", given),
            Line("floor: one matrix product of as many operations", "tensorflow", "product", given),
        ],
    )


def training(precision, frozen):
    given = {"precision": precision}
    both = {**given, "frozen": frozen}
    name = "stem, C2 and BatchNorm frozen" if frozen else "all weights"
    peers = [
        Line("torchvision", "torchvision", "torchvision_train", {**both, "channels_last": False}, count=2),
        Line("torchvision, channels last", "torchvision", "torchvision_train", both, count=2),
    ]
    if not frozen:
        peers.append(Line("KerasHub, TensorFlow", "kerashub", "kerashub_train", given, count=2))
    engines = {"TensorFlow": "tensorflow", "JAX": "jax", "PyTorch": "torch"}
    ours = [Line(f"ours, {name}", engine, "train", both, count=2) for name, engine in engines.items()]
    return Group(
        f"train-{'frozen' if frozen else 'all'}-{precision}",
        f"training step, for each of 2 pictures of 512×512, ResNet50, {name}, {precision}",
        "s",
        peers + ours,
        rounds=3,
        seconds=0,
    )


ENGINES = {"TensorFlow": "tensorflow", "JAX": "jax", "PyTorch": "torch"}


def filtering(batch):
    lines = [
        Line(name, engine, "filtering", {"batch": batch}, count=batch) for name, engine in ENGINES.items()
    ]
    lines.append(
        Line("NumPy, of exported files", "openvino", "numpy_filtering", {"batch": batch}, count=batch)
    )
    return Group(
        f"filtering-{batch}",
        f"filtering at its worst: 49,104 anchors × 20 classes above the threshold, a picture in batches of {batch}",
        "ms",
        lines,
    )


def growth():
    def ours(key, title, values, **fixed):
        lines = [
            Line(f"{title} {v}", "tensorflow", "detect", {**fixed, key: v}, v if key == "batch" else 1)
            for v in values
        ]
        return Group(
            f"growth-{key}", f"detection by {title}, TensorFlow, bfloat16, a picture", "s", lines, 3, 0.3
        )

    low = {"precision": "bfloat16"}
    counts = [
        Line(f"{n} objects a picture", "tensorflow", "assignment", {"count": n}) for n in (1, 10, 100, 300)
    ]
    return [
        ours("size", "side", (256, 384, 512, 768), **low),
        ours("batch", "batch of", (1, 2, 4, 8), **low),
        ours("classes", "classes:", (1, 20, 80, 320), **low),
        Group("growth-objects", "assigning targets to 2 pictures of 512×512, TensorFlow", "ms", counts),
    ]


def starting():
    words = {
        "python -c pass": ["-c", "pass"],
        "import numpy, cv2": ["-c", "import numpy, cv2"],
        "import retinanet_nb": ["-c", "import retinanet_nb"],
        "import retinanet_nb.hyperparameters": ["-c", "import retinanet_nb.hyperparameters"],
        "import retinanet_nb.retinanet_box": ["-c", "import retinanet_nb.retinanet_box"],
        "retinanet_detect x.onnx photo.jpg": [
            "-m",
            "retinanet_nb",
            "detect",
            "{onnx}",
            "{photo}",
            "--out",
            "{out}",
        ],
        "retinanet_detect x.keras photo.jpg": [
            *("-m", "retinanet_nb", "detect", "{shapes}", "{photo}", "--out", "{out}")
        ],
    }
    lines = [Line(name, "shell", "command", {"words": w}) for name, w in words.items()]
    return Group("start", "from start to end, in a new process", "s", lines, rounds=3, seconds=0)


def pairs():
    of = {
        "nms": ("suppression of 8 × 1000 boxes", "one after the other, NumPy", "in blocks"),
        "iou": ("overlap of 5000 × 50 boxes", "a loop over the objects, NumPy", "one expression"),
        "batch": ("detection in 16 pictures of 160×160, small preset", "one at a time", "as one batch"),
        "threads": ("reading and augmenting 64 pictures", "one thread", "as many as there are cores"),
        "reach": ("best anchor of 200 objects on 512×512", "all overlaps", "nearest cells only"),
        "coco": ("COCO's figures of 500 pictures, 100 detections each", "pycocotools", "faster-coco-eval"),
    }
    return [
        Group(
            f"way-{key}",
            title,
            "ms",
            [
                Line(name, "tensorflow", "pair", {"key": key, "fast": fast})
                for fast, name in enumerate((slow, quick))
            ],
            rounds=3,
        )
        for key, (title, slow, quick) in of.items()
    ]


def groups():
    "All that is measured, in this order."
    stages = {"read": "read", "fitted": "read, fitted to 512×512", "augmented": "read, colour, flip, fitted"}
    yield detection("float32")
    yield detection("bfloat16")
    for frozen in (False, True):
        for precision in ("float32", "bfloat16"):
            yield training(precision, frozen)
    yield filtering(1)
    yield filtering(8)
    yield Group(
        "pipeline",
        "pictures from file to batch, by one core",
        "a second",
        [Line(name, "pipeline", "pipeline", {"stage": s}, 8) for s, name in stages.items()],
        own=True,
    )
    yield starting()
    yield from growth()
    yield from pairs()


class Process:
    "An engine in a process of its own, which is asked one thing at a time."

    def __init__(self, engine, folder):
        backend = {"jax": "jax", "torch": "torch"}.get(engine, "tensorflow")
        env = {**os.environ, "KERAS_BACKEND": backend}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        call = [sys.executable, ROOT / "tests" / "bench_lines.py", engine, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(call, cwd=ROOT, env=env, text=True, **pipes)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"absent": "its process ended"}

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Bench:
    "The processes, and what they are asked."

    def __init__(self, folder, rounds=None):
        self.folder, self.rounds, self.processes, self.others = folder, rounds, {}, 0.0

    def process(self, engine):
        if engine not in self.processes or self.processes[engine].process.poll() is not None:
            self.processes[engine] = Process(engine, self.folder)
        return self.processes[engine]

    def measure(self, group):
        "Each line's times, or why there are none."
        found = self.make(group)
        there = [k for k, line in enumerate(found) if "absent" not in line]
        busy, start = self.at_work(), time.perf_counter()
        for _ in range(self.rounds or group.rounds):
            for k in there:
                process = self.process(group.lines[k].engine)
                process.ask(do="run", id=k, seconds=group.seconds, most=group.most, own=group.own)
                found[k]["times"] += process.answer().get("seconds", [])
                time.sleep(0.05)  # threads that still spin shall not disturb the next
        self.others = max(0.0, self.at_work() - busy) / (time.perf_counter() - start)
        for engine in {line.engine for line in group.lines}:
            self.process(engine).ask(do="forget")
            self.process(engine).answer()
        return [result(line, f, group) for line, f in zip(group.lines, found)]

    def make(self, group):
        "Have all lines built and run for the first time, the engines beside each other."
        for k, line in enumerate(group.lines):
            self.process(line.engine).ask(**{"do": "make", "id": k, "part": line.part, "with": line.given})
        return [{"times": [], **self.process(line.engine).answer()} for line in group.lines]

    def at_work(self):
        "Seconds of processor time that others than these processes had until now, and those that the machine's own host took."
        times = psutil.cpu_times()
        all_of_them = sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0)
        ours = [psutil.Process(), *(psutil.Process(p.process.pid) for p in self.processes.values())]
        return all_of_them - sum(sum(p.cpu_times()[:4]) for p in ours)

    def close(self):
        for process in self.processes.values():
            process.close()


def result(line, found, group):
    "What a line shows."
    told = {"name": line.name, "engine": line.engine}
    if not found["times"]:
        return {**told, "absent": found.get("absent", "no times")}
    one = statistics.median(found["times"]) / line.count
    value = 1 / one if group.unit == "a second" else one * {"s": 1, "ms": 1e3}[group.unit]
    times = sorted(found["times"])
    spread = (times[len(times) * 3 // 4] - times[len(times) // 4]) / line.count / one
    return {**told, "value": value, "runs": len(times), "spread": spread, "first": found["first"]}


def machine():
    "What it was measured on."
    model, flags = platform.processor() or platform.machine(), set()
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = next(
            line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")
        )
        flags = set(next(line for line in text.splitlines() if line.startswith("flags")).split())
    except (OSError, StopIteration):
        pass
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if f in flags]
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instructions": known,
        "python": sys.version.split()[0],
    }


def versions():
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def unfit(lines, others):
    "Lines of engines whose threads wait for each other (OpenMP) lose many times as much as others on a busy machine, and are left out there."
    if others <= 0.25 * os.cpu_count():
        return lines
    reason = f"no fair figure: others had {others:.1f} cores, and its threads wait for each other"
    waits = ("torch", "torchvision")
    return [
        {"name": line["name"], "engine": line["engine"], "absent": reason}
        if line["engine"] in waits and "value" in line
        else line
        for line in lines
    ]


def show(group, lines):
    "Print a group as a table; the ratio is that to its first line that is there."
    print(f"\n{group.key}: {group.title}")
    base = next((line["value"] for line in lines if "value" in line), None)
    for line in lines:
        if "absent" in line:
            print(f"  {line['name']:50}  left out: {line['absent'][:90]}")
            continue
        value = f"{line['value']:9.3f} s" if group.unit == "s" else f"{line['value']:8.1f} {group.unit}"
        print(
            f"  {line['name']:50}{value}{line['value'] / base:8.2f}   ± {line['spread'] / 2:4.0%}, {line['runs']} runs"
        )
    sys.stdout.flush()


def keep(path, about, measured):
    "Write what there is; groups of an earlier run that weren't measured again stay."
    older = json.loads(path.read_text())["groups"] if path.exists() else {}
    whole = {**about, "groups": {**older, **measured}}
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def chosen(words):
    "The groups whose key contains one of the words, in the order of the words; all where there are none."
    found = {}
    for word in words or [""]:
        found.update({group.key: group for group in groups() if word in group.key and group.key not in found})
    return found.values()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="groups whose key contains one of these")
    parser.add_argument(
        "--json", type=Path, help="file for the figures; groups that aren't measured stay in it"
    )
    parser.add_argument("--rounds", type=int, help="of each group; fewer than usual for a first look")
    given = parser.parse_args()
    options = [word for word in sys.argv[1:] if word != "--json" and word != str(given.json)]
    command = f"make bench ARGS='{' '.join(options)}'" if options else "make bench"
    about = {"command": command, "machine": machine(), "versions": versions()}
    print(json.dumps(about), flush=True)
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, given.rounds)
        try:
            for group in chosen(given.words):
                start = time.perf_counter()
                lines = unfit(bench.measure(group), bench.others)
                show(group, lines)
                measured[group.key] = {
                    "title": group.title,
                    "unit": group.unit,
                    "lines": lines,
                    "date": time.strftime("%Y-%m-%d"),
                    "others": round(bench.others, 2),
                    "seconds": round(time.perf_counter() - start, 1),
                }
                if given.json:
                    keep(given.json, about, measured)
        finally:
            bench.close()


if __name__ == "__main__":
    main()
