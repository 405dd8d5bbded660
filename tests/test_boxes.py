"""IoU and the coding of boxes against plain loops, and the identities they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

import oracles
from helpers import numpy
from retinanet_nb.anchors import Part
from retinanet_nb.boxes import (
    CenterCoder,
    CornerCoder,
    RegressBoxes,
    box_coder,
    decode_boxes,
    encode_boxes,
    overlaps,
)
from retinanet_nb.hyperparameters import HyperParameters

whole = st.integers(0, 60)


def boxes_of(rng, n, span=400.0, smallest=1.0, largest=300.0):
    """Random boxes with widths and heights spread evenly over their logarithm."""
    w, h = np.exp(rng.uniform(math.log(smallest), math.log(largest), (2, n)))
    x, y = rng.uniform(0, span, (2, n))
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1).astype("float32")


def test_iou_by_hand():
    a = np.array([[0, 0, 10, 10]], "float32")
    others = np.array(
        [
            [0, 0, 10, 10],
            [0, 0, 10, 5],
            [5, 5, 15, 15],
            [10, 0, 20, 10],
            [20, 20, 30, 30],
            [2, 2, 4, 4],
            [-5, -5, 5, 5],
        ],
        "float32",
    )
    np.testing.assert_allclose(
        numpy(overlaps(a, others)), [[1, 0.5, 25 / 175, 0, 0, 0.04, 25 / 175]], rtol=1e-6
    )


def test_iou_of_boxes_without_area_is_zero():
    points = np.array([[3, 3, 3, 3], [0, 0, 10, 0], [-1, -1, -1, -1]], "float32")
    values = numpy(overlaps(points, np.concatenate([points, [[0, 0, 10, 10]]]).astype("float32")))
    np.testing.assert_array_equal(values, np.zeros((3, 4)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(arrays("int64", (7, 4), elements=whole), arrays("int64", (5, 4), elements=whole))
def test_iou(first, second):
    first, second = (
        np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1).astype("float32") for b in (first, second)
    )
    found = numpy(overlaps(first, second))
    assert found.shape == (7, 5)
    np.testing.assert_allclose(found, oracles.overlaps(first, second), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found, numpy(overlaps(second, first)).T, rtol=1e-6, atol=1e-7)
    assert found.min() >= 0 and found.max() <= 1


def test_encode_by_hand():
    anchor = np.array([[0, 0, 10, 20]], "float32")
    same = numpy(encode_boxes(anchor, anchor))
    np.testing.assert_allclose(same, [[0, 0, 0, 0]], atol=1e-6)
    # centre moved by (5, 10) of (10, 20): half an anchor, over 0.1; twice as wide, half as high, over 0.2
    moved = np.array([[0, 15, 20, 25]], "float32")
    np.testing.assert_allclose(
        numpy(encode_boxes(anchor, moved)), [[5, 5, math.log(2) / 0.2, -math.log(2) / 0.2]], rtol=1e-5
    )
    np.testing.assert_allclose(
        numpy(encode_boxes(anchor, moved, std=(1, 1, 1, 1))),
        [[0.5, 0.5, math.log(2), -math.log(2)]],
        rtol=1e-5,
    )


@pytest.mark.parametrize("std", [oracles.BOX_STD, (1, 1, 1, 1), (0.3, 0.2, 0.5, 0.4)])
def test_encode_and_decode(std):
    rng = np.random.default_rng(0)
    anchor_boxes, boxes = boxes_of(rng, 500, smallest=8), boxes_of(rng, 500, smallest=2)
    deltas = oracles.encode_all(anchor_boxes, boxes, std)
    np.testing.assert_allclose(
        numpy(encode_boxes(anchor_boxes, boxes, std=std)), deltas, rtol=1e-4, atol=2e-5
    )
    drawn = rng.normal(0, 1.5, (500, 4)).astype("float32")
    np.testing.assert_allclose(
        numpy(decode_boxes(anchor_boxes, drawn, std=std)),
        oracles.decode_all(anchor_boxes, drawn, std),
        rtol=1e-4,
        atol=1e-3,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    std=st.sampled_from([oracles.BOX_STD, (1, 1, 1, 1), (0.05, 0.2, 0.1, 0.4)]),
)
def test_decoding_what_was_encoded_gives_the_box(seed, std):
    rng = np.random.default_rng(seed)
    anchor_boxes, boxes = (
        boxes_of(rng, 64, span=600, smallest=8, largest=600),
        boxes_of(rng, 64, span=600, smallest=10, largest=490),
    )
    back = numpy(
        decode_boxes(anchor_boxes, encode_boxes(anchor_boxes, boxes, std=std), std=std)
    )  # sides at most 490 / 8 < 62.5 anchors
    np.testing.assert_allclose(back, boxes, rtol=0, atol=1e-3)


def test_decoding_what_was_encoded_for_the_anchors_of_a_picture():
    anchor_boxes = oracles.anchors(128, 160).astype("float32")
    rng = np.random.default_rng(1)
    for box in boxes_of(rng, 8, span=128, smallest=16, largest=128):
        boxes = np.broadcast_to(box, anchor_boxes.shape)
        np.testing.assert_allclose(
            numpy(decode_boxes(anchor_boxes, encode_boxes(anchor_boxes, boxes))), boxes, rtol=0, atol=1e-3
        )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_encoding_what_was_decoded_gives_the_deltas(seed):
    rng = np.random.default_rng(seed)
    anchor_boxes = boxes_of(rng, 32, smallest=16)
    deltas = rng.normal(0, 2, (32, 4)).astype("float32")
    np.testing.assert_allclose(
        numpy(encode_boxes(anchor_boxes, decode_boxes(anchor_boxes, deltas))), deltas, rtol=1e-3, atol=2e-3
    )


def test_the_clamp():
    anchor = np.array([[0, 0, 16, 16]], "float32")
    wide = numpy(decode_boxes(anchor, np.array([[0, 0, 1e4, 0]], "float32")))
    np.testing.assert_allclose(wide, [[8 - 500, 0, 8 + 500, 16]], rtol=1e-5, atol=1e-3)  # 16 px * 1000/16
    high = numpy(decode_boxes(anchor, np.array([[0, 0, 0, 1e4]], "float32"), std=(1, 1, 1, 1)))
    np.testing.assert_allclose(high, [[0, 8 - 500, 16, 8 + 500]], rtol=1e-5, atol=1e-3)
    # the clamp is on tw itself, not on tw / std: just inside it nothing happens
    inside = numpy(decode_boxes(anchor, np.array([[0, 0, 4.0 / 0.2, 0]], "float32")))
    np.testing.assert_allclose(inside[0, 2] - inside[0, 0], 16 * math.exp(4), rtol=1e-5)
    assert np.isfinite(numpy(decode_boxes(anchor, np.array([[1e3, -1e3, 1e30, -1e30]], "float32")))).all()


def test_leading_dimensions():
    rng = np.random.default_rng(2)
    anchor_boxes, boxes = boxes_of(rng, 30, smallest=8), boxes_of(rng, 30, smallest=8)
    flat = numpy(encode_boxes(anchor_boxes, boxes))
    for shape in ((2, 15), (2, 3, 5), (1, 30)):
        deltas = numpy(encode_boxes(anchor_boxes.reshape(*shape, 4), boxes.reshape(*shape, 4)))
        np.testing.assert_allclose(deltas, flat.reshape(*shape, 4), rtol=1e-6, atol=1e-6)
        back = numpy(decode_boxes(anchor_boxes.reshape(*shape, 4), deltas))
        np.testing.assert_allclose(back, boxes.reshape(*shape, 4), atol=1e-3)
    # one set of anchors for a batch of boxes
    batch = np.stack([boxes, boxes[::-1]])
    np.testing.assert_allclose(numpy(encode_boxes(anchor_boxes, batch))[0], flat, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        numpy(decode_boxes(anchor_boxes, encode_boxes(anchor_boxes, batch))), batch, atol=1e-3
    )
    one = numpy(encode_boxes(anchor_boxes[0], boxes[0]))
    assert one.shape == (4,)
    np.testing.assert_allclose(one, flat[0], rtol=1e-6, atol=1e-6)


# ---- coders


def test_corner_coding_by_hand():
    anchor, box = np.array([0, 0, 64, 32], "float32"), np.array([-16, 8, 80, 32], "float32")
    deltas = numpy(CornerCoder().encode(anchor, box))
    np.testing.assert_allclose(deltas, [-1.25, 1.25, 1.25, 0], atol=1e-6)
    np.testing.assert_allclose(numpy(CornerCoder().decode(anchor, deltas)), box, atol=1e-4)


@pytest.mark.parametrize("std", [(0.2,) * 4, (1, 1, 1, 1), (0.05, 0.3, 0.1, 0.5)])
def test_corner_coding_against_a_loop(std):
    rng = np.random.default_rng(0)
    anchors, boxes = boxes_of(rng, 300, smallest=8), boxes_of(rng, 300)
    wanted = [oracles.encode_corners(a, b, std) for a, b in zip(anchors.astype(float), boxes.astype(float))]
    np.testing.assert_allclose(numpy(CornerCoder(std).encode(anchors, boxes)), wanted, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**32 - 1), st.sampled_from([CenterCoder, CornerCoder]), st.floats(0.05, 2))
@settings(max_examples=30, deadline=None)
def test_every_coder_undoes_itself(seed, kind, std):
    rng = np.random.default_rng(seed)
    coder = kind((std, std / 2, std, 2 * std))
    # (2, 1, 20, 4) with (3, 20, 4): leading dimensions that broadcast
    anchors = boxes_of(rng, 40, smallest=8, largest=256).reshape(2, 1, 20, 4)
    boxes = boxes_of(rng, 60, smallest=8, largest=256).reshape(3, 20, 4)
    back = numpy(coder.decode(anchors, coder.encode(anchors, boxes)))
    assert back.shape == (2, 3, 20, 4)
    np.testing.assert_allclose(back, np.broadcast_to(boxes, back.shape), atol=2e-3)


def test_hyperparameters_name_the_coder():
    h = HyperParameters(box_std=(0.1, 0.2, 0.3, 0.4))
    assert box_coder(h) == CenterCoder((0.1, 0.2, 0.3, 0.4))
    assert box_coder(h.replace(box_coding="corners")) == CornerCoder((0.1, 0.2, 0.3, 0.4))
    with pytest.raises(ValueError, match="box_coding"):
        h.replace(box_coding="corner")


@pytest.mark.parametrize("coding, coder", [("center", CenterCoder), ("corners", CornerCoder)])
def test_the_layer_decodes_by_its_coding(coding, coder):
    rng = np.random.default_rng(1)
    anchors, deltas = boxes_of(rng, 20)[None], rng.normal(size=(2, 20, 4)).astype("float32")
    layer = RegressBoxes((0.2, 0.1, 0.3, 0.2), coding)
    wanted = numpy(coder((0.2, 0.1, 0.3, 0.2)).decode(anchors, deltas))
    for each in (layer, RegressBoxes.from_config(layer.get_config()), RegressBoxes(coder=layer.coder)):
        np.testing.assert_array_equal(numpy(each([anchors, deltas])), wanted)
    old = {k: v for k, v in RegressBoxes().get_config().items() if k != "coding"}
    assert RegressBoxes.from_config(old).coder == CenterCoder()


def test_a_part_says_what_it_was_made_from():
    assert isinstance(CornerCoder(), Part)
    assert CornerCoder.from_config(CornerCoder((1, 2, 3, 4)).get_config()) == CornerCoder((1, 2, 3, 4))
