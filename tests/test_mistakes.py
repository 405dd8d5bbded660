"""Mistakes: columns against a slow sorting of the same mistakes, and figures of many classes."""

import numpy as np
import pytest

from retinanet_nb.evaluation import evaluate_detections, iou_matrix
from retinanet_nb.mistakes import (
    CONFUSED_CLASSES,
    MISSED_COLOR,
    Mistake,
    Mistakes,
    confusion_matrix,
    confusion_size,
    describe_mistake,
    draw_mistake,
    find_mistakes,
    largest_confusions,
    outcomes,
    plot_confusion,
)
from retinanet_nb.prediction import Found
from test_evaluation import EMPTY, SQUARES, found, random_data, truth


def slow_mistakes(report, truths, score_threshold):
    "Reasons by the tables of chapter 7.4, one box at a time."
    t, alarms, missed = report.iou_threshold, [], []
    for o in outcomes(report.detections, truths, t, score_threshold):
        d, real = report.detections[o.index], truths[o.index]
        iou = iou_matrix(d.boxes, real.boxes)
        for a in o.false_alarms:
            own = [v for v, l in zip(iou[a], real.labels) if l == d.labels[a]]
            foreign = [(v, -k) for k, (v, l) in enumerate(zip(iou[a], real.labels)) if l != d.labels[a]]
            other, best = -1, max(own, default=0)
            if best >= t:
                reason = "double"
            elif max(foreign, default=(0, 0))[0] >= t:
                reason, other = "confused", real.labels[-max(foreign)[1]]
            else:
                reason = "loose" if best >= 0.1 else "background"
            row = (o.index, "false alarm", reason, d.labels[a], other, *d.boxes[a], d.scores[a])
            alarms.append(row)
        for m in o.missed:
            rows = list(zip(range(len(d.scores)), iou[:, m], d.labels == real.labels[m], d.scores))
            wrong = [(s, -k) for k, v, same, s in rows if v >= t and not same and k in o.false_alarms]
            unsure = [s for _, v, same, s in rows if v >= t and same and s < score_threshold]
            loose = [k for k, v, same, _ in rows if v >= 0.1 and same and k in o.false_alarms]
            other, score = -1, np.nan
            if wrong:
                reason, other = "confused", d.labels[-max(wrong)[1]]
            elif unsure:
                reason, score = "unsure", max(unsure)
            else:
                reason = "loose" if loose else "unseen"
            row = (o.index, "missed", reason, real.labels[m], other, *real.boxes[m], score)
            missed.append(row)
    alarms.sort(key=lambda r: -r[-1])
    missed.sort(key=lambda r: -(r[7] - r[5]) * (r[8] - r[6]))
    return alarms + missed


@pytest.mark.parametrize("seed,score_threshold", [(0, 0.5), (1, 0.3), (2, 0.9), (3, 0.0)])
def test_mistakes_equal_the_slow_ones(seed, score_threshold):
    detected, truths = random_data(seed, pictures=40, crowd=0.1, decimals=2)
    report = evaluate_detections(detected, truths, "abc", coco=False)
    mistakes = find_mistakes(report, truths, score_threshold)
    expected = slow_mistakes(report, truths, score_threshold)
    assert len(mistakes) == len(expected) > 50
    for mine, theirs in zip(mistakes, expected):
        assert (mine.index, mine.kind, mine.reason, mine.label, mine.other) == theirs[:5]
        np.testing.assert_array_equal([*mine.box, mine.score], np.array(theirs[5:], float))


def test_mistakes_are_a_sequence():
    detected, truths = random_data(4, pictures=20)
    mistakes = find_mistakes(evaluate_detections(detected, truths, "abc", coco=False), truths)
    assert isinstance(mistakes, Mistakes) and all(isinstance(m, Mistake) for m in mistakes)
    assert [m.label for m in mistakes[:5]] == mistakes.label[:5].tolist() and mistakes
    assert type(mistakes[0].kind) is str and mistakes[-1].kind == "missed"
    some = mistakes.take(mistakes.kind == "missed")
    assert {m.kind for m in some} == {"missed"} and len(some) == (mistakes.kind == "missed").sum()
    with pytest.raises(IndexError):
        mistakes[len(mistakes)]


@pytest.mark.parametrize("detected,real", [([], []), ([EMPTY], [truth([])])])
def test_no_mistakes(detected, real):
    mistakes = find_mistakes(evaluate_detections(detected, real, "a", coco=False), real)
    assert len(mistakes) == 0 and not mistakes and list(mistakes) == []


def test_only_false_alarms_and_only_misses():
    "Pictures without any object, or without any detection."
    real = [truth([]), truth(SQUARES)]
    mistakes = find_mistakes(evaluate_detections([found(SQUARES, [0.9, 0.6]), EMPTY], real, "a"), real)
    assert [(m.index, m.kind, m.reason) for m in mistakes] == [
        (0, "false alarm", "background"),
        (0, "false alarm", "background"),
        (1, "missed", "unseen"),
        (1, "missed", "unseen"),
    ]
    assert describe_mistake(mistakes[0], "a") == "a 0.90: nothing marked there"
    assert describe_mistake(mistakes[3], "a") == "a missed: not seen"


