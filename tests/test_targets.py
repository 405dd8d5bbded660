"""Which anchor answers for which object: plain loops, cases worked by hand, properties."""

import keras
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

import oracles
from helpers import numpy
from retinanet_nb.anchors import Part
from retinanet_nb.boxes import CornerCoder, overlaps
from retinanet_nb.engine import as_kernel
from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.targets import BACKGROUND, IGNORED, Matcher, assign_targets, match_anchors

DEFAULTS = dict(negative_overlap=0.4, positive_overlap=0.5, force_match=True, std=oracles.BOX_STD)


def assign(anchors, boxes, labels, **options):
    deltas, classes = assign_targets(
        np.asarray(anchors, "float32"),
        np.asarray(boxes, "float32"),
        np.asarray(labels, "int32"),
        **{**DEFAULTS, **options},
    )
    deltas, classes = numpy(deltas), numpy(classes)
    assert deltas.dtype == np.float32 and classes.dtype == np.int32
    assert deltas.shape == (len(boxes), len(anchors), 4) and classes.shape == (len(boxes), len(anchors))
    assert np.isfinite(deltas).all()  # also where they don't count: 0 * inf would be nan
    return deltas, classes


def check(anchors, boxes, labels, **options):
    deltas, classes = assign(anchors, boxes, labels, **options)
    names = dict(negative_overlap="negative", positive_overlap="positive")
    for b in range(len(boxes)):
        expected, expected_classes = oracles.assign(
            anchors, boxes[b], labels[b], **{names.get(k, k): v for k, v in options.items()}
        )
        np.testing.assert_array_equal(classes[b], expected_classes)
        positive = expected_classes >= 0
        np.testing.assert_allclose(deltas[b][positive], expected[positive], rtol=1e-4, atol=1e-4)
    return deltas, classes


ANCHORS = np.array(
    [[0, 0, 10, 10], [0, 0, 10, 4], [0, 0, 10, 5], [50, 50, 60, 60], [0, 0, 20, 10]], "float32"
)


def test_five_anchors_by_hand():
    # the object is anchor 0: IoU 1, 0.4 (not below 0.4: ignored), 0.5 (positive), 0, 0.5 (positive)
    _, classes = check(ANCHORS, [[[0, 0, 10, 10]]], [[7]])
    np.testing.assert_array_equal(classes, [[7, -2, 7, -1, 7]])
    _, classes = check(ANCHORS, [[[0, 0, 10, 10]]], [[7]], positive_overlap=0.6)
    np.testing.assert_array_equal(classes, [[7, -2, -2, -1, -2]])
    _, classes = check(ANCHORS, [[[0, 0, 10, 10]]], [[0]], negative_overlap=0.5)
    np.testing.assert_array_equal(classes, [[0, -1, 0, -1, 0]])


def test_every_object_gets_its_best_anchor():
    far = [[[52, 52, 55, 55], [0, 0, 10, 10]]]  # IoU 9/100 with anchor 3, nothing better
    _, classes = check(ANCHORS, far, [[3, 4]])
    assert classes[0, 3] == 3
    _, classes = check(ANCHORS, far, [[3, 4]], force_match=False)
    assert classes[0, 3] == -1


def test_the_best_anchor_is_taken_also_from_another_object():
    # the second object overlaps anchor 0 best (0.36); the first object has anchor 1 for itself and anchor 0 by IoU 0.5
    anchors = [[0, 0, 10, 10], [0, 0, 10, 5]]
    boxes = [[[0, 0, 10, 5], [2, 4, 8, 10]]]
    deltas, classes = check(anchors, boxes, [[1, 2]])
    np.testing.assert_array_equal(classes, [[2, 1]])


def test_two_objects_with_one_best_anchor():
    anchors = [[0, 0, 10, 10], [100, 100, 110, 110]]
    deltas, classes = assign(anchors, [[[0, 0, 10, 9], [0, 1, 10, 10]]], [[1, 2]])
    assert classes[0, 0] in (1, 2) and classes[0, 1] == -1
    box = [[0, 0, 10, 9], [0, 1, 10, 10]][classes[0, 0] - 1]
    np.testing.assert_allclose(deltas[0, 0], oracles.encode(anchors[0], box), rtol=1e-4, atol=1e-5)


