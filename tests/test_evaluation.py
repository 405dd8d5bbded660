"""Evaluation: against the published sample, pycocotools on its own, a slow float64 oracle of the devkit, and cases worked by hand."""

import contextlib
import io
import json
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memory
from retinanet_nb import coco_metric
from retinanet_nb.evaluation import (
    COCO_FIGURES,
    LEGEND,
    METRICS,
    POINTS,
    Curve,
    Detections,
    Objects,
    average_precision,
    best_f1,
    coco_metrics,
    evaluate,
    evaluate_detections,
    iou_matrix,
    judge,
    match_detections,
    precision_recall,
    precision_recall_curve,
    stack_detections,
    stack_objects,
)
from retinanet_nb.mistakes import (
    confusion_matrix,
    describe_mistake,
    draw_mistake,
    draw_outcome,
    find_mistakes,
    mistakes_overview,
    outcomes,
    show_worst,
    worst,
)
from retinanet_nb.prediction import Found

ROOT = Path(__file__).resolve().parent.parent
EMPTY = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))


def truth(boxes, labels=None, difficult=None, crowd=None):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    flags = lambda v: np.zeros(len(boxes), bool) if v is None else np.asarray(v, bool)
    return SimpleNamespace(
        boxes=boxes,
        labels=np.zeros(len(boxes), int) if labels is None else np.asarray(labels),
        difficult=flags(difficult),
        crowd=flags(crowd),
    )


def found(boxes, scores, labels=None):
    return Found(
        np.asarray(boxes, np.float64).reshape(-1, 4),
        np.asarray(scores, float),
        np.zeros(len(scores), int) if labels is None else np.asarray(labels),
    )


def random_data(
    seed, pictures=30, num_classes=3, most=6, detections=40, side=500, difficult=0.15, crowd=0.0, decimals=2
):
    rng = np.random.default_rng(seed)
    truths, detected = [], []
    for _ in range(pictures):
        m, n = rng.integers(0, most), rng.integers(0, detections + 1)
        corner = rng.uniform(0, side * 0.8, (m, 2))
        boxes = np.concatenate([corner, corner + side * rng.uniform(0.02, 0.5, (m, 2))], 1).astype(np.float32)
        labels = rng.integers(0, num_classes, m)
        truths.append(truth(boxes, labels, rng.random(m) < difficult, rng.random(m) < crowd))
        if m:
            of = rng.integers(0, m, n)
            size = np.tile(boxes[of, 2:] - boxes[of, :2], 2)
            guess = boxes[of] + rng.normal(0, 0.12, (n, 4)) * size
            guess = np.concatenate(
                [np.minimum(guess[:, :2], guess[:, 2:]), np.maximum(guess[:, :2], guess[:, 2:])], 1
            )
            kinds = np.where(rng.random(n) < 0.8, labels[of], rng.integers(0, num_classes, n))
        else:
            guess, kinds = (
                np.sort(rng.uniform(0, side, (n, 2, 2)), 1).reshape(n, 4),
                rng.integers(0, num_classes, n),
            )
        detected.append(found(guess, rng.random(n).round(decimals), kinds))
    return detected, truths


# ---------------------------------------------------------------- the slow oracle


