"""What mutation testing found untested in anchors, boxes, filtering, targets and losses: layers, defaults, limits, types.

The layers are tried by themselves here, each with every field of its configuration away from the default.
"""

import inspect
import math
from dataclasses import asdict, dataclass

import keras
import numpy as np
import pytest

from helpers import numpy
from retinanet_nb import anchors as anchors_module, boxes as boxes_module, filtering, losses, targets
from retinanet_nb.anchors import AnchorGenerator, Anchors, Part, anchors_for_shape, generate_anchors, shift
from retinanet_nb.boxes import (
    CenterCoder,
    ClipBoxes,
    CornerCoder,
    RegressBoxes,
    box_coder,
    decode_boxes,
    encode_boxes,
    overlaps,
)
from retinanet_nb.filtering import (
    DetectionFilter,
    FilterDetections,
    filter_detections,
    non_max_suppression,
)
from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters
from retinanet_nb.losses import focal_loss, smooth_l1_loss
from retinanet_nb.targets import BACKGROUND, IGNORED, Matcher, assign_targets, match_anchors

OTHER_ANCHORS = AnchorParameters(sizes=(10, 20, 40, 80, 160), ratios=(0.7, 1.3), scales=(1, 1.5, 1.8))


def again(layer):
    """The layer after its configuration has been written and read, found by its registered name."""
    assert keras.saving.get_registered_name(type(layer)) == f"retinanet_nb>{type(layer).__name__}"
    return keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))


def is_float32(layer):
    """The layer computes in float32 and leaves what it is given as it is."""
    return (
        layer.dtype_policy.name == "float32" and layer.compute_dtype == "float32" and layer.autocast is False
    )


@pytest.mark.parametrize(
    "name",
    [
        "match_anchors",
        "assign_targets",
        "filter_detections",
        "non_max_suppression",
        "focal_loss",
        "smooth_l1_loss",
    ],
)
def test_defaults_are_the_hyperparameters(name):
    function = globals()[name]
    h = HyperParameters()
    names = {"class_specific_filter": True, "nms": True, "std": h.box_std}
    names |= dict.fromkeys(("matcher", "coder", "level_sizes"))  # parts of one's own: none
    given = {
        k: p.default for k, p in inspect.signature(function).parameters.items() if p.default is not p.empty
    }
    assert given
    for option, value in given.items():
        assert value == (names[option] if option in names else getattr(h, option)), option


def test_defaults_of_coding_and_of_the_layers():
    h = HyperParameters()
    for function in (encode_boxes, decode_boxes, RegressBoxes):
        assert inspect.signature(function).parameters["std"].default == h.box_std == (0.1, 0.1, 0.2, 0.2)
    assert FilterDetections().options == {
        "class_specific_filter": True,
        "nms": True,
        **{k: getattr(h, k) for k in ("score_threshold", "nms_threshold", "pre_nms_top_k", "max_detections")},
    }
    assert Anchors().parameters == AnchorParameters()
    assert math.isclose(boxes_module.SCALE_CLAMP, math.log(62.5))
    assert (BACKGROUND, IGNORED) == (-1, -2)


def test_parts_by_default():
    h = HyperParameters()
    parts = Matcher(), DetectionFilter(), CenterCoder(), AnchorGenerator()
    assert parts == (Matcher.of(h), DetectionFilter.of(h), box_coder(h), AnchorGenerator(h.anchors))
    assert CornerCoder().std == (0.2, 0.2, 0.2, 0.2)  # as keras-retinanet has it
    for part in (*parts, CornerCoder()):
        assert keras.saving.get_registered_name(type(part)) == f"retinanet_nb>{type(part).__name__}"


# ---- anchors


