"""What mutation testing found untested in the evaluation: areas, the arrays of a data set, checks, pieces of COCO's sums."""

from types import SimpleNamespace

import numpy as np
import pytest

from retinanet_nb import evaluation
from retinanet_nb.evaluation import Detections, coco_metrics, iou_matrix, stack_detections, stack_objects
from retinanet_nb.prediction import Found


def test_boxes_without_area_overlap_nothing():
    boxes = np.array([[0, 0, 4, 4], [4, 0, 0, 4], [0, 4, 4, 0], [4, 4, 0, 0], [2, 2, 2, 2], [0, 0, 0.5, 0.5]])
    np.testing.assert_array_equal(evaluation._areas(boxes), [16, 0, 0, 0, 0, 0.25])
    found = iou_matrix(boxes, boxes)
    expected = np.zeros((6, 6))
    expected[0, 0] = expected[5, 5] = 1
    expected[0, 5] = expected[5, 0] = 0.25 / 16
    np.testing.assert_array_equal(found, expected)


def test_overlaps_are_computed_in_float64():
    a = np.array([[0, 0, 1e4, 1e4]], np.float32)
    b = np.array([[0, 0, 1e4, 9999]], np.float32)
    assert iou_matrix(a, b)[0, 0] == 0.9999 and iou_matrix(a, b).dtype == np.float64
    assert iou_matrix([0, 0, 2, 2], [[0, 0, 2, 1], [5, 5, 6, 6]]).tolist() == [[0.5, 0]]  # lists; one box
    assert iou_matrix(np.array([[0, 0, 2, 2]], np.uint8), [[1, 0, 2, 2]]).tolist() == [[0.5]]
    assert iou_matrix([], [[0, 0, 1, 1]]).shape == (0, 1)


def found(n, dtype=np.float32, first=0):
    boxes = (np.arange(4 * n).reshape(n, 4) + first).astype(dtype)
    return Found(boxes, (np.arange(n) / 8).astype(dtype), np.arange(n))


def test_detections_are_a_sequence_of_pictures():
    stack = stack_detections([found(2), found(0), found(3)])
    assert len(stack) == 3 and stack.ends.tolist() == [0, 2, 2, 5]
    assert stack.picture.tolist() == [0, 0, 2, 2, 2] and stack.picture.dtype == np.int32
    np.testing.assert_array_equal(stack[2].boxes, found(3).boxes)
    np.testing.assert_array_equal(stack[-3].scores, found(2).scores)
    assert [len(f.labels) for f in stack] == [2, 0, 3]
    assert [len(f.labels) for f in stack[1:]] == [0, 3] and [len(f.labels) for f in stack[::-2]] == [3, 2]
    for i in (3, -4):
        with pytest.raises(IndexError):
            stack[i]
    few = stack.take([1, 2, 4])
    assert (
        isinstance(few, Detections) and few.ends.tolist() == [0, 1, 1, 3] and few.labels.tolist() == [1, 0, 2]
    )
    assert stack_detections(stack) is stack


def test_arrays_that_grow():
    """Past the first thousand rows, and from float32 to float64 on the way, nothing is lost."""
    parts = [found(700), found(700, np.float64, 0.125), found(3)]
    stack = stack_detections(parts)
    assert stack.boxes.dtype == stack.scores.dtype == np.float64 and stack.labels.dtype == np.int32
    np.testing.assert_array_equal(stack.boxes, np.concatenate([p.boxes for p in parts]))
    np.testing.assert_array_equal(stack.scores, np.concatenate([p.scores for p in parts]))
    assert stack_detections(parts[:1]).boxes.dtype == np.float32


def record(**changes):
    values = {"boxes": [[0, 0, 4, 2], [1, 1, 3, 5]], "labels": [1, 0], "image": "cat.jpg"}
    return SimpleNamespace(**{**values, **changes})


