"""What each optimisation gives on this machine: `make bench`, minutes. Every line is a ratio of two ways to do one thing (below 1: the second is slower here), measured
alternately in one run, so that a busy machine slows both. Nothing here passes or fails; the tests do that.

`make bench ARGS='nms step'` measures only lines whose key contains one of the words.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

BENCHES = {}


def bench(key, text):
    "Register a function that gives `(slow, fast)`, two functions without arguments that do the same thing."

    def add(f):
        BENCHES[key] = text, f
        return f

    return add


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def compare(slow, fast, seconds=12):
    "Medians of alternating runs, after one of each that is not counted (it compiles)."
    slow(), fast()
    pairs, start = [], time.perf_counter()
    while len(pairs) < 3 or (time.perf_counter() - start < seconds and len(pairs) < 50):
        pairs.append((timed(slow), timed(fast)))
    return statistics.median(s for s, _ in pairs), statistics.median(f for _, f in pairs), len(pairs)


def compiled(f):
    "`f` as the engine runs it inside a model: a graph under TensorFlow, XLA under JAX, as it is under PyTorch."
    import keras

    engine = keras.backend.backend()
    if engine == "tensorflow":
        import tensorflow as tf

        return tf.function(f)
    if engine == "jax":
        import jax

        return lambda *x, _f=jax.jit(f): jax.block_until_ready(_f(*x))
    return f


def crowd(batch, n, classes, seed=0):
    "Boxes in clumps, as a detector gives them: boxes (B, n, 4), scores (B, n), labels (B, n)."
    rng = np.random.default_rng(seed)
    centre = rng.uniform(50, 450, (batch, n // 10, 1, 2)) + rng.normal(0, 6, (batch, n // 10, 10, 2))
    size = rng.uniform(20, 90, (batch, n // 10, 1, 2)) * rng.uniform(0.8, 1.25, (batch, n // 10, 10, 2))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], -1).reshape(batch, n, 4)
    return (
        boxes.astype("float32"),
        rng.uniform(0.05, 1, (batch, n)).astype("float32"),
        rng.integers(0, classes, (batch, n)).astype("int32"),
    )


def sequential(boxes, scores, labels, threshold, limit):
    "Greedy suppression, one box after the other, in NumPy."
    kept = []
    for picture, (b, s, c) in enumerate(zip(boxes, scores, labels)):
        kept.append([])
        area = np.prod(b[:, 2:] - b[:, :2], axis=1)
        for i in np.argsort(-s, kind="stable"):
            free = True
            for j in kept[picture]:
                if c[i] != c[j]:
                    continue
                width, height = np.minimum(b[i, 2:], b[j, 2:]) - np.maximum(b[i, :2], b[j, :2])
                shared = max(width, 0) * max(height, 0)
                if shared > threshold * (area[i] + area[j] - shared):
                    free = False
                    break
            if free:
                kept[picture].append(i)
            if len(kept[picture]) == limit:
                break
    return kept


@bench("nms", "suppression of 8 x 1000 boxes: one after the other in NumPy / vectorised")
def _():
    from retinanet_nb.filtering import non_max_suppression

    boxes, scores, labels = crowd(8, 1000, 20)
    run = compiled(lambda b, s, c: non_max_suppression(b, s, c, 0.5, 100))
    return lambda: sequential(boxes, scores, labels, 0.5, 100), lambda: np.asarray(run(boxes, scores, labels))


@bench("iou", "overlap of 5000 x 50 boxes: a loop over the objects in NumPy / one expression")
def _():
    from retinanet_nb.boxes import overlaps

    boxes = crowd(1, 5050, 2)[0][0]
    a, b = boxes[:5000], boxes[5000:]

    def loop():
        out = np.zeros((len(a), len(b)), "float32")
        for k, x in enumerate(b):
            shared = np.clip(np.minimum(a[:, 2:], x[2:]) - np.maximum(a[:, :2], x[:2]), 0, None).prod(1)
            out[:, k] = shared / ((a[:, 2:] - a[:, :2]).prod(1) + (x[2:] - x[:2]).prod() - shared)
        return out

    run = compiled(overlaps)
    return loop, lambda: np.asarray(run(a, b))


def _trainer(precision, size=(160, 160), backbone="tiny"):
    "A function that does one training step on drawn pictures."
    import keras
    from retinanet_nb.hyperparameters import preset
    from retinanet_nb.retinanet import retinanet_model
    from retinanet_nb.shapes import SHAPE_CLASSES, draw_scene
    from retinanet_nb.training import RetinaNetTrainer, make_optimizer

    h = preset("tiny").replace(precision=precision, image_size=size, backbone=backbone)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        model = retinanet_model(len(SHAPE_CLASSES), h, SHAPE_CLASSES)
    finally:
        keras.config.set_dtype_policy(before)
    trainer = RetinaNetTrainer(model)
    trainer.compile(optimizer=make_optimizer(h, 1000), jit_compile=keras.backend.backend() == "jax")
    rng = np.random.default_rng(0)
    images = np.stack([draw_scene(np.random.default_rng(k), size)[0] for k in range(8)])
    corner = rng.uniform(0, 90, (8, 4, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 60, (8, 4, 2))], -1).astype("float32")
    batch = images, {"boxes": boxes, "labels": rng.integers(0, len(SHAPE_CLASSES), (8, 4)).astype("int32")}
    return lambda: trainer.train_on_batch(*batch)


@bench("step", "one training step, 8 pictures of 160 x 160, small preset: float32 / bfloat16")
def _():
    return _trainer("float32"), _trainer("mixed_bfloat16")


@bench("resnet-step", "one training step, 8 pictures of 160 x 160, ResNet50: float32 / bfloat16")
def _():
    return _trainer("float32", backbone="resnet50"), _trainer("mixed_bfloat16", backbone="resnet50")


@bench("batch", "detection in 16 pictures of 160 x 160: one at a time / as one batch")
def _():
    from retinanet_nb.hyperparameters import preset
    from retinanet_nb.retinanet import retinanet_model
    from retinanet_nb.retinanet_box import retinanet_box

    detector = retinanet_box(retinanet_model(5, preset("tiny")))
    images = np.random.default_rng(0).integers(0, 255, (16, 160, 160, 3)).astype("uint8")
    return lambda: [
        detector.predict_on_batch(images[i : i + 1]) for i in range(16)
    ], lambda: detector.predict_on_batch(images)


@bench("threads", "reading and augmenting 64 pictures: one thread / as many as there are cores")
def _():
    import atexit, shutil, tempfile
    from pathlib import Path
    from retinanet_nb.generator import train_generator
    from retinanet_nb.hyperparameters import preset
    from retinanet_nb.shapes import make_shapes
    from retinanet_nb.voc import VOCDataset

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dataset = VOCDataset(make_shapes(folder / "shapes", train=64, val=1, test=1, size=(480, 640)), "train")

    def read(workers):
        generator = train_generator(
            dataset, preset("tiny").replace(image_size=(480, 640)), 8, training=True, workers=workers
        )

        def run():
            if workers == 1:
                return [generator[i] for i in range(len(generator))]
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(generator.__getitem__, range(len(generator))))

        return run

    from concurrent.futures import ThreadPoolExecutor

    return read(1), read(os.cpu_count() or 2)


@bench("reach", "best anchor of 200 objects on a 512 x 512 canvas: all overlaps / nearest cells only")
def _():
    from retinanet_nb.anchors import anchors_for_shape
    from retinanet_nb.evaluation import iou_matrix
    from retinanet_nb.inspection import best_overlaps

    boxes, anchors = crowd(1, 200, 1)[0][0], np.asarray(anchors_for_shape((512, 512)))
    return lambda: iou_matrix(boxes, anchors).max(1), lambda: best_overlaps(boxes, (512, 512))


@bench("coco", "COCO's figures of 500 pictures with 100 detections each: pycocotools / faster-coco-eval")
def _():
    from types import SimpleNamespace
    from retinanet_nb.evaluation import coco_metrics
    from retinanet_nb.prediction import Found

    rng = np.random.default_rng(0)
    found = [Found(b[0], s[0], l[0]) for b, s, l in (crowd(1, 100, 20, seed) for seed in range(500))]
    truth = [
        SimpleNamespace(boxes=f.boxes[:8] + rng.normal(0, 3, (8, 4)), labels=f.labels[:8]) for f in found
    ]
    return lambda: coco_metrics(found, truth, 20, "pycocotools"), lambda: coco_metrics(
        found, truth, 20, "faster_coco_eval"
    )


def main(words):
    import keras

    print(
        f"{os.cpu_count()} cores, {keras.backend.backend()}, keras {keras.__version__}; medians of alternating runs\n"
    )
    print(f"{'':12} {'first':>10} {'second':>10} {'ratio':>7}  runs")
    for key, (text, make) in BENCHES.items():
        if words and not any(word in key for word in words):
            continue
        try:
            slow, fast, runs = compare(*make())
        except (ImportError, FileNotFoundError) as error:
            print(f"{key:12} left out: {error}")
            continue
        print(
            f"{key:12} {slow * 1e3:7.1f} ms {fast * 1e3:7.1f} ms {slow / fast:6.1f}x  {runs:4}   {text}",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