def test_anchor_types():
    whole = generate_anchors(8, [1], [1, 2])
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, [[-4, -4, 4, 4], [-8, -8, 8, 8]])
    # a square of 11 × √2 is no whole number of pixels, and is left so
    np.testing.assert_allclose(
        generate_anchors(11, [1], [2**0.5]), [np.array([-1, -1, 1, 1]) * 11 / 2**0.5], rtol=1e-6
    )
    # arrays of float32 give what the same numbers give in a list: the sums are made in float64
    ratios, scales = (0.3 + np.random.default_rng(0).random((2, 9))).astype("float32")
    for given in ((ratios, scales.tolist()), (ratios.tolist(), scales)):
        np.testing.assert_array_equal(
            generate_anchors(33, *given), generate_anchors(33, ratios.tolist(), scales.tolist())
        )
    wide = numpy(shift([1, 2], 8, np.zeros((1, 4), "float64")))
    assert wide.dtype == np.float32 and wide.shape == (2, 4)
    np.testing.assert_array_equal(wide, [[4, 4, 4, 4], [12, 4, 12, 4]])


def test_anchors_layer():
    images = np.zeros((2, 40, 57, 3), "uint8")
    layer = Anchors(OTHER_ANCHORS, name="mine", dtype="float16")
    found = numpy(layer(images))
    assert found.dtype == np.float32 and found.shape[0] == 1
    np.testing.assert_array_equal(found[0], numpy(anchors_for_shape((40, 57), OTHER_ANCHORS)))
    assert is_float32(layer) and layer.name == "mine"
    copy = again(layer)
    assert copy.parameters == OTHER_ANCHORS and copy.name == "mine" and is_float32(copy)
    np.testing.assert_array_equal(numpy(copy(images)), found)
    assert layer.get_config()["parameters"]["ratios"] == (0.7, 1.3)


@pytest.mark.parametrize(
    "kind, name, part",
    [
        (Anchors, "generator", AnchorGenerator(OTHER_ANCHORS)),
        (RegressBoxes, "coder", CornerCoder((1, 2, 3, 4))),
        (FilterDetections, "filter", DetectionFilter(nms=False, max_detections=7)),
        (FilterDetections, "levels", AnchorGenerator(OTHER_ANCHORS)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_layer_keeps_the_part_that_it_was_given(kind, name, part):
    layer = kind(**{name: part})
    for each in (layer, again(layer)):
        assert getattr(each, name) == part
        assert name == "levels" or each.custom == part
    # and writes none where there was none
    assert kind().custom is None and name not in kind().get_config()


def test_anchors_layer_says_its_shape():
    layer = Anchors(OTHER_ANCHORS)
    cells = 5 * 8 + 3 * 4 + 2 * 2 + 1 + 1
    assert tuple(layer.compute_output_shape((None, 40, 57, 3))) == (1, 6 * cells, 4)
    assert tuple(layer.compute_output_shape((2, 57, 40, 3))) == (1, 6 * cells, 4)
    assert len(anchors_for_shape((40, 57), OTHER_ANCHORS)) == 6 * cells
    assert tuple(layer.compute_output_shape((None, 40, 57, None))) == (1, 6 * cells, 4)  # grey or colour
    for shape in ((None, None, None, 3), (2, None, 57, 3), (2, 40, None, 3)):
        assert tuple(layer.compute_output_shape(shape)) == (1, None, 4)
    for shape in ((40, 57, 3), (1, 2, 40, 57, 3)):
        with pytest.raises(ValueError) as error:
            layer.compute_output_shape(shape)
        assert str(shape) in str(error.value) and "(B, H, W, C)" in str(error.value)


# ---- boxes


def test_overlaps_with_whole_numbers_and_upside_down():
    whole = np.array([[0, 0, 10, 10]]), np.array([[0, 0, 10, 5], [3, 3, 3, 9], [9, 0, 2, 10], [0, 9, 10, 2]])
    found = numpy(overlaps(*whole))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.5, 0, 0, 0]], rtol=1e-6)
    # a box turned inside out has no area of its own either
    np.testing.assert_array_equal(numpy(overlaps(whole[1][2:], whole[1][2:])), np.zeros((2, 2)))


def test_overlaps_of_tiny_boxes():
    """Boxes of a thousandth of a pixel still overlap themselves wholly; what has no area divides by no zero."""
    tiny = np.array([[5, 5, 5.001, 5.001]], "float32")
    np.testing.assert_allclose(numpy(overlaps(tiny, tiny)), [[1]], rtol=1e-4)
    small = np.array([[0, 0, 1e-5, 1e-5]], "float32")  # 1e-10 of 1e-8
    np.testing.assert_allclose(numpy(overlaps(small, small)), [[0.01]], rtol=1e-4)


