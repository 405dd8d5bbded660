"""Kernels that begin where an import has ended: TensorFlow takes seconds to import, in every notebook the same ones.

A server imports it once, uses nothing of it, and forks a child for every kernel. What Jupyter starts is `join` below,
a process of a moment that hands its environment to the server and lives as long as its kernel: killed, it takes the
kernel along. A page still has a process, an environment and a namespace of its own.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# not the back end that draws into the page: imported, it looks for the kernel
AHEAD = "import tensorflow, cv2, matplotlib.pyplot, ipykernel.kernelapp"


def serve(address):
    "In the server: a handler for every connection, until standard input closes."
    sys.path.pop(0)  # this folder, which no page finds anything in
    exec(AHEAD, {})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            os._exit(handle(connection))
        connection.close()


def handle(connection):
    "The kernel of one connection: ends when that closes, and tells its exit status."
    told, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    kernel = os.fork()
    if kernel == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
        become(**json.loads(told))
    status = None
    while status is None:
        if select.select([connection], [], [], 0.05)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(kernel, signal.SIGKILL)
        ended, code = os.waitpid(kernel, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(bytes([status % 256]))
    return 0


def become(file, folder, environment):
    "What `python -m ipykernel_launcher` does."
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from ipykernel import kernelapp

    sys.argv = ["ipykernel_launcher", "-f", file, f"--IPKernelApp.parent_handle={os.getppid()}"]
    status = 1
    try:
        kernelapp.launch_new_instance()
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def join(address, file):
    "What Jupyter starts in place of a kernel."
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    told = {"file": file, "folder": os.getcwd(), "environment": dict(os.environ)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socket.send_fds(connection, [json.dumps(told).encode()], [0, 1, 2])
    return (connection.recv(1) or b"\1")[0]


class Kernels:
    "The server, and its kernels for Jupyter under the name `forked`: put `path` into JUPYTER_PATH."

    def __init__(self):
        self.scratch = tempfile.TemporaryDirectory()  # pytest's own would be too long a name for a socket
        self.path, own = Path(self.scratch.name), [sys.executable, str(Path(__file__).resolve())]
        address = str(self.path / "socket")
        settings = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
        settings["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel sets it
        self.server = subprocess.Popen(
            [*own, "serve", address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=settings
        )
        assert self.server.stdout.readline() == b"ready\n", "the server of kernels did not start"
        line = [own[0], "-S", "-E", own[1], "join", address, "{connection_file}"]
        spec = self.path / "kernels" / "forked" / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": line, "display_name": "forked", "language": "python"}))

    def close(self):
        self.server.stdin.close()
        self.server.wait(60)
        self.scratch.cleanup()


if __name__ == "__main__":
    sys.exit({"serve": serve, "join": join}[sys.argv[1]](*sys.argv[2:]))
