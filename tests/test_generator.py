"""The generator: boxes stay on their objects, and every batch is a function of (seed, epoch, index)."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from retinanet_nb.generator import (
    MIN_VISIBLE,
    BatchMaker,
    Order,
    Shelf,
    flip_horizontally,
    jitter_color,
    make_example,
    show_batch,
    train_generator,
    zoom_to_canvas,
)
from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.records import Record, Records

ROOT = Path(__file__).resolve().parent.parent


def find(image, channel):
    """The box of whatever is more than half bright in one colour channel, or None. Edges of pixels, so a mask of one pixel is one wide."""
    ys, xs = np.where(image[..., channel] > 127)
    return None if not len(xs) else np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float64)


@st.composite
def scenes(draw):
    """A black picture with a red, a green and a blue rectangle, side by side, and their boxes."""
    width, height = draw(st.integers(90, 260)), draw(st.integers(60, 240))
    image, boxes = np.zeros((height, width, 3), np.uint8), []
    third = width // 3
    for c in range(3):
        w, h = draw(st.integers(14, third - 4)), draw(st.integers(14, height - 4))
        x, y = c * third + draw(st.integers(0, third - w)), draw(st.integers(0, height - h))
        image[y : y + h, x : x + w, c] = 255
        boxes.append((x, y, x + w, y + h))
    return image, np.array(boxes, np.float32)


@given(scenes())
@settings(deadline=None, max_examples=40)
def test_flip_finds_its_objects(scene):
    image, boxes = scene
    mirrored, moved = flip_horizontally(image, boxes)
    for c in range(3):
        assert find(mirrored, c).tolist() == moved[c].tolist()
    again, back = flip_horizontally(mirrored, moved)
    assert (again == image).all() and (back == boxes).all()
    assert flip_horizontally(image, np.zeros((0, 4), np.float32))[1].shape == (0, 4)


@given(
    scenes(),
    st.floats(0.5, 2.0),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([(96, 128), (128, 96), (160, 160), (240, 200)]),
)
@settings(deadline=None, max_examples=80)
def test_zoom_finds_its_objects(scene, zoom, down, right, size):
    image, boxes = scene
    canvas, moved, share = zoom_to_canvas(image, boxes, size, zoom, (down, right))
    assert canvas.shape == (*size, 3) and moved.dtype == np.float32
    assert (
        (moved >= 0).all()
        and (moved <= [size[1], size[0]] * 2).all()
        and (share >= 0).all()
        and (share <= 1 + 1e-5).all()
    )
    for c in range(3):
        found = find(canvas, c)
        if found is None:  # cropped away, or a sliver that its neighbourhood swallowed
            assert min(moved[c, 2] - moved[c, 0], moved[c, 3] - moved[c, 1]) <= 1.5
        else:
            np.testing.assert_allclose(moved[c], found, rtol=0, atol=1.5)


@given(scenes(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=80)
def test_everything_together_finds_its_objects(scene, seed):
    image, boxes = scene
    hp = HyperParameters(image_size=(120, 160), flip=0.5, scale_jitter=(0.6, 2.0))
    canvas, found, labels = make_example(image, boxes, [0, 1, 2], hp, np.random.default_rng(seed))
    assert len(found) == len(labels)
    for box, label in zip(found, labels):
        np.testing.assert_allclose(box, find(canvas, label), rtol=0, atol=1.5)
    for lost in {0, 1, 2} - set(
        labels.tolist()
    ):  # only what the crop took: less than MIN_VISIBLE of it remains
        left = find(canvas, lost)
        if left is not None:
            x1, y1, x2, y2 = boxes[lost]
            scale = min(120 / image.shape[0], 160 / image.shape[1])
            bright = (canvas[..., lost] > 127).sum()
            assert bright <= MIN_VISIBLE * (x2 - x1) * (y2 - y1) * (2.0 * scale) ** 2 + 40


def test_a_box_worked_by_hand():
    image = np.zeros((100, 200, 3), np.uint8)
    # 100x200 onto 100x100 at zoom 2: the picture is 100x200 again, so the right half shows what stood 100 to the left
    canvas, boxes, share = zoom_to_canvas(
        image, [[90, 10, 130, 50], [0, 0, 50, 50]], (100, 100), 2.0, (0.0, 1.0)
    )
    assert boxes.tolist() == [[0, 10, 30, 50], [0, 0, 0, 50]] and share.tolist() == [0.75, 0.0]
    canvas, boxes, share = zoom_to_canvas(image, [[90, 10, 130, 50]], (100, 100), 1.0)
    assert boxes.tolist() == [[45, 5, 65, 25]] and share.tolist() == [1.0]


@given(st.floats(0.5, 1.5), st.floats(0.5, 1.5), st.floats(0.0, 2.0), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_color_against_its_definition(brightness, contrast, saturation, seed):
    image = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    x = image.astype(np.float64)
    grey = x @ [0.299, 0.587, 0.114]
    mean = grey.mean()
    x = grey[..., None] + saturation * (x - grey[..., None])
    x = brightness * (mean + contrast * (x - mean))
    np.testing.assert_allclose(
        jitter_color(image, brightness, contrast, saturation), np.clip(x, 0, 255), rtol=0, atol=0.88
    )  # rounding, ½, and OpenCV's ten-bit coefficients: 3 · 255 / 2¹¹ = 0.374
    assert (jitter_color(image) == image).all()


def test_no_augmentation_is_the_plain_picture():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    hp = HyperParameters(image_size=(60, 80), flip=0.0)
    for rng in (None, np.random.default_rng(1)):
        canvas, boxes, labels = make_example(image, [[1, 2, 30, 40]], [3], hp, rng)
        assert (canvas == image).all() and boxes.tolist() == [[1, 2, 30, 40]] and labels.tolist() == [3]
    hp = HyperParameters(image_size=(60, 80), flip=1.0)
    assert (make_example(image, [], [], hp, None)[0] == image).all()
    assert (make_example(image, [], [], hp, np.random.default_rng(1))[0] == image[:, ::-1]).all()


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng, records = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i in range(11):
        h, w = rng.integers(40, 90, 2)
        path = folder / f"{i:02}.png"
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)
        n = i % 4
        boxes = np.array([[2, 3, 20 + 2 * k, 30] for k in range(n)], np.float32).reshape(-1, 4)
        records.append(
            Record(
                path,
                w,
                h,
                boxes,
                np.arange(n),
                np.arange(n) == 2 if i == 3 else None,
                np.arange(n) == 1 if i == 7 else None,
            )
        )
    return Records(records, ["a", "b", "c"])


HP = HyperParameters(image_size=(64, 96), flip=0.5, scale_jitter=(0.8, 1.3), color_jitter=0.3)


def same(a, b):
    return (
        (a[0] == b[0]).all()
        and (a[1]["boxes"] == b[1]["boxes"]).all()
        and (a[1]["labels"] == b[1]["labels"]).all()
    )


def test_shapes_types_and_padding(pictures):
    g = train_generator(pictures, HP, 4, workers=2)
    assert (
        len(g) == 3 and g.max_objects == 2
    )  # the three objects of a picture are two targets: one is difficult or a crowd
    for images, targets in g:
        assert images.shape == (4, 64, 96, 3) and images.dtype == np.uint8
        assert targets["boxes"].shape == (4, g.max_objects, 4) and targets["boxes"].dtype == np.float32
        assert targets["labels"].shape == (4, g.max_objects) and targets["labels"].dtype == np.int32
        padding = targets["labels"] < 0
        assert (
            (targets["labels"][padding] == -1).all()
            and (targets["boxes"][padding] == -1).all()
            and (targets["boxes"][~padding] >= 0).all()
        )


def test_evaluation_keeps_order_and_a_short_last_batch(pictures):
    g = train_generator(pictures, HP, 4, training=False, workers=0)
    assert [len(x) for x, _ in g] == [4, 4, 3]
    assert [f for i in range(len(g)) for f in g.files(i)] == [r.image for r in pictures]
    g.set_epoch(5)
    assert same(
        g[0],
        train_generator(
            pictures, HP.replace(scale_jitter=(1, 1), color_jitter=0.0), 4, training=False, seed=9, workers=1
        )[0],
    )


def test_difficult_and_crowds_are_no_targets(pictures):
    g = train_generator(pictures, HP, 11, training=False, workers=0)
    labels = g[0][1]["labels"]
    assert [l[l >= 0].tolist() for l in labels[[2, 3, 6, 7, 10]]] == [[0, 1], [0, 1], [0, 1], [0, 2], [0, 1]]


def test_a_data_set_without_objects(pictures):
    g = train_generator(Records([pictures[0]], ["a"]), HP, 2)
    images, targets = g[0]
    assert images.shape[0] == 2 and targets["labels"].tolist() == [[-1], [-1]]


def test_every_picture_once_an_epoch_and_another_order_each_time(pictures):
    g = train_generator(pictures, HP, 4)
    orders = [np.concatenate([g.indices(i, epoch) for i in range(3)]) for epoch in range(4)]
    for order in orders:
        assert sorted(order[:11]) == list(range(11)) and order[11] == order[0]
    assert len({tuple(o) for o in orders}) == 4
    assert len(train_generator(pictures[:3], HP, 8).indices(0)) == 8


def test_a_function_of_seed_epoch_and_index(pictures):
    plain = train_generator(pictures, HP, 4, seed=3, workers=0)
    threads = train_generator(pictures, HP, 4, seed=3, workers=3)
    for epoch in (0, 1, 7):
        plain.set_epoch(epoch), threads.set_epoch(epoch)
        for i in (2, 0, 1, 1, 2):  # in any order, more than once
            assert same(plain[i], threads[i]) and same(plain[i], plain.batch(i, epoch))
    assert not same(plain.batch(0, 0), plain.batch(0, 1))
    assert not same(plain.batch(0, 0), train_generator(pictures, HP, 4, seed=4, workers=0).batch(0, 0))
    np.random.seed(0), np.random.rand(7)  # the global state has no say
    assert same(plain.batch(1, 7), threads.batch(1, 7))


FIT = """
import sys, numpy as np, keras
sys.path[:0] = [{tests!r}]
from pathlib import Path
from retinanet_nb.voc import Record, Records
from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.generator import train_generator
folder = Path({folder!r})
from PIL import Image
records = [Record(p, *Image.open(p).size, [[2, 3, 20, 30]], [0]) for p in sorted(folder.glob("*.png"))]
data, hp = Records(records, ["a"]), HyperParameters(image_size=(64, 96), scale_jitter=(0.8, 1.3), color_jitter=0.3)