def test_leading_dimensions_of_overlaps():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0, 50, (2, 3, 4)), rng.uniform(0, 50, (2, 5, 4))
    first[..., 2:], second[..., 2:] = first[..., :2] + 20, second[..., :2] + 30
    both = numpy(overlaps(first, second))
    assert both.shape == (2, 3, 5)
    for b in range(2):
        np.testing.assert_allclose(both[b], numpy(overlaps(first[b], second[b])), rtol=1e-6)
    np.testing.assert_allclose(
        numpy(overlaps(first[0], second)), [numpy(overlaps(first[0], s)) for s in second]
    )


def test_coding_takes_whole_numbers_and_flat_boxes():
    anchor, flat = np.array([[0, 0, 10, 20]]), np.array([[0, 5, 10, 5]])
    deltas = numpy(encode_boxes(anchor, flat))
    assert deltas.dtype == np.float32
    np.testing.assert_allclose(deltas, [[0, -2.5, 0, math.log(1e-3 / 20) / 0.2]], rtol=1e-5, atol=1e-6)
    back = numpy(decode_boxes(anchor, np.array([[1, 0, 0, 0]])))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, [[1, 0, 11, 20]], rtol=1e-6)


def test_factors_of_another_type_leave_float32():
    anchor, box = np.array([[0, 0, 10, 20]], "float32"), np.array([[5, 10, 15, 60]], "float32")
    wanted = [[0.5, 1.25, 0, math.log(2.5)]]
    for std in ((1, 1, 1, 1), np.ones(4, "float64")):
        deltas = encode_boxes(anchor, box, std)
        back = decode_boxes(anchor, deltas, std)
        for found in (deltas, back):
            assert keras.backend.standardize_dtype(found.dtype) == "float32"
        np.testing.assert_allclose(numpy(deltas), wanted, rtol=1e-6)
        np.testing.assert_allclose(numpy(back), box, rtol=1e-6)
        corners = CornerCoder(std)
        deltas = corners.encode(anchor, box)
        for found, expected in ((deltas, [[0.5, 0.5, 0.5, 2]]), (corners.decode(anchor, deltas), box)):
            assert keras.backend.standardize_dtype(found.dtype) == "float32"
            np.testing.assert_allclose(numpy(found), expected, rtol=1e-6)


