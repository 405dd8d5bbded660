"""Every notebook runs top to bottom in a process of its own, without a network and without `RETINANET_DATA`, and its
saved outputs are of the kinds that such a run gives. Cells with `#| slow` or `#| eval: false` are left out."""

import atexit
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

import book

PAGES = [
    p.relative_to(book.ROOT / "nbs").as_posix()
    for p in book.notebooks()
    if any(c["cell_type"] == "code" for c in book.read(p)["cells"])
]
LIMIT = {"07b_training.ipynb": 540}  # seconds for one cell, generous: a slow machine is no fault of the book
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def untracked(root):
    "Files that git knows nothing of; None outside a git checkout."
    run = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], cwd=root, capture_output=True, text=True
    )
    return None if run.returncode else {line[3:] for line in run.stdout.splitlines() if line.startswith("??")}


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind():
    "Running the book leaves no file in the checkout."
    before = untracked(book.ROOT)
    yield
    if before is not None:
        assert not untracked(book.ROOT) - before, "running the notebooks left files in the checkout"


# --- a process for each page -----------------------------------------------------------------------------------------

# TensorFlow takes four seconds to import. Where there is fork, one process does that and nothing else, and every kernel
# is a copy of it; until the first operation there are no threads that a copy would lack.
FORKED = sys.platform == "linux"
if FORKED:
    SERVER = multiprocessing.get_context("forkserver")
    SERVER.set_forkserver_preload(["tensorflow", "ipykernel.kernelapp"])


def kernel(words, folder, environment, ready):
    "What `python -m ipykernel_launcher` does."
    os.setsid()  # a kernel is killed with all of its group
    ready.send(True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
    sys.argv[:] = words
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here]  # the book has no tests to import
    import matplotlib
    from ipykernel import kernelapp

    # Keras has imported matplotlib, which asked the environment of that time how to draw
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    kernelapp.launch_new_instance()
    atexit._run_exitfuncs()  # such a process leaves without


class Kernel:
    "A forked kernel, as jupyter_client knows those that it starts itself."

    stdin = stdout = stderr = None

    def __init__(self, words, env, cwd, **_):
        words = words[words.index("-f") - 1 :]
        ready, theirs = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=kernel, args=(words, cwd, dict(env), theirs))
        self.process.start()
        assert ready.recv()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    "A copy of the notebooks' folder to run in, and a reader's environment: no data, no network beyond this machine."
    shutil.copytree(
        book.ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*", "runs", "_quarto.yml")
    )
    shutil.copy(book.ROOT / "settings.ini", tmp_path)
    monkeypatch.delenv("RETINANET_DATA", raising=False)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, inline
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "localhost,127.0.0.1")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    # console commands called by a page are those beside this Python
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    return tmp_path / "nbs"


def kinds(outputs):
    "What kinds of output a cell shows, without order or number: printing may come in one piece or in several."
    found = set()
    for output in outputs:
        if output["output_type"] == "stream":
            # TensorFlow greets on the process's error stream, and no setting stops it; whether a kernel shows that depends on the platform
            text = output["text"] if isinstance(output["text"], str) else "".join(output["text"])
            if output["name"] == "stdout" or not all(
                book.GREETING.match(line) for line in text.splitlines() if line.strip()
            ):
                found.add(output["name"])
        elif output["output_type"] in ("display_data", "execute_result"):
            found.update(k for k in output["data"] if not k.startswith("text/"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_notebook_runs(page, reader, monkeypatch):
    nb = nbformat.read(reader / page, 4)
    # a page that looks at what is imported gets a process that has imported nothing
    if FORKED and "sys.modules" not in (reader / page).read_text(encoding="utf-8"):
        monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", Kernel)
    saved, skipped = [cell.get("outputs", []) for cell in nb.cells], []
    for k, cell in enumerate(nb.cells):
        if cell.cell_type == "code" and book.is_skipped(cell):
            cell.source = ""
            skipped.append(k)
    client = NotebookClient(
        nb,
        timeout=LIMIT.get(page, 300),
        kernel_name="python3",
        resources={"metadata": {"path": str((reader / page).parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        pytest.fail(f"{page}:\n{ANSI.sub('', str(error))[-8000:]}", pytrace=False)
    except CellTimeoutError as error:
        pytest.fail(
            f"{page}: a cell took more than {client.timeout} s\n{ANSI.sub('', str(error))[-2000:]}",
            pytrace=False,
        )
    except DeadKernelError as error:
        pytest.fail(f"{page}: the kernel died ({error}); memory?", pytrace=False)
    stale = [
        f"the cell\n{cell.source}\nwas saved with {sorted(kinds(old)) or 'nothing'} and gives {sorted(kinds(cell.outputs)) or 'nothing'}"
        for k, (cell, old) in enumerate(zip(nb.cells, saved))
        if cell.cell_type == "code" and k not in skipped and kinds(cell.outputs) != kinds(old)
    ]
    assert not stale, (
        f"{page}: its saved outputs are not those of a run; execute and save it again.\n" + "\n".join(stale)
    )