class Sum(keras.Model):  # its weights depend on every picture seen and on their order
    def __init__(self):
        super().__init__()
        self.w = self.add_weight(shape=(3,), initializer="zeros")
    def call(self, x):
        return keras.ops.mean(keras.ops.cast(x, "float32") / 255, axis=(1, 2)) * (1 + self.w)
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y_pred - keras.ops.mean(y["boxes"]) / 30))

def model():
    m = Sum()
    m.compile(keras.optimizers.SGD(0.3), jit_compile=keras.backend.backend() == "jax")
    return m

def fit(m, g, callback=True, **kwargs):
    m.fit(g, shuffle=False, verbose=0, callbacks=[g.callback()] if callback else [], **kwargs)
    return keras.ops.convert_to_numpy(m.w)

make = lambda workers=2, n=None: train_generator(data if n is None else data[:n], hp, 4, seed=5, workers=workers)
g, m = make(0), model()
for epoch in range(4):
    for i in range(len(g)): m.train_on_batch(*g.batch(i, epoch))
by_hand = keras.ops.convert_to_numpy(m.w)
assert np.abs(by_hand).max() > 1e-3
for workers, callback in ((0, True), (3, True), (3, False)):
    w = fit(model(), make(workers), callback, epochs=4)
    assert np.allclose(w, by_hand, rtol=0, atol=1e-6), (workers, callback, w, by_hand)
