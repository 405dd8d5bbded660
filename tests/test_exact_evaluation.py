"""What mutation testing found untested in the evaluation: areas, the arrays of a data set, checks, pieces of COCO's sums."""

import functools
import inspect
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from retinanet_nb import arrays, coco_metric, evaluation, records
from retinanet_nb.evaluation import Detections, coco_metrics, iou_matrix, stack_detections, stack_objects
from retinanet_nb.prediction import Found


def test_boxes_without_area_overlap_nothing():
    boxes = np.array([[0, 0, 4, 4], [4, 0, 0, 4], [0, 4, 4, 0], [4, 4, 0, 0], [2, 2, 2, 2], [0, 0, 0.5, 0.5]])
    np.testing.assert_array_equal(records._areas(boxes), [16, 0, 0, 0, 0, 0.25])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy has one for a result that is partly uninitialized
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
    rng = np.random.default_rng(0)
    a, b = np.sort(rng.uniform(0, 9, (2, 40, 2, 2)), 2).reshape(2, 40, 4).astype(np.float32)
    exact = iou_matrix(a.astype(float), b.astype(float))
    np.testing.assert_array_equal(iou_matrix(a, b), exact)  # areas, too, are those of float64
    np.testing.assert_array_equal(iou_matrix(a, b.astype(float)), exact)
    np.testing.assert_array_equal(iou_matrix(a.astype(float), b), exact)


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
    assert len(stack.take([])) == 3 and stack.take([]).ends.tolist() == [0, 0, 0, 0]
    assert stack_detections(stack) is stack


def test_arrays_that_grow():
    """Past the first thousand rows, and from float32 to float64 on the way, nothing is lost."""
    parts = [found(700), found(700, np.float64, 0.125), found(3)]
    stack = stack_detections(parts)
    assert stack.boxes.dtype == stack.scores.dtype == np.float64 and stack.labels.dtype == np.int32
    np.testing.assert_array_equal(stack.boxes, np.concatenate([p.boxes for p in parts]))
    np.testing.assert_array_equal(stack.scores, np.concatenate([p.scores for p in parts]))
    assert stack_detections(parts[:1]).boxes.dtype == np.float32


def test_arrays_grow_seldom_and_not_by_much(monkeypatch):
    """A quarter more room each time: a thousand pictures need few copies, and memory is never a third too large."""
    sizes, resize = [], arrays._Growing.resize

    def noted(self, length):
        sizes.append(length)
        resize(self, length)

    monkeypatch.setattr(arrays._Growing, "resize", noted)
    column = arrays._Growing(())
    room = len(column.array)
    column.add(np.zeros(room, np.float32))
    assert sizes == []  # there was just enough
    for _ in range(1000):
        column.add(np.ones(100, np.float32))
        assert len(column.array) <= max(room, 1.25 * column.length)
    assert len(sizes) < 25 and column.length == room + 100_000
    assert len(column.done()) == column.length and column.array.sum() == 100_000


def record(**changes):
    values = {"boxes": [[0, 0, 4, 2], [1, 1, 3, 5]], "labels": [1, 0], "image": "cat.jpg"}
    return SimpleNamespace(**{**values, **changes})


def test_objects_of_a_data_set():
    objects = stack_objects([record(), record(crowd=[True, False]), record(areas=[3, 5.5], difficult=[0, 1])])
    assert objects.ends.tolist() == [0, 2, 4, 6] and objects.picture.tolist() == [0, 0, 1, 1, 2, 2]
    assert objects.areas.tolist() == [8, 8, 8, 8, 3, 5.5]
    assert objects.ignored.tolist() == [False, False, True, False, False, True]
    assert objects.ignored.dtype == bool  # also where a record has whole numbers
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
@pytest.mark.parametrize(
    "limits", [{"PIECE": 1}, {"PIECE": 150}, {"VERDICTS": 1}, {"PIECE": 100, "VERDICTS": 4_000}]
)
def test_pieces_give_the_sums_of_the_whole(monkeypatch, library, limits):
    pytest.importorskip(library)
    detected, records = crowded()
    whole = coco_metrics(detected, records, 2, library)
    for name, value in limits.items():
        monkeypatch.setattr(coco_metric, name, value)
    parts = coco_metrics(detected, records, 2, library)
    np.testing.assert_equal(parts[0], whole[0])
    np.testing.assert_equal(parts[1], whole[1])
    assert whole[0]["APs"] > 0 and whole[0]["APl"] > 0


