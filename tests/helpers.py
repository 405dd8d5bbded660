"""What several test files need: the small network, pictures drawn with a few lines, another process, a server."""

import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def small(**changes):
    """Hyperparameters of a network that builds and runs in a moment, after setting the seed its weights are drawn with."""
    import keras
    from retinanet_nb.hyperparameters import HyperParameters

    keras.utils.set_random_seed(0)
    return HyperParameters(
        **{"backbone": "tiny", "feature_size": 32, "subnet_depth": 1, "image_size": (128, 128), **changes}
    )


def short_backbone(dropout=0.0):
    """The name of a backbone with which TensorFlow makes the graph of a step in half the time: five convolutions
    `c1_conv`…`c5_conv` with BatchNorm, and dropout after the last where asked for.
    """
    import keras
    from retinanet_nb.resnet50 import BACKBONES, Backbone

    def build(weights=None):
        x = pictures = keras.Input((None, None, 3))
        for n, filters in enumerate((16, 16, 32, 32, 32), 1):
            x = keras.layers.Conv2D(filters, 3, 2, padding="same", use_bias=False, name=f"c{n}_conv")(x)
            x = keras.layers.BatchNormalization(name=f"c{n}_bn")(x)
            x = keras.layers.ReLU(name=f"c{n}")(x)
        return keras.Model(pictures, keras.layers.Dropout(dropout, name="dropped")(x) if dropout else x)

    name = "short_dropping" if dropout else "short"
    layers = ("c1", "c2", "c3", "c4", "dropped" if dropout else "c5")
    BACKBONES.setdefault(name, Backbone(build, "tf", layers))
    return name


def head_weights(model, num_classes, feature_size=32, num_anchors=9):
    """Kernel and bias of the last classification convolution and of the last regression one, found by the kernels' shapes."""
    weights = {w.path: w for w in model.weights}
    found = []
    for outputs in (num_classes * num_anchors, 4 * num_anchors):
        kernels = [path for path, w in weights.items() if tuple(w.shape) == (3, 3, feature_size, outputs)]
        assert len(kernels) == 1, (
            f"{len(kernels)} kernels of {outputs} filters: the heads are to be shared over the levels"
        )
        found += [weights[kernels[0]], weights[kernels[0].removesuffix("kernel") + "bias"]]
    return found


def excite(model, num_classes, feature_size=32, num_anchors=9, seed=0, size=(128, 128), pictures=None):
    """Give an untrained network something to say about `pictures` (noise of `size`): logits spread around -2, deltas around 0, different everywhere."""
    import keras

    # op by op is quick under TensorFlow and slow under JAX, where every operation compiles for itself
    run = model if keras.backend.backend() == "tensorflow" else model.predict_on_batch
    rng = np.random.default_rng(seed)
    ck, cb, rk, rb = head_weights(model, num_classes, feature_size, num_anchors)
    pictures = noise(2, size, seed) if pictures is None else pictures
    for kernel, bias, name, spread, middle in (
        (ck, cb, "classification", 1.5, -2.0),
        (rk, rb, "regression", 1.0, 0.0),
    ):
        kernel.assign(rng.normal(size=kernel.shape).astype("float32"))
        bias.assign(np.zeros(bias.shape, "float32"))
        out = numpy(run(pictures)[name]).astype("float64")
        kernel.assign(numpy(kernel) * spread / max(out.std(), 1e-6))
        bias.assign(np.full(bias.shape, middle, "float32"))
    return model