m = model()
fit(m, make(), epochs=2)
w = fit(m, make(), initial_epoch=2, epochs=4)  # resumed with a fresh generator
assert np.allclose(w, by_hand, rtol=0, atol=1e-6), ("resumed", w, by_hand)
m, g = model(), make()  # stopped inside epoch 2, and resumed at that very batch
fit(m, g, epochs=2)
m.train_on_batch(*g.batch(0, 2))
g = make()
g.set_epoch(2, start=1)
fit(m, g, initial_epoch=2, epochs=3)
assert g.epoch == 3 and g.start == 0 and len(g) == g.batches
w = fit(m, g, initial_epoch=3, epochs=4)
assert np.allclose(w, by_hand, rtol=0, atol=1e-6), ("resumed inside an epoch", w, by_hand)
w = fit(model(), make(), epochs=4, validation_data=train_generator(data, hp, 4, training=False))
assert np.allclose(w, by_hand, rtol=0, atol=1e-6), ("with validation", w, by_hand)
print(keras.backend.backend(), "equal")
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_fit_uses_the_numbers_of_its_epoch(pictures, backend):
    """`fit` with any number of threads, whole or in two parts, ends where a plain loop over the batches ends."""
    pytest.importorskip(backend)
    code = FIT.format(tests=str(ROOT / "tests"), folder=str(Path(pictures[0].image).parent))
    env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{backend} equal" in done.stdout


