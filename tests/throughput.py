"""Ten thousand pictures through `retinanet_detect`: `python tests/throughput.py [--pictures 10000] [--drawn] [--only_json] [--model FILE] [--batch_size 8] [--json FILE]` (minutes; `--json nbs/results/throughput.json` for the page "How fast").

The pictures are those of VOC2007 in RETINANET_DATA, linked as often as it takes, or with `--drawn` five hundred of the book's own; one file in the middle is cut short. The rate
that everything is held against is the network's own: the same detector in a process of its own, asked for batches of the same size over and over while nothing else runs. The two take
turns: at the start and after every fifth of the pictures the command is stopped (SIGSTOP) for the seconds that the network alone is measured, and these seconds do not count.

Linux only: /proc knows the memory and the processor time.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "retinanet_nb" / "assets" / "shapes.keras"
TURNS = 5  # how often the network alone is measured
SECONDS = 6  # each time

NETWORK = """
import sys, time, numpy as np
from retinanet_nb.cli_detect import _any_detector
from retinanet_nb.pictures import fit_to_canvas, read_image
detector = _any_detector(sys.argv[1], pictures=10_000)
batch, seconds = int(sys.argv[2]), float(sys.argv[3])
size = detector.hyperparameters.image_size
images = np.stack([fit_to_canvas(read_image(p), size)[0] for p in sys.argv[4:]])
images = images[np.arange(batch) % len(images)]
for _ in range(5):
    detector.predict_on_batch(images)
print("ready", flush=True)
for line in sys.stdin:
    start, used, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        detector.predict_on_batch(images)
        done += batch
    print(done / (time.perf_counter() - start), (time.process_time() - used) / done, flush=True)
"""


class Network:
    "The detector alone, in a process that is asked for its rate."

    def __init__(self, model, batch_size, pictures):
        args = [sys.executable, "-c", NETWORK, str(model), str(batch_size), str(SECONDS), *map(str, pictures)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(args, cwd=ROOT, text=True, **pipes)
        if "ready" not in self.process.stdout.readline():
            raise RuntimeError("the network could not be measured")

    def rate(self):
        "Pictures a second, and seconds of processor time a picture."
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return tuple(map(float, self.process.stdout.readline().split()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def linked(folder, sources, count):
    "Links to the pictures, as often as it takes; the one in the middle is a file that is cut short."
    folder.mkdir()
    for k in range(count):
        path = folder / f"{k:06}{sources[0].suffix}"
        if k == count // 2:
            path.write_bytes(sources[0].read_bytes()[:2000])
        else:
            path.symlink_to(sources[k % len(sources)])
    return folder


def drawn(folder):
    "Five hundred pictures of the book's own."
    from retinanet_nb.shapes import make_shapes

    return sorted((make_shapes(folder, train=500, val=1, test=1) / "JPEGImages").iterdir())


def memory(pid):
    "Megabytes that a process holds now and held at most."
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split() for line in lines}
    return tuple(int(sizes[key][1]) / 1e3 for key in ("VmRSS", "VmHWM"))


def processor(pid):
    "Seconds of processor time that a process has used."
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch:
    "Follows the command: how far it is, what it holds, and the time without the pauses."

    def __init__(self, process, rows):
        self.pid, self.rows = process.pid, rows
        self.start, self.paused, self.samples = time.perf_counter(), 0.0, []
        self._read, self._lines = 0, 0

    def lines(self):
        "Rows that have been written so far."
        try:
            with open(self.rows, "rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return self._lines
        self._read, self._lines = self._read + len(new), self._lines + new.count(b"\n")
        return self._lines

    def sample(self):
        now = time.perf_counter() - self.start - self.paused
        try:
            self.samples.append((now, self.lines(), *memory(self.pid), processor(self.pid)))
        except (FileNotFoundError, ProcessLookupError, KeyError):
            pass  # it has ended
        return self._lines

    def pause(self, function):
        "What `function` gives while the process stands still."
        start = time.perf_counter()
        os.kill(self.pid, signal.SIGSTOP)
        try:
            return function()
        finally:
            os.kill(self.pid, signal.SIGCONT)
            self.paused += time.perf_counter() - start


def run(model, pictures, out, count, batch_size, network, extra=()):
    "The command; what was measured."
    command = [sys.executable, "-m", "retinanet_nb", "detect", str(model), str(pictures), "--out", str(out)]
    command += ["--batch_size", str(batch_size), *extra]
    rates = [network.rate()]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        watch = Watch(process, out / "detections.jsonl")
        while process.poll() is None:
            time.sleep(0.25)
            if watch.sample() > count * len(rates) / TURNS:
                rates.append(watch.pause(network.rate))
        whole = time.perf_counter() - watch.start - watch.paused
        said.seek(0)
        text = said.read()
    return measured(watch.samples, whole, rates, process.returncode, text, out)


def measured(samples, whole, rates, status, text, out):
    "The figures of a run."
    rows = json.loads((out / "detections.json").read_text())
    begun = [s for s in samples if s[1]]
    (t0, n0, *_, c0), (t1, n1, *_, c1) = begun[0], begun[-1]
    at = lambda share: min(begun, key=lambda s: abs(s[1] - share * len(rows)))[2]
    own, cost = (statistics.median(column) for column in zip(*rates))
    return {
        "rows": len(rows),
        "objects": sum(len(row["detections"]) for row in rows),
        "status": status,
        "said": text.strip().splitlines()[-1],
        "network": own,
        "network_rates": [rate for rate, _ in rates],
        "steady": (n1 - n0) / (t1 - t0),
        "whole": len(rows) / whole,
        "seconds": whole,
        "cores_busy": (c1 - c0) / (t1 - t0),
        # milliseconds of processor time a picture: hardly change with what else runs on the machine
        "cpu_network": 1e3 * cost,
        "cpu_command": 1e3 * (c1 - c0) / (n1 - n0),
        "share_steady": (n1 - n0) / (t1 - t0) / own,
        "share_whole": len(rows) / whole / own,
        "memory": {f"{share:.0%}": round(at(share)) for share in (0.1, 0.5, 1)},
        "memory_peak": round(max(s[3] for s in samples)),
    }


def add(path, found):
    "Put a run's figures into a file, in place of an older run of its kind."
    kind = lambda run: (run["pictures"], run["only_json"])
    older = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = sorted([*(r for r in older if kind(r) != kind(found)), found], key=kind)
    path.write_text(json.dumps({"cores": os.cpu_count(), "runs": runs}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--drawn", action="store_true", help="the book's own pictures")
    parser.add_argument("--only_json", action="store_true", help="no annotated pictures")
    parser.add_argument("--model", default=SHAPES)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--json", help="file for the figures")
    given = parser.parse_args()
    data = os.environ.get("RETINANET_DATA")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if given.drawn or not data:
            sources = drawn(folder / "shapes")
        else:
            sources = sorted((Path(data) / "voc2007" / "JPEGImages").iterdir())
        pictures = linked(folder / "pictures", sources, given.pictures)
        network = Network(given.model, given.batch_size, sources[: given.batch_size])
        extra = ["--only_json"] if given.only_json else []
        try:
            found = run(
                given.model, pictures, folder / "out", given.pictures, given.batch_size, network, extra
            )
        finally:
            network.close()
    what = "drawn" if given.drawn or not data else "VOC2007"
    found = {"pictures": what, "only_json": given.only_json, "date": time.strftime("%Y-%m-%d"), **found}
    found["said"] = found["said"].replace(str(folder), "…")
    print(json.dumps(found, indent=1))
    if given.json:
        add(Path(given.json), found)


if __name__ == "__main__":
    main()
