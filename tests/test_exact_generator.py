"""What mutation testing found untested in the generator: exact crops, what is drawn, options, what is made ahead."""

import inspect
import threading
import warnings

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
        if n is None:
            return self.single.pop(0)
        return np.array(self.at) if n == 2 and self.asked.count(2) == 1 else np.full(n, 0.99)

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
        assert luck.asked == [None, None, 2, (-1, 1, 3), 2, 6]  # whatever is switched on
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


def test_crops_begin_at_the_corner_unless_told():
    big = np.repeat(np.repeat(PICTURE, 2, 0), 2, 1)
    np.testing.assert_array_equal(zoom_to_canvas(big, [], (40, 60), 2.0)[0], big[:40, :60])


def test_a_crop_of_a_picture_that_is_enlarged():
    for at, down, right in (((0, 0), 0, 0), ((1, 0), 40, 0), ((0, 1), 0, 60), ((0.5, 0.5), 20, 30)):
        boxes = zoom_to_canvas(PICTURE, [[25, 15, 35, 25]], (40, 60), 2.0, at)[1]
        kept = np.clip([50 - right, 30 - down, 70 - right, 50 - down], 0, [60, 40, 60, 40])
        np.testing.assert_allclose(boxes, [kept])


def test_a_picture_of_less_than_a_pixel_is_one_pixel():
    for picture in (PICTURE, PICTURE.transpose(1, 0, 2)):
        canvas = zoom_to_canvas(np.ascontiguousarray(picture), [], (2, 2), 0.01)[0]
        assert canvas[0, 0].any() and not canvas[1].any() and not canvas[:, 1].any()


def test_boxes_turned_inside_out_one_way_have_no_share():
    boxes = [[9, 5, 5, 9], [5, 9, 9, 5], [6, 5, 5, 9], [5, 6, 9, 5]]
    np.testing.assert_array_equal(zoom_to_canvas(PICTURE, boxes, (40, 60))[2], np.zeros(4))


def test_how_far_ahead_large_batches_are_made(data):
    for batch_size, ahead in ((4, 2), (8, 1)):
        g = train_generator(data, HP.replace(image_size=(9_000, 9_000)), batch_size, workers=8)
        assert g._ahead == ahead
    assert train_generator(data, HP, workers=8)._ahead == 16
    assert train_generator(data, HP, workers=0)._ahead == 0


def test_items_out_of_range(data):
    g = train_generator(data, HP, workers=0)
    assert g.error is None
    for call in (lambda: g[-4], lambda: g[3], lambda: g.indices(-1), lambda: g.indices(3)):
        with pytest.raises(IndexError, match="batch -?[13] of 3"):
            call()
    np.testing.assert_array_equal(g[-3][0], g[0][0])
    g.set_epoch(0, start=1)  # item -1 is none of this epoch, though batch 0 is
    for call in (lambda: g.indices(-1), lambda: g[-3], lambda: g.files(-1)):
        with pytest.raises(IndexError, match="batch -1 of 2"):
            call()


def test_the_words_for_no_memory():
    cause = MemoryError()
    error = module._named(cause, "cat.jpg")
    words = str(error)
    assert words.startswith("cat.jpg could not be prepared (")
    assert words.endswith("): lower batch_size or image_size")
    assert type(error) is MemoryError and error.__cause__ is cause
    assert str(module._named(KeyError("x"), "cat.jpg")) == "cat.jpg could not be prepared ('x')"