def test_the_surest_hundred_of_each_picture():
    detected, _ = crowded()
    stack = stack_detections(detected)
    mine, picture = coco_metric._surest(stack, 1)
    for i in range(3):
        rows = np.flatnonzero((stack.labels == 1) & (stack.picture == i))
        best = rows[np.argsort(-stack.scores[rows], kind="stable")[:100]]
        assert mine[picture == i].tolist() == sorted(best.tolist())
    # a picture with few beside one with many
    uneven = Found(np.zeros((150, 4)), np.arange(150) / 150, np.zeros(150, int))
    one = Found(np.zeros((1, 4)), np.zeros(1), np.zeros(1, int))
    mine, picture = coco_metric._surest(stack_detections([one, uneven, one]), 0)
    assert mine.tolist() == [0, *range(51, 151), 151] and np.bincount(picture).tolist() == [1, 100, 1]
    few, at = coco_metric._surest(stack.take(np.arange(5)), 0)
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


# ---- a report by hand: its text, its JSON, its figure


def report(**changes):
    curve = evaluation.precision_recall_curve([0.9, 0.8, 0.7000000001], [1, 0, 1], 4)
    nothing = evaluation.precision_recall_curve([], [], 0)
    values = {
        "class_names": ("cat", "dog", "a ship"),
        "iou_threshold": 0.5,
        "pictures": 7,
        "objects": np.array([4, 0, 0]),
        "difficult": np.array([1, 0, 2]),
        "num_detections": np.array([3, 0, 5]),
        "voc07": np.array([0.25, np.nan, np.nan]),
        "voc": np.array([0.375, np.nan, np.nan]),
        "coco": {n: np.nan if n == "APs" else k / 16 for k, n in enumerate(evaluation.COCO_FIGURES)},
        "coco_per_class": np.array([0.125, np.nan, 0.5]),
        "curves": {"cat": curve, "dog": nothing, "a ship": nothing},
        "detections": [found(1)],
    }
    return evaluation.Report(**{**values, **changes})


def test_the_table_of_a_report():
    assert str(report(iou_threshold=0.25)).split("\n") == [
        "class   objects  difficult  detections   VOC07     VOC    COCO",
        "cat           4          1           3   0.250   0.375   0.125",
        "a ship        0          2           5       –       –   0.500",
        "mean          4          3           8   0.250   0.375   0.000",
        "7 pictures; VOC at IoU 0.25, COCO at IoU .50 … .95",
        "COCO: AP 0.000  AP50 0.062  AP75 0.125  APs –  APm 0.250  APl 0.312",
        "COCO: AR1 0.375  AR10 0.438  AR100 0.500  ARs 0.562  ARm 0.625  ARl 0.688",
    ]
    short = str(report(coco={}, class_names=("c", "dog", "d"))).split("\n")
    assert short[0].startswith("class  objects") and len(short[0]) == len(short[1])
    assert len(short) == 5 and short[3].endswith("0.375       –")


def test_a_report_in_plain_values(tmp_path):
    plain = report().to_dict()
    nothing = {"recall": [], "precision": [], "scores": []}
    assert plain == {
        "pictures": 7,
        "iou_threshold": 0.5,
        "voc07_map": 0.25,
        "voc_map": 0.375,
        "coco": {n: None if n == "APs" else k / 16 for k, n in enumerate(evaluation.COCO_FIGURES)},
        "classes": {
            "cat": {
                "objects": 4,
                "difficult": 1,
                "detections": 3,
                "voc07": 0.25,
                "voc": 0.375,
                "coco": 0.125,
                "curve": {"recall": [0.25, 0.5], "precision": [1, 0.666667], "scores": [0.9, 0.7]},
            },
            "dog": dict(objects=0, difficult=0, detections=0, voc07=None, voc=None, coco=None, curve=nothing),
            "a ship": dict(
                objects=0, difficult=2, detections=5, voc07=None, voc=None, coco=0.5, curve=nothing
            ),
        },
    }
    for k in ("objects", "difficult", "detections"):
        assert type(plain["classes"]["cat"][k]) is int
    full = report().to_dict(True)
    assert full.pop("detections") == [{"boxes": [[0, 1, 2, 3]], "scores": [0], "labels": [0]}]
    assert full == plain
    for detections in (False, True):
        path = report().to_json(str(tmp_path / "r.json"), detections)
        assert path == tmp_path / "r.json" and ("detections" in path.read_text()[-200:]) >= detections
        assert json.loads(path.read_text()) == report().to_dict(detections)
    assert json.loads(report().to_json(tmp_path / "s.json").read_text()) == plain