def test_no_objects():
    deltas, classes = assign(ANCHORS, np.full((2, 3, 4), -1), np.full((2, 3), -1))
    np.testing.assert_array_equal(classes, -1)
    deltas, classes = assign(ANCHORS, np.zeros((2, 0, 4)), np.zeros((2, 0)))  # not even room for one
    np.testing.assert_array_equal(classes, -1)


def test_padding_is_not_an_object_whatever_its_box():
    boxes = [[[0, 0, 10, 10], [50, 50, 60, 60]], [[50, 50, 60, 60], [0, 0, 0, 0]]]
    _, classes = check(ANCHORS, boxes, [[1, -1], [-1, -1]])
    assert classes[0, 3] == -1 and (classes[1] == -1).all()
    alone = assign(ANCHORS, [[[0, 0, 10, 10]]], [[1]])
    np.testing.assert_array_equal(classes[0], alone[1][0])


def test_padding_in_front():
    check(ANCHORS, [[[-1, -1, -1, -1], [50, 50, 60, 59]]], [[-1, 2]])


def scene(rng, objects, anchors=60):
    """Random anchors and objects whose ties have no chance; some objects are padding."""

    def boxes(n):
        x, y = rng.uniform(0, 100, (2, n))
        w, h = rng.uniform(10, 60, (2, n))
        return np.stack([x, y, x + w, y + h], 1).astype("float32")

    return (
        boxes(anchors),
        np.stack([boxes(objects) for _ in range(3)]),
        rng.integers(-1, 4, (3, objects)).astype("int32"),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    thresholds=st.sampled_from([(0.4, 0.5), (0.3, 0.7), (0.5, 0.5)]),
    force=st.booleans(),
)
def test_random_batches(seed, thresholds, force):
    rng = np.random.default_rng(seed)
    anchors, boxes, labels = scene(rng, 5)
    for b in range(
        3
    ):  # which of two objects wins a common best anchor is left open, and so is one that no anchor touches
        best = [i for i in oracles.best_anchors(anchors, boxes[b], labels[b]) if i is not None]
        assume(len(set(best)) == len(best))
        assume(
            all(
                max(oracles.iou(a, box) for a in anchors) > 0
                for box, label in zip(boxes[b], labels[b])
                if label >= 0
            )
        )
    check(
        anchors,
        boxes,
        labels,
        negative_overlap=thresholds[0],
        positive_overlap=thresholds[1],
        force_match=force,
    )


def test_real_anchors():
    anchors = oracles.anchors(128, 128).astype("float32")
    rng = np.random.default_rng(3)
    wh, xy = rng.uniform(8, 90, (2, 4, 2)), rng.uniform(0, 100, (2, 4, 2))
    boxes, labels = np.concatenate([xy, xy + wh], -1), np.array([[0, 1, 2, -1], [5, -1, -1, -1]])
    check(anchors, boxes, labels, force_match=False)
    deltas, classes = assign(anchors, boxes, labels)
    for b in range(2):
        values = oracles.overlaps(anchors, boxes[b])
        for m in np.flatnonzero(labels[b] >= 0):
            best = np.flatnonzero(values[:, m] > values[:, m].max() - 1e-6)  # the grid has ties
            assert any(
                classes[b, i] == labels[b, m]
                and np.allclose(deltas[b, i], oracles.encode(anchors[i], boxes[b, m]), atol=1e-3)
                for i in best
            )


def test_permuting_pictures_permutes_the_targets():
    anchors, boxes, labels = scene(np.random.default_rng(4), 6)
    deltas, classes = assign(anchors, boxes, labels)
    order = [2, 0, 1]
    again, classes_again = assign(anchors, boxes[order], labels[order])
    np.testing.assert_array_equal(classes_again, classes[order])
    np.testing.assert_allclose(again[classes_again >= 0], deltas[order][classes[order] >= 0], atol=1e-5)


def test_the_order_of_objects_does_not_matter():
    anchors, boxes, labels = scene(np.random.default_rng(8), 4, anchors=200)
    labels = np.abs(labels)
    for b in range(3):
        best = oracles.best_anchors(anchors, boxes[b], labels[b])
        assert len(set(best)) == len(best)
    first, second = assign(anchors, boxes, labels), assign(anchors, boxes[:, ::-1], labels[:, ::-1])
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_allclose(first[0][first[1] >= 0], second[0][first[1] >= 0], atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="compiles with TensorFlow")
@pytest.mark.parametrize("xla", [False, True])
def test_inside_a_compiled_graph(xla):
    import tensorflow as tf

    anchors, boxes, labels = scene(np.random.default_rng(5), 5)
    eager = assign(anchors, boxes, labels)
    run = tf.function(lambda b, l: assign_targets(anchors, b, l, **DEFAULTS), jit_compile=xla)
    deltas, classes = run(tf.constant(boxes), tf.constant(labels))
    np.testing.assert_array_equal(classes.numpy(), eager[1])
    np.testing.assert_allclose(deltas.numpy()[eager[1] >= 0], eager[0][eager[1] >= 0], atol=1e-4)