def test_numbers_of_outcomes_count_padding():
    "Detections as a network gives them: numbers are places in the rows given, padding or not."
    rows = Found([[-1] * 4, SQUARES[0], [-1] * 4, [50, 50, 60, 60]], [-1, 0.9, -1, 0.8], [-1, 0, -1, 0])
    (outcome,) = outcomes([rows], [truth(SQUARES)])
    assert outcome.hits.tolist() == [1] and outcome.false_alarms.tolist() == [3]
    assert outcome.missed.tolist() == [1]
    assert confusion_matrix([rows], [truth(SQUARES)], 1).tolist() == [[1, 1], [1, 0]]


# ---------------------------------------------------------------- the confusion picture


def confusions(classes, seed=0):
    "A matrix with a few large confusions among many small counts."
    rng = np.random.default_rng(seed)
    matrix = rng.poisson(0.2, (classes + 1, classes + 1))
    matrix[np.arange(classes), np.arange(classes)] = rng.integers(5, 50, classes)
    matrix[classes, classes] = 0
    return matrix


def test_largest_confusions_lose_nothing():
    matrix, names = confusions(200), [f"n{k}" for k in range(200)]
    matrix[150, 7] = 900
    smaller, few = largest_confusions(matrix, names)
    assert smaller.shape == (CONFUSED_CLASSES + 2,) * 2 and len(few) == CONFUSED_CLASSES + 1
    assert smaller.sum() == matrix.sum() and few[-1] == f"{200 - CONFUSED_CLASSES} others"
    assert smaller[few.index("n150"), few.index("n7")] == 900
    assert list(few[:-1]) == sorted(few[:-1], key=names.index)
    for name in few[:-1]:
        k, j = names.index(name), few.index(name)
        assert smaller[j].sum() == matrix[k].sum() and smaller[:, j].sum() == matrix[:, k].sum()
        assert smaller[j, j] == matrix[k, k] and smaller[j, -1] == matrix[k, -1]
    same, all_names = largest_confusions(matrix[:21, :21], names[:20])
    assert same.shape == (21, 21) and all_names == tuple(names[:20])


@pytest.mark.parametrize("classes", [2, 20, 21, 200])
def test_confusion_picture_has_a_bounded_size(classes):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"a class with a name that has no end, {k}" for k in range(classes)]
    axes = plot_confusion(confusions(classes), names)
    rows = min(classes, CONFUSED_CLASSES + 1) + 1
    assert axes.images[0].get_array().shape == (rows, rows) and len(axes.texts) <= rows**2
    assert tuple(axes.figure.get_size_inches()) == pytest.approx(confusion_size(classes))
    assert max(confusion_size(classes)) < 13
    assert all(len(t.get_text()) <= 24 for t in axes.get_xticklabels())
    plt.close(axes.figure)


def test_two_hundred_classes_from_pictures_to_figure():
    from retinanet_nb.demo import confusion_figure

    detected, truths = random_data(32, pictures=100, num_classes=200)
    report = evaluate_detections(detected, truths, [str(k) for k in range(200)], coco=False)
    figure = confusion_figure(report, truths)
    assert max(figure.get_size_inches()) < 13 and len(figure.axes[0].texts) < 500


def test_background_is_not_shaded():
    "Five false alarms are no share of anything: the darkest cell is the one with most of its row's objects."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = plot_confusion(np.array([[90, 10, 0], [40, 30, 30], [5, 0, 0]]), "ab")
    shades = axes.images[0].get_array()
    assert shades[:2].tolist() == [[0.9, 0.1, 0], [0.4, 0.3, 0.3]]
    assert np.ma.getmaskarray(shades)[2].all() and not np.ma.getmaskarray(shades)[:2].any()
    assert {t.get_text() for t in axes.texts} == {"90", "10", "40", "30", "5"}
    colors = axes.images[0].to_rgba(shades)[..., :3].sum(-1)
    assert colors[2].min() > colors[0, 0] and colors[0, 0] == colors.min()
    plt.close(axes.figure)


@pytest.mark.parametrize("box", [(2, 2, 98, 58), (0, 0, 20, 20), (80, 40, 100, 60), (40, 20, 60, 40)])
def test_crops_stay_inside_the_picture(box):
    "Grey, which stands for what the picture doesn't have, is seen only where the object is longer than the picture is high."
    image = np.full((60, 100, 3), 255, np.uint8)
    mistake = Mistake(0, "missed", "unseen", 0, -1, np.array(box, float), 0.0)
    crop = draw_mistake(image, mistake, side=120)
    assert (crop == MISSED_COLOR).all(-1).any()
    grey = (crop == 127).all(-1).mean()
    assert grey < 0.5 if box[2] - box[0] > 60 else grey == 0