def many(n, **changes):
    names = tuple(f"class {k}" for k in range(n))
    curve = evaluation.precision_recall_curve([0.9, 0.8], [1, 0], 2)
    values = np.linspace(0.9, 0.1, n).round(3)
    return report(class_names=names, voc=values, curves=dict.fromkeys(names, curve), **changes)


def test_the_figure_of_a_report():
    from matplotlib.colors import to_rgba

    axes = many(16).plot()
    assert axes.figure.get_size_inches().tolist() == [7, 4.2]
    assert axes.get_xlim() == (0, 1.01) and axes.get_ylim() == (0, 1.03)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("recall", "precision")
    assert many(2).plot(axes) is axes and len(axes.lines) == 18  # into axes that are given
    colors = evaluation.PALETTE
    for k, line in enumerate(axes.lines[:16]):
        assert line.get_color() == colors[k % len(colors)]
        assert line.get_linestyle() == ("-", "--", ":", "-.")[k // len(colors) % 4]
        assert line.get_label() == f"class {k}  {np.linspace(0.9, 0.1, 16)[k].round(3):.2f}"
        assert line.get_xdata().tolist() == [0.5, 0.5, 0.5] and line.get_ydata().tolist() == [1, 0.5, 0]
    legend = axes.get_legend()
    assert legend.get_title().get_text() == "" and not legend.get_frame_on()
    assert legend._loc == 6 and {t.get_fontsize() for t in legend.get_texts()} == {9}
    corner = axes.transAxes.inverted().transform(legend.get_bbox_to_anchor().get_points()[0])
    np.testing.assert_allclose(corner, [1.01, 0.5])

    axes = many(41).plot()
    grey, named = axes.lines[:25], axes.lines[25:]
    assert all(to_rgba(x.get_color()) == to_rgba(evaluation.GREY) for x in grey)
    assert all(x.get_linewidth() == 0.6 for x in grey)
    names = [x.get_label().split("  ")[0] for x in named]
    assert names == [f"class {k}" for k in (*range(8), *range(33, 41))]
    assert [x.get_color() for x in named] == [colors[k % len(colors)] for k in range(16)]
    assert axes.get_legend().get_title().get_text() == "best and worst 8 of 41"


def test_lines_of_few_among_many_classes():
    """A class keeps its colour and kind of line whichever others occur."""
    values = np.full(40, np.nan)
    values[[3, 11, 19, 27, 35]] = 0.5
    report = many(40)
    object.__setattr__(report, "voc", values)
    lines = report.plot().lines
    assert [x.get_linestyle() for x in lines] == ["-", "--", ":", "-.", "-"]
    assert {x.get_color() for x in lines} == {evaluation.PALETTE[3]}


def test_the_figure_of_a_report_without_objects():
    axes = many(2, objects=np.zeros(3, int)).plot()
    assert len(axes.lines) == 2
    empty = report(voc=np.full(3, np.nan)).plot()
    assert not empty.lines and empty.get_legend() is None


def test_names_in_order_of_their_precision():
    values = np.array([0.5] * 9 + [np.nan] + [0.9] * 9)
    drawn, named = evaluation._named(report(voc=values))
    assert drawn.tolist() == [*range(9), *range(10, 19)]
    assert named.tolist() == [*range(10, 18), *range(1, 9)]  # equals in their order
    for some in evaluation._named(report(voc=np.linspace(0.1, 0.9, evaluation.LEGEND))):
        assert some.tolist() == [*range(evaluation.LEGEND)]  # all of them, in the order of the classes
    assert evaluation._cut("x" * 24) == "x" * 24 and evaluation._cut("x" * 25) == "x" * 23 + "…"
    assert (evaluation.LEGEND, evaluation.POINTS) == (16, 2_000)


def test_points_of_a_curve():
    rng = np.random.default_rng(0)
    for n in (0, 1, 1999, 2000, 5000):
        curve = evaluation.precision_recall_curve(np.arange(n)[::-1], rng.random(n) < 0.5, max(n, 1))
        recall, precision = evaluation._points(curve)
        assert len(recall) == len(precision) == min(n, 2000) + (n > 0)
        if n:
            assert precision[-1] == 0 and recall[-1] == recall[-2] == curve.recall[-1]
            assert (recall[0], precision[0]) == (curve.recall[0], curve.precision[0])
            if n <= 2000:
                np.testing.assert_array_equal(precision[:-1], curve.precision)


def test_small_figures():
    nan = float("nan")
    assert evaluation._figure(nan) == "–" and evaluation._figure(0.12345) == "0.123"
    assert evaluation._none(nan) is None and type(evaluation._none(np.float32(0.5))) is float
    assert np.isnan(coco_metric._undefined(-1)) and coco_metric._undefined(0) == 0
    assert type(coco_metric._undefined(np.float32(0.5))) is float
    few = np.float32([0.1, 0.2, 0.7])
    assert evaluation._mean(few) == few.astype(np.float64).mean() != few.mean()
    assert evaluation._mean([1, nan, 2]) == 1.5 and type(evaluation._mean([1])) is float
    assert np.isnan(evaluation._mean([nan])) and np.isnan(evaluation._mean([]))
    none = report(coco={})
    assert np.isnan(none.coco_ap) and np.isnan(none.coco_ap50)
    assert report().coco_ap50 == 1 / 16 and report().voc_map == 0.375 and report().metric("voc07") == 0.25


def test_constants_and_defaults_of_the_evaluation():
    limits = evaluation.COCO_MOST, evaluation.PIECE, evaluation.VERDICTS, evaluation.PICTURES
    assert limits == (100, 10_000, 2_500_000, 1_000)
    assert (evaluation.FASTER, evaluation.PLAIN) == ("faster_coco_eval", "pycocotools")
    assert (evaluation.HIT, evaluation.FALSE_ALARM, evaluation.LEFT_OUT) == (1, 0, -1)

    def defaults(function):
        given = inspect.signature(function).parameters.items()
        return {k: p.default for k, p in given if p.default is not p.empty}

    assert defaults(evaluation.evaluate) == {
        "batch_size": 8,
        "iou_threshold": 0.5,
        "score_threshold": None,
        "progress": True,
        "coco": True,
        "predict": evaluation.predict,
    }
    assert defaults(evaluation.evaluate_detections) == {"iou_threshold": 0.5, "coco": True}
    assert defaults(evaluation.average_precision) == {"method": "voc07", "num_objects": None}
    assert defaults(evaluation.match_detections) == {"num_classes": None}
    assert defaults(evaluation.coco_metrics) == {"library": None}
    assert defaults(evaluation.stack_detections) == {"records": ()}
    assert evaluation.Report.__dataclass_fields__["detections"].default == ()
    assert " detections=" not in repr(report())


def test_options_are_shares():
    for good in (0, 1, 0.5, np.float32(0.5), np.int64(1)):
        evaluation._share("x", good)
    for bad in (-1e-9, 1.000001, "1", None, float("nan")):
        with pytest.raises(ValueError) as error:
            evaluation._share("x", bad)
        assert str(error.value) == f"x must be 0 and at most 1, not {bad!r}"
    for threshold in (0, -1, 1.5):
        with pytest.raises(ValueError, match="iou_threshold must be above 0 and at most 1, not"):
            evaluation.evaluate_detections([], [], ("a",), threshold)
        with pytest.raises(ValueError, match="iou_threshold must be above 0 and at most 1, not"):
            evaluation.judge(None, threshold)
        with pytest.raises(ValueError, match="iou_threshold must be above 0 and at most 1, not"):
            evaluation.evaluate(None, None, iou_threshold=threshold)


def test_labels_too_large_and_pictures_too_few():
    detected = [found(1), found(0), found(3)]
    records = [record(), record(), record()]
    arrays._stacked(detected, records, 3)
    with pytest.raises(ValueError) as error:
        arrays._stacked(detected, records, 2)
    assert str(error.value) == (
        "picture 2 (cat.jpg) has a detection with label 2, but there are only 2 classes"
    )
    with pytest.raises(ValueError) as error:
        arrays._stacked([found(0), found(1), found(0)], records, 1)
    assert str(error.value) == "picture 0 (cat.jpg) has an object with label 1, but there are only 1 classes"
    objects = stack_objects(records)
    with pytest.raises(ValueError, match="^picture 2 has a detection with label 2"):
        arrays._stacked(detected, objects, 2)
    for few in (records[:2], stack_objects(records[:2])):
        with pytest.raises(ValueError, match="detections for 3 pictures but 2 records"):
            arrays._stacked(detected, few)
        with pytest.raises(ValueError, match="detections for 3 pictures but 2 records"):
            arrays._stacked(stack_detections(detected), few)
    assert arrays._called(2, [record()] * 2) == "picture 2"
    assert arrays._called(0, [record(image=None)]) == "picture 0"


class Data(list):
    class_names = ("a", "b")


def test_what_is_asked_of_the_detector(capfd):
    asked = []

    def predict(detector, paths, batch_size, score_threshold):
        asked.append((detector, paths, batch_size, score_threshold))
        for path in paths:
            yield path, Found(np.array([[0, 0, 4, 2.0]]), np.array([0.5]), np.array([2]))

    evaluate = functools.partial(evaluation.evaluate, predict=predict)
    detector = SimpleNamespace(class_names=["c", "b", "a"])
    data = Data([record(boxes=[[0, 0, 4, 2]], labels=[0], image=f"{i}.jpg") for i in range(3)])
    made = evaluate(detector, data, coco=False)
    bar = capfd.readouterr().err
    assert "detecting:" in bar and "3/3" in bar and "picture/s" in bar
    assert made.class_names == ("a", "b", "c") and made.num_detections.tolist() == [3, 0, 0]
    assert made.voc_map == 1 and made.coco == {} and made.iou_threshold == 0.5
    again = evaluate(detector, data, np.int64(2), 0.75, 0.25, progress=False)
    assert capfd.readouterr().err == "" and again.iou_threshold == 0.75 and again.coco_ap == 1
    evaluate(detector, data, 1, progress=False, coco=False)
    evaluate(detector, Data(), 4, progress=False, coco=False)
    names = ["0.jpg", "1.jpg", "2.jpg"]
    assert asked == [
        (detector, names, 3, None),
        (detector, names, 2, 0.25),
        (detector, names, 1, None),
        (detector, [], 1, None),
    ]
    with pytest.raises(ValueError, match=r"^picture 1 \(cat.jpg\) has an object with label 3, but"):
        evaluate(detector, Data([data[0], record(labels=[0, 3])]), progress=False)
    with pytest.raises(ValueError) as error:
        evaluate(SimpleNamespace(class_names=["b", "c"]), data)
    assert "1 class(es)" in str(error.value) and "not know: a; it knows b, c. Give" in str(error.value)
    with pytest.raises(ValueError, match="^the detector has no class names"):
        evaluate(object(), data)


def test_small_matters_of_the_truth():
    assert arrays._called(0, [SimpleNamespace()]) == "picture 0"
    assert inspect.signature(arrays._flags).parameters["name"].default == "a record"
    objects = stack_objects([record(areas=[0, 0.5])])
    assert objects.areas.tolist() == [0, 0.5] and objects.areas.dtype == np.float64
    assert objects.boxes.dtype == np.float64 and objects.labels.dtype == np.int32
    assert objects.difficult.dtype == objects.crowd.dtype == bool
    assert not objects.difficult.any() and not objects.crowd.any()
    negative = stack_objects([record(boxes=[[5, 1, 2, 3], [0, 0, 1, 1]])])
    assert negative.areas.tolist() == [-6, 1]  # as the box says; COCO counts it in no size
    nothing = stack_objects([])
    assert nothing.boxes.shape == (0, 4) and nothing.ends.tolist() == [0] and nothing.picture.tolist() == []
    padded = Found([[0, 0, 1, 1], [-1, -1, -1, -1], [0, 0, 2, 2]], [0.5, -1, np.float64(0.25)], [0, -1, 1])
    rows = arrays._rows(padded, "it")
    assert [r.tolist() for r in rows] == [[[0, 0, 1, 1], [0, 0, 2, 2]], [0.5, 0.25], [0, 1]]
    # padding may hold anything
    arrays._rows(Found([[np.nan] * 4], [np.inf], [-1]), "it")


def test_matches_of_three_pictures():
    detected = [
        Found(np.array([[0, 0, 4, 2], [0, 0, 4, 4], [9, 9, 10, 10]]), np.array([0.5, 0.6, 0.7]), [1, 0, 1]),
        Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0)),
        Found(np.array([[1, 1, 3, 5], [0, 0, 2, 2], [0, 0, 4, 2]]), np.array([0.1, 0.2, 0.3]), [0, 0, 1]),
    ]
    twice = record(boxes=[[0, 0, 4, 2], [0, 0, 4, 2]], labels=[1, 1], difficult=[False, True])
    made = evaluation.match_detections(detected, [twice, record(), record(crowd=[True, False])], 2)
    assert made.picture.tolist() == [0, 0, 0, 2, 2, 2] and made.label.tolist() == [1, 0, 1, 0, 0, 1]
    assert made.score.tolist() == [0.5, 0.6, 0.7, 0.1, 0.2, 0.3]
    assert made.best.tolist() == [0, -1, -1, 5, 5, 4] and made.best.dtype == np.int32
    np.testing.assert_allclose(made.overlap, [1, 0, 0, 1, 1 / 11, 1])
    assert made.object_picture.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.object_label.tolist() == [1, 1, 1, 0, 1, 0]
    assert made.ignored.tolist() == [False, True, False, False, True, False]
    verdict = evaluation.judge(made, 0.05)
    assert verdict.tolist() == [1, 0, 0, 0, 1, -1] and verdict.dtype == np.int8
    assert evaluation.judge(made, 0.5).tolist() == [1, 0, 0, 1, 0, -1]
    assert evaluation.judge(made, 1).tolist() == [1, 0, 0, 1, 0, -1]
    none = evaluation.match_detections([found(2)], [SimpleNamespace(boxes=[], labels=[])])
    assert none.best.tolist() == [-1, -1] and none.overlap.tolist() == [0, 0]
    assert evaluation.judge(none, 0.5).tolist() == [0, 0]