@pytest.mark.parametrize("anchors", [3, 1024, 1025])
def test_one_object_after_another_says_what_the_table_says(anchors):
    "Also for whole blocks of anchors, and where padding comes in between."
    rng = np.random.default_rng(anchors)
    boxes = np.concatenate([xy := rng.uniform(0, 80, (anchors, 2)), xy + rng.uniform(9, 40, (anchors, 2))], 1)
    boxes[-1] = boxes[0]  # of equal ones, the first
    objects = rng.permutation(boxes)[: 3 * (anchors // 3)].reshape(3, -1, 4)[:, :60] + rng.uniform(-2, 2, 4)
    valid = rng.random(objects.shape[:2]) < 0.7
    valid[1] = False
    boxes, objects = boxes.astype("float32"), objects.astype("float32")
    for rule in ((0.4, 0.5, True), (0.4, 0.5, False), (0.0, 0.3, True), (0.0, 0.0, False)):
        expected = numpy(match_anchors(overlaps(boxes, objects), valid, *rule))
        for match in (Matcher(*rule), as_kernel(Matcher(*rule))):
            np.testing.assert_array_equal(numpy(match(boxes, objects, valid)), expected)


# ---- parts of one's own


def test_the_matcher_of_hyperparameters_does_what_the_numbers_do():
    h = HyperParameters(negative_overlap=0.2, positive_overlap=0.3, force_match=False)
    assert Matcher.of(h) == Matcher(0.2, 0.3, False)
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 80, (60, 2))
    anchors = np.concatenate([xy, xy + rng.uniform(10, 40, (60, 2))], 1)
    boxes, labels = anchors[None, :5] + rng.uniform(-9, 9, (1, 5, 4)), np.arange(5)[None]
    plain = assign(anchors, boxes, labels, negative_overlap=0.2, positive_overlap=0.3, force_match=False)
    parts = assign(anchors, boxes, labels, matcher=Matcher.of(h))
    for a, b in zip(plain, parts):
        np.testing.assert_array_equal(a, b)
    assert {BACKGROUND, IGNORED, 0} <= set(plain[1].ravel())


class Nearest(Part):
    """Every object gets the one anchor whose centre is nearest; nobody else anything."""

    def __call__(self, anchors, boxes, valid):
        centre = lambda x: (x[..., :2] + x[..., 2:]) / 2
        away = keras.ops.norm(centre(anchors)[None, :, None] - centre(boxes)[:, None], axis=-1)
        away = keras.ops.where(valid[:, None], away, np.inf)
        nearest = keras.ops.argmin(away, axis=1)
        mine = keras.ops.arange(len(anchors))[None, :, None] == nearest[:, None]
        mine = mine & valid[:, None]
        return keras.ops.where(
            keras.ops.any(mine, -1), keras.ops.cast(keras.ops.argmax(mine, -1), "int32"), -1
        )


def test_a_matcher_of_ones_own_decides_alone():
    anchors = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]
    boxes = [[[21, 1, 24, 4], [900, 0, 910, 10]], [[1, 0, 10, 9], [-1, -1, -1, -1]]]
    deltas, classes = assign(anchors, boxes, [[7, 8], [9, -1]], matcher=Nearest())
    assert classes.tolist() == [[-1, 7, 8], [9, -1, -1]]
    assert (deltas[classes < 0] == 0).all() and (deltas[classes >= 0] != 0).any()


def test_targets_in_another_coding():
    anchors, boxes = np.array([[0, 0, 20, 10], [50, 50, 60, 60]], "float32"), np.array([[[2, 0, 22, 10]]])
    deltas, classes = assign(anchors, boxes, [[1]], coder=CornerCoder((0.5,) * 4))
    assert classes.tolist() == [[1, -1]]
    np.testing.assert_allclose(deltas, [[[0.2, 0, 0.2, 0], [0, 0, 0, 0]]], atol=1e-6)
