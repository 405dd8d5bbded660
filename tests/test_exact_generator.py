"""What mutation testing found untested in the generator: exact crops, what is drawn, options, what is made ahead."""

import dataclasses
import inspect
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from retinanet_nb import generator as module
from retinanet_nb.augmentation import (
    crop_around,
    flip_horizontally,
    flip_vertically,
    mosaic,
    mosaic_cells,
    turn,
)
from retinanet_nb.generator import (
    MAX_BATCH_BYTES,
    BatchMaker,
    Order,
    Shelf,
    jitter_color,
    make_example,
    repeat_factors,
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
        (BatchMaker, "transform", None),
        (module.TrainGenerator, "transform", None),
        (module.TrainGenerator, "weights", None),
        (train_generator, "transform", None),
        (train_generator, "weights", None),
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


# --- flips, turns and crops, as their numbers have it -------------------------------------------------------------------


BOXES = np.array([[10, 5, 20, 15], [30, 20, 55, 38]], np.float32)


def is_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_picture_is_laid_as_three_numbers_have_it():
    none = HyperParameters(flip=0.0, vertical_flip=0.0)
    both = none.replace(flip=0.5, vertical_flip=0.25)
    plain, lower = (PICTURE, BOXES), flip_vertically(PICTURE, BOXES)
    # at nought never, even where the number is nought; below the probability, not at it
    for hp, luck, more, expected in (
        (none, 0.0, (0.0, 0.9), plain),
        (both, 0.5, (0.25, 0.9), plain),
        (both, 0.49, (0.25, 0.9), flip_horizontally(PICTURE, BOXES)),
        (both, 0.5, (0.24, 0.9), lower),
        (both, 0.49, (0.24, 0.9), flip_horizontally(*lower)),
    ):
        is_same(module._laid(PICTURE, BOXES, hp, luck, more), expected)
    turning = none.replace(quarter_turns=True)
    for number, quarters in ((0.0, 0), (0.24, 0), (0.25, 1), (0.49, 1), (0.5, 2), (0.75, 3), (0.999, 3)):
        laid = module._laid(PICTURE, BOXES, turning, 0.5, (0.5, number))
        is_same(laid, turn(PICTURE, BOXES, quarters))
    # turned last: a quarter after a mirror is not a mirror after a quarter
    laid = module._laid(PICTURE, BOXES, both.replace(quarter_turns=True), 0.0, (0.5, 0.3))
    is_same(laid, turn(*flip_horizontally(PICTURE, BOXES), 1))


def test_a_picture_is_cropped_as_six_numbers_have_it():
    assert module.CROP_SIDES == 0.4
    luck = np.array([0.3, 0.6, 0.0, 0.5, 0.25, 1.0])
    for never in (
        0.0,
        0.3,
    ):  # below the probability, not at it; the other numbers are drawn and not looked at
        image, boxes, seen = module._cropped(PICTURE, BOXES, never, luck)
        assert image is PICTURE and boxes is BOXES and seen == 1.0
    is_same(module._cropped(PICTURE, BOXES, 0.0, 0 * luck), (PICTURE, BOXES, 1.0))
    for number, keep in ((0.0, 0), (0.49, 0), (0.5, 1), (0.99, 1)):
        luck[1] = number
        expected = crop_around(PICTURE, BOXES, keep, (0.4, 0.7), (0.25, 1.0))
        is_same(module._cropped(PICTURE, BOXES, 0.31, luck), expected)
    part, boxes, seen = module._cropped(PICTURE, BOXES[:0], 0.31, luck)  # without an object, anywhere
    assert part.shape == (16, 42, 3) and boxes.shape == (0, 4) and seen.shape == (0,)
    np.testing.assert_array_equal(part, PICTURE[6:22, 18:60])
    luck[2:4] = 1.0, 1.0
    assert module._cropped(PICTURE, BOXES, 1.0, luck)[0].shape == PICTURE.shape


def test_what_make_example_hands_on(monkeypatch):
    """Two numbers to the laying, six to the crop, its probability and its shares; of the objects both shares count."""
    asked = []

    class Numbered:
        "Every number another one."

        def __init__(self):
            self.rng = np.random.default_rng(5)

        def random(self, n=None):
            return self.rng.random(n)

        def uniform(self, low, high, n):
            return self.rng.uniform(low, high, n)

    hp = HyperParameters(image_size=(40, 60), crop=0.7)
    rng = Numbered()
    luck, _ = rng.random(), rng.random()
    _, _, two, six = rng.random(2), rng.uniform(-1, 1, 3), rng.random(2), rng.random(6)
    monkeypatch.setattr(module, "_laid", lambda *given: asked.append(given) or (PICTURE, BOXES))
    cropped = PICTURE, BOXES, np.array([0.5, 0.6])
    monkeypatch.setattr(module, "_cropped", lambda *given: asked.append(given) or cropped)
    monkeypatch.setattr(module, "zoom_to_canvas", lambda i, b, *_: (i, b, np.array([0.6, 0.49])))
    _, boxes, labels = make_example(PICTURE, BOXES, [1, 2], hp, Numbered())
    (_, _, options, drawn, more), (image, _, probability, numbers) = asked
    assert options is hp and drawn == luck and more.tolist() == two.tolist()
    assert image is PICTURE and probability == 0.7 and numbers.tolist() == six.tolist()
    assert labels.tolist() == [1] and boxes.tolist() == BOXES[:1].tolist()  # 0.3 and 0.294


# --- where the luck of a picture comes from -----------------------------------------------------------------------------


def telling(*arguments):
    "A `BatchMaker` that notes which pictures are asked for, by which addresses, on which canvas; and its notes."
    maker, told = BatchMaker(*arguments), []

    def single(j, address, hyperparameters):
        told.append((j, address, hyperparameters.image_size))
        H, W = hyperparameters.image_size
        return np.full((H, W, 3), j, np.uint8), np.array([[0, 0, 1, 1]]), np.array([j])

    maker.single = single
    return maker, told


@pytest.mark.parametrize(
    "again, address", [(None, (7, 4, 2)), (0, (7, 4, 2)), (1, (7, 4, 2, 3, 1)), (5, (7, 4, 2, 3, 5))]
)
def test_addresses_of_pictures_alone(data, again, address):
    rest = () if again is None else (np.int64(again),)
    for mosaics, augment in ((0.0, True), (1.0, False)):
        maker, told = telling(data, HP.replace(mosaic=mosaics), augment, 7)
        image, boxes, labels = maker.example(2, 4, *rest)
        assert told == [(2, address, (40, 60))] and labels.tolist() == [2]
        assert all(type(number) is int for number in told[0][1])
    assert inspect.signature(BatchMaker.example).parameters["again"].default == 0
    assert inspect.signature(BatchMaker.batch).parameters["repeats"].default is None


@pytest.mark.parametrize("again, address", [(0, (7, 4, 2)), (3, (7, 4, 2, 3, 3))])
def test_addresses_of_the_four_of_a_mosaic(data, again, address):
    assert module.MOSAIC_CUT == (0.3, 0.7)
    rng = np.random.default_rng((*address, 2))
    luck, cut, others = rng.random(), rng.uniform(0.3, 0.7, 2), rng.integers(6, size=3)
    cells = mosaic_cells((40, 60), cut)
    four = [2, *others.tolist()]
    maker, told = telling(data, HP.replace(mosaic=1.0), True, 7)
    canvas, boxes, labels = maker.example(2, 4, again)
    assert told == [(j, (*address, 2, n), cells[n][2:]) for n, j in enumerate(four)]
    parts = [(np.full((*cell[2:], 3), j, np.uint8), [[0, 0, 1, 1]], [j]) for j, cell in zip(four, cells)]
    is_same((canvas, boxes, labels), mosaic(parts, cells))
    # below the probability, not at it
    for probability, made in ((luck, 1), (np.nextafter(luck, 1), 4)):
        maker, told = telling(data, HP.replace(mosaic=float(probability)), True, 7)
        maker.example(2, 4, again)
        assert len(told) == made
    # and the luck of the picture alone is that without mosaics
    maker, told = telling(data, HP.replace(mosaic=float(luck)), True, 7)
    maker.example(2, 4, again)
    assert told == [(2, address, (40, 60))]


def test_a_picture_takes_its_luck_from_its_address_and_a_transform_from_another(data):
    drawn = []

    def transform(image, boxes, labels, rng):
        drawn.append(rng.random())
        return image, boxes, labels

    maker = BatchMaker(data, HP, True, 7, transform)
    maker.single(0, (9,), HP)  # its first picture is asked for twice
    drawn.clear()
    canvas, boxes, labels = maker.single(3, (7, 4, 3), HP)
    assert drawn == [np.random.default_rng((7, 4, 3, 1)).random()]
    expected = make_example(np.roll(PICTURE, 3, 0), *maker.targets[3], HP, np.random.default_rng((7, 4, 3)))
    is_same((canvas, boxes, labels), expected)
    drawn.clear()
    still = BatchMaker(data, HP, False, 7, transform).single(3, (7, 4, 3), HP)
    is_same(still, make_example(np.roll(PICTURE, 3, 0), *maker.targets[3], HP))
    assert not drawn and maker.transform.classes == 1 and maker.transform.most == 1


NO_FLAGS = dict.fromkeys(("difficult", "crowd", "truncated"))


def test_room_for_the_objects_of_a_batch(data):
    mosaics = HP.replace(mosaic=0.5)
    for hp, augment, room in ((HP, True, 1), (HP, False, 1), (mosaics, True, 4), (mosaics, False, 1)):
        assert BatchMaker(data, hp, augment).max_objects == room
    maker = BatchMaker(data, mosaics, True, transform=lambda *example: example[:3])
    assert maker.transform.most == 1  # of each of the four
    records = [
        data[0],
        dataclasses.replace(data[1], boxes=np.zeros((0, 4)), labels=np.zeros(0, int), **NO_FLAGS),
    ]
    assert BatchMaker(records[1:], HP, True).max_objects == 1  # room for one, and none is there
    several = dataclasses.replace(data[0], boxes=np.tile(BOXES, (2, 1)), labels=np.zeros(4, int), **NO_FLAGS)
    assert BatchMaker([*records, several], HP, True).max_objects == 4
    nameless = BatchMaker(list(data), HP, True, transform=lambda *example: example[:3])
    assert nameless.transform.classes is None


def test_how_often_a_picture_came_before_reaches_it(data):
    maker, told = telling(data, HP, True, 7)
    images, targets = maker.batch(np.array([1, 4, 1]), 2, np.array([0, 0, 1]))
    assert [(j, address) for j, address, _ in told] == [
        (1, (7, 2, 1)), (4, (7, 2, 4)), (1, (7, 2, 1, 3, 1))
    ]  # fmt: skip
    assert images[:, 0, 0, 0].tolist() == [1, 4, 1] and targets["labels"].tolist() == [[1], [4], [1]]
    told.clear()
    maker.batch([5, 5], 0)
    assert [address for _, address, _ in told] == [(7, 0, 5)] * 2


# --- weights -------------------------------------------------------------------------------------------------------------


def test_repeats_by_hand():
    """The weights laid end to end, and a mark at every whole number from `start` on."""
    weights = np.array([0.5, 2.0, 0.0, 1.5])  # end at 0.5, 2.5, 2.5 and 4
    for start, expected in (
        (0.0, [0, 1, 1, 3]),
        (0.49, [0, 1, 1, 3]),
        (0.5, [1, 1, 3, 3]),  # a mark on an end belongs to the next
        (0.99, [1, 1, 3, 3]),
    ):
        found = module._repeated(weights, 4, start)
        assert found.tolist() == expected
    assert module._repeated(weights / 3, 4, 0.5).tolist() == [1, 1, 3, 3]  # stretched to as many as are shown
    assert module._repeated(np.array([1.0, 1.0]), 2, 1.0).tolist() == [
        1,
        1,
    ]  # a rounding error beyond the end
    assert module._repeated(np.array([3.0, 1.0]), 2, 0.75).tolist() == [0, 1]


def test_weights_are_looked_at():
    found = module._weights([0, 1, 2], 3)
    assert found.dtype == np.float64 and found.tolist() == [0, 1, 2]
    assert module._weights([0.0, 0.5], 2).tolist() == [
        0.0,
        0.5,
    ]  # together one half, which is rounded to a picture
    for wrong in (
        [1, 2],
        [[1, 2, 3]],
        [1, 2, np.nan],
        [1, 2, np.inf],
        [1, 2, -0.001],
        [0.2, 0.2, 0.09],
        [-1, 5, 5],
    ):
        with pytest.raises(ValueError, match="weights must be 3 numbers of at least 0"):
            module._weights(wrong, 3)


def test_an_epoch_with_weights_is_shuffled_by_seed_and_epoch():
    weights = [2.0, 0.5, 1.5, 1.0]
    order = Order(4, 2, True, 3, weights)
    assert order.shown == 5 and len(order) == 3
    for epoch in (0, 6):
        rng = np.random.default_rng((3, epoch))
        expected = rng.permutation(module._repeated(np.array(weights), 5, rng.random()))
        shown = np.concatenate([order.batch(epoch, i) for i in range(3)])
        assert shown.tolist() == [*expected.tolist(), expected[0]]  # the last batch is filled from the front
        before = [expected[:k].tolist().count(j) for k, j in enumerate(expected)]
        repeats = np.concatenate([order.repeats(epoch, i) for i in range(3)])
        assert repeats.tolist() == [*before, before[0]]
    assert Order(4, 2, True, 3, [1.0] * 4).shown == 4 and Order(3, 2, True).weights is None


def test_how_rare_a_class_is(tmp_path):
    """Class 0 on four of four pictures, 1 on one, 2 on one that shows it twice, 3 in a crowd only."""

    def record(*labels, crowd=None):
        boxes = np.array([[0, 0, 5, 5]] * len(labels), np.float32).reshape(-1, 4)
        return Record(tmp_path / "x.png", 10, 10, boxes, np.array(labels, int), crowd=crowd)

    crowd = np.array([False, True])
    records = Records([record(0), record(0, 1), record(0, 2, 2), record(0, 3, crowd=crowd)], list("abcd"))
    np.testing.assert_allclose(repeat_factors(records, 0.64), [1, 1.6, 1.6, 1], rtol=1e-12)
    np.testing.assert_allclose(repeat_factors(records, 0.25), [1, 1, 1, 1], rtol=0)
    empty = repeat_factors(Records([record(), record(0)], ["a"]), 1.0)
    np.testing.assert_allclose(empty, [1, 2**0.5])
    assert empty.dtype == np.float64