def test_starts_inside_an_epoch(pictures):
    for workers in (0, 2):
        g = train_generator(pictures, HP, 3, seed=3, workers=workers)
        assert (len(g), g.batches, g.start) == (4, 4, 0)
        g.set_epoch(2, start=1)
        assert (len(g), g.batches, g.start, g.epoch) == (3, 4, 1, 2)
        for i in range(3):
            assert same(g[i], g.batch(1 + i, 2))
            assert g.indices(i).tolist() == g.indices(1 + i, 2).tolist()
            assert g.files(i) == [pictures[j].image for j in g.order.batch(2, 1 + i)]
        assert same(g[-1], g.batch(3, 2)) and len(list(g)) == 3
        for call in (lambda: g[3], lambda: g.indices(3)):
            with pytest.raises(IndexError, match="batch 3 of 3"):
                call()
        g.on_epoch_begin(), g[2], g.on_epoch_end()  # as Keras does
        assert (g.epoch, g.start, len(g)) == (3, 0, 4)
        g.callback().on_epoch_begin(3)
        assert (g.epoch, g.start) == (3, 0)
        g.set_epoch(3, start=2)
        g.callback().on_epoch_begin(3)  # the same epoch: its start is kept
        assert g.start == 2
        g.callback().on_epoch_begin(4)
        assert (g.epoch, g.start) == (4, 0)
        with pytest.raises(ValueError, match="4 batches.*batch 4"):
            g.set_epoch(0, start=4)
        for bad in ((-1, 0), (0, -1), (0.5, 0)):
            with pytest.raises(ValueError, match="whole number"):
                g.set_epoch(*bad)
        g.close()


