"""Anchors against plain loops and against numbers worked by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import oracles
from helpers import numpy
from retinanet_nb.anchors import AnchorGenerator, Anchors, anchors_for_shape
from retinanet_nb.hyperparameters import AnchorParameters


@pytest.mark.parametrize("shape", [(64, 64), (240, 320), (333, 500), (100, 130), (1, 1), (128, 8), (7, 129)])
def test_all_anchors_in_the_documented_order(shape):
    found, expected = numpy(anchors_for_shape(shape)), oracles.anchors(*shape)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_by_hand():
    # 16 x 24 pixels: P3 has 2 rows of 3 cells, P4 one row of two, P5 to P7 one cell each
    found = numpy(anchors_for_shape((16, 24)))
    assert len(found) == 9 * (6 + 2 + 1 + 1 + 1)
    w = 32 / math.sqrt(0.5)  # ratio 1/2: twice as wide as high, 45.25 x 22.63
    np.testing.assert_allclose(found[0], [4 - w / 2, 4 - w / 4, 4 + w / 2, 4 + w / 4], atol=1e-4)
    np.testing.assert_allclose(found[3], [4 - 16, 4 - 16, 4 + 16, 4 + 16], atol=1e-4)  # ratio 1, scale 1
    np.testing.assert_allclose(
        found[9 + 3], [12 - 16, 4 - 16, 12 + 16, 4 + 16], atol=1e-4
    )  # next column first
    np.testing.assert_allclose(
        found[27 + 3], [4 - 16, 12 - 16, 4 + 16, 12 + 16], atol=1e-4
    )  # then the next row
    np.testing.assert_allclose(found[54 + 3], [8 - 32, 8 - 32, 8 + 32, 8 + 32], atol=1e-4)  # P4 begins
    np.testing.assert_allclose(found[-6], [64 - 256, 64 - 256, 64 + 256, 64 + 256], atol=1e-3)  # P7


def test_areas_and_ratios():
    found = numpy(anchors_for_shape((40, 56))).astype("float64")
    w, h = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    ratios = np.tile(np.repeat([0.5, 1, 2], 3), len(found) // 9)
    np.testing.assert_allclose(h / w, ratios, rtol=1e-5)
    scale = np.tile([1, 2 ** (1 / 3), 2 ** (2 / 3)], len(found) // 3)
    size = np.concatenate(
        [
            np.full(9 * math.ceil(40 / s) * math.ceil(56 / s), v)
            for s, v in zip(oracles.STRIDES, oracles.SIZES)
        ]
    )
    np.testing.assert_allclose(np.sqrt(w * h), size * scale, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(sizes=(10, 20, 40, 80, 160)),
        dict(ratios=(1,), scales=(1,)),
        dict(ratios=(3, 0.25), scales=(0.5, 1, 1.5, 2)),
        dict(sizes=(16, 32, 64, 128, 256), ratios=(0.7, 1.3), scales=(2, 1)),
    ],
)
def test_other_parameters(options):
    parameters = AnchorParameters(**options)
    assert parameters.num_anchors == len(options.get("ratios", oracles.RATIOS)) * len(
        options.get("scales", oracles.SCALES)
    )
    np.testing.assert_allclose(
        numpy(anchors_for_shape((90, 121), parameters)),
        oracles.anchors(90, 121, **options),
        rtol=0,
        atol=1e-3,
    )


def test_parameters_are_the_documented_ones():
    p = AnchorParameters()
    assert (tuple(p.sizes), tuple(p.strides), tuple(p.ratios)) == (
        oracles.SIZES,
        oracles.STRIDES,
        oracles.RATIOS,
    )
    np.testing.assert_allclose(p.scales, oracles.SCALES)
    assert p.num_anchors == 9
    with pytest.raises(AttributeError):
        p.sizes = (1, 2, 3, 4, 5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_count_and_symmetry(height, width):
    found = numpy(anchors_for_shape((height, width)))
    assert len(found) == 9 * sum(math.ceil(height / s) * math.ceil(width / s) for s in oracles.STRIDES)
    # turning the picture on its side turns every anchor on its side: the same set with x and y exchanged
    turned = numpy(anchors_for_shape((width, height)))[:, [1, 0, 3, 2]]
    order = lambda boxes: boxes[np.lexsort(np.round(boxes.astype("float64"), 1).T)]
    np.testing.assert_allclose(order(found), order(turned), atol=2e-3)


TORCHVISION = AnchorParameters(offset=0, whole_pixels=True)


@pytest.mark.parametrize("shape", [(256, 256), (800, 1088), (1333, 800), (100, 130), (33, 31)])
def test_anchors_as_torchvision_lays_them(shape):
    found = numpy(anchors_for_shape(shape, TORCHVISION))
    np.testing.assert_array_equal(found, oracles.torchvision_anchors(*shape))


def test_torchvision_anchors_by_hand():
    found = numpy(anchors_for_shape((800, 800), TORCHVISION))
    np.testing.assert_array_equal(found[:3], [[-23, -11, 23, 11], [-28, -14, 28, 14], [-35, -18, 35, 18]])
    np.testing.assert_array_equal(found[3:6], [[-16, -16, 16, 16], [-20, -20, 20, 20], [-25, -25, 25, 25]])
    last = found[-9:].reshape(9, 2, 2).mean(1)
    np.testing.assert_array_equal(
        last, [[684, 684]] * 9
    )  # the seventh cell of P7, 800 // 7 = 114 pixels apart


@given(st.floats(0, 1), st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=25, deadline=None)
def test_the_offset_moves_every_anchor_by_so_many_strides(offset, height, width):
    shape, moved = (height, width), AnchorParameters(offset=offset)
    sizes = AnchorGenerator(moved).level_sizes(shape)
    away = np.repeat(np.array(moved.strides) * (offset - 0.5), sizes)[:, None]
    np.testing.assert_allclose(
        numpy(anchors_for_shape(shape, moved)), numpy(anchors_for_shape(shape)) + away, atol=1e-3
    )


def test_level_sizes_add_up_and_the_layer_takes_another_generator():
    shape = (100, 130)
    sizes = AnchorGenerator().level_sizes(shape)
    assert sizes == [9 * n for n in (13 * 17, 7 * 9, 4 * 5, 2 * 3, 1 * 2)]
    assert sum(sizes) == len(anchors_for_shape(shape))
    other = AnchorGenerator(TORCHVISION)
    layer = Anchors(generator=other)
    np.testing.assert_array_equal(
        numpy(layer(np.zeros((1, *shape, 3), "uint8")))[0], numpy(anchors_for_shape(shape, TORCHVISION))
    )
    assert layer.compute_output_shape((None, *shape, 3)) == (1, sum(sizes), 4)
    assert Anchors.from_config(Anchors(TORCHVISION).get_config()).parameters == TORCHVISION


@pytest.mark.parametrize(
    "wrong", [dict(offset=-0.1), dict(offset=1.1), dict(offset=None), dict(whole_pixels=1)]
)
def test_wrong_fields_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"AnchorParameters.{next(iter(wrong))}"):
        AnchorParameters(**wrong)


def test_whole_pixels_may_not_round_an_anchor_to_nothing():
    sizes = (1, 4, 8, 16, 32)
    with pytest.raises(ValueError, match="to nothing"):
        AnchorParameters(sizes=sizes, whole_pixels=True)
    assert AnchorParameters(sizes=sizes).sizes == sizes
    smallest = AnchorParameters(sizes=(2, *sizes[1:]), whole_pixels=True)
    assert (np.diff(numpy(anchors_for_shape((8, 8), smallest)).reshape(-1, 2, 2), axis=1) > 0).all()