def test_regress_boxes():
    anchors = np.array([[[0, 0, 10, 20], [5, 5, 20, 20]]], "float32")
    deltas = np.random.default_rng(0).normal(size=(3, 2, 4)).astype("float32")
    std = (0.3, 0.4, 0.5, 0.6)
    layer = RegressBoxes(list(std), name="mine", dtype="float16")
    assert layer.std == std and is_float32(layer) and layer.name == "mine"
    found = numpy(layer([anchors, deltas]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, numpy(decode_boxes(anchors, deltas, std)), rtol=1e-6)
    assert tuple(layer.compute_output_shape([(1, 2, 4), (3, 2, 4)])) == (3, 2, 4)
    copy = again(layer)
    assert tuple(copy.std) == std and copy.name == "mine"
    np.testing.assert_allclose(
        numpy(RegressBoxes()([anchors, deltas])), numpy(decode_boxes(anchors, deltas)), rtol=1e-6
    )


def test_clip_boxes():
    images = np.zeros((1, 30, 50, 3), "uint8")
    boxes = np.array([[[-5, -6, 60, 40], [10, 20, 40, 25], [55, 35, 70, 90], [-9, -9, -1, -1]]], "float64")
    layer = ClipBoxes(name="mine", dtype="float16")
    found = numpy(layer([images, boxes]))
    assert found.dtype == np.float32 and is_float32(layer) and layer.name == "mine"
    np.testing.assert_array_equal(found, [[[0, 0, 50, 30], [10, 20, 40, 25], [50, 30, 50, 30], [0, 0, 0, 0]]])
    assert tuple(layer.compute_output_shape([(1, 30, 50, 3), (1, 4, 4)])) == (1, 4, 4)
    assert again(layer).name == "mine"


# ---- filtering


def test_suppression_by_itself():
    boxes = np.array(
        [[[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 8], [0, 0, 10, 10]]], "float64"
    )
    scores, labels = np.array([[0.5, 0.9, 0, 0.5, -1]]), np.array([[3, 3, 3, 4, 4]])
    kept = numpy(non_max_suppression(boxes, scores, labels, 0.5, 6))
    # best first; a score of nought is a candidate, -1 is none; another label is not suppressed; no more: -1
    assert kept.dtype == np.int32
    np.testing.assert_array_equal(kept, [[1, 3, 2, -1, -1, -1]])
    # an overlap of just the threshold (0.8, the area of 8 in 10) is allowed
    np.testing.assert_array_equal(
        numpy(non_max_suppression(boxes[:, [0, 3]], scores[:, :2], labels[:, :2], np.float32(0.8), 3)),
        [[1, 0, -1]],
    )
    np.testing.assert_array_equal(numpy(non_max_suppression(boxes, scores, labels, 0.5, 2)), [[1, 3]])


def test_suppression_by_default():
    boxes = np.array([[[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 5], [20, 0, 30, 10]]], "float32")
    kept = numpy(non_max_suppression(boxes, np.array([[0.9, 0.8, 0.7, 0]]), np.zeros((1, 4), "int32")))
    np.testing.assert_array_equal(kept, [[0, 2, 3] + [-1] * 297])


def test_labels_and_boxes_of_the_first_candidate_are_those_compared():
    """Label 0 and a box at the origin are no special case, nor is a label beside a larger one."""
    boxes = np.array([[[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]]], "float32")
    kept = non_max_suppression(boxes, np.array([[0.3, 0.2, 0.1]]), np.array([[1, 0, 1]]), 0.5, 3)
    np.testing.assert_array_equal(numpy(kept), [[0, 1, -1]])


@pytest.mark.parametrize("specific", [True, False])
@pytest.mark.parametrize("nms", [True, False])
def test_filter_layer(specific, nms):
    rng = np.random.default_rng(1)
    xy = rng.integers(0, 20, (2, 12, 2))
    boxes = np.concatenate([xy, xy + rng.integers(5, 20, (2, 12, 2))], -1).astype("float32")
    scores = rng.permutation(2 * 12 * 3).reshape(2, 12, 3).astype("float32") / 100
    options = dict(
        class_specific_filter=specific,
        nms=nms,
        score_threshold=0.2,
        nms_threshold=0.3,
        pre_nms_top_k=9,
        max_detections=7,
    )
    layer = FilterDetections(**options, name="mine")
    assert layer.options == options
    found, wanted = layer([boxes, scores]), filter_detections(boxes, scores, **options)
    for a, b in zip(found, wanted):
        np.testing.assert_array_equal(numpy(a), numpy(b))
    copy = again(layer)
    assert copy.options == options and copy.name == "mine"
    spec = layer.compute_output_spec([keras.KerasTensor((5, 12, 4)), keras.KerasTensor((5, 12, 3))])
    assert [(tuple(s.shape), s.dtype) for s in spec] == [
        ((5, 7, 4), "float32"),
        ((5, 7), "float32"),
        ((5, 7), "int32"),
    ]


def test_filter_takes_other_types():
    boxes = np.array([[[0, 0, 10, 10], [30, 0, 40, 10]]])
    scores = np.array([[[0.9, 0.1], [0.2, 0.3]]])
    found = [numpy(x) for x in filter_detections(boxes, scores, score_threshold=0.15, max_detections=4)]
    assert [str(x.dtype) for x in found] == ["float32", "float32", "int32"]
    np.testing.assert_allclose(found[1], [[0.9, 0.3, 0.2, -1]], rtol=1e-6)
    np.testing.assert_array_equal(found[2], [[0, 1, 0, -1]])


@pytest.mark.parametrize("specific", [True, False])
@pytest.mark.parametrize("nms", [True, False])
def test_a_score_of_just_the_threshold_is_too_low(specific, nms):
    boxes = np.array([[[0, 0, 4, 4], [8, 0, 12, 4], [0, 8, 4, 12]]] * 2, "float32")
    scores = np.array([[[0.25, 0], [0, 0.5], [0.125, 0]], [[0, 0], [0.25, 0.75], [0.125, 0.375]]])
    found = filter_detections(boxes, scores, specific, nms, 0.25, 0.5, 4, 3)
    wanted = [
        [[boxes[0, 1], [-1] * 4, [-1] * 4], [boxes[1, 1], boxes[1, 2], [-1] * 4]],
        [[0.5, -1, -1], [0.75, 0.375, -1]],
        [[1, -1, -1], [1, 1, -1]],
    ]
    for x, expected in zip(found, wanted):
        np.testing.assert_array_equal(numpy(x), np.array(expected))


@pytest.mark.parametrize("specific", [True, False])
def test_a_single_box_below_the_threshold(specific):
    boxes, scores = np.ones((2, 1, 4), "float32"), np.full((2, 1, 1), 0.1, "float32")
    for x in filter_detections(boxes, scores, specific, True, 0.25, 0.5, 4, 3):
        assert (numpy(x) == -1).all()


def test_a_score_of_nought_above_a_negative_threshold():
    boxes = np.array([[[0, 0, 4, 4], [8, 0, 12, 4], [1, 2, 3, 4]]], "float32")
    found = filter_detections(boxes, np.array([[[0.0], [0.0], [0.0]]]), True, True, -0.5, 0.5, 4, 5)
    np.testing.assert_array_equal(numpy(found[1]), [[0, 0, 0, -1, -1]])
    np.testing.assert_array_equal(numpy(found[0])[0, :3], boxes[0])
    found = filter_detections(boxes, np.array([[[0.0], [0.0], [0.0]]]), False, False, -0.5, 0.5, 4, 5)
    np.testing.assert_array_equal(numpy(found[2]), [[0, 0, 0, -1, -1]])


@keras.saving.register_keras_serializable("test_exact")
@dataclass(frozen=True)
class Halves(Part):
    """Two levels, which share the pixels of a picture."""

    fewer: int = 0

    def level_sizes(self, shape):
        return [shape[0] * shape[1] // 2 - self.fewer] * 2


def test_levels_in_a_configuration():
    """Those of our own anchors as their numbers, which is how they stand in files; any others as a part."""
    ours = FilterDetections(levels=AnchorGenerator(OTHER_ANCHORS))
    assert ours.get_config()["levels"] == asdict(OTHER_ANCHORS)
    assert again(ours).levels == FilterDetections(levels=OTHER_ANCHORS).levels == ours.levels
    theirs = again(FilterDetections(levels=Halves(3)))
    assert theirs.levels == Halves(3) and theirs.levels.level_sizes((4, 4)) == [5, 5]
    given = inspect.signature(DetectionFilter.__call__).parameters
    assert (
        given["level_sizes"].default is inspect.signature(filter_detections).parameters["level_sizes"].default
    )


@pytest.mark.parametrize("specific", [True, False])
def test_candidates_of_each_level(specific):
    """No level sends more than it has, if that is known before the picture comes; else empty ones fill up."""
    rng = np.random.default_rng(0)
    boxes, scores = rng.random((3, 6, 4), np.float32), rng.random((3, 6, 2), np.float32)
    each = scores if specific else scores.max(-1, keepdims=True)
    best = lambda x: -np.sort(-x.reshape(3, -1))[:, :5]
    levels = [best(each[:, :4]), best(each[:, 4:])]
    filled = [np.pad(x, [(0, 0), (0, 5 - x.shape[1])], constant_values=-1) for x in levels]
    unknown = [keras.ops.convert_to_tensor(n, "int32") for n in (4, 2)]
    for sizes, expected in ((None, [best(each)]), ((4, 2), levels), (unknown, filled)):
        got = [numpy(x) for x in filtering._candidates_by_level(boxes, scores, sizes, specific, 0, 5)]
        np.testing.assert_array_equal(got[1], np.concatenate(expected, 1))
        assert got[0].shape == (*got[1].shape, 4) and got[2].shape == got[1].shape


# ---- targets


def test_matching_by_itself():
    iou = np.array(
        [
            [
                [0.5, 0.0, 0.9],
                [0.45, 0.39, 0.9],
                [0.4, 0.0, 0.9],
                [0.39, 0.0, 0.9],
                [0.0, 0.1, 0.9],
                [0.7, 0.7, 0.9],
            ]
        ],
        "float32",
    )
    valid = np.array([[True, True, False]])  # the last one is padding, whatever it overlaps
    found = numpy(match_anchors(iou, valid, force_match=False))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [[0, IGNORED, IGNORED, BACKGROUND, BACKGROUND, 0]])
    # the best anchor of both objects is the last; of equals the first object gets it
    np.testing.assert_array_equal(numpy(match_anchors(iou, valid)), found)
    iou[0, 5, 1] = 0.71
    forced = numpy(match_anchors(iou, valid))
    np.testing.assert_array_equal(forced, [[0, IGNORED, IGNORED, BACKGROUND, BACKGROUND, 1]])
    iou[0, 5] = 0
    # now each has an anchor of its own, below every threshold for the second
    np.testing.assert_array_equal(
        numpy(match_anchors(iou, valid)), [[0, 1, IGNORED, BACKGROUND, BACKGROUND, BACKGROUND]]
    )


def test_objects_that_no_anchor_touches_get_none():
    iou = np.zeros((1, 3, 2), "float32")
    iou[0, 1, 1] = 1e-6
    found = numpy(match_anchors(iou, np.ones((1, 2), bool)))
    np.testing.assert_array_equal(found, [[BACKGROUND, 1, BACKGROUND]])


def test_targets_of_other_types_and_of_no_object():
    anchors = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 7]])
    boxes, labels = np.array([[[0, 0, 10, 10]]]), np.array([[5.0]])
    deltas, classes = (numpy(x) for x in assign_targets(anchors, boxes, labels))
    assert (deltas.dtype, classes.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(classes, [[5, -1, 5]])
    np.testing.assert_allclose(
        deltas[0, 2], [0, 1.5 / 7 / 0.1, 0, math.log(10 / 7) / 0.2], rtol=1e-5, atol=1e-6
    )
    assert (deltas[0, :2] == 0).all()
    none = assign_targets(anchors, np.zeros((2, 0, 4)), np.zeros((2, 0)))
    assert (numpy(none[1]) == -1).all() and numpy(none[1]).shape == (2, 3) and not numpy(none[0]).any()


def test_targets_pass_their_options_on():
    anchors = np.array([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 3]], "float32")
    boxes, labels = np.array([[[0, 0, 10, 10]]], "float32"), np.array([[2]])
    given = dict(negative_overlap=0.2, positive_overlap=0.7, force_match=False, std=(1, 1, 1, 1))
    deltas, classes = (numpy(x) for x in assign_targets(anchors, boxes, labels, **given))
    np.testing.assert_array_equal(classes, [[2, -2, -2]])
    deltas, classes = (
        numpy(x) for x in assign_targets(anchors, boxes, labels, 0.2, 0.25, True, (1, 1, 1, 1))
    )
    np.testing.assert_array_equal(classes, [[2, 2, 2]])
    np.testing.assert_allclose(deltas[0, 1], [0, 2 / 6, 0, math.log(10 / 6)], rtol=1e-5, atol=1e-6)
    far = np.array([[[8, 8, 30, 30]]], "float32")  # overlaps the first a little, and is forced on it
    assert numpy(assign_targets(anchors, far, labels)[1]).tolist() == [[2, -1, -1]]
    assert numpy(assign_targets(anchors, far, labels, force_match=False)[1]).tolist() == [[-1, -1, -1]]


