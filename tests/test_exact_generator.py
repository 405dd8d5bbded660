"""What mutation testing found untested in the generator: exact crops, what is drawn, options, what is made ahead."""

import inspect
import threading

import numpy as np
import pytest
from PIL import Image

from retinanet_nb import generator as module
from retinanet_nb.generator import (
    MAX_BATCH_BYTES,
    BatchMaker,
    Order,
    Shelf,
    jitter_color,
    make_example,
    train_generator,
    zoom_to_canvas,
)
from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.records import Record, Records

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


class Luck:
    """A generator of random numbers that gives what it was told, and notes what it was asked for."""

    def __init__(self, luck=1.0, u=0.0, at=(0.0, 0.0), color=(0.0, 0.0, 0.0)):
        self.single, self.at, self.color, self.asked = [luck, u], at, color, []

    def random(self, n=None):
        self.asked.append(n)
        return self.single.pop(0) if n is None else np.array(self.at)

    def uniform(self, low, high, n):
        self.asked.append((low, high, n))
        return np.array(self.color)


def test_a_crop_is_the_very_part():
    """At twice the size a corner of the picture fills the canvas, at the place asked for, down before right."""
    big = np.repeat(np.repeat(PICTURE, 2, 0), 2, 1)
    for at, down, right in (((0, 0), 0, 0), ((1, 0), 40, 0), ((0, 1), 0, 60), ((0.5, 0.25), 20, 15)):
        canvas, boxes, share = zoom_to_canvas(big, [[10, 20, 100, 70]], (40, 60), 2.0, at)
        np.testing.assert_array_equal(canvas, big[down : down + 40, right : right + 60])
        moved = np.array([10 - right, 20 - down, 100 - right, 70 - down])
        kept = np.clip(moved, 0, [60, 40, 60, 40])
        np.testing.assert_allclose(boxes, [kept])
        np.testing.assert_allclose(share, [(kept[2] - kept[0]) * (kept[3] - kept[1]) / (90 * 50)], rtol=1e-6)


def test_a_smaller_picture_lies_in_the_corner_on_black():
    canvas, boxes, share = zoom_to_canvas(PICTURE, [[0, 0, 60, 40]], (80, 120), 0.5, (1.0, 1.0))
    np.testing.assert_array_equal(canvas[:40, :60], PICTURE)
    assert canvas.dtype == np.uint8 and not canvas[40:].any() and not canvas[:, 60:].any()
    assert boxes.tolist() == [[0, 0, 60, 40]] and share.tolist() == [1]
    tiny, boxes, _ = zoom_to_canvas(PICTURE, [], (2, 2), 0.01)
    assert tiny.shape == (2, 2, 3) and tiny[0, 0].any() and not tiny[1].any() and boxes.shape == (0, 4)


def test_without_zoom_the_whole_picture_is_fitted():
    plain = zoom_to_canvas(PICTURE, [[1, 2, 3, 4]], (40, 60))
    np.testing.assert_array_equal(plain[0], PICTURE)
    assert plain[1].tolist() == [[1, 2, 3, 4]]


def test_shares_of_boxes_without_area_and_of_tiny_ones():
    flat = [[5, 5, 5, 9], [9, 9, 5, 5], [5, 5, 5.01, 5.01]]
    share = zoom_to_canvas(PICTURE, flat, (40, 60))[2]
    np.testing.assert_allclose(share, [0, 0, 1], rtol=1e-5)


def test_an_object_is_kept_with_just_the_smallest_share(monkeypatch):
    hp = HyperParameters(image_size=(40, 60))
    boxes = [[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]]
    shares = np.array([0.3, 0.2999, 0.31])
    monkeypatch.setattr(module, "zoom_to_canvas", lambda image, boxes, *_: (image, boxes, shares))
    assert make_example(PICTURE, boxes, [4.0, 5.0, 6.0], hp)[2].tolist() == [4, 6]
    assert make_example(PICTURE, boxes, [4.0, 5.0, 6.0], hp)[2].dtype == np.int32
    assert module.MIN_VISIBLE == 0.3


def test_what_is_drawn_and_what_it_does():
    hp = HyperParameters(image_size=(40, 60), flip=0.5, scale_jitter=(0.5, 2.0), color_jitter=0.5)
    for options in (hp, hp.replace(flip=0.0, color_jitter=0.0, scale_jitter=(1.0, 1.0))):
        luck = Luck()
        make_example(PICTURE, [], [], options, luck)
        assert luck.asked == [None, None, 2, (-1, 1, 3)]  # whatever is switched on
    same = hp.replace(scale_jitter=(1.0, 1.0), color_jitter=0.0)
    mirrored = PICTURE[:, ::-1]
    for drawn, expected in ((0.49, mirrored), (0.5, PICTURE), (0.9, PICTURE)):
        np.testing.assert_array_equal(make_example(PICTURE, [], [], same, Luck(drawn))[0], expected)
    colors = np.array([0.2, -0.4, 0.6])
    found = make_example(PICTURE, [], [], hp.replace(scale_jitter=(1.0, 1.0)), Luck(color=colors))[0]
    np.testing.assert_array_equal(found, jitter_color(PICTURE, 1.1, 0.8, 1.3))


