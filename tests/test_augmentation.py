"""Augmentation: boxes follow their pictures exactly, what is off by default changes nothing, and chance has an address."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retinanet_nb import augmentation, generator
from retinanet_nb.augmentation import (
    Transform,
    check_example,
    crop_around,
    flip_horizontally,
    flip_vertically,
    jitter_color,
    mosaic,
    mosaic_cells,
    turn,
    zoom_to_canvas,
)
from retinanet_nb.generator import BatchMaker, Order, make_example, repeat_factors, train_generator
from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.records import Record, Records

from test_generator import HP, find, pictures, same, scenes  # noqa: F401 (a fixture)


def areas(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@given(scenes(), st.integers(-5, 9))
@settings(deadline=None, max_examples=40)
def test_turns_and_vertical_flips_find_their_objects(scene, quarters):
    image, boxes = scene
    for (other, moved), (again, back) in (
        ((view := turn(image, boxes, quarters)), turn(*view, -quarters)),
        ((view := flip_vertically(image, boxes)), flip_vertically(*view)),
    ):
        for c in range(3):
            assert find(other, c).tolist() == moved[c].tolist()
        np.testing.assert_array_equal(areas(moved), areas(boxes))
        assert (moved >= 0).all() and (moved <= [other.shape[1], other.shape[0]] * 2).all()
        assert (again == image).all() and (back == boxes).all()
    assert turn(image, np.zeros((0, 4), np.float32), quarters)[1].shape == (0, 4)


@given(scenes())
@settings(deadline=None, max_examples=15)
def test_the_eight_views_of_a_picture_hang_together(scene):
    """Two mirrors are half a turn; a mirror between two turns undoes the turning."""
    image, boxes = scene
    half, both = turn(image, boxes, 2), flip_vertically(*flip_horizontally(image, boxes))
    assert (half[0] == both[0]).all() and (half[1] == both[1]).all()
    back = turn(*flip_horizontally(*turn(image, boxes, 1)), 1)
    mirrored = flip_horizontally(image, boxes)
    assert (back[0] == mirrored[0]).all() and (back[1] == mirrored[1]).all()


def test_a_turn_by_hand():
    image = np.zeros((80, 100, 3), np.uint8)
    image[0, 99] = 7  # the upper right corner goes to the upper left one
    turned, boxes = turn(image, [[10, 20, 30, 60]])
    assert turned.shape == (100, 80, 3) and turned[0, 0, 0] == 7 and turned.flags["C_CONTIGUOUS"]
    assert boxes.tolist() == [[20, 70, 60, 90]]


@pytest.mark.parametrize("option, ways", [({"vertical_flip": 0.5}, 2), ({"quarter_turns": True}, 4)])
def test_all_ways_come_about_equally_often(option, ways):
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    plain = HyperParameters(image_size=(24, 24), flip=0.0)
    seen = {}
    for seed in range(200):
        canvas, _, _ = make_example(image, [], [], plain.replace(**option), np.random.default_rng(seed))
        seen[canvas.tobytes()] = seen.get(canvas.tobytes(), 0) + 1
        off = make_example(image, [], [], plain, np.random.default_rng(seed))
        assert (off[0] == image).all()
    assert len(seen) == ways and min(seen.values()) > 0.7 * 200 / ways


def test_an_option_does_not_change_the_luck_of_the_others():
    """Which pictures are mirrored, recoloured and zoomed is the same with turns and without."""
    image = np.full((40, 40, 3), 90, np.uint8)
    image[:20, :20] = 200  # turned, it still has the same mean and a corner
    hp = HyperParameters(image_size=(40, 40), flip=0.5, color_jitter=0.4)
    for seed in range(20):
        without, with_turns = (
            make_example(image, [], [], options, np.random.default_rng(seed))[0]
            for options in (hp, hp.replace(vertical_flip=1.0, quarter_turns=True))
        )
        assert sorted(without.ravel()) == sorted(with_turns.ravel())


unit = st.floats(0, 1)


@given(scenes(), st.sampled_from([None, 0, 1, 2]), unit, unit, unit, unit)
@settings(deadline=None, max_examples=60)
def test_a_crop_keeps_its_object_and_finds_the_others(scene, keep, high, wide, down, right):
    image, boxes = scene
    part, moved, seen = crop_around(image, boxes, keep, (high, wide), (down, right))
    assert (moved >= 0).all() and (moved <= [part.shape[1], part.shape[0]] * 2).all()
    for c in range(3):
        found = find(part, c)
        assert (found is None) == (seen[c] == 0)
        if found is not None:
            np.testing.assert_array_equal(found, moved[c])
    np.testing.assert_allclose(seen * areas(boxes), areas(moved), rtol=1e-5)
    for side, share, whole in ((part.shape[0], high, image.shape[0]), (part.shape[1], wide, image.shape[1])):
        assert side >= max(1, round(whole * share))
        if keep is None:
            assert side == max(1, round(whole * share))
    if keep is not None:
        assert seen[keep] == 1


@given(st.lists(scenes(), min_size=4, max_size=4), st.integers(8, 200), st.integers(8, 200), unit, unit)
@settings(deadline=None, max_examples=25)
def test_a_mosaic_finds_the_objects_of_all_four(four, height, width, down, right):
    cells = mosaic_cells((height, width), (down, right))
    assert sum(h * w for _, _, h, w in cells) == height * width and min(min(c[2:]) for c in cells) >= 1
    examples = []
    for n, ((image, boxes), (_, _, h, w)) in enumerate(zip(four, cells)):
        canvas, moved, _ = zoom_to_canvas(image, boxes, (h, w))
        examples.append((canvas, moved, [3 * n, 3 * n + 1, 3 * n + 2]))
    canvas, boxes, labels = mosaic(examples, cells)
    assert canvas.shape == (height, width, 3) and labels.tolist() == list(range(12))
    assert (boxes >= 0).all() and (boxes <= [width, height] * 2).all()
    for n, (top, left, h, w) in enumerate(cells):
        assert (canvas[top : top + h, left : left + w] == examples[n][0]).all()
        inside = boxes[3 * n : 3 * n + 3] - [left, top, left, top]
        np.testing.assert_allclose(inside, examples[n][1], atol=1e-4)


@given(scenes(), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_everything_together_finds_its_objects(scene, seed):
    image, boxes = scene
    hp = HyperParameters(
        image_size=(120, 160), vertical_flip=0.5, quarter_turns=True, crop=0.7, scale_jitter=(0.5, 2.0)
    )
    canvas, found, labels = make_example(image, boxes, [0, 1, 2], hp, np.random.default_rng(seed))
    assert len(found) == len(labels) and len(set(labels.tolist())) == len(labels)
    for box, label in zip(found, labels):
        np.testing.assert_allclose(box, find(canvas, label), rtol=0, atol=1.6)


def test_what_crop_and_zoom_leave_together_decides():
    """Half of an object after the crop and half of that after the zoom is less than MIN_VISIBLE."""
    image, boxes = np.zeros((100, 100, 3), np.uint8), [[0, 0, 100, 10], [0, 40, 10, 60]]
    hp = HyperParameters(image_size=(100, 100), flip=0.0, crop=1.0, scale_jitter=(4.0, 4.0))

    class Luck:
        def __init__(self):
            self.given = [0.9, 0.0, np.zeros(2), np.zeros(2), np.array([0.0, 0.6, 0.99, 0.16, 0.5, 0.0])]

        def random(self, n=None):
            return self.given.pop(0)

        def uniform(self, low, high, n):
            return np.zeros(n)

    assert make_example(image, boxes, [7, 8], hp, Luck())[2].tolist() == []


def test_mosaics_are_functions_of_seed_epoch_and_index(pictures):  # noqa: F811
    hp = HP.replace(mosaic=0.5, crop=0.5)
    plain, threads = (train_generator(pictures, hp, 4, workers=w, transform=shifted) for w in (0, 3))
    assert plain.max_objects == 8 and train_generator(pictures, hp, 4, False).max_objects == 2
    for epoch, i in ((0, 2), (0, 0), (3, 1)):
        threads.set_epoch(epoch)
        assert same(plain.batch(i, epoch), threads[i])
    threads.close()
    counts = [(plain.batch(i, e)[1]["labels"] >= 0).sum(1) for e in range(4) for i in range(3)]
    assert np.max(counts) > 2  # more than any picture has alone
    every = train_generator(pictures, hp.replace(mosaic=1.0, crop=0.0), 4, workers=0)
    _, targets = every[0]
    real = targets["labels"] >= 0
    boxes = targets["boxes"][real]
    assert (boxes >= 0).all() and (boxes <= [96, 64, 96, 64]).all() and (targets["boxes"][~real] == -1).all()
    with pytest.raises(ValueError, match="for a mosaic"):
        hp.replace(image_size=(64, 7))


# --- a function of somebody's own --------------------------------------------------------------------------------------


def shifted(image, boxes, labels, rng):
    """Some pixels away from the left edge, and a random colour there."""
    n = int(rng.integers(1, 9))
    wider = np.concatenate([np.full_like(image[:, :1], rng.integers(256)).repeat(n, 1), image], axis=1)
    return wider, boxes + [n, 0, n, 0], labels


def idle(image, boxes, labels, rng):
    image[:], boxes[:] = image.copy(), boxes.copy()  # it may write into what it is given
    return image, boxes, labels


def test_a_transform_is_a_function_of_seed_epoch_and_index(pictures):  # noqa: F811
    """In threads or without, out of order, in a generator made afresh: the same; and the luck of flips and zoom stays."""
    plain, one, threads = (
        train_generator(pictures, HP, 4, workers=w, transform=t)
        for w, t in ((0, None), (0, shifted), (3, shifted))
    )
    for epoch in (0, 2):
        threads.set_epoch(epoch)
        for i in (2, 0, 1):
            assert same(one.batch(i, epoch), threads[i])
            assert not same(one.batch(i, epoch), plain.batch(i, epoch))
    threads.close()
    assert same(plain.batch(1, 1), train_generator(pictures, HP, 4, workers=0, transform=idle).batch(1, 1))
    checked = [train_generator(pictures, HP, 4, False, workers=0, transform=t)[0] for t in (None, shifted)]
    assert same(*checked)  # not when measuring


def test_a_wrong_answer_names_the_picture(pictures):  # noqa: F811
    def outside(image, boxes, labels, rng):
        return image, boxes + 1000, labels

    def label(image, boxes, labels, rng):
        return image, boxes, labels + 3

    for function, why in ((outside, "outside a picture"), (label, "from 0 to 2")):
        generator = train_generator(pictures, HP, 11, workers=0, transform=function)
        with pytest.raises(ValueError, match=rf"\.png could not be prepared \({function.__name__} .*{why}"):
            generator[0]
    with pytest.raises(TypeError, match="transform must be a function"):
        train_generator(pictures, HP, 4, transform="flip")


def test_too_many_objects_for_a_batch(pictures):  # noqa: F811
    def twice(image, boxes, labels, rng):
        return image, np.tile(boxes, (3, 1)), np.tile(labels, 3)

    with pytest.raises(ValueError, match="no room"):
        train_generator(pictures, HP, 11, workers=0, transform=twice)[0]


def test_chance_of_its_own_is_found_out():
    image = np.zeros((20, 30, 3), np.uint8)
    for function in (
        lambda i, b, l, rng: (i + np.random.randint(1, 200, dtype=np.uint8), b, l),
        lambda i, b, l, rng, kept=[]: kept.append(1) or (i + np.uint8(len(kept)), b, l),
    ):
        with pytest.raises(ValueError, match="asked again"):
            Transform(function)(image, [], [], (0,))


GOOD = np.zeros((20, 30, 3), np.uint8), np.array([[1.0, 2, 30, 20]]), np.array([0])


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda i, b, l: None, "not NoneType"),
        (lambda i, b, l: (i[..., 0], b, l), r"not \(20, 30\) of uint8"),
        (lambda i, b, l: (i[:0], b, l), "without pixels"),
        (lambda i, b, l: (i, b[0], l), r"boxes \(n, 4\)"),
        (lambda i, b, l: (i, b.astype(str), l), "in numbers"),
        (lambda i, b, l: (i, b * np.inf, l), "finite"),
        (
            lambda i, b, l: (i, b + [0, 0, 0, 0.02], l),
            r"\(1, 2, 30, 20.02\), outside a picture 30 wide and 20 high",
        ),
        (lambda i, b, l: (i, b[:, [0, 1, 0, 3]], l), "without area"),
        (lambda i, b, l: (i, b, [0, 1]), "a label for each of 1 boxes"),
        (lambda i, b, l: (i, b, [0.0]), "whole numbers, not float64"),
        (lambda i, b, l: (i, b, [-1]), "label -1"),
        (lambda i, b, l: (i, b, [4]), "label 4, and the classes have labels from 0 to 3"),
        (lambda i, b, l: (i, [], [1]), "a label for each of 0"),
    ],
)
def test_what_is_refused(change, why):
    with pytest.raises(ValueError, match=why):
        check_example(change(*GOOD), classes=4)


def test_what_is_accepted():
    image, boxes, labels = check_example((GOOD[0], GOOD[1] + [0, 0, 0.009, 0], [3]), classes=4)
    assert boxes.tolist() == [[1, 2, 30, 20]] and boxes.dtype == np.float32  # a rounding error is cut
    assert labels.tolist() == [3] and labels.dtype == np.int32 and image.flags["C_CONTIGUOUS"]
    for nothing in ([], np.zeros((0, 4)), np.zeros((0,))):
        _, boxes, labels = check_example((GOOD[0][:, ::-1], nothing, []))
        assert boxes.shape == (0, 4) and labels.shape == (0,)


# --- rare classes more often --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 4), min_size=2, max_size=30).filter(lambda w: sum(w) >= 1), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_a_picture_is_shown_as_often_as_its_weight_says(weights, size):
    order = Order(len(weights), size, True, seed=3, weights=weights)
    scale = order.shown / sum(weights)
    assert order.shown == round(sum(weights)) and len(order) == -(-order.shown // size)
    for epoch in (0, 1):
        shown = np.concatenate([order.batch(epoch, i) for i in range(len(order))])[: order.shown]
        repeats = np.concatenate([order.repeats(epoch, i) for i in range(len(order))])[: order.shown]
        count = np.bincount(shown, minlength=len(weights))
        assert (np.abs(count - np.array(weights) * scale) < 1 + 1e-6).all()
        for j in range(len(weights)):  # each time with a number of its own
            assert sorted(repeats[shown == j]) == list(range(count[j]))


def test_repeat_factors_by_hand():
    """Class 0 on all of 8 pictures, 1 on two, 2 on one; a difficult object is no reason."""

    def record(*labels, difficult=None):
        boxes = np.array([[0, 0, 5, 5]] * len(labels), np.float32).reshape(-1, 4)
        return Record("x.png", 10, 10, boxes, np.array(labels, int), difficult)

    records = [record(0)] * 5 + [
        record(0, 1),
        record(0, 1, 2),
        record(0, 3, difficult=np.array([False, True])),
    ]
    found = repeat_factors(Records(records, list("abcd")), 0.5)
    np.testing.assert_allclose(found, [1, 1, 1, 1, 1, 2**0.5, 2, 1])
    np.testing.assert_array_equal(repeat_factors(Records([record()], ["a"]), 0.5), [1])


def test_a_picture_shown_twice_is_varied_twice_and_resumes(pictures):  # noqa: F811
    weights = [4.0] + [0.5] * 10
    one, two = (train_generator(pictures, HP, 3, workers=w, weights=weights) for w in (0, 2))
    assert len(one) == 3 and one.batches == 3
    for epoch in (0, 4):
        two.set_epoch(epoch, start=1)
        assert same(two[0], one.batch(1, epoch)) and same(two[1], one.batch(2, epoch))
    two.close()
    epoch = [one.batch(i, 0) for i in range(3)]
    first = [x for i in range(3) for x, j in zip(epoch[i][0], one.indices(i, 0)) if j == 0]
    assert len(first) == 4 and len({x.tobytes() for x in first}) == 4
    assert len(train_generator(pictures, HP, 3, False, workers=0, weights=weights)) == 4  # not when measuring
    rare = train_generator(pictures, HP.replace(repeat_rare=0.9), 3, workers=0)
    assert rare.order.shown == round(repeat_factors(pictures, 0.9).sum()) > 11
    for wrong in ([1.0] * 10, [1.0] * 10 + [-1], [0.0] * 11, [np.nan] * 11):
        with pytest.raises(ValueError, match="weights must be 11 numbers"):
            train_generator(pictures, HP, 3, weights=wrong)


def test_a_picture_of_weight_0_is_in_no_mosaic(pictures, monkeypatch):  # noqa: F811
    "Without weights the same numbers are drawn as with equal ones, so that runs are resumed."
    hp, read, seen = HP.replace(mosaic=1.0, crop=0.0), generator.read_image, set()
    monkeypatch.setattr(generator, "read_image", lambda path: seen.add(path) or read(path))
    some = train_generator(pictures, hp, 3, workers=0, weights=[1.0, 0.5] * 4 + [0, 0, 0])
    for epoch in range(4):
        for i in range(some.batches):
            some.batch(i, epoch)
    assert seen == {record.image for record in pictures[:8]}
    makers = [BatchMaker(pictures, hp, True, 7, weights=w) for w in (None, [0.5] * 11)]
    assert same(*(maker.batch(range(11), 2) for maker in makers))


def test_percent_are_no_factors():
    assert HyperParameters(scale_jitter=(0.1, 10)).scale_jitter == (0.1, 10)
    with pytest.raises(ValueError, match="scale_jitter must be factors of at most 10"):
        HyperParameters(scale_jitter=(80, 120))


# --- by hand ------------------------------------------------------------------------------------------------------------


WIDE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def test_flips_and_turns_by_hand():
    boxes = np.array([[10, 5, 20, 15], [0, 30, 60, 40]])
    image, moved = flip_vertically(WIDE, boxes)
    np.testing.assert_array_equal(image, WIDE[::-1])
    assert moved.tolist() == [[10, 25, 20, 35], [0, 0, 60, 10]]
    one, three = [[5, 40, 15, 50], [30, 0, 40, 60]], [[25, 10, 35, 20], [0, 0, 10, 60]]
    views = [boxes.tolist(), one, [[40, 25, 50, 35], [0, 0, 60, 10]], three]
    for quarters in range(-4, 10):
        image, moved = turn(WIDE, boxes, quarters)
        np.testing.assert_array_equal(image, np.rot90(WIDE, quarters % 4))
        assert moved.tolist() == views[quarters % 4]


def test_colours_by_hand():
    """Each of the three alone, and all together, against the sums in float64."""
    picture = np.array([[[100, 50, 200], [20, 90, 10]]], np.uint8)
    grey = picture.astype(float) @ [0.299, 0.587, 0.114]  # 82.05 and 59.95, their mean is 71
    for brightness, contrast, saturation in (
        (1.2, 1, 1),
        (1, 0.5, 1),
        (1, 1, 0.25),
        (1, 1, 0),
        (0.9, 1.3, 1.4),
    ):
        own = saturation * picture + (1 - saturation) * grey[..., None]
        expected = np.clip(brightness * (contrast * own + (1 - contrast) * grey.mean()), 0, 255)
        given = dict(brightness=brightness, contrast=contrast, saturation=saturation)
        found = jitter_color(picture, **{k: v for k, v in given.items() if v != 1})
        assert found.dtype == np.uint8 and found.shape == picture.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.88)


@pytest.mark.parametrize(
    "size, low, high, share, at, found",
    [
        (100, 10.6, 30.2, 0, 0, (10, 21)),  # whole pixels, all of the object
        (100, 10.6, 30.2, 0, 1, (10, 21)),
        (100, 40, 50, 0.3, 0, (20, 30)),  # as far left as holds it, half way, and as far right
        (100, 40, 50, 0.3, 0.5, (30, 30)),
        (100, 40, 50, 0.3, 1, (40, 30)),
        (100, 5, 20, 0.5, 0, (0, 50)),  # the picture begins here
        (100, 5, 20, 0.5, 1, (5, 50)),
        (100, 90, 95, 0.5, 0, (45, 50)),  # and ends here
        (100, 90, 95, 0.5, 1, (50, 50)),
        (100, -5, 20, 0, 0, (0, 20)),  # an object that sticks out
        (100, 80, 130, 0, 1, (80, 20)),
        (10, 2, 4, 1.5, 1, (0, 10)),  # more than all is all
        (100, 100, 0, 0, 0.5, (50, 1)),  # no object; a pixel at least
        (100, 100, 0, 0.304, 1, (70, 30)),
    ],
)
def test_windows_by_hand(size, low, high, share, at, found):
    assert augmentation._window(size, low, high, share, at) == found


def test_a_crop_by_hand():
    boxes = [[5.5, 2, 30, 20], [40, 30, 60, 40], [12, 14, 12.5, 14.5], [20, 10, 20, 25], [5, 5, 25, 15]]
    part, moved, seen = crop_around(WIDE, boxes)  # half of it, from the middle, whatever is there
    np.testing.assert_array_equal(part, WIDE[10:30, 15:45])
    assert part.flags["C_CONTIGUOUS"] and moved.dtype == seen.dtype == np.float32
    assert moved.tolist() == [[0, 0, 15, 10], [25, 20, 30, 20], [0, 4, 0, 4.5], [5, 0, 5, 15], [0, 0, 10, 5]]
    np.testing.assert_allclose(seen, [150 / 441, 0, 0, 0, 0.25], rtol=1e-6)
    # down before right, the object whole, others cut
    part, moved, seen = crop_around(WIDE, boxes, 2, (0.25, 0.5), (0.0, 1.0))
    np.testing.assert_array_equal(part, WIDE[5:15, 12:42])
    assert moved.tolist()[2] == [0, 9, 0.5, 9.5] and seen[2] == 1  # a quarter of a pixel, and all of it
    assert moved.tolist()[4] == [0, 0, 13, 10] and seen[4] == np.float32(130 / 200)
    # an object that is larger than what was asked for
    part, moved, seen = crop_around(WIDE, boxes, 0, (0.1, 0.1), (0.0, 0.0))
    np.testing.assert_array_equal(part, WIDE[2:20, 5:30])
    assert moved.tolist()[0] == [0.5, 0, 25, 18] and seen[0] == 1
    for keep in (None, 0):  # a box given as a list of one, and boxes in other types
        part, moved, seen = crop_around(WIDE, np.array([[5, 2, 30, 20]], np.uint8), keep, (1, 1))
        assert part.shape == WIDE.shape and moved.tolist() == [[5, 2, 30, 20]] and seen.tolist() == [1]
    rng = np.random.default_rng(3)
    fine = np.sort(rng.uniform(0, 40, (50, 2, 2)), 1).reshape(50, 4)
    for one, two in zip(crop_around(WIDE, fine, 7), crop_around(WIDE, fine.astype(np.float32), 7)):
        np.testing.assert_array_equal(one, two)
    defaults = {k: v.default for k, v in inspect.signature(crop_around).parameters.items()}
    assert (defaults["keep"], defaults["share"], defaults["at"]) == (None, (0.5, 0.5), (0.5, 0.5))


def test_cells_and_a_mosaic_by_hand():
    assert mosaic_cells((10, 20), (0.3, 0.45)) == [(0, 0, 3, 9), (0, 9, 3, 11), (3, 0, 7, 9), (3, 9, 7, 11)]
    assert mosaic_cells((10, 20), (0, 1)) == [(0, 0, 1, 19), (0, 19, 1, 1), (1, 0, 9, 19), (1, 19, 9, 1)]
    cells = mosaic_cells((10, 20), (0.3, 0.45))
    parts = [np.full((h, w, 3), n, np.uint8) for n, (_, _, h, w) in enumerate(cells)]
    boxes = [[[0.1, 0.2, 3.7, 2.9]], [], [[1, 1, 2, 2], [0, 0, 9, 7]], [[2, 3, 11, 7]]]
    labels = [[4], [], [1, 0], [2]]
    canvas, moved, names = mosaic(list(zip(parts, boxes, labels)), cells)
    assert canvas.shape == (10, 20, 3) and canvas.dtype == np.uint8
    for n, (y, x, h, w) in enumerate(cells):
        assert (canvas[y : y + h, x : x + w] == n).all()
    expected = [[0.1, 0.2, 3.7, 2.9], [1, 4, 2, 5], [0, 3, 9, 10], [11, 6, 20, 10]]
    assert moved.dtype == np.float32 and moved.tolist() == np.float32(expected).tolist()
    assert names.dtype == np.int32 and names.tolist() == [4, 1, 0, 2]
    with pytest.raises(ValueError, match="shorter"):
        mosaic(list(zip(parts, boxes, labels))[:3], cells)
    rng = np.random.default_rng(4)
    fine = [rng.uniform(0, 3, (40, 4)) for _ in range(4)]
    one, two = (
        mosaic([(p, b.astype(kind), np.zeros(40)) for p, b in zip(parts, fine)], cells)[1]
        for kind in (np.float64, np.float32)
    )
    np.testing.assert_array_equal(one, two)  # as if they had come from the data set


def test_without_limits_everything_that_makes_sense_is_accepted():
    for count in (1, 3):
        boxes, labels = np.tile(GOOD[1], (count, 1)), np.full(count, 1000, np.uint16)
        found = check_example([GOOD[0], boxes, labels])
        assert found[2].tolist() == [1000] * count and found[1].tolist() == [[1, 2, 30, 20]] * count
        assert len(check_example((GOOD[0], boxes, labels), most=count)[2]) == count
    with pytest.raises(
        ValueError, match="returned 3 objects, and no picture of the data set has more than 2:"
    ):
        check_example((GOOD[0], boxes, labels), most=2)
    empty = check_example((GOOD[0], [], []))
    assert empty[1].dtype == np.float32 and empty[2].dtype == np.int32
    for corner in ([0, 0, 5, 5], [25, 15, 30, 20], [-0.01, -0.01, 30, 20]):  # a hundredth is rounding
        (box,) = check_example((GOOD[0], [corner], [0]))[1].tolist()
        assert box == np.clip(corner, 0, [30, 20, 30, 20]).tolist()
    assert check_example((GOOD[0], np.array([[1, 2, 30, 20]], np.uint8), [0]))[1].tolist() == [[1, 2, 30, 20]]


IMAGE = "transform must return an image (h, w, 3) of uint8, not "
PLACE = "transform returned the box ({}), {} a picture 30 wide and 20 high"


@pytest.mark.parametrize(
    "example, why",
    [
        (None, "transform must return image, boxes, labels, not NoneType"),
        ("abc", "transform must return image, boxes, labels, not str"),
        (GOOD[:2], "transform must return image, boxes, labels, not 2 values"),
        (np.zeros((3, 4)), "transform must return image, boxes, labels, not (3, 4) of float64"),
        ((GOOD[0].astype(float), *GOOD[1:]), IMAGE + "(20, 30, 3) of float64"),
        ((GOOD[0][..., 0], *GOOD[1:]), IMAGE + "(20, 30) of uint8"),
        ((GOOD[0][None], *GOOD[1:]), IMAGE + "(1, 20, 30, 3) of uint8"),
        ((GOOD[0][..., [0, 1, 2, 0]], *GOOD[1:]), IMAGE + "(20, 30, 4) of uint8"),
        ((GOOD[0][:, :, None], *GOOD[1:]), IMAGE + "(20, 30, 1, 3) of uint8"),
        ((GOOD[0], GOOD[1][0], [0]), "transform must return boxes (n, 4) in numbers, not (4,) of float64"),
        ((GOOD[0], GOOD[1][None], [0]), "transform must return boxes (n, 4) in numbers, not (1, 1, 4) of float64"),
        ((GOOD[0], [[1, 2, 3]], [0]), "transform must return boxes (n, 4) in numbers, not (1, 3) of int64"),
        ((GOOD[0], GOOD[1] > 1, [0]), "transform must return boxes (n, 4) in numbers, not (1, 4) of bool"),
        ((GOOD[0], [[1, 2, 3, np.nan]], [0]), "transform returned a box that isn't finite"),
        ((GOOD[0], [[1, 2, 3, 4], [-0.02, 2, 3, 4]], [0, 0]), PLACE.format("-0.02, 2, 3, 4", "outside")),
        ((GOOD[0], [[1, 2, 3, 4], [1, 2, 30.5, 4]], [0, 0]), PLACE.format("1, 2, 30.5, 4", "outside")),
        ((GOOD[0], [[1, 2, 3, 4]] * 2 + [[5, 2, 5, 4]], [0] * 3), PLACE.format("5, 2, 5, 4", "without area in")),
        ((GOOD[0], [[1, 2, 3, 4], [5, 6, 7, 6]], [0, 0]), PLACE.format("5, 6, 7, 6", "without area in")),
        ((GOOD[0], GOOD[1], []), "transform must return a label for each of 1 boxes, not (0,) of float64"),
        ((GOOD[0], GOOD[1], [[0]]), "transform must return a label for each of 1 boxes, not (1, 1) of int64"),
        ((GOOD[0], [[1, 2, 3, 4]] * 2, [0, 5]), "transform returned the label 5, and the classes have labels from 0 to 4"),
    ],
)  # fmt: skip
def test_the_very_words_of_what_is_refused(example, why):
    with pytest.raises(ValueError) as error:
        check_example(example, classes=5)
    assert str(error.value) == why


def test_a_transform_is_asked_twice_at_first_and_once_later():
    calls = []

    class Asked:
        def __call__(self, image, boxes, labels, rng):
            calls.append(rng.random())
            image[:], boxes[:], labels[:] = 1, 2, 3  # copies, to do with as it likes
            return GOOD

    transform = Transform(Asked())
    assert (transform.name, transform.classes, transform.most) == ("Asked", None, None)
    assert Transform(shifted, 3, 4).name == "shifted"
    image, boxes, labels = np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4)), np.zeros(1, int)
    with pytest.raises(TypeError, match="^transform must be a function of .* not a str$"):
        Transform("flip")
    with pytest.raises(ValueError, match="^Asked returned the label 0, "):
        Transform(Asked(), classes=0)(*GOOD, (0,))
    for address, asked in (((5, 1), 2), ((5, 2), 1), ((5, 3), 1)):
        calls.clear()
        transform(image, boxes, labels, address)
        assert calls == [np.random.default_rng(address).random()] * asked
    assert not image.any() and not boxes.any() and not labels.any()


@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_part_that_differs_is_enough(part):
    count = iter(range(9))

    def moody(*example):
        answer = [np.array(x) for x in GOOD]
        n = next(count)
        if part == 1:
            answer[1][0, 0] = n
        else:
            answer[part] = answer[part] + answer[part].dtype.type(n)
        return tuple(answer)

    with pytest.raises(ValueError, match="^moody gave another answer when asked again"):
        Transform(moody)(*GOOD, (0,))