def test_objects_of_a_data_set():
    objects = stack_objects([record(), record(crowd=[True, False]), record(areas=[3, 5.5], difficult=[0, 1])])
    assert objects.ends.tolist() == [0, 2, 4, 6] and objects.picture.tolist() == [0, 0, 1, 1, 2, 2]
    assert objects.areas.tolist() == [8, 8, 8, 8, 3, 5.5]
    assert objects.ignored.tolist() == [False, False, True, False, False, True]
    assert objects.labels.tolist() == [1, 0] * 3 and stack_objects(objects) is objects


@pytest.mark.parametrize(
    "change, words",
    [
        ({"labels": [0]}, "2 boxes but 1 labels"),
        ({"labels": [0, -1]}, "labels count from 0"),
        ({"labels": [0, 0.5]}, "label 0.5"),
        ({"labels": [0, -2]}, "label -2"),
        ({"boxes": [[0, 0, 4], [1, 1, 3]]}, "shape"),
        ({"boxes": [[0, 0, 4, np.nan], [1, 1, 3, 5]]}, "finite"),
        ({"areas": [1, -1]}, "area"),
        ({"areas": [1, np.nan]}, "area"),
        ({"areas": [1, np.inf]}, "finite"),
        ({"areas": [1]}, "1 areas"),
        ({"crowd": [True]}, "1 crowd"),
        ({"difficult": [True] * 3}, "3 difficult"),
    ],
)
def test_objects_that_are_none(change, words):
    with pytest.raises(ValueError, match=words) as error:
        stack_objects([record(), record(**change)])
    assert "picture 1 (cat.jpg)" in str(error.value)


def crowded():
    """Three pictures with more than a hundred detections of a class, and sizes that the boxes don't have."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 300, (3, 8, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 150, (3, 8, 2))], 2)
    records = [
        SimpleNamespace(boxes=b, labels=np.arange(8) % 2, areas=rng.uniform(100, 20_000, 8)) for b in boxes
    ]
    guesses = [np.repeat(b, 30, 0) + rng.normal(0, 4, (240, 4)) for b in boxes]
    return [Found(g, rng.random(240), np.repeat(np.arange(8) % 2, 30)) for g in guesses], records


@pytest.mark.parametrize("library", ["pycocotools", "faster_coco_eval"])
@pytest.mark.parametrize("limits", [{"PIECE": 1}, {"PIECE": 150}, {"MANY": 0}, {"PIECE": 100, "MANY": 10}])
def test_pieces_give_the_sums_of_the_whole(monkeypatch, library, limits):
    pytest.importorskip(library)
    detected, records = crowded()
    whole = coco_metrics(detected, records, 2, library)
    for name, value in limits.items():
        monkeypatch.setattr(evaluation, name, value)
    parts = coco_metrics(detected, records, 2, library)
    np.testing.assert_equal(parts[0], whole[0])
    np.testing.assert_equal(parts[1], whole[1])
    assert whole[0]["APs"] > 0 and whole[0]["APl"] > 0


def test_the_surest_hundred_of_each_picture():
    detected, _ = crowded()
    stack = stack_detections(detected)
    mine, picture = evaluation._surest(stack, 1)
    for i in range(3):
        rows = np.flatnonzero((stack.labels == 1) & (stack.picture == i))
        best = rows[np.argsort(-stack.scores[rows], kind="stable")[:100]]
        assert mine[picture == i].tolist() == sorted(best.tolist())
    few, at = evaluation._surest(stack.take(np.arange(5)), 0)
    assert few.tolist() == np.flatnonzero(stack.labels[:5] == 0).tolist() and set(at) <= {0}


def test_metrics_by_name():
    report = evaluation.evaluate_detections(*crowded(), ("a", "b"))
    values = {"voc07": report.voc07_map, "voc": report.voc_map, "coco": report.coco_ap}
    assert evaluation.METRICS == tuple(values) and len(set(values.values())) == 3
    for name, value in values.items():
        assert report.metric(name) == value
    with pytest.raises(ValueError, match="voc07, voc or coco"):
        report.metric("map")
    assert np.isnan(evaluation.evaluate_detections(*crowded(), ("a", "b"), coco=False).metric("coco"))