def test_curves_and_precisions_by_hand():
    curve = evaluation.precision_recall_curve([0.5, 0.9, 0.5, 0.1, 0.7], [0, 1, 1, 1, -1], np.int64(4))
    assert curve.scores.tolist() == [0.9, 0.5, 0.5, 0.1] and type(curve.num_objects) is int
    assert curve.hits.tolist() == [True, False, True, True]
    assert curve.recall.tolist() == [0.25, 0.25, 0.5, 0.75]
    np.testing.assert_allclose(curve.precision, [1, 0.5, 2 / 3, 0.75])
    recall, precision, scores = evaluation.precision_recall([np.float32(0.5), 0.25], [1, 0], 2)
    assert recall.tolist() == [0.5, 0.5] and precision.tolist() == [1, 0.5]
    assert scores.dtype == np.float64 and scores.tolist() == [0.5, 0.25]
    ap = evaluation.average_precision
    assert ap([0.25, 0.25, 0.5, 0.75], curve.precision, "voc") == pytest.approx(0.25 + 0.5 * 0.75)
    # recalls 0, .1, .2 have precision 1, those to .7 have .75
    for number in (None, 4):
        assert ap(curve.recall, curve.precision, "voc07", number) == pytest.approx((3 + 5 * 0.75) / 11)
    assert ap([], []) == ap([], [], "voc") == 0 and type(ap([], [])) is type(ap([], [], "voc")) is float
    assert ap([1], [1]) == ap([1], [1], "voc") == ap([1], [1], "voc07", 3) == 1
    assert np.isnan(ap([np.nan], [0])) and type(ap([np.nan, 1], [0, 1])) is float
    no_object = evaluation.precision_recall_curve([0.5], [0], 0)
    assert np.isnan(no_object.recall).tolist() == [True] and no_object.precision.tolist() == [0]
    for recall, precision in (([0.5], [1, 1]), ([[0.5]], [[1]]), (0.5, 1)):
        with pytest.raises(ValueError, match="two rows of the same length"):
            ap(recall, precision)
    for method in ("coco", "VOC", None):
        with pytest.raises(ValueError) as error:
            ap([1], [1], method)
        assert str(error.value) == f'method must be "voc07" or "voc", not {method!r}'