@pytest.mark.parametrize("u, zoom", [(0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (0.25, 0.5**0.5)])
def test_the_zoom_is_even_on_a_scale_of_ratios(monkeypatch, u, zoom):
    asked = []
    monkeypatch.setattr(
        module, "zoom_to_canvas", lambda image, boxes, *rest: asked.append(rest) or (image, boxes, np.ones(0))
    )
    hp = HyperParameters(image_size=(40, 60), scale_jitter=(0.5, 2.0))
    make_example(PICTURE, [], [], hp, Luck(u=u, at=(0.3, 0.6)))
    make_example(PICTURE, [], [], hp)
    (size, found, at), plain = asked
    assert size == (40, 60) and found == pytest.approx(zoom) and at.tolist() == [0.3, 0.6]
    assert plain == ((40, 60), 1.0, (0.0, 0.0))


@pytest.fixture
def data(tmp_path):
    records = []
    for i in range(6):
        Image.fromarray(np.roll(PICTURE, i, 0)).save(tmp_path / f"{i}.png")
        records.append(Record(tmp_path / f"{i}.png", 60, 40, np.array([[1, 2, 30, 20]]), np.array([0])))
    return Records(records, ["a"])


HP = HyperParameters(image_size=(40, 60), flip=0.5, scale_jitter=(0.8, 1.3), batch_size=2, seed=7)


def test_options_and_defaults(data, monkeypatch):
    for function, name, value in (
        (Order, "seed", 0),
        (BatchMaker, "seed", 0),
        (module.TrainGenerator, "seed", 0),
        (module.TrainGenerator, "workers", 2),
        (module.TrainGenerator, "training", True),
    ):
        assert inspect.signature(function).parameters[name].default == value
    assert MAX_BATCH_BYTES == 2**31
    made = train_generator(data, HP)
    assert (made.order.batch_size, made.order.seed, made.maker.seed, made.maker.augment) == (2, 7, 7, True)
    other = train_generator(data, HP, 3, training=False, seed=5, workers=0)
    assert (other.order.batch_size, other.order.seed, other.maker.augment, other.threads) == (3, 5, False, 0)
    for count, threads in ((3, 3), (8, 8), (64, 8), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        assert train_generator(data, HP).threads == threads
    assert made.workers == 1  # Keras's own enqueuer stays out


def test_the_size_of_a_batch_is_counted_in_bytes():
    assert module._check_size((10, 20), 3) == 1800
    assert module._check_size((2**14, 2**15), 1) == 3 * 2**29
    with pytest.raises(ValueError, match="lower image_size or batch_size"):
        module._check_size((2**15, 2**15), 1)


def test_augmentation_follows_seed_and_epoch_of_the_generator(data):
    g = train_generator(data, HP, workers=0)
    for epoch in (0, 3):
        images, targets = g.batch(1, epoch)
        for k, j in enumerate(g.order.batch(epoch, 1)):
            rng = np.random.default_rng((7, epoch, j))
            canvas, boxes, _ = make_example(np.roll(PICTURE, j, 0), data[int(j)].boxes, [0], HP, rng)
            np.testing.assert_array_equal(images[k], canvas)
            np.testing.assert_allclose(targets["boxes"][k, : len(boxes)], boxes)


def test_what_follows_is_begun_before_it_is_asked_for():
    begun, names = threading.Event(), []

    def make(key):
        if key == "next":
            names.append(threading.current_thread().name)
            begun.set()
        return key

    shelf = Shelf(make, 1)
    assert shelf.take("now", ["next"]) == "now"
    assert begun.wait(20) and names[0].startswith("retinanet-pictures")
    assert list(shelf._ahead) == ["next"]
    assert shelf.take("next", ["next2"]) == "next" and len(names) == 1  # not made a second time
    shelf.take("other", [])
    assert not shelf._ahead  # dropped
    shelf.close()


def test_the_batches_after_the_one_asked_for_are_made_ahead(data, monkeypatch):
    g = train_generator(data, HP, 1, workers=1)
    asked = []
    monkeypatch.setattr(g.shelf, "take", lambda key, following=(): asked.append((key, list(following))))
    g[0], g[3], g[5]
    ahead = [[key[-1] for key in following] for _, following in asked]
    assert ahead == [[1, 2], [4, 5], []]
    g.close()


def test_the_share_of_waiting(monkeypatch):
    clock = iter([10.0, 12.0, 15.0, 16.0])  # asked, ready, asked, ready
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    shelf = Shelf(lambda key: key, 0)
    assert shelf.waiting is None
    shelf.take(1)
    assert shelf.waiting == 1.0
    shelf.take(2)
    assert shelf.waiting == pytest.approx(3 / 6)
    shelf.restart()
    assert shelf.waiting is None


def test_only_an_epoch_drawn_to_its_end_counts(data):
    g = train_generator(data, HP, 2, workers=0)
    assert (g.epoch, g.start, g.waiting) == (0, 0, 0.0)
    g.on_epoch_end()  # Keras calls it before the first
    g[2], g.on_epoch_end()  # not running
    assert g.epoch == 0
    g.on_epoch_begin(), g[0], g.on_epoch_end()  # not drawn to its end
    assert g.epoch == 0
    g.on_epoch_begin(), g[2], g.on_epoch_end()
    assert g.epoch == 1
    g.on_epoch_end()  # once
    g.on_epoch_begin(), g.on_epoch_end()  # what was drawn before does not count
    assert g.epoch == 1