# ---- losses


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.1, float("nan")])
def test_focal_loss_refuses_alpha(alpha):
    with pytest.raises(ValueError, match="alpha") as error:
        focal_loss(alpha=alpha)
    assert str(alpha) in str(error.value)


@pytest.mark.parametrize("gamma", [-1e-9, -2, float("nan")])
def test_focal_loss_refuses_gamma(gamma):
    with pytest.raises(ValueError, match="gamma") as error:
        focal_loss(gamma=gamma)
    assert str(gamma) in str(error.value)


@pytest.mark.parametrize("sigma", [0, -1, float("nan")])
def test_smooth_l1_refuses_sigma(sigma):
    with pytest.raises(ValueError, match="sigma") as error:
        smooth_l1_loss(sigma)
    assert str(sigma) in str(error.value)


def test_losses_take_what_is_allowed():
    classes, logits = np.array([[0, -1]]), np.zeros((1, 2, 1), "float32")
    half = math.log(2)
    for alpha, gamma, expected in (
        (0.5, 0, half),
        (None, 0, 2 * half),
        (0.999, 0, half),
        (1e-6, 0, half),
        (0.25, 2, half / 4),
        (None, 1, half),
    ):
        np.testing.assert_allclose(numpy(focal_loss(alpha, gamma)(classes, logits)), expected, rtol=1e-5)
    expected = 0.25 * (0.25 + 0.75) * half  # alpha and gamma as in the paper
    np.testing.assert_allclose(numpy(focal_loss()(classes, logits)), expected, rtol=1e-5)
    deltas = np.full((1, 2, 4), 0.5, "float32")
    np.testing.assert_allclose(
        numpy(smooth_l1_loss(0.5)(classes, deltas * 0, deltas)), 4 * 0.5 * 0.25**2, rtol=1e-5
    )