def test_libraries_by_name():
    pytest.importorskip("pycocotools")
    pytest.importorskip("faster_coco_eval")
    for name, module in ((None, "faster_coco_eval"), ("faster_coco_eval",) * 2, ("pycocotools",) * 2):
        for kind in coco_metric._coco_library(name):
            assert kind.__module__.split(".")[0] == module
    with pytest.raises(ValueError) as error:
        coco_metric._coco_library("coco")
    assert str(error.value) == 'library must be "pycocotools" or "faster_coco_eval", not \'coco\''


@pytest.mark.parametrize("name", [None, "faster_coco_eval", "pycocotools"])
def test_libraries_that_are_missing(monkeypatch, name):
    import sys

    for module in ("faster_coco_eval", "pycocotools", "pycocotools.coco", "pycocotools.cocoeval"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as error:
        coco_metric._coco_library(name)
    wanted = name or "pycocotools"
    assert str(error.value) == (
        f"COCO's figures need {wanted}, which is not installed: pip install"
        f" {wanted.replace('_', '-')}, or evaluate with coco=False"
    )


def test_only_the_faster_library_is_missing(monkeypatch):
    import sys

    pytest.importorskip("pycocotools")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert coco_metric._coco_library()[1].__module__.startswith("pycocotools")
    with pytest.raises(ImportError, match="pip install faster-coco-eval,"):
        coco_metric._coco_library("faster_coco_eval")


@pytest.mark.parametrize("library", ["pycocotools", "faster_coco_eval"])
def test_a_piece_as_the_library_gets_it(library, capsys):
    pytest.importorskip(library)
    COCO = coco_metric._coco_library(library)[0]
    boxes = np.array([[1, 2, 4, 8], [0, 0, 2, 2], [3, 3, 4, 5]], np.float32)
    detected = stack_detections(
        [
            Found(boxes[:2], np.float32([0.5, 0.25]), [1, 0]),
            found(0),
            Found(boxes, [0.1, 0.2, 0.3], [1, 1, 0]),
        ]
    )
    truths = [
        record(labels=[1, 1], areas=[7.5, 3], crowd=[True, True], difficult=[False, True]),
        record(),
        record(labels=[0, 1], areas=[5, 6], difficult=[True, True]),
    ]
    objects = stack_objects(truths)
    mine, truth = np.flatnonzero(detected.labels == 1), np.flatnonzero(objects.labels == 1)
    real, guessed = coco_metric._piece(COCO, 1, range(3), detected, mine, objects, truth)
    for side in (real, guessed):
        assert side.dataset["images"] == [{"id": 0}, {"id": 1}, {"id": 2}]
        assert side.dataset["categories"] == [{"id": 1, "name": "1"}]
        assert sorted(side.getImgIds()) == [0, 1, 2] and side.getCatIds() == [1]
    row = ("id", "category_id", "image_id", "bbox", "area", "iscrowd")
    assert [tuple(a[n] for n in row) for a in real.dataset["annotations"]] == [
        (1, 1, 0, [0, 0, 4, 2], 7.5, 1),
        (2, 1, 0, [1, 1, 2, 4], 3, 1),
        (3, 1, 1, [0, 0, 4, 2], 8, 0),
        (4, 1, 2, [1, 1, 2, 4], -1, 0),
    ]
    assert [tuple(a[n] for n in (*row, "score")) for a in guessed.dataset["annotations"]] == [
        (1, 1, 0, [1, 2, 3, 6], 18, 0, 0.5),
        (2, 1, 2, [1, 2, 3, 6], 18, 0, 0.1),
        (3, 1, 2, [0, 0, 2, 2], 4, 0, 0.2),
    ]
    assert {type(a["iscrowd"]) for side in (real, guessed) for a in side.dataset["annotations"]} == {int}


def test_pictures_are_cut_where_a_piece_is_full(monkeypatch):
    monkeypatch.setattr(coco_metric, "PIECE", 10)
    pictures = np.array([2, 3, 5, 8, 9])
    picture = np.repeat(pictures, [4, 6, 1, 25, 2])
    cut = coco_metric._pieces(pictures, picture)
    assert [c.tolist() for c in cut] == [[2, 3], [5, 8], [9]]
    assert [c.tolist() for c in coco_metric._pieces(pictures, picture[:0])] == [[2, 3, 5, 8, 9]]


def test_sizes_take_turns_and_then_overlaps(monkeypatch):
    monkeypatch.setattr(coco_metric, "VERDICTS", 1_000)
    ranges, thresholds = [[0, 1]] * 4, np.linspace(0.5, 0.95, 10)
    assert coco_metric._turns(ranges, thresholds, 25) == [(slice(4), slice(10))]
    for count, groups in ((26, [10]), (100, [10]), (101, [9, 1]), (250, [4, 4, 2]), (2_000, [1] * 10)):
        turns = coco_metric._turns(ranges, thresholds, count)
        assert len(turns) == 4 * len(groups), count
        seen = np.zeros((4, 10), int)
        for a, t in turns:
            assert len(ranges[a]) == 1
            seen[a, t] += 1
        assert (seen == 1).all()
        assert [len(thresholds[t]) for _, t in turns] == groups * 4
    assert coco_metric._turns(ranges, thresholds, 0) == [(slice(4), slice(10))]


def test_pictures_are_matched_a_few_at_a_time(monkeypatch):
    detected, records = crowded()
    detected, records = (
        detected[:3] + [Found(np.zeros((0, 4)), [], [])] + detected[3:],
        records[:3] + [SimpleNamespace(boxes=np.zeros((0, 4)), labels=[])] + records[3:],
    )
    found, objects = stack_detections(detected), stack_objects(records)
    whole = evaluation.judge(evaluation.match_detections(found, objects), 0.5)
    assert set(whole.tolist()) == {0, 1} and whole.dtype == np.int8
    for pictures in (1, 2, len(records), 1_000):
        monkeypatch.setattr(evaluation, "PICTURES", pictures)
        np.testing.assert_array_equal(evaluation._verdicts(found, objects, 0.5), whole)
    none = evaluation._verdicts(stack_detections([]), stack_objects([]), 0.5)
    assert none.shape == (0,) and none.dtype == np.int8
    some = evaluation._part(objects, 1, 3)
    np.testing.assert_array_equal(some.boxes, np.concatenate([r.boxes for r in records[1:3]]))
    assert some.ends.tolist() == [0, 8, 16] and len(some.areas) == len(some.crowd) == 16


@pytest.mark.parametrize("name", ["pycocotools", "faster_coco_eval"])
def test_a_piece_gets_what_is_its_own(monkeypatch, name):
    """No piece is given detections or objects of another one, and what is counted for the turns are the detections: else memory would not be bounded."""
    pytest.importorskip(name)
    detected, records = crowded()
    found, objects = stack_detections(detected), stack_objects(records)
    pieces, counts, piece, turns = [], [], coco_metric._piece, coco_metric._turns

    def noted(COCO, label, pictures, found, mine, objects, truth):
        pieces.append((pictures.tolist(), mine.tolist(), truth.tolist()))
        return piece(COCO, label, pictures, found, mine, objects, truth)

    def counted(ranges, thresholds, count):
        counts.append(count)
        return turns(ranges, thresholds, count)

    monkeypatch.setattr(coco_metric, "_piece", noted)
    monkeypatch.setattr(coco_metric, "_turns", counted)
    monkeypatch.setattr(coco_metric, "PIECE", 100)
    coco_metrics(found, objects, 2, name)
    assert counts == [300, 300] and [p for p, _, _ in pieces] == [[0], [1], [2]] * 2
    for k, ((i,), mine, truth) in zip((0, 0, 0, 1, 1, 1), pieces):
        assert len(mine) == 100
        assert (found.picture[mine] == i).all() and (found.labels[mine] == k).all()
        assert truth == np.flatnonzero((objects.picture == i) & (objects.labels == k)).tolist()


def test_verdicts_of_pycocotools_are_made_slim():
    pytest.importorskip("pycocotools")
    COCO, COCOeval = coco_metric._coco_library("pycocotools")
    found, objects = (stack(x) for stack, x in zip((stack_detections, stack_objects), crowded()))
    mine, truth = np.flatnonzero(found.labels == 0)[:5], np.flatnonzero(objects.labels == 0)[:3]
    run = COCOeval(*coco_metric._piece(COCO, 0, np.arange(1), found, mine, objects, truth), "bbox")
    ((verdict,),) = coco_metric._judged(run, np.arange(1), 0, run.params.areaRng[:1], run.params.iouThrs)
    assert set(verdict) == {"dtScores", "dtMatches", "dtIgnore", "gtIgnore"}
    assert verdict["dtMatches"].dtype == bool and verdict["dtMatches"].shape == (10, 5)


@pytest.mark.parametrize("name", ["pycocotools", "faster_coco_eval"])
def test_a_class_without_objects_has_no_recall_either(name):
    pytest.importorskip(name)
    one = [Found(np.array([[0.0, 0, 9, 9]]), np.array([0.5]), np.array([1]))]
    figures, per_class = coco_metrics(one, [record(boxes=[[0, 0, 9, 9]], labels=[1])], 3, name)
    assert {n: figures[n] for n in ("AP", "AR1", "AR10", "AR100", "ARs")} == pytest.approx(
        dict.fromkeys(("AP", "AR1", "AR10", "AR100", "ARs"), 1), abs=1e-9
    )
    assert np.isnan(figures["ARl"]) and np.isnan(per_class).tolist() == [True, False, True]


def test_types_that_come_in_change_no_figure():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="label nan"):  # and no warning of a cast
            stack_detections([Found(np.zeros((1, 4)), [0.5], [np.nan])])
    with pytest.raises(ValueError, match="label 2, but there are only 2 classes"):
        evaluation.match_detections([found(3)], [record()], 2)
    for kind, number in ((np.float16, 2049), (np.float32, 20_000_001)):  # numbers that the type doesn't have
        assert evaluation.average_precision(np.ones(1, kind), [1], "voc07", number) == 1


def test_of_many_equal_scores_the_first_given_hits():
    """An unstable sort of so many would show."""
    rng = np.random.default_rng(1)
    n, m = 400, 10
    score, best = rng.choice([0.5, 0.9], n), rng.integers(0, m, n)
    zeros = np.zeros(max(n, m), np.int32)
    made = evaluation.Matches(
        zeros[:n],
        zeros[:n],
        score,
        best.astype(np.int32),
        np.ones(n),
        zeros[:m],
        zeros[:m],
        np.zeros(m, bool),
    )
    expected = np.zeros(n, int)
    for k in range(m):
        expected[np.flatnonzero((best == k) & (score == 0.9))[0]] = 1
    assert evaluation.judge(made, 0.5).tolist() == expected.tolist()
