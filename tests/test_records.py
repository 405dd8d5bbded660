"""Records, their check and their report: whatever does not fit together is refused by name."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from retinanet_nb.records import (
    EDGE_TOLERANCE,
    DataReport,
    Entry,
    Record,
    Records,
    as_flag,
    as_number,
    check_entry,
    check_records,
    finish,
)


def record(boxes=((0, 0, 5, 5),), labels=(0,), size=(10, 10), **more):
    return Record("some.jpg", *size, boxes, labels, **more)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_without_a_name_is_refused(label):
    with pytest.raises(ValueError, match="some.jpg.*between 0 and 1"):
        Records([record(labels=[label])], ("a", "b"))


def test_records():
    records = Records([Record("x.jpg", 10, 10, [[0, 0, 1, 1]], [0]), Record("y.jpg", 10, 10, [], [])], ["a"])
    assert (
        len(records[1:]) == 1
        and records[1:].class_names == ("a",)
        and records[-1].image.name == "y.jpg"
        and records.report.empty == 1
    )


@pytest.mark.parametrize("name", ["labels", "difficult", "crowd", "truncated", "areas"])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_arrays_of_another_length_than_the_boxes(name, length):
    given = {"labels": [0, 0], name: [0] * length}
    with pytest.raises(ValueError, match=f"some.jpg: 2 boxes but {length} {name}"):
        record([[0, 0, 5, 5]] * 2, **given)


@pytest.mark.parametrize(
    "given",
    [
        dict(boxes=[[0, 0, 5, 5, 0.9]]),
        dict(boxes=[[0, 0, 5, 5, 0, 0, 5, 5]], labels=[0, 0]),
        dict(boxes=[["a", 0, 5, 5]]),
        dict(boxes=[[0, 0, 5], [1]]),
        dict(labels=[0.5]),
        dict(labels=[math.nan]),
        dict(labels=[2**40]),
        dict(labels=["cat"]),
        dict(labels=[None]),
        dict(areas=["much"]),
    ],
)
def test_arrays_that_are_none(given):
    with pytest.raises(ValueError, match="some.jpg: the (boxes|labels|areas) must"):
        record(**given)


def test_a_record_owns_its_arrays():
    boxes, areas = np.array([[0, 0, 5, 5]], np.float32), np.array([20], np.float32)
    one = record(boxes, areas=areas)
    boxes[:], areas[:] = 7, 7
    assert one.boxes.tolist() == [[0, 0, 5, 5]] and one.areas.tolist() == [20]
    assert one.areas.dtype == np.float32 and record().areas is None


WRONG = {
    "a label too high": (record(labels=[2]), "label 2"),
    "a negative label": (record(labels=[-1]), "label -1"),
    "not a number": (record([[0, 0, math.nan, 5]]), "is not finite"),
    "infinite": (record([[0, 0, 5, math.inf]]), "is not finite"),
    "beyond float32": (record([[0, 0, 1e300, 5]]), "is not finite"),
    "no width": (record([[5, 0, 5, 5]]), "has no area"),
    "inside out": (record([[0, 7, 5, 5]]), "has no area"),
    "beyond the right": (record([[0, 0, 10.2, 5]]), "goes beyond the 10×10 picture"),
    "beyond the bottom": (record([[0, 0, 10, 11]]), "goes beyond"),
    "beyond the left": (record([[-0.2, 0, 10, 5]]), "goes beyond"),
    "beyond the top": (record([[0, -9, 10, 5]]), "goes beyond"),
    "no size": (record(size=(0, 10)), "width and a height.* not 0 and 10"),
    "a size of text": (record(size=(10, "10")), "width and a height"),
    "half a pixel": (record(size=(10, 9.5)), "width and a height"),
    "a negative area": (record(areas=[-1]), "as its area"),
    "no number as area": (record(areas=[math.nan]), "as its area"),
    "the second of its objects": (
        record([[0, 0, 5, 5], [9, 9, 9, 9]], [0, 1]),
        r"\(9, 9, 9, 9\) has no area",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_check_records_names_picture_and_fault(kind):
    wrong, words = WRONG[kind]
    good = Record("good.jpg", 10, 10, [[0, 0, 10, 10]] * 3, [0, 1, 0])
    empty = Record("empty.jpg", 10, 10, [], [])
    for records in ([wrong], [good, empty, wrong, good], [empty, empty, good, wrong]):
        with pytest.raises(ValueError, match="some.jpg.*" + words) as error:
            check_records(records, 2)
        assert "good.jpg" not in str(error.value)
    with pytest.raises(ValueError, match="some.jpg.*" + words):
        Records([good, wrong], ("cat", "dog"))


@pytest.mark.parametrize("entry", [None, "a.jpg", 5, ({}, []), np.zeros(4)])
def test_entries_that_are_no_records(entry):
    with pytest.raises(ValueError, match="entry 1 of the data set.*Record was expected"):
        check_records([record(), entry], 1)


def test_check_records_lets_pass():
    edge = EDGE_TOLERANCE * 0.99
    check_records([], 0)
    check_records([record([], [])], 0)
    check_records([record([[-edge, -edge, 10 + edge, 10 + edge]], areas=[0])], 1)
    check_records((record(labels=[i]) for i in range(3)), 3)
    check_records([record(size=(np.int64(10), np.int32(10)))], 1)


def test_the_report_counts():
    data = Records(
        [
            record([[0, 0, 5, 5]] * 3, [2, 2, 0], difficult=[1, 0, 0], truncated=[0, 1, 1], crowd=[0, 0, 1]),
            record([], []),
            record(labels=[2], difficult=[1]),
        ],
        ("a", "b", "c"),
    )
    report = data.report
    assert report.per_class == {
        "a": dict(pictures=1, objects=1, difficult=0, truncated=1),
        "b": dict(pictures=0, objects=0, difficult=0, truncated=0),
        "c": dict(pictures=2, objects=3, difficult=2, truncated=1),
    }
    assert (report.pictures, report.empty, report.objects) == (3, 1, 4)
    assert (report.difficult, report.truncated, report.crowd) == (2, 2, 1)
    assert json.loads(report.to_json())["objects"] == 4 and "1 object is a crowd" in str(report)
    empty = DataReport("none").count([], ())
    assert empty.per_class == {} and "0 pictures" in str(empty)


def test_a_report_is_always_text():
    report = DataReport("some")
    name = b"\xff.jpg".decode("utf-8", "surrogateescape")
    report.add("dropped", name, "x" * 1_000_000)
    report.add("noted", "y" * 1_000_000, "why")
    assert json.loads(report.to_json().encode())["dropped"][0][0] == name
    assert len(str(report).encode()) < 2000


def test_check_entry(tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    report = DataReport("some")
    boxes = np.array([[-1e-6, 0, 100.1, 80], [0, 0, 100.2, 5], [100, 0, 200, 5], [10, 10, 10 + 1e-9, 20]])
    entry = Entry(
        "a.txt", tmp_path / "a.png", list("abcd"), boxes, areas=[np.nan, 3, 4, 5], difficult=[1, 0, 1, 1]
    )
    assert check_entry(entry, report) and entry.size == (80, 100)
    assert entry.names == ["a", "b"] and entry.boxes.tolist() == [[0, 0, 100, 80], [0, 0, 100, 5]]
    assert entry.areas.tolist() == [8000, 3] and entry.difficult.tolist() == [1, 0]
    assert len(report.clipped) == 1 and "100.2" in report.clipped[0][1]
    assert ["outside", "float32"] == [
        why.split()[-4 if "outside" in why else -1] for _, why in report.dropped
    ]
    for name in ("gone.png", "x" * 2000 + ".png"):
        assert not check_entry(Entry("a.txt", tmp_path / name, [], np.zeros((0, 4))), report)
    assert [file for file, _ in report.refused] == ["a.txt"] * 2 and "there is no picture gone.png" in str(
        report
    )

    class Data(Records):
        def __init__(self):
            finish(self, [entry], None, report)

    assert Data().class_names == ("a", "b") and Data()[0].areas.tolist() == [8000, 3]


def test_a_picture_that_may_not_be_read(tmp_path, monkeypatch):
    """It is refused with the reason, and not the end of a reading."""
    import retinanet_nb.records as module

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "read_header", forbidden)
    report = DataReport("some")
    assert not check_entry(Entry("a.txt", tmp_path / "a.png", [], np.zeros((0, 4))), report)
    assert "Permission denied" in report.refused[0][1] and str(tmp_path) not in report.refused[0][1]


@pytest.mark.parametrize(
    "text", ["1_000", "١٢", "１２", "1,5", "0x10", "nan", "inf", "-inf", "", "e5", "1e", ".", "1 2"]
)
def test_no_numbers(text):
    assert math.isnan(as_number(text))


def test_numbers_and_flags():
    assert [as_number(v) for v in (" 12 ", "-1.5", "+.5", "2.", "1E3", 7, 2.5)] == [
        12,
        -1.5,
        0.5,
        2,
        1000,
        7,
        2.5,
    ]
    assert all(math.isnan(as_number(v)) for v in (True, None, [], {}, 10**400, math.inf, "9" * 500, b"1"))
    assert [as_flag(v) for v in ("0", "No", False, None, "", 0.0)] == [False] * 6
    assert [as_flag(v) for v in ("1", " TRUE ", True, 1)] == [True] * 4
    assert [as_flag(v) for v in ("2", 2, [], "maybe")] == [None] * 4