def test_waiting_of_less_than_a_second_and_of_no_time(monkeypatch):
    shelf = Shelf(lambda key: shelf.waiting, 0)
    clock = iter([10.0, 10.25, 10.5, 10.5, 20.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert shelf.take(1) is None  # while the first thing is made there is no share yet
    assert shelf.waiting == 1.0
    assert shelf.take(2) == 1.0 and shelf.waiting == pytest.approx(0.5)
    shelf.restart()
    assert shelf.take(3) is None and shelf.waiting == 0.0


def test_closing_drops_what_waits_and_waits_for_what_runs():
    gate, started, made = threading.Event(), threading.Event(), []

    def make(key):
        if key == "slow":
            started.set()
            assert gate.wait(20)
        made.append((key, threading.current_thread().name))
        return key

    shelf = Shelf(make, 1)
    assert shelf.take("now", ["slow", "never"]) == "now" and started.wait(20)
    threading.Timer(0.2, gate.set).start()
    shelf.close()
    assert [key for key, _ in made] == ["now", "slow"] and not shelf._ahead and shelf._pool is None
    assert made[1][1] == "retinanet-pictures_0"
    shelf.close()  # a second time does nothing
    shelf.take("again", ["next"])
    assert shelf.take("next") == "next"
    shelf.close()


def test_an_epoch_set_by_hand_or_drawn_outside_does_not_count(data):
    g = train_generator(data, HP, 2, workers=0)
    g.on_epoch_begin(), g.set_epoch(3), g.on_epoch_end()
    assert g.epoch == 3
    g.on_epoch_begin(), g[2], g.set_epoch(5), g.on_epoch_end()
    assert g.epoch == 5
    g.on_epoch_begin(), g.on_epoch_end(), g[2], g.on_epoch_end()
    assert g.epoch == 5
    fresh = train_generator(data, HP, 2, workers=0)
    fresh[2], fresh.on_epoch_end()  # drawn before Keras began
    assert fresh.epoch == 0
    callback = g.callback()
    assert callback.params is None and callback.model is None
    assert inspect.signature(callback.on_epoch_begin).parameters["logs"].default is None


def test_a_batch_is_drawn_with_its_boxes_and_names(data, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "draw_detections", lambda *what: drawn.append(what) or len(drawn))
    monkeypatch.setattr(module, "show_grid", lambda pictures, columns: (pictures, columns))
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    boxes = np.arange(16).reshape(2, 2, 4)
    batch = images, {"boxes": boxes, "labels": np.array([[0, -1], [1, 0]])}
    assert module.show_batch(batch) == ([1, 2], 4)
    assert module.show_batch(batch, ["a", "b"], 3) == ([3, 4], 3)
    for k, (image, found, scores, labels, names) in enumerate(drawn):
        np.testing.assert_array_equal(image, images[k % 2])
        assert found.tolist() == boxes[k % 2][: 1 + k % 2].tolist()
        assert labels.tolist() == [[0], [1, 0]][k % 2]
        assert scores is None and names == (None if k < 2 else ["a", "b"])


def test_boxes_of_another_type_are_taken_as_float32():
    """Bit for bit: whoever holds float64 sees what the data set's float32 gives."""
    rng, image = np.random.default_rng(3), np.zeros((90, 300, 3), np.uint8)
    boxes = np.sort(rng.uniform(0, 90, (50, 2, 2)), 1).reshape(50, 4)
    assert (boxes.astype(np.float32) != boxes).any()
    for given in (boxes, boxes.tolist()):
        for a, b in zip(
            zoom_to_canvas(image, given, (41, 59), 1.3, (0.5, 0.5)),
            zoom_to_canvas(image, boxes.astype(np.float32), (41, 59), 1.3, (0.5, 0.5)),
        ):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype != np.float64
    labels, hp = np.zeros(50, int), HyperParameters(image_size=(41, 59), flip=1.0)
    for a, b in zip(
        make_example(image, boxes, labels, hp, Luck(0.0)),
        make_example(image, boxes.astype(np.float32), labels, hp, Luck(0.0)),
    ):
        np.testing.assert_array_equal(a, b)
    small = np.array([[1, 2, 30, 20]], np.uint8)  # 300 − 30 does not fit into its type
    at = make_example(image, small, [0], HyperParameters(image_size=(90, 300), flip=1.0), Luck(0.0))[1]
    assert at.tolist() == [[270, 2, 299, 20]]


def test_options_are_called_by_their_names(data):
    for name, least in (("batch_size", 1), ("seed", 0), ("workers", 0)):
        with pytest.raises(
            ValueError, match=f"^{name} must be a whole number, {least} or more, not {least - 1}$"
        ):
            train_generator(data, HP, **{name: least - 1})
    generator = train_generator(data, HP, workers=0)
    for name in ("epoch", "start"):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number, 0 or more, not -1$"):
            generator.set_epoch(**{"epoch": 0, name: -1})


def test_a_batch_of_exactly_the_limit_is_allowed(monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_BYTES", 2 * 4 * 5 * 3)
    assert module._check_size((4, 5), 2) == 120
    with pytest.raises(ValueError, match="lower image_size or batch_size"):
        module._check_size((4, 5), 3)


def test_an_error_that_names_its_picture_is_left_alone():
    error = ValueError("a/cat.jpg is no picture")
    assert module._named(error, "a/cat.jpg") is error
    other = module._named(error, "a/dog.jpg")
    assert other is not error and str(other).startswith("a/dog.jpg could not") and other.__cause__ is error


def test_the_waiting_is_counted_afresh_in_every_epoch(data):
    generator = train_generator(data, HP, workers=0)
    generator[0]
    before = generator.shelf.waiting
    assert before is not None
    generator.set_epoch(1)
    assert generator.shelf.waiting is None and generator.waiting == before


def test_files_of_another_epoch_and_what_keras_asks(data):
    generator = train_generator(data, HP, workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Keras has one for who leaves out its __init__
        assert generator.workers == 1 and not generator.use_multiprocessing
    files = lambda epoch: [generator.files(i, epoch) for i in range(len(generator))]
    for epoch in range(3):
        expected = [[data[j].image for j in generator.indices(i, epoch)] for i in range(len(generator))]
        assert files(epoch) == expected
    assert files(0) != files(1) and generator.files(0) == files(0)[0]
    generator[0]
    assert generator.shelf._pool is not None
    generator.close()
    assert generator.shelf._pool is None