def test_losses_cast_what_they_are_given():
    classes = np.array([[1.0, -1.0, -2.0]])  # labels as floats, logits and deltas in other precisions
    logits = np.array([[[1, -2], [0, 3], [5, 5]]], "float64")
    exact = focal_loss()(classes.astype("int32"), logits.astype("float32"))
    for c, x in ((classes, logits), (classes, logits.astype("float16")), (classes.astype("int64"), logits)):
        found = numpy(focal_loss()(c, x))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, numpy(exact), rtol=1e-6)
    deltas = np.ones((1, 3, 4), "float64")
    for d in (deltas, deltas.astype("float16")):
        found = numpy(smooth_l1_loss()(classes, d * 0, d))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, 4 * (1 - 0.5 / 9), rtol=1e-5)
    # both sides are cast before they are subtracted: in float16 2049 - 2048 would be 0
    far = np.array([[[2049, 0, 0, 0]]], "float32"), np.array([[[2048, 0, 0, 0]]], "float16")
    np.testing.assert_allclose(numpy(smooth_l1_loss()(np.array([[0]]), *far)), 1 - 0.5 / 9, rtol=1e-5)


def test_one_positive_counts_once():
    """The divisor is the number of positives, at least one, and the class 0 is one of them."""
    logits = np.zeros((1, 4, 2), "float32")
    for classes, divisor in (([0, -1, -1, -1], 1), ([0, 0, 1, -1], 3), ([-1, -1, -1, -1], 1)):
        found = numpy(focal_loss(None, 0)(np.array([classes]), logits))
        np.testing.assert_allclose(found, 8 * math.log(2) / divisor, rtol=1e-5)
        boxes = numpy(smooth_l1_loss()(np.array([classes]), np.zeros((1, 4, 4)), np.ones((1, 4, 4))))
        positives = sum(c >= 0 for c in classes)
        np.testing.assert_allclose(boxes, positives * 4 * (1 - 0.5 / 9) / divisor, rtol=1e-5)


def test_everything_public_is_exported():
    assert set(anchors_module.__all__) >= {"Anchors", "anchors_for_shape", "generate_anchors", "shift"}
    assert set(filtering.__all__) >= {"FilterDetections", "filter_detections", "non_max_suppression"}
    assert set(losses.__all__) >= {"focal_loss", "smooth_l1_loss"}
    assert set(targets.__all__) >= {"BACKGROUND", "IGNORED", "assign_targets", "match_anchors"}


def test_without_objects_all_is_background_even_where_nothing_is_below_the_threshold():
    anchors = np.array([[0, 0, 10, 10], [40, 40, 50, 50]], "float32")
    for boxes, labels in (
        (np.zeros((1, 0, 4)), np.zeros((1, 0))),
        (np.full((1, 2, 4), -1.0), np.full((1, 2), -1)),
    ):
        classes = numpy(assign_targets(anchors, boxes, labels, negative_overlap=0.0)[1])
        assert classes.tolist() == [[BACKGROUND, BACKGROUND]]
    # an overlap of nought is not below a threshold of nought
    far = assign_targets(anchors, np.array([[[0, 0, 10, 10]]]), np.array([[1]]), negative_overlap=0.0)
    assert numpy(far[1]).tolist() == [[1, IGNORED]]