def noise(batch, size, seed=0):
    """Random uint8 pictures with patches of all sizes, so that all levels see something."""
    rng = np.random.default_rng(seed)
    height, width = size
    pictures = np.zeros((batch, height, width, 3))
    for cell in (1, 8, 32):
        coarse = rng.uniform(0, 85, (batch, -(-height // cell), -(-width // cell), 3))
        pictures += coarse.repeat(cell, 1).repeat(cell, 2)[:, :height, :width]
    return pictures.astype("uint8")


def drawn(batch, size=(128, 128), seed=0, objects=2):
    """Pictures of filled rectangles, red or blue: images (B, H, W, 3) uint8, boxes (B, M, 4) float32, labels (B, M) int32, -1 padding."""
    rng = np.random.default_rng(seed)
    height, width = size
    images = rng.integers(90, 130, (batch, height, width, 3)).astype("uint8")
    boxes, labels = np.full((batch, objects, 4), -1, "float32"), np.full((batch, objects), -1, "int32")
    for b in range(batch):
        for m in range(rng.integers(0, objects + 1)):
            w, h = rng.integers(30, 60, 2)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            label = int(rng.integers(0, 2))
            images[b, y : y + h, x : x + w] = (230, 30, 30) if label == 0 else (30, 30, 230)
            boxes[b, m], labels[b, m] = (x, y, x + w, y + h), label
    return images, boxes, labels


def numpy(x):
    """Any engine's tensor as an array; bfloat16 becomes float32."""
    import keras

    x = keras.ops.convert_to_tensor(x)
    return keras.ops.convert_to_numpy(
        keras.ops.cast(x, "float32") if keras.backend.standardize_dtype(x.dtype) == "bfloat16" else x
    )


def same_detections(first, second, pixels=1e-3, score=1e-4):
    """Both hold the same detections: equal labels, boxes and scores within the tolerances, in the same order up to equal scores."""
    for b, (boxes, scores, labels, boxes2, scores2, labels2) in enumerate(zip(*first, *second)):
        np.testing.assert_allclose(scores, scores2, rtol=0, atol=score, err_msg=f"scores of picture {b}")
        free = set(range(len(scores2)))
        for i in range(len(scores)):
            match = next(
                (
                    j
                    for j in sorted(free, key=lambda j: abs(j - i))
                    if labels[i] == labels2[j]
                    and abs(scores[i] - scores2[j]) <= score
                    and np.abs(boxes[i] - boxes2[j]).max() <= pixels
                ),
                None,
            )
            assert match is not None, (
                f"picture {b}: no partner for detection {i}: {boxes[i]}, {scores[i]}, {labels[i]}"
            )
            free.discard(match)


@functools.cache
def compiled():
    "A folder where JAX keeps what it has compiled until these tests end: a run that is resumed takes the step of the first."
    return tempfile.TemporaryDirectory()


def python(code, *arguments, timeout=900, **environment):
    """Run `code` in a new interpreter from the repository's root; returns what it printed, fails with its error."""
    if environment.get("KERAS_BACKEND") == "jax":
        environment["JAX_COMPILATION_CACHE_DIR"] = compiled().name
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    env = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        **environment,
    }
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, f"exit {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    return run.stdout


def archive_text(path):
    """The names inside a .keras file and its configuration as text."""
    import zipfile

    with zipfile.ZipFile(path) as z:
        return z.namelist(), json.dumps(json.loads(z.read("config.json")))


class Server:
    """Serves one body under every path of `url`; `cuts` are the numbers of bytes after which the first replies break off.

    `asked` holds what was asked for: paths and ranges.
    """

    def __init__(self, body, cuts=(), ranges=True, status=200, length=True, shift=0):
        outer = self
        self.asked, cuts = [], list(cuts)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                asked = self.headers.get("Range")
                outer.asked.append((self.path, asked))
                if status != 200:
                    return self.send_error(status)
                start = int(asked[6:-1]) if asked and ranges else 0
                if start >= len(body):
                    return self.send_error(416)
                rest = body[start:]
                self.send_response(206 if asked and ranges else 200)
                if length:
                    self.send_header("Content-Length", str(len(rest)))
                if asked and ranges and shift:
                    self.send_header("Content-Range", f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(rest[: cuts.pop(0)] if cuts else rest)
                self.close_connection = True

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def ranges(self):
        "The ranges that were asked for, None for the whole."
        return [asked for _, asked in self.asked]

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
