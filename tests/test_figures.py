"""Figures that show numbers: what is drawn is what was counted."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters
from retinanet_nb.inspection import coverage, plot_overlaps, plot_shapes, plot_sizes
from retinanet_nb.pictures import write_image
from retinanet_nb.records import Record, Records
from retinanet_nb.selfcheck import draw_pair, plot_check
from retinanet_nb.training import plot_history


@pytest.fixture(scope="module")
def found():
    "Coverage of seven square objects, two of which are too small for the anchors."
    boxes = [[0, 0, s, s] for s in (6, 8, 32, 40, 60, 64, 100)]
    records = Records([Record("a.jpg", 128, 128, boxes, [0] * 7)], ["thing"])
    anchors = AnchorParameters(sizes=(32, 64, 128, 256, 512))
    return coverage(records, HyperParameters(image_size=(128, 128), anchors=anchors))


def axes():
    return Figure().subplots()


def bars(ax):
    "The total height of a histogram's bars, by the order of their colours."
    return [round(sum(bar.get_height() for bar in group)) for group in ax.containers]


def test_sizes_are_counted_by_reach(found):
    ax = plot_sizes(found, axes())
    reached = int(found.reached.sum())
    assert bars(ax) == [reached, 7 - reached] and reached == 5
    lines = sorted(line.get_xdata()[0] for line in ax.get_lines())
    assert np.allclose(lines, sorted(s * 2 ** (k / 3) for s in (32, 64, 128, 256, 512) for k in range(3)))


def test_shapes_are_the_objects_and_the_anchors(found):
    ax = plot_shapes(found, axes())
    by_name = {line.get_label(): line for line in ax.get_lines()}
    assert sorted(by_name["not reached"].get_xdata()) == [6, 8]
    assert sorted(by_name["reached"].get_ydata()) == [32, 40, 60, 64, 100]
    assert len(by_name["anchors"].get_xdata()) == 45


def test_overlaps_fall_into_three(found):
    ax = plot_overlaps(found, axes())
    between = int(found.between.sum())
    assert bars(ax) == [2 - between, between, 5]
    assert sorted(line.get_xdata()[0] for line in ax.get_lines()) == [0.4, 0.5]


HISTORY = [
    {"epoch": k, "loss": 3.0 / k, "classification": 2.0 / k, "box": 1.0 / k, "val_voc07_map": 0.1 * k}
    for k in (1, 2, 3)
]


def test_history_draws_its_epochs():
    losses, measured = plot_history(HISTORY).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert {"loss", "classification", "box"} <= set(drawn)
    assert drawn["loss"] == [3.0, 1.5, 1.0]
    assert np.allclose(measured.get_lines()[0].get_ydata(), [0.1, 0.2, 0.3])
    without = [{k: v for k, v in entry.items() if k != "val_voc07_map"} for entry in HISTORY]
    assert len(plot_history(without).axes) == 1


def test_check_draws_its_steps():
    history = [dict(step=k, loss=1 / k, classification=0.5 / k, box=0.5 / k) for k in (1, 2, 3)]
    losses, known = plot_check(SimpleNamespace(history=history, tests=[(1, 0.2), (3, 0.9)])).axes
    assert list(losses.get_lines()[0].get_ydata()) == [1, 0.5, 1 / 3] and losses.get_yscale() == "log"
    assert known.get_lines()[0].get_xydata().tolist() == [[1, 0.2], [3, 0.9]]


def test_pair_is_truth_and_detections_side_by_side(tmp_path):
    picture = np.full((320, 320, 3), 128, np.uint8)
    record = Record(write_image(tmp_path / "a.png", picture), 320, 320, [[20, 100, 120, 200]], [0])
    found = SimpleNamespace(
        boxes=np.array([[200, 100, 300, 200], [30, 30, 60, 60]]),
        scores=np.array([0.9, 0.2]),
        labels=np.array([0, 0]),
    )
    pair = draw_pair(record, found, ("thing",))
    left, right = pair[:, :320], pair[:, 326:]
    changed = lambda half: np.argwhere((half != 128).any(-1))[:, 1]
    assert pair.shape == (320, 646, 3) and (pair[:, 320:326] == 255).all()
    assert changed(left).max() < 160 and changed(right).min() >= 195  # and the unsure one isn't drawn
    assert (draw_pair(record, None, ("thing",)) == left).all()