def oracle_iou(a, b):
    a, b = [float(v) for v in a], [float(v) for v in b]
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def oracle_ap(detected, truths, label, threshold, method):
    """VOCevaldet and VOCap as they stand, but for the eleven recalls in whole numbers: zero rows for what is left out, no shortcuts."""
    queue = [
        (-float(s), i, d)
        for i, f in enumerate(detected)
        for d, (s, l) in enumerate(zip(f.scores, f.labels))
        if l == label
    ]
    queue.sort(key=lambda q: q[0])
    number = sum(
        int(l == label and not d and not c) for t in truths for l, d, c in zip(t.labels, t.difficult, t.crowd)
    )
    if number == 0:
        return float("nan")
    taken, tp, fp = set(), 0, 0
    recall, precision, found_so_far = [], [], []
    for _, i, d in queue:
        best, best_iou = None, -1.0
        for o, (box, l) in enumerate(zip(truths[i].boxes, truths[i].labels)):
            if l != label:
                continue
            iou = oracle_iou(detected[i].boxes[d], box)
            if iou > best_iou:
                best, best_iou = o, iou
        if best is not None and best_iou >= threshold:
            if not (truths[i].difficult[best] or truths[i].crowd[best]):
                if (i, best) in taken:
                    fp += 1
                else:
                    tp += 1
                    taken.add((i, best))
        else:
            fp += 1
        recall.append(tp / number)
        found_so_far.append(tp)
        precision.append(tp / (tp + fp) if tp + fp else 0.0)
    if method == "voc07":
        steps = [[p for h, p in zip(found_so_far, precision) if 10 * h >= k * number] for k in range(11)]
        return sum(max(step, default=0.0) for step in steps) / 11
    area, last = 0.0, 0.0
    for i, r in enumerate(recall):
        if r > last:
            area += (r - last) * max(precision[i:])
            last = r
    return area


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.95]),
    most=st.integers(1, 6),
    detections=st.integers(0, 25),
    decimals=st.integers(0, 3),
    crowd=st.sampled_from([0.0, 0.2]),
)
def test_equals_the_oracle(seed, threshold, most, detections, decimals, crowd):
    detected, truths = random_data(
        seed, pictures=8, most=most, detections=detections, crowd=crowd, decimals=decimals
    )
    report = evaluate_detections(detected, truths, "abc", threshold, coco=False)
    for method in ("voc07", "voc"):
        expected = [oracle_ap(detected, truths, label, threshold, method) for label in range(3)]
        np.testing.assert_allclose(getattr(report, method), expected, rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 8), st.integers(0, 8)),
        min_size=1,
        max_size=6,
    )
)
def test_iou_equals_counted_pixels(corners):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in corners])
    grid = np.zeros((len(boxes), 24, 24), bool)
    for g, (x1, y1, x2, y2) in zip(grid, boxes):
        g[y1:y2, x1:x2] = True
    shared = (grid[:, None] & grid).sum((2, 3))
    either = (grid[:, None] | grid).sum((2, 3))
    np.testing.assert_allclose(iou_matrix(boxes, boxes), shared / np.maximum(either, 1), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- published figures


@pytest.fixture(scope="module")
def sample():
    "The published sample: expected figures, detections, truth."
    data = json.loads((ROOT / "tests" / "data" / "voc_sample.json").read_text())
    outward = np.array([0, 0, 1, 1])  # inclusive corners become edges
    names = list(data["ground_truth"])
    truths = [truth(np.array(data["ground_truth"][n]) + outward) for n in names]
    detected = []
    for n in names:
        rows = data["detections"].get(n, [])
        boxes = np.array([d["box"] for d in rows]).reshape(-1, 4) + outward
        detected.append(found(boxes, [d["score"] for d in rows]))
    assert sum(len(d.scores) for d in detected) == 24 and "MIT" in data["licence"]
    return data["expected"], detected, truths


def test_published_sample(sample):
    expected, detected, truths = sample
    checked = 0
    for method, key in (("voc07", "eleven_point"), ("voc", "all_points")):
        for threshold, value in expected[key].items():
            report = evaluate_detections(detected, truths, ["object"], float(threshold), coco=False)
            curve = report.curves["object"]
            # by fractions, as the published figures were made
            assert abs(average_precision(curve.recall, curve.precision, method) - value) < 1e-6
            if (method, threshold) != ("voc07", "0.1"):
                assert abs(getattr(report, method)[0] - value) < 1e-6, (method, threshold)
            checked += 1
    assert checked == 8


def test_published_sample_in_whole_numbers(sample):
    "At an IoU of 0.1 nine of fifteen are found: the seventh point is reached, which fractions miss by a hair."
    expected, detected, truths = sample
    report = evaluate_detections(detected, truths, ["object"], 0.1, coco=False)
    curve = report.curves["object"]
    assert curve.hits.sum() == 9 and curve.num_objects == 15
    at_the_end = curve.precision[np.flatnonzero(curve.hits)[-1]]
    assert report.voc07[0] == pytest.approx(expected["eleven_point"]["0.1"] + at_the_end / 11, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(number=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), decimals=st.sampled_from([4, 17]))
def test_eleven_points_are_whole_numbers(number, seed, decimals):
    "Equal to exact fractions, also where recalls were rounded; and to the usual floats but where a recall is exactly 3, 6 or 7 tenths."
    rng = np.random.default_rng(seed)
    hits = rng.random(80) < rng.uniform(0.2, 1)
    hits &= np.cumsum(hits) <= number
    tp = np.cumsum(hits)
    precision = tp / np.arange(1, 81)
    expected = 0
    for k in range(11):
        reached = [p for h, p in zip(tp.tolist(), precision) if Fraction(h, number) >= Fraction(k, 10)]
        expected += max(reached, default=0) / 11
    value = average_precision((tp / number).round(decimals), precision, "voc07", num_objects=number)
    assert value == pytest.approx(expected, abs=1e-12)
    if not np.isin(10 * tp, np.array([3, 6, 7]) * number).any():
        assert average_precision(tp / number, precision, "voc07") == pytest.approx(value, abs=1e-12)


def pycocotools_alone(detected, truths, num_classes, ignore_difficult=True):
    """The twelve figures and the per-class AP, the library fed by its own JSON-like path and told what to ignore from outside."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Ignoring(COCOeval):
        def _prepare(self):
            super()._prepare()
            for rows in self._gts.values():
                for row in rows:
                    row["ignore"] = row["ignore"] or row["hard"]

    images, annotations, results = [], [], []
    for i, (d, t) in enumerate(zip(detected, truths)):
        images.append({"id": 1000 + 7 * i})
        areas = getattr(t, "areas", None)
        areas = [None] * len(t.boxes) if areas is None else areas
        for box, label, hard, crowd, area in zip(
            t.boxes.astype(float), t.labels, t.difficult, t.crowd, areas
        ):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            annotations.append(
                {
                    "id": 5 + len(annotations),
                    "image_id": 1000 + 7 * i,
                    "category_id": int(label) + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h if area is None else float(area),
                    "iscrowd": int(crowd),
                    "hard": bool(hard) and not crowd and ignore_difficult,
                }
            )
        for box, score, label in zip(d.boxes, d.scores, d.labels):
            results.append(
                {
                    "image_id": 1000 + 7 * i,
                    "category_id": int(label) + 1,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "score": float(score),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k + 1, "name": str(k)} for k in range(num_classes)],
            "info": {},
        }
        gt.createIndex()
        run = Ignoring(gt, gt.loadRes(results), "bbox")
        run.evaluate(), run.accumulate(), run.summarize()
    precision = run.eval["precision"][..., 0, -1]
    classes = [
        precision[:, :, k][precision[:, :, k] > -1].mean() if (precision[:, :, k] > -1).any() else np.nan
        for k in range(num_classes)
    ]
    return np.where(run.stats < 0, np.nan, run.stats), np.array(classes)


LIBRARIES = ["pycocotools", "faster_coco_eval"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "seed,crowd,difficult", [(0, 0.0, 0.0), (1, 0.0, 0.25), (2, 0.2, 0.0), (3, 0.2, 0.2)]
)
def test_coco_figures_equal_pycocotools(library, seed, crowd, difficult):
    pytest.importorskip(library)
    detected, truths = random_data(
        seed, pictures=60, num_classes=4, most=10, detections=140, crowd=crowd, difficult=difficult
    )
    assert sum(len(d.scores) for d in detected) > 3000
    expected, classes = pycocotools_alone(detected, truths, 4)
    figures, per_class = coco_metrics(detected, truths, 4, library)
    np.testing.assert_allclose([figures[n] for n in COCO_FIGURES], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(per_class, classes, rtol=0, atol=1e-6)
    assert 0.02 < figures["AP"] < figures["AP50"] < 1
    if difficult:  # the flag matters
        assert (
            abs(pycocotools_alone(detected, truths, 4, ignore_difficult=False)[0][0] - figures["AP"]) > 1e-3
        )


def test_coco_is_quiet(capfd):
    detected, truths = random_data(5, pictures=3)
    for library in LIBRARIES:
        pytest.importorskip(library)
        coco_metrics(detected, truths, 3, library)
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_coco_library_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match="pip install pycocotools.*coco=False"):
        evaluate_detections([EMPTY], [truth([])], ["a"])
    assert evaluate_detections([EMPTY], [truth([])], ["a"], coco=False).coco == {}
    with pytest.raises(ValueError, match='"pycocotools" or "faster_coco_eval"'):
        coco_metrics([EMPTY], [truth([])], 1, "detectron")


# ---------------------------------------------------------------- cases worked by hand

SQUARES = [[0, 0, 10, 10], [20, 0, 30, 10]]


def figures(detected, truths, names=("a",), **options):
    r = evaluate_detections(detected, truths, names, **options)
    return r, (r.voc07_map, r.voc_map, r.coco_ap50)


def test_no_detections():
    r, values = figures([EMPTY], [truth(SQUARES)])
    assert values == (0, 0, 0) and r.objects.tolist() == [2] and r.voc.tolist() == [0]


def test_no_objects():
    r, values = figures([found(SQUARES, [0.9, 0.8])], [truth([])])
    assert (
        np.isnan(values).all() and np.isnan(r.coco_ap) and np.isnan(r.coco_per_class).all() and "–" in str(r)
    )


def test_no_pictures():
    assert np.isnan(figures([], [])[1]).all()


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_only_difficult_objects(flag):
    r, values = figures(
        [found([*SQUARES, [50, 50, 60, 60]], [0.9, 0.8, 0.7])], [truth(SQUARES, **{flag: [True, True]})]
    )
    assert np.isnan(values).all() and r.objects.tolist() == [0] and r.difficult.tolist() == [2]


def test_detection_of_a_difficult_object_counts_neither_way():
    truths = [truth(SQUARES, difficult=[True, False])]
    alone = figures([found(SQUARES[1:], [0.5])], truths)[1]
    with_difficult = figures([found(SQUARES, [0.9, 0.5])], truths)[1]
    np.testing.assert_allclose(alone, 1)
    np.testing.assert_allclose(with_difficult, 1)
    r, values = figures(
        [found([SQUARES[0]] * 2 + [SQUARES[1]], [0.9, 0.8, 0.5])], truths
    )  # VOC excuses every box there, COCO one
    assert r.voc_map == 1 and abs(r.coco_ap50 - 0.5) < 1e-9


def test_duplicates_are_false_alarms():
    detected = [found([SQUARES[0], SQUARES[0], SQUARES[1]], [0.9, 0.8, 0.7])]
    verdict = judge(match_detections(detected, [truth(SQUARES)]), 0.5)
    assert verdict.tolist() == [1, 0, 1]
    r, _ = figures(detected, [truth(SQUARES)])
    np.testing.assert_allclose(r.voc, 0.5 * 1 + 0.5 * 2 / 3)
    np.testing.assert_allclose(r.voc07, (6 * 1 + 5 * 2 / 3) / 11)


def test_the_surer_of_two_boxes_is_the_hit_even_if_it_fits_worse():
    assert judge(
        match_detections([found([[0, 0, 10, 10], [0, 0, 10, 8]], [0.8, 0.9])], [truth(SQUARES[:1])]), 0.5
    ).tolist() == [0, 1]


def test_a_taken_best_object_is_not_exchanged_for_a_free_one():
    truths = [
        truth([[0, 0, 10, 10], [0, 2, 10, 12]])
    ]  # the second box fits the first object best, the other well enough
    assert judge(
        match_detections([found([[0, 0, 10, 10], [0, 0.5, 10, 10.5]], [0.9, 0.8])], truths), 0.5
    ).tolist() == [1, 0]


def test_equal_scores_keep_the_order_given():
    good, bad = SQUARES[0], [50, 50, 60, 60]
    for boxes, expected in (([good, bad], 1), ([bad, good], 0.5)):
        assert figures([found(boxes, [0.5, 0.5])], [truth([good])])[0].voc_map == expected
        two = figures(
            [found([b], [0.5]) for b in boxes], [truth([good] if b is good else []) for b in boxes]
        )[0]
        assert two.voc_map == expected
    many = [found([bad] * 500 + [good], [0.5] * 501)]  # an unstable sort would show with this many
    np.testing.assert_allclose(figures(many, [truth([good])])[0].voc_map, 1 / 501)


def test_a_class_that_never_occurs_is_left_out_of_the_mean():
    r, values = figures(
        [found([*SQUARES, [50, 50, 60, 60]], [0.9, 0.8, 0.95], [0, 0, 1])],
        [truth(SQUARES)],
        names=("a", "never"),
    )
    np.testing.assert_allclose(values, 1)
    assert (
        np.isnan(r.voc[1])
        and np.isnan(r.voc07[1])
        and np.isnan(r.coco_per_class[1])
        and r.num_detections.tolist() == [2, 1]
    )


def test_classes_are_matched_on_their_own():
    assert figures([found(SQUARES, [0.9, 0.8], [1, 0])], [truth(SQUARES, [0, 1])], names=("a", "b"))[1] == (
        0,
        0,
        0,
    )


def test_threshold_is_reached_by_equality():
    truths, detected = [truth([[0, 0, 10, 10]])], [found([[0, 0, 10, 5]], [0.9])]  # IoU exactly ½
    assert figures(detected, truths, iou_threshold=0.5)[0].voc_map == 1
    assert figures(detected, truths, iou_threshold=0.5001)[0].voc_map == 0


def test_padding_and_boxes_without_area():
    detected = [found([[0, 0, 10, 10], [5, 5, 5, 9], [-1] * 4], [0.9, 0.95, -1], [0, 0, -1])]
    r, _ = figures(detected, [truth(SQUARES[:1])])
    assert r.num_detections.tolist() == [2]
    np.testing.assert_allclose(r.voc, 0.5)


def test_average_precision_by_hand():
    assert average_precision([], [], "voc07") == average_precision([], [], "voc") == 0
    assert average_precision([1.0], [1.0]) == 1
    assert average_precision([0.5, 0.5, 1.0], [1.0, 0.5, 2 / 3], "voc") == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert np.isnan(average_precision([np.nan], [0.0]))
    with pytest.raises(ValueError, match="method"):
        average_precision([1.0], [1.0], "area")
    with pytest.raises(ValueError, match="same length"):
        average_precision([1.0], [])


def test_precision_recall_leaves_out():
    recall, precision, scores = precision_recall([0.2, 0.9, 0.5], [1, -1, 0], 2)
    assert recall.tolist() == [0, 0.5] and precision.tolist() == [0, 0.5] and scores.tolist() == [0.5, 0.2]
    assert np.isnan(precision_recall([0.5], [0], 0)[0]).all()


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(detected=[]), "0 pictures but 1 records"),
        (
            dict(detected=[found(SQUARES, [0.9, 0.8], [0, 3])]),
            "picture 0 has a detection with label 3, but there are only 1 classes",
        ),
        (dict(detected=[found(SQUARES, [0.9, float("nan")])]), "not a finite number"),
        (
            dict(detected=[Found(np.zeros((2, 4)), np.zeros(1), np.zeros(2))]),
            "2 boxes, 1 scores and 2 labels",
        ),
        (
            dict(truths=[truth(SQUARES, [0, 5])]),
            "picture 0 has an object with label 5, but there are only 1 classes",
        ),
        (dict(threshold=0.0), "iou_threshold must be above 0"),
    ],
)
def test_bad_input(change, message):
    case = dict(detected=[found(SQUARES, [0.9, 0.8])], truths=[truth(SQUARES)], threshold=0.5) | change
    with pytest.raises(ValueError, match=message):
        evaluate_detections(case["detected"], case["truths"], ["a"], case["threshold"])


# ---------------------------------------------------------------- report, mistakes, confusion


def test_report_to_json_is_atomic_and_complete(tmp_path, monkeypatch):
    detected, truths = random_data(11, pictures=12)
    report = evaluate_detections(detected, truths, ("a", "b", "c", "never"))
    path = report.to_json(tmp_path / "r.json")
    saved = json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert (
        "detections" not in saved
        and saved["classes"]["never"]["voc"] is None
        and saved["coco"]["AP"] == pytest.approx(report.coco_ap)
    )
    for k, name in enumerate("abc"):
        curve = saved["classes"][name]["curve"]
        for method in ("voc07", "voc"):
            value = average_precision(
                curve["recall"], curve["precision"], method, saved["classes"][name]["objects"]
            )
            assert value == pytest.approx(getattr(report, method)[k], abs=1e-4)
    before = path.read_bytes()

    def breaks_off(path, data):
        with path.open("wb") as f:
            f.write(data[:99])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        report.to_json(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.to_json(tmp_path / "nowhere" / "r.json")


def test_report_prints_and_plots():
    import matplotlib

    matplotlib.use("Agg")
    detected, truths = random_data(12, pictures=12)
    report = evaluate_detections(detected, truths, ("ant", "bee", "cow", "never"))
    text = str(report)
    assert (
        all(f"{v:.3f}" in text for v in (report.voc07_map, report.voc_map, report.coco_ap, report.coco_ap50))
        and "never" not in text
    )
    assert [line.get_label().split()[0] for line in report.plot().lines] == ["ant", "bee", "cow"]


def test_outcomes_and_confusion_count_every_object_once():
    detected, truths = random_data(13, pictures=50, num_classes=4)
    sorted_out = outcomes(detected, truths, 0.5, 0.4)
    matrix = confusion_matrix(detected, truths, 4, 0.5, 0.4)
    counted = sum((~(t.difficult | t.crowd)).sum() for t in truths)
    assert matrix[:4].sum() == counted == sum(len(o.hits) + len(o.missed) for o in sorted_out)
    assert np.trace(matrix[:4, :4]) == sum(len(o.hits) for o in sorted_out) > 0
    assert matrix[4, 4] == 0 and matrix[:4, :4].sum() > np.trace(matrix[:4, :4])
    kept = [
        found(d.boxes[d.scores >= 0.4], d.scores[d.scores >= 0.4], d.labels[d.scores >= 0.4])
        for d in detected
    ]
    report = evaluate_detections(kept, truths, "abcd", coco=False)
    assert [int(c.hits.sum()) for c in report.curves.values()] == np.diag(matrix)[:4].tolist()
    for o, d in zip(sorted_out, detected):
        assert (d.scores[np.concatenate([o.hits, o.false_alarms]).astype(int)] >= 0.4).all()


def test_worst_first(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    from retinanet_nb.pictures import write_image

    truths = [truth(SQUARES), truth(SQUARES), truth(SQUARES, difficult=[True, False])]
    detected = [
        found(SQUARES, [0.9, 0.8]),
        found([[50, 50, 60, 60]], [0.9]),
        found([[50, 50, 60, 60], SQUARES[1]], [0.9, 0.3]),
    ]
    for i, t in enumerate(truths):
        t.image = write_image(tmp_path / f"{i}.png", np.full((80, 90, 3), 200, np.uint8))
    report = evaluate_detections(detected, truths, ["a"], coco=False)
    ranking = worst(report, truths)
    assert [(o.index, len(o.missed), len(o.false_alarms), o.mistakes) for o in ranking] == [
        (1, 2, 1, 3),
        (2, 1, 1, 2),
    ]
    assert len(show_worst(report, truths, columns=2).axes) == 2
    assert show_worst(evaluate_detections(detected[:1], truths[:1], ["a"], coco=False), truths[:1]) is None
    assert draw_outcome(
        np.zeros((80, 90, 3), np.uint8), truths[1], detected[1], ranking[0], ["a"], side=360
    ).shape == (320, 360, 3)


# ---------------------------------------------------------------- a detector over files


class Brightness:
    """Finds the one bright rectangle in each picture, in canvas pixels; labels by colour. No network."""

    class_names = ["blue", "red"]
    hyperparameters = SimpleNamespace(image_size=(96, 128))

    def __init__(self):
        self.shapes = []

    def predict_on_batch(self, images):
        self.shapes.append(images.shape)
        B = len(images)
        boxes, scores, labels = (
            np.full((B, 5, 4), -1, np.float32),
            np.full((B, 5), -1, np.float32),
            np.full((B, 5), -1, np.int32),
        )
        for b, image in enumerate(images.astype(float)):
            if image.max() < 128:
                continue
            ys, xs = np.nonzero(image.max(-1) > 128)
            boxes[b, 0] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            scores[b, 0], labels[b, 0] = 0.9, int(image[..., 0].max() > image[..., 2].max())
        return boxes, scores, labels


class Files(list):
    class_names = ("red", "blue")


@pytest.fixture
def files(tmp_path):
    from retinanet_nb.pictures import write_image

    records = Files()
    for i, (h, w) in enumerate([(48, 64), (192, 256), (200, 100), (96, 128), (300, 90)]):
        image, box = np.full((h, w, 3), 20, np.uint8), np.array([w // 4, h // 5, 3 * w // 4, 4 * h // 5])
        image[box[1] : box[3], box[0] : box[2]] = (250, 0, 0) if i % 2 else (0, 0, 250)
        t = truth([box], [1 - i % 2])
        t.image = write_image(tmp_path / f"{i}.png", image)
        records.append(t)
    return records


def test_evaluate_a_detector(files, capfd):
    detector = Brightness()
    report = evaluate(detector, files, batch_size=2, progress=False)
    assert detector.shapes == [(2, 96, 128, 3)] * 3  # the last batch is filled up
    assert (
        report.class_names == ("red", "blue")
        and report.voc_map == report.voc07_map == 1
        and report.coco_ap50 == pytest.approx(1)
    )
    assert [d.labels.tolist() for d in report.detections] == [[1], [0], [1], [0], [1]]
    for d, t in zip(report.detections, files):
        assert iou_matrix(d.boxes, t.boxes)[0, 0] > 0.9
    assert capfd.readouterr() == ("", "")
    none = evaluate(detector, files, batch_size=2, score_threshold=0.95, progress=False)
    assert none.voc_map == 0 and none.num_detections.sum() == 0


def test_evaluate_names(files):
    detector = Brightness()
    detector.class_names = ["red", "green"]
    with pytest.raises(ValueError, match="does not know: blue; it knows red, green"):
        evaluate(detector, files)
    detector.class_names = ["green", "blue", "red"]
    assert evaluate(detector, files, progress=False).class_names == ("red", "blue", "green")
    with pytest.raises(ValueError, match="no class names"):
        evaluate(SimpleNamespace(class_names=None), files)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(Brightness(), files, batch_size=0)


def test_evaluate_names_the_missing_picture(files):
    files[3].image.unlink()
    with pytest.raises(FileNotFoundError, match="3.png"):
        evaluate(Brightness(), files, progress=False)


# ---------------------------------------------------------------- cost


def test_import_needs_no_network_library():
    code = "import sys, retinanet_nb.evaluation; print(sorted({'keras', 'tensorflow', 'jax', 'torch', 'matplotlib', 'pycocotools'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_figures_of_a_report():
    "A figure each, which no notebook shows by itself: the curves with a line for every class that has objects, the confusions with a count in every cell that has one."
    from retinanet_nb.demo import confusion_figure, curves_figure

    detected, truths = random_data(12, pictures=30)
    report = evaluate_detections(detected, truths, ("a", "b", "c", "never"), coco=False)
    (axes,) = curves_figure(report).axes
    assert len(axes.lines) == 3
    (axes,) = confusion_figure(report, truths).axes
    matrix = confusion_matrix(detected, truths, 4)
    assert sorted(t.get_text() for t in axes.texts) == sorted(str(n) for n in matrix[matrix > 0])


def test_a_hit_beside_a_missed_object_is_no_reason():
    "Two cells that overlap, one found: the other was not seen. A horse found, the rider on it not: nobody took the rider for a horse."
    for labels in ([0, 0], [0, 1]):
        truths = [truth([[0, 0, 20, 20], [4, 0, 24, 20]], labels)]
        (mistake,) = find_mistakes(
            evaluate_detections([found([[0, 0, 20, 20]], [0.9])], truths, ("horse", "rider"), coco=False),
            truths,
        )
        assert (mistake.kind, mistake.reason, mistake.label) == ("missed", "unseen", labels[1])


def test_mistakes_are_the_outcomes_one_by_one():
    "On random detections: as many as `outcomes` counts, false alarms by falling score, misses by falling size, and reasons that the overlaps bear out."
    detected, truths = random_data(13, pictures=60)
    report = evaluate_detections(detected, truths, ("a", "b", "c"), coco=False)
    mistakes = find_mistakes(report, truths)
    alarms, missed = ([m for m in mistakes if m.kind == kind] for kind in ("false alarm", "missed"))
    results = outcomes(detected, truths)
    assert (
        len(alarms) == sum(len(o.false_alarms) for o in results)
        and len(missed) == sum(len(o.missed) for o in results)
        and alarms
        and missed
    )
    assert [m.score for m in alarms] == sorted((m.score for m in alarms), reverse=True)
    sizes = [(m.box[2] - m.box[0]) * (m.box[3] - m.box[1]) for m in missed]
    assert sizes == sorted(sizes, reverse=True)
    for m in alarms:
        iou, classes = iou_matrix(m.box[None], truths[m.index].boxes)[0], np.asarray(truths[m.index].labels)
        own, foreign = iou[classes == m.label].max(initial=0), iou[classes != m.label].max(initial=0)
        assert m.reason == (
            "double"
            if own >= 0.5
            else "confused"
            if foreign >= 0.5
            else "loose"
            if own >= 0.1
            else "background"
        )
        assert m.score >= 0.5 and (m.reason != "confused" or m.other in classes)
    for m in missed:
        d, outcome = detected[m.index], results[m.index]
        free = np.isin(np.arange(len(d.scores)), outcome.false_alarms)
        iou, sure, same = (
            iou_matrix(m.box[None], d.boxes)[0],
            np.asarray(d.scores) >= 0.5,
            np.asarray(d.labels) == m.label,
        )
        if m.reason == "unseen":
            assert (
                not (iou[same & ~sure] >= 0.5).any()
                and not (iou[same & free] >= 0.1).any()
                and not (iou[free] >= 0.5).any()
            )
        if m.reason == "confused":
            assert (iou[free & ~same] >= 0.5).any() and m.other != m.label
        if m.reason == "loose":
            assert (iou[free & same] >= 0.1).any()
        if m.reason == "unsure":
            assert m.score == pytest.approx(np.asarray(d.scores)[same & (iou >= 0.5)].max()) and m.score < 0.5
    text = mistakes_overview(mistakes, "abc")
    assert f"false alarms: {len(alarms)} (" in text and f"missed objects: {len(missed)} (" in text
    assert all(describe_mistake(m, "abc").startswith("abc"[m.label]) for m in mistakes)
    crop = draw_mistake(
        np.full((60, 60, 3), 255, np.uint8), missed[0]._replace(box=np.array([10.0, 10, 30, 30])), side=80
    )
    assert (
        crop.shape == (80, 80, 3) and (crop == (255, 150, 0)).all(-1).any()
    )  # orange dashes: 20 pixels become 40, in the middle


# ---------------------------------------------------------------- arrays, areas, pieces


def test_detections_in_arrays():
    "Entries are views, padding is gone, kinds stay, and the whole behaves as a sequence."
    first = Found(np.array([[0, 0, 4, 4], [-1] * 4, [1, 1, 2, 2]], np.float32), [0.5, -1, 0.25], [1, -1, 0])
    row = stack_detections(iter([first, EMPTY, first]))
    assert isinstance(row, Detections) and len(row) == 3 and stack_detections(row) is row
    assert row.ends.tolist() == [0, 2, 2, 4] and row.picture.tolist() == [0, 0, 2, 2]
    assert row.boxes.dtype == np.float64 and row.labels.dtype == np.int32  # EMPTY is float64
    assert row[-1].scores.tolist() == [0.5, 0.25] and [len(f.labels) for f in row] == [2, 0, 2]
    assert np.shares_memory(row[2].boxes, row.boxes)
    assert row.take([1, 2]).ends.tolist() == [0, 1, 1, 2] and row.take([1, 2])[2].labels.tolist() == [1]
    with pytest.raises(IndexError):
        row[3]
    narrow = [Found(first.boxes, np.float32([0.5, -1, 0.25]), first.labels)] * 2
    assert stack_detections(narrow).boxes.dtype == stack_detections(narrow).scores.dtype == np.float32
    many = [found(np.full((n, 4), n), [0.5] * n) for n in range(100)]  # grows more than once
    assert np.array_equal(stack_detections(many).boxes[:, 0], np.repeat(range(100), range(100)))


def test_objects_in_arrays():
    "An area of the annotation goes before the box's."
    one, two = truth(SQUARES, [0, 1], crowd=[True, False]), truth(SQUARES[:1], difficult=[True])
    two.areas = np.array([7.0])
    row = stack_objects([one, truth([]), two])
    assert (
        isinstance(row, Objects) and row.areas.tolist() == [100, 100, 7] and row.ends.tolist() == [0, 2, 2, 3]
    )
    assert row.ignored.tolist() == [True, False, True] and row.picture.tolist() == [0, 0, 2]
    assert stack_objects(row) is row and row.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_coco_sizes_are_the_annotations(library):
    "Areas unlike the boxes': the figures by size are the library's own for these areas, the others stay."
    pytest.importorskip(library)
    detected, truths = random_data(21, pictures=60, num_classes=2, detections=80, crowd=0.1)
    by_box = coco_metrics(detected, truths, 2, library)[0]
    rng = np.random.default_rng(5)
    for t in truths[:-5]:  # the last ones have none
        t.areas = (box_area(t.boxes) * rng.uniform(0.05, 1, len(t.boxes))).astype(np.float32)
    figures, per_class = coco_metrics(detected, truths, 2, library)
    expected, classes = pycocotools_alone(detected, truths, 2)
    np.testing.assert_allclose([figures[n] for n in COCO_FIGURES], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(per_class, classes, rtol=0, atol=1e-9)
    for name in COCO_FIGURES:
        same = abs(figures[name] - by_box[name]) < 1e-12
        assert same == (name[-1] not in "sml"), name


def box_area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("decimals, verdicts", [(1, 20_000), (6, 7_000), (6, 1)])
def test_coco_in_pieces(monkeypatch, library, decimals, verdicts):
    "Pieces of few detections, sizes one by one and overlaps in groups or one by one, and more than a hundred of a class in a picture, many with equal scores."
    pytest.importorskip(library)
    detected, truths = random_data(
        22, pictures=12, num_classes=2, most=12, detections=500, crowd=0.1, decimals=decimals
    )
    assert max(np.bincount(d.labels).max(initial=0) for d in detected) > 150
    expected, classes = pycocotools_alone(detected, truths, 2)
    whole = list(coco_metrics(detected, truths, 2, library)[0].values())
    monkeypatch.setattr(coco_metric, "PIECE", 300)
    monkeypatch.setattr(coco_metric, "VERDICTS", verdicts)
    figures, per_class = coco_metrics(detected, truths, 2, library)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(list(figures.values()), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(per_class, classes, rtol=0, atol=1e-9)


def test_memory_of_an_evaluation():
    "300,000 detections from pictures to confusions, in a process of its own."
    steps = memory.measured(1000, 300, 20)
    assert [name for name, _, _ in steps][-1] == "confusions"
    assert max(megabytes for _, _, megabytes in steps) < 350, steps  # as a dictionary each: 508


# ---------------------------------------------------------------- names and bad input


def test_metric_by_name(tmp_path):
    detected, truths = random_data(11, pictures=12)
    report = evaluate_detections(detected, truths, ("a", "b", "c"))
    assert METRICS == ("voc07", "voc", "coco")
    assert [report.metric(n) for n in METRICS] == [report.voc07_map, report.voc_map, report.coco_ap]
    assert all(type(report.metric(n)) is float for n in METRICS)
    none = evaluate_detections(detected, truths, ("a", "b", "c"), coco=False)
    assert np.isnan(none.metric("coco")) and none.metric("voc") == report.metric("voc")
    for name in ("AP", "VOC", None, ""):
        with pytest.raises(ValueError, match="voc07, voc or coco"):
            report.metric(name)
    saved = json.loads(none.to_json(tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert saved["coco"] == {} and saved["classes"]["a"]["coco"] is None


def with_image(t, **attributes):
    for name, value in {"image": "album/cat.jpg", **attributes}.items():
        setattr(t, name, value)
    return t


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(difficult=[True]), "2 boxes but 1 difficult"),
        (dict(crowd=[True] * 3), "2 boxes but 3 crowd"),
        (dict(areas=[1.0]), "2 boxes but 1 areas"),
        (dict(areas=[1.0, -1]), "area"),
        (dict(areas=[1.0, float("nan")]), "area"),
        (dict(labels=[0]), "2 boxes but 1 labels"),
        (dict(labels=[0, -1]), "label −1"),
        (dict(labels=[0, 1.5]), "label 1.5"),
        (dict(boxes=[[0, 0, 1, float("inf")]] * 2), "not finite"),
        (dict(boxes=[[0, 0, 1]] * 2), r"shape \(2, 3\)"),
    ],
)
def test_bad_records_name_their_picture(change, message):
    truths = [truth(SQUARES), with_image(truth(SQUARES), **change)]
    for function in (
        lambda: evaluate_detections([EMPTY] * 2, truths, ["a"]),
        lambda: match_detections([EMPTY] * 2, truths),
        lambda: coco_metrics([EMPTY] * 2, truths, 1),
        lambda: outcomes([EMPTY] * 2, truths),
        lambda: confusion_matrix([EMPTY] * 2, truths, 1),
    ):
        with pytest.raises(ValueError, match=rf"picture 1 \(album/cat.jpg\).*{message}"):
            function()


@pytest.mark.parametrize(
    "boxes,scores,labels,message",
    [
        (SQUARES, [0.9, float("nan")], [0, 0], "not a finite number"),
        ([SQUARES[0], [0, 0, 1, float("inf")]], [0.9, 0.8], [0, 0], "not a finite number"),
        (SQUARES, [0.9], [0, 0], "2 boxes, 1 scores and 2 labels"),
        (SQUARES, [0.9, 0.8], [0, 1], "label 1, but there are only 1 classes"),
        (SQUARES, [0.9, 0.8], [0, -2], "label -2"),
        (SQUARES, [0.9, 0.8], [0, 0.5], "label 0.5"),
        (SQUARES, [0.9, 0.8], [0, 2**32], "label 4294967296"),
        (SQUARES, [0.9, 0.8], [0, float("nan")], "label nan"),
        ([0, 0, 1, 1], [0.9], [0], r"shape \(4,\)"),
    ],
)
def test_bad_detections_name_their_picture(boxes, scores, labels, message):
    truths = [truth(SQUARES), with_image(truth(SQUARES))]
    detected = [EMPTY, Found(np.array(boxes), np.array(scores), np.array(labels))]
    for function in (
        lambda: evaluate_detections(detected, truths, ["a"]),
        lambda: coco_metrics(detected, truths, 1),
        lambda: confusion_matrix(detected, truths, 1),
    ):
        with pytest.raises(ValueError, match=rf"picture 1 \(album/cat.jpg\).*{message}"):
            function()


@pytest.mark.parametrize(
    "option",
    [
        dict(batch_size=0),
        dict(batch_size=-1),
        dict(batch_size=2.5),
        dict(iou_threshold=0),
        dict(iou_threshold=float("nan")),
        dict(iou_threshold=50),
        dict(score_threshold=-0.1),
        dict(score_threshold=2),
        dict(score_threshold=float("nan")),
        dict(score_threshold="high"),
    ],
)
def test_options_out_of_range_are_named(option):
    "Before the detector is asked anything."
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} must be"):
        evaluate(None, None, **option)
    if name != "batch_size":
        report = evaluate_detections([EMPTY], [truth([])], ["a"], coco=False)
        for function in (outcomes, partial(confusion_matrix, num_classes=1)):
            with pytest.raises(ValueError, match=f"^{name} must be"):
                function(report.detections, [truth([])], **option)
    if name == "score_threshold":
        for function in (worst, find_mistakes, show_worst):
            with pytest.raises(ValueError, match=f"^{name} must be"):
                function(report, [truth([])], **option)


# ---------------------------------------------------------------- two hundred classes


def test_curve_of_a_class():
    curve = precision_recall_curve([0.2, 0.9, 0.5], [1, -1, 0], 2)
    assert isinstance(curve, Curve) and curve.num_objects == 2
    assert curve.scores.tolist() == [0.5, 0.2] and curve.hits.tolist() == [False, True]
    assert curve.recall.tolist() == [0, 0.5] and curve.precision.tolist() == [0, 0.5]


def drawn(report):
    "The axes of a report's curves, laid out, in a figure of the demo's size."
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from retinanet_nb.demo import curves_figure

    figure = curves_figure(report)
    FigureCanvasAgg(figure).draw()
    return figure.axes[0]


@pytest.mark.parametrize("classes,named", [(3, 3), (LEGEND, LEGEND), (LEGEND + 1, LEGEND), (200, LEGEND)])
def test_legend_fits(classes, named):
    "A line for every class, names of the best and the worst, and all of the legend inside the figure."
    detected, truths = random_data(31, pictures=150, num_classes=classes, most=12, detections=30)
    names = [f"a class with a name that has no end at all, number {k}" for k in range(classes)]
    report = evaluate_detections(detected, truths, names, coco=False)
    axes = drawn(report)
    assert len(axes.lines) == (report.objects > 0).sum() > 0.9 * classes
    texts = [t.get_text() for t in axes.get_legend().get_texts()]
    assert len(texts) == named and all(len(t) < 40 for t in texts)
    values = sorted(float(t.split()[-1]) for t in texts)
    every = sorted(report.voc[report.objects > 0].round(2))
    half = named // 2
    assert classes <= LEGEND or values == pytest.approx(every[:half] + every[-half:], abs=0.011)
    box, figure = axes.get_legend().get_window_extent(), axes.figure.bbox
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.x1 and box.y1 <= figure.y1
    assert axes.get_window_extent().width > figure.width / 4


def test_curves_are_thinned():
    "A class with many detections draws no more points than a figure can show, from the first to the last."
    rng = np.random.default_rng(0)
    boxes = np.tile([[0.0, 0, 9, 9]], (10_000, 1))
    report = evaluate_detections([found(boxes, rng.random(10_000))], [truth(SQUARES)], ["a"], coco=False)
    (line,) = drawn(report).lines
    assert len(line.get_xdata()) <= POINTS + 1 and line.get_ydata()[0] == 1 and line.get_ydata()[-1] == 0
    assert line.get_ydata()[-2] == pytest.approx(1 / 10_000)


# ---- one threshold


@pytest.mark.parametrize("seed", range(20))
def test_the_best_f1_is_the_best_of_all_cuts(seed):
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(rng.integers(1, 4)):
        n = rng.integers(0, 12)
        scores = rng.integers(1, 8, n) / 8  # many are equal
        verdicts = rng.integers(-1, 2, n)
        curves.append(precision_recall_curve(scores, verdicts, (verdicts == 1).sum() + rng.integers(0, 4)))
    objects = sum(c.num_objects for c in curves)
    shown = [(s, h) for c in curves for s, h in zip(c.scores, c.hits)]
    cuts = []
    for cut in sorted({s for s, _ in shown}, reverse=True):
        hits = [h for s, h in shown if s >= cut]
        cuts.append((2 * sum(hits) / (len(hits) + objects), cut, sum(hits) / len(hits), sum(hits) / objects))
    point = best_f1(curves)
    if not any(h for _, h in shown):
        assert point is None
        return
    best = max(cuts, key=lambda c: (c[0], c[1]))
    np.testing.assert_allclose((point.f1, point.score, point.precision, point.recall), best)