@pytest.mark.parametrize(
    "pictures_, size, shuffle", [(11, 4, True), (11, 4, False), (3, 8, True), (8, 8, False)]
)
def test_order(pictures_, size, shuffle):
    order = Order(pictures_, size, shuffle, seed=5)
    batches = [order.batch(3, i).tolist() for i in range(len(order))]
    flat = sum(batches, [])
    assert sorted(flat[:pictures_]) == list(range(pictures_)) and len(order) == -(-pictures_ // size)
    if shuffle:
        assert {len(b) for b in batches} == {size}
        assert flat[pictures_:] == [flat[k % pictures_] for k in range(pictures_, len(flat))]
        assert flat == sum((order.batch(3, i).tolist() for i in range(len(order))), [])
    else:
        assert flat == list(range(pictures_))
    for i in (-1, len(order)):
        with pytest.raises(IndexError, match=f"batch {i} of"):
            order.batch(0, i)


def test_shelf_makes_ahead_drops_and_starts_again():
    made, gate = [], threading.Event()

    def make(key):
        made.append(key)
        if key == "bad":
            raise ValueError("bad is bad")
        if key == "slow":
            assert gate.wait(20)
        return key * 2

    shelf = Shelf(make, 1)
    assert shelf.waiting is None and shelf.take("a", ["slow", "never", "b"]) == "aa"
    gate_opener = threading.Timer(0.2, gate.set)
    gate_opener.start()
    assert shelf.take("slow", ["b"]) == "slowslow"  # made ahead, and once
    assert shelf.take("b", ["bad"]) == "bb"
    with pytest.raises(ValueError, match="bad is bad"):
        shelf.take("bad")
    shelf.close()
    assert sorted(made) == ["a", "b", "bad", "slow"]  # "never" was dropped before its turn
    assert 0 < shelf.waiting <= 1
    shelf.restart()
    assert shelf.waiting is None and shelf.take("c") == "cc"
    shelf.close()
    plain = Shelf(make, 0)
    assert plain.take("d", ["e"]) == "dd" and "e" not in made


def test_a_batch_is_bounded_before_memory_is(pictures):
    huge = HP.replace(image_size=(32_000, 32_000))
    with pytest.raises(ValueError, match=r"32,000×32,000.*3\.1 GB.*lower image_size or batch_size"):
        train_generator(pictures, huge, 1)
    with pytest.raises(ValueError, match="lower image_size or batch_size"):
        train_generator(pictures, HP, 2_000_000)
    small = train_generator(pictures, HP.replace(image_size=(9_000, 9_000)), 4, workers=8)
    assert small._ahead == 2  # batches of a gigabyte are not made sixteen at a time


def test_whatever_fails_names_the_picture(pictures, monkeypatch):
    maker = BatchMaker(pictures, HP, True, 0)
    for error, kind, words in (
        (MemoryError(), MemoryError, "lower batch_size"),
        (RuntimeError("the decoder fell over"), ValueError, "the decoder fell over"),
        (ValueError("04.png is wrong"), ValueError, "04.png is wrong"),
    ):

        def fails(*_):
            raise error

        monkeypatch.setattr("retinanet_nb.generator.make_example", fails)
        with pytest.raises(kind, match=words) as raised:
            maker.batch([4], 0)
        assert "04.png" in str(raised.value)


@pytest.mark.parametrize("seed", [-1, 1.5, "x", float("nan")])
def test_seeds_are_whole_numbers(pictures, seed):
    with pytest.raises(ValueError, match="seed must be a whole number, 0 or more, not"):
        train_generator(pictures, HP, 4, seed=seed)


def test_mistakes_are_named(pictures, tmp_path):
    with pytest.raises(ValueError, match="no pictures"):
        train_generator(Records([], ["a"]), HP, 4)
    with pytest.raises(ValueError, match="batch_size"):
        train_generator(pictures, HP, 0)
    with pytest.raises(ValueError, match="seed"):
        train_generator(pictures, HP, 4, seed=-1)
    with pytest.raises(IndexError, match="batch 3 of 3"):
        train_generator(pictures, HP, 4)[3]
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    small = tmp_path / "small.png"
    Image.new("RGB", (30, 30)).save(small)
    for record, words in (
        (Record(tmp_path / "broken.jpg", 9, 9, [], []), "broken.jpg"),
        (Record(tmp_path / "gone.jpg", 9, 9, [], []), "gone.jpg"),
        (Record(small, 40, 30, [], []), "small.png.*30×30.*40×30"),
    ):
        for workers in (0, 2):
            g = train_generator(Records([pictures[0], record], ["a"]), HP, 1, training=False, workers=workers)
            g[0]
            with pytest.raises((ValueError, FileNotFoundError), match=words):
                g[1]
            assert words.split(".*")[0] in str(g.error) and g.files(1) == [record.image]


def test_waiting_and_closing(pictures):
    g = train_generator(pictures, HP, 4, workers=2)
    assert g.waiting == 0
    for _ in g:
        pass
    share = g.waiting
    assert 0 < share <= 1
    g.set_epoch(1)
    assert g.waiting == share  # Keras turns to the next epoch before anybody can ask about the last one
    g.close()
    assert same(g[0], g.batch(0, 1))
    g.close()


def test_defaults_come_from_the_hyperparameters(pictures):
    g = train_generator(pictures, HP.replace(batch_size=5, seed=8))
    assert (g.batch_size, g.seed) == (5, 8) and g.threads >= 1


def test_show_batch(pictures):
    import matplotlib

    matplotlib.use("Agg")
    figure = show_batch(train_generator(pictures, HP, 4, workers=0)[0], pictures.class_names)
    assert len(figure.axes) == 4
