"""The data doctor: best overlaps against brute force, counts made by hand, promises that are kept, and a page that is whole."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import oracles
from retinanet_nb import inspection
from retinanet_nb.hyperparameters import AnchorParameters, HyperParameters
from retinanet_nb.inspection import (
    GOAL,
    anchor_shapes,
    best_overlaps,
    copies_elsewhere,
    coverage,
    double_boxes,
    draw_reach,
    inspect_dataset,
    same_pictures,
    suggestions,
    tiny_objects,
)
from retinanet_nb.pictures import fit_to_canvas, write_image
from retinanet_nb.records import DataReport, Record, Records
from retinanet_nb.voc import VOCDataset


def oracle_best(boxes, image_size, a):
    """Best IoU of each box with any anchor, by comparing all with all in float64."""
    anchors = oracles.anchors(*image_size, a.sizes, a.strides, a.ratios, a.scales)
    if not len(boxes):
        return np.zeros(0)
    boxes = np.asarray(boxes, np.float64)[:, None]
    common = np.clip(
        np.minimum(boxes[..., 2:], anchors[:, 2:]) - np.maximum(boxes[..., :2], anchors[:, :2]), 0, None
    ).prod(-1)
    area = lambda b: (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    return (common / (area(boxes) + area(anchors) - common)).max(axis=1)


def scattered(rng, n, image_size):
    """Boxes of all sizes, some of which stick out of the canvas."""
    corner, size = rng.uniform(-10, max(image_size), (n, 2)), 2 ** rng.uniform(0, 9.5, (n, 2))
    return np.concatenate([corner, corner + size], axis=1)


def dataset(seed=0, n=40, size=(480, 640), side=(6, 60)):
    """Records made without pictures: square and lying objects, so small that the usual anchors miss many."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        w = rng.uniform(*side, 6)
        h = w * rng.choice([1.0, 0.9, 0.5], 6)
        x, y = rng.uniform(0, size[1] - w), rng.uniform(0, size[0] - h)
        records.append(
            Record(
                f"{i}.jpg", size[1], size[0], np.stack([x, y, x + w, y + h], axis=1), rng.integers(0, 2, 6)
            )
        )
    return Records(records, ("cat", "dog"))


# --- best overlaps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [(512, 512), (240, 320), (333, 500), (1, 1), (7, 129), (100, 8)])
@pytest.mark.parametrize(
    "a",
    [
        AnchorParameters(),
        AnchorParameters((4, 9, 30, 100, 101), ratios=(0.2, 1.7), scales=(0.5, 1, 1.3)),
        AnchorParameters((5, 5, 5, 5, 5), ratios=(1,), scales=(1,)),
    ],
)
def test_best_overlaps_are_those_of_brute_force(image_size, a):
    boxes = scattered(np.random.default_rng(1), 40, image_size)
    iou, level, anchor = best_overlaps(boxes, image_size, a)
    assert iou.dtype == np.float32 and level.dtype == np.int32 and anchor.shape == (40, 4)
    np.testing.assert_allclose(iou, oracle_best(boxes, image_size, a), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        [oracles.iou(x, y) for x, y in zip(boxes, anchor.astype(float))], iou, rtol=0, atol=1e-4
    )  # and this anchor has it
    side = np.sqrt((anchor[:, 2:] - anchor[:, :2]).prod(axis=1))
    possible = np.multiply.outer(a.sizes, a.scales)[level]
    assert (np.abs(possible - side[:, None]).min(axis=1) < 1e-2).all()  # it is one of its level


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.floats(-50, 300),
    st.floats(-50, 300),
    st.floats(0.5, 400),
    st.floats(0.5, 400),
    st.lists(st.floats(2, 300), min_size=5, max_size=5),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=3),
)
def test_best_overlaps_property(height, width, x, y, w, h, sizes, ratios):
    a, box = AnchorParameters(sizes, ratios=ratios), [[x, y, x + w, y + h]]
    np.testing.assert_allclose(
        best_overlaps(box, (height, width), a)[0], oracle_best(box, (height, width), a), rtol=0, atol=1e-6
    )


def test_best_overlaps_are_those_of_the_network():
    from helpers import numpy
    from retinanet_nb.anchors import anchors_for_shape, generate_anchors
    from retinanet_nb.boxes import overlaps

    for a in (AnchorParameters(), AnchorParameters((16, 40, 70, 128, 300), ratios=(0.33, 1, 3))):
        for (w, h), box in zip(
            anchor_shapes(a).reshape(-1, 2),
            np.concatenate([generate_anchors(s, a.ratios, a.scales) for s in a.sizes]),
        ):
            np.testing.assert_allclose(box, [-w / 2, -h / 2, w / 2, h / 2], rtol=1e-5)
        for image_size in ((200, 300), (97, 131)):
            boxes = scattered(np.random.default_rng(2), 50, image_size).astype("float32")
            network = numpy(overlaps(boxes, anchors_for_shape(image_size, a))).max(axis=1)
            np.testing.assert_allclose(best_overlaps(boxes, image_size, a)[0], network, rtol=0, atol=2e-5)


def test_by_hand():
    # the square of 32 pixels around (100, 100), the centre of a cell of P3, is an anchor; half of it lies in the next anchor: a half; (96, 96) is a centre of P6
    iou, level, anchor = best_overlaps(
        [[84, 84, 116, 116], [84, 84, 100, 116], [-32, -32, 224, 224]],
        (512, 512),
        AnchorParameters(ratios=(1,), scales=(1,)),
    )
    np.testing.assert_allclose(iou, [1, 0.5, 1], atol=1e-6)
    assert level.tolist() == [0, 0, 3]
    np.testing.assert_allclose(anchor[[0, 2]], [[84, 84, 116, 116], [-32, -32, 224, 224]], atol=1e-4)
    assert best_overlaps([[5, 5, 5, 20]], (64, 64))[0].tolist() == [0]  # no area


def test_one_canvas_for_each_object():
    boxes = scattered(np.random.default_rng(3), 20, (90, 90))
    sizes = np.random.default_rng(4).integers(20, 200, (20, 2))
    each = [best_overlaps(b[None], s)[0][0] for b, s in zip(boxes, sizes)]
    np.testing.assert_array_equal(best_overlaps(boxes, sizes)[0], each)


# --- coverage --------------------------------------------------------------------------------------------------------


def centred(side):
    return [40 - side / 2, 40 - side / 2, 40 + side / 2, 40 + side / 2]


def test_coverage_counts_by_hand():
    # canvas half the picture: around the centre (20, 20) of a cell lie squares of 32, 20 and 22 pixels; the difficult and the crowd do not count
    first = Record(
        "a.jpg",
        200,
        200,
        [centred(64), centred(40), centred(44), centred(64)],
        [0, 0, 1, 1],
        difficult=[0, 0, 0, 1],
    )
    second = Record("b.jpg", 100, 200, [centred(64), centred(64)], [1, 1], crowd=[1, 0])
    found = coverage(
        Records([first, Record("none.jpg", 5, 5, [], []), second], ("cat", "dog", "cow")),
        HyperParameters(image_size=(100, 100)),
    )
    np.testing.assert_allclose(found.iou, [1, 400 / 1024, 484 / 1024, 1], atol=1e-6)
    assert (
        found.picture.tolist() == [0, 0, 0, 2]
        and found.index.tolist() == [0, 1, 2, 1]
        and found.label.tolist() == [0, 0, 1, 1]
    )
    assert found.reached.tolist() == [True, False, False, True] and found.between.tolist() == [
        False,
        False,
        True,
        False,
    ]
    assert (len(found), found.left_out, found.share) == (4, 2, 0.5)
    np.testing.assert_allclose(found.side, [32, 20, 22, 32], atol=1e-4)
    assert found.per_class() == [
        dict(name="cat", objects=2, reached=1, between=0, below=1, share=0.5),
        dict(name="dog", objects=2, reached=1, between=1, below=0, share=0.5),
        dict(name="cow", objects=0, reached=0, between=0, below=0, share=None),
    ]
    assert [(r["name"], r["objects"], r["reached"]) for r in found.per_size()] == [
        ("16 to 32", 2, 0),
        ("32 to 64", 2, 2),
    ]
    assert (
        found.state(0, 4).tolist() == [1, 0, 0, -1]
        and found.state(1, 0).tolist() == []
        and found.state(2, 2).tolist() == [-1, 1]
    )
    assert "50.0 %" in str(found)


@pytest.mark.parametrize("picture", [(375, 500), (500, 333), (31, 77), (96, 128)])
def test_objects_are_scaled_as_pictures_are(picture):
    boxes = scattered(np.random.default_rng(5), 10, picture)
    _, fit = fit_to_canvas(np.zeros((*picture, 3), np.uint8), (96, 128))
    data = type("Data", (list,), {"class_names": ("a",)})  # `Records` takes no box beyond its picture
    found = coverage(
        data([Record("a.jpg", picture[1], picture[0], boxes, [0] * 10)]),
        HyperParameters(image_size=(96, 128)),
    )
    np.testing.assert_allclose(found.boxes, fit.to_canvas(boxes.astype("float32")), rtol=1e-6, atol=1e-5)


def test_thresholds_are_the_hyperparameters():
    data = dataset()
    h = HyperParameters(positive_overlap=0.7, negative_overlap=0.3)
    found = coverage(data, h)
    np.testing.assert_array_equal(found.reached, found.iou >= np.float32(0.7))
    np.testing.assert_array_equal(
        found.between, (found.iou >= np.float32(0.3)) & (found.iou < np.float32(0.7))
    )


def test_reached_objects_are_those_that_get_anchors_without_force():
    from helpers import numpy
    from retinanet_nb.anchors import anchors_for_shape
    from retinanet_nb.boxes import overlaps
    from retinanet_nb.targets import match_anchors

    h = HyperParameters(image_size=(160, 200))
    found = coverage(dataset(n=12, side=(10, 200)), h)
    anchors = anchors_for_shape(h.image_size, h.anchors)
    for k in range(0, len(found), 5):  # each alone, so that no object takes another's anchor
        matched = numpy(
            match_anchors(
                overlaps(anchors, found.boxes[k : k + 1])[None], np.ones((1, 1), bool), force_match=False
            )
        )
        assert found.reached[k] == (matched >= 0).any()
    assert 0 < found.reached[::5].sum() < len(found.reached[::5])


# --- suggestions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searched", [10000, 100])  # the second time on a part only, but measured on all
def test_promises_are_kept(searched, monkeypatch):
    monkeypatch.setattr("retinanet_nb.inspection._SEARCHED", searched)
    data, h = dataset(), HyperParameters(image_size=(224, 320))
    now, found = coverage(data, h), suggestions(data, h)
    assert found and now.share < GOAL
    for s in found:
        followed = coverage(data, s.hyperparameters)
        assert (s.reached, s.objects) == (
            int(followed.reached.sum()),
            len(followed),
        ) and s.coverage == followed.share > now.share
        assert s.area == pytest.approx(np.prod(s.hyperparameters.image_size) / (224 * 320))
        count = lambda h: len(
            oracles.anchors(
                *h.image_size, h.anchors.sizes, h.anchors.strides, h.anchors.ratios, h.anchors.scales
            )
        )
        assert s.anchors == pytest.approx(count(s.hyperparameters) / count(h))
        # the options say all that was changed, and nothing but that
        changes, a = {}, h.anchors
        for name, value in re.findall(r"--(\w+) (\S+)", s.options):
            numbers = tuple(float(v) for v in value.split("x" if name == "image_size" else ","))
            if name == "image_size":
                changes["image_size"] = tuple(map(int, numbers))
            elif name == "anchor_sizes":
                a = AnchorParameters(numbers, a.strides, a.ratios, a.scales)
            elif name == "anchor_ratios":
                a = AnchorParameters(a.sizes, a.strides, numbers, a.scales)
            else:
                pytest.fail(f"unknown option {name}")
        assert h.replace(anchors=a, **changes) == s.hyperparameters
    enough = [coverage(data, s.hyperparameters).enough for s in found]
    assert enough == sorted(enough, reverse=True) and len(found) <= 4


def test_nothing_to_change():
    assert suggestions(dataset(side=(60, 200)), HyperParameters(image_size=(480, 640))) == []
    assert (
        suggestions(Records([], ("a",))) == []
        and suggestions(Records([Record("a.jpg", 9, 9, [], [])], ("a",))) == []
    )


def test_a_rare_class_is_not_forgotten():
    # 4,000 large objects and 12 that no anchor of 32 pixels reaches: 99.7 % of all, and none of a class
    large = Record("a.jpg", 512, 512, np.tile([[100, 100, 200, 200]], (4000, 1)), [0] * 4000)
    small = Record("b.jpg", 512, 512, [[40 * k + 4, 4, 40 * k + 20, 20] for k in range(12)], [1] * 12)
    data = Records([large, small], ("cell", "spot"))
    found = coverage(data)
    assert found.share >= GOAL and not found.enough and found.worst_class == ("spot", 0.0)
    proposals = suggestions(data)
    assert coverage(data, proposals[0].hyperparameters).enough and proposals[0].area == 1
    small = Record("b.jpg", 512, 512, small.boxes[:9], [1] * 9)  # fewer than ten: chance
    assert coverage(Records([large, small], ("cell", "spot"))).enough


def test_long_objects_want_other_ratios():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 250, (2, 30))
    data = Records([Record("a.jpg", 512, 512, np.stack([x, y, x + 240, y + 40], axis=1), [0] * 30)], ("pen",))
    best = suggestions(data)[0]
    assert "--anchor_ratios" in best.options and "--image_size" not in best.options and best.coverage >= GOAL


def test_tiny_objects():
    r = Record(
        "a.jpg",
        2000,
        1000,
        [[0, 0, 300, 300], [500, 500, 512, 512], [697, 697, 703, 702], [1, 1, 3, 3]],
        [0] * 4,
        difficult=[0, 0, 0, 1],
    )
    assert tiny_objects(Records([r], ("a",))).tolist() == [[0, 2], [0, 1]]
    assert (
        tiny_objects(
            Records([r], ("a",)), HyperParameters(anchors=AnchorParameters((8, 16, 32, 64, 128)))
        ).tolist()
        == []
    )
    text = str(inspect_dataset(Records([r], ("a",))))
    assert "2 objects overlap no anchor by a third" in text and "6×5 pixels, in a.jpg" in text


def test_what_is_large_is_not_tiny():
    "A poster of 3,000 pixels finds no anchor in full size; on the canvas it does, and nothing needs changing."
    poster = Record("poster.jpg", 4000, 4000, [[100, 100, 3900, 3900]], [0])
    data = Records([poster], ("poster",))
    assert best_overlaps(poster.boxes, (4000, 4000))[0][0] < 1 / 3
    assert tiny_objects(data).tolist() == []
    text = str(inspect_dataset(data))
    assert "Nothing needs changing" in text and "smaller anchors" not in text


def test_few_missed_objects_are_not_called_none():
    "Enough of them are reached, one isn't: the verdict says both, and no line beside it the opposite."
    large = Record("a.jpg", 512, 512, np.tile([[100, 100, 200, 200]], (400, 1)), [0] * 400)
    speck = Record("b.jpg", 512, 512, [[10, 10, 14, 14]], [0])
    found = inspect_dataset(Records([large, speck], ("cell",)))
    assert found.coverage.enough and found.verdict.endswith("So few are no reason to change the settings.")
    assert "othing needs changing" not in str(found) and "1 object overlaps" in str(found)


@pytest.mark.parametrize("picture", [(200, 2000), (2000, 200), (240, 320)])
def test_no_canvas_is_more_than_twice_as_long(picture):
    height, width = picture
    data = Records([Record("a.jpg", width, height, [[50, 50, 60, 60]], [0])], ("a",))
    choices = inspection._canvas_choices((256, 256), inspection._targets_of(data))
    assert all(h <= 512 and w <= 512 for h, w in choices)
    assert choices or picture != (240, 320)


# --- the examination -------------------------------------------------------------------------------------------------


@pytest.fixture
def marked(tmp_path):
    """Four pictures with a class that is HTML: large and small objects, a double box, a double file, one difficult, one file missing."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_image(tmp_path / "in" / f"{name}.jpg", rng.integers(0, 255, (100, 160, 3)).astype(np.uint8))
    (tmp_path / "in" / "c.jpg").write_bytes((tmp_path / "in" / "b.jpg").read_bytes())
    at = lambda name, *more, **kw: Record(tmp_path / "in" / f"{name}.jpg", 160, 100, *more, **kw)
    report = DataReport("drawn <i>")
    for k in range(400):
        report.add("refused", f"{k}.xml", "there is no <size>")
    return Records(
        [
            at("a", [[10, 10, 60, 60], [10, 10, 60, 61], [100, 40, 106, 46]], [0, 0, 1]),
            at("b", [[20, 20, 90, 90], [5, 5, 9, 9]], [0, 1], difficult=[0, 1]),
            at("c", [], []),
            at("missing", [[1, 1, 50, 50]], [1]),
        ],
        ("<b>", "tom & co"),
        report,
    )


def test_page(marked, tmp_path):
    out = tmp_path / "page"
    result = inspect_dataset(marked, HyperParameters(image_size=(100, 160)), out)
    html = (out / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 2 + 1 and all((out / s).stat().st_size for s in sources)
    assert (
        "&lt;b&gt;" in html
        and "<b>" not in html
        and "<i>" not in html.replace("<i></i>", "")
        and "tom &amp; co" in html
        and "<script" not in html
    )
    assert str(tmp_path) not in html
    assert sorted(p.name for p in out.glob("[!.]*")) == [
        "index.html",
        "pictures",
        "report.json",
        "report.txt",
    ]
    assert (out / "report.txt").read_text(encoding="utf-8") == str(result) + "\n"
    saved = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert saved == json.loads(result.to_json())
    assert (
        saved["coverage"]["objects"] == 5
        and saved["coverage"]["left_out"] == 1
        and len(saved["data"]["refused"]) == 400
    )
    assert [u["file"] for u in saved["coverage"]["unreached"]] == ["a.jpg"] and saved["coverage"][
        "unreached"
    ][0]["name"] == "tom & co"
    assert result.same == [("b.jpg", "c.jpg")] and len(result.double) == 1 and result.double[0][0] == "a.jpg"
    assert result.unreadable and result.unreadable[0][0] == "missing.jpg"
    assert html.index("a.jpg: 3 objects, 1 not reached") < html.index("b.jpg: 1 object,")
    for s in result.suggestions:
        assert s.options in html and s.options in str(result)
    # a second page in the same folder leaves no picture of the first behind
    inspect_dataset(marked, HyperParameters(image_size=(100, 160)), out, pictures=1)
    again = re.findall(r'src="([^"]*)"', (out / "index.html").read_text(encoding="utf-8"))
    assert (
        sorted(again) == sorted(p.relative_to(out).as_posix() for p in (out / "pictures").iterdir())
        and len(again) == 1 + 1
    )


def test_red_means_unreached(marked, tmp_path):
    image = draw_reach(np.zeros((100, 160, 3), np.uint8), marked[0].boxes, [1, 1, 0])
    red, green = image[43, 99].astype(int), image[30, 9].astype(int)  # around the boxes, not in them
    assert not image[43, 100].any() and not image[30, 20].any()
    assert red[0] > 2 * red[2] and red[0] > green[0] and green[1] > green[0]


@pytest.mark.parametrize(
    "data",
    [
        Records([], ("cat",)),
        Records([Record("a.jpg", 7, 3, [], [])], ("cat",)),
        Records([Record("a.jpg", 7, 3, [[0, 0, 5, 3]], [0], difficult=[1])], ("cat",)),
        Records(
            [
                Record("a.jpg", 1, 4000, [[0, 0, 1, 3999]], [0]),
                Record("/elsewhere/b.jpg", 33, 7, [[1, 1, 2, 2]], [0]),
            ],
            ("cat",),
        ),
    ],
)
def test_awkward_data(data, tmp_path):
    result = inspect_dataset(data, HyperParameters(image_size=(97, 61)), tmp_path)
    saved = json.loads(result.to_json())
    assert (
        saved["coverage"]["objects"] == len(result.coverage)
        and "NaN" not in result.to_json()
        and "nan" not in str(result)
    )
    if not len(result.coverage):
        assert (
            "no object to train on" in str(result)
            and "no object to train on" in (tmp_path / "index.html").read_text()
        )


def test_errors_name_the_culprit():
    with pytest.raises(TypeError, match="class_names"):
        inspect_dataset([Record("a.jpg", 9, 9, [], [])])
    with pytest.raises(ValueError, match="bad.jpg.*width and a height"):
        coverage(Records([Record("bad.jpg", 0, 9, [], [])], ("a",)))

    class Wrong(list):
        class_names = ("a",)

    with pytest.raises(ValueError, match="bad.jpg.*between 0 and 0.*found 1 to 1"):
        coverage(Wrong([Record("bad.jpg", 9, 9, [[0, 0, 1, 1]], [1])]))


def test_doubles():
    boxes = [[0, 0, 100, 100], [0, 0, 100, 98], [0, 0, 100, 90], [300, 300, 310, 310], [0, 0, 100, 100]]
    data = Records([Record("a.jpg", 400, 400, boxes, [0, 0, 0, 0, 1], crowd=[0, 0, 0, 0, 0])], ("a", "b"))
    assert double_boxes(data) == [(0, 0, 1), (0, 0, 4), (0, 1, 4)]
    assert same_pictures(data) == []  # the file isn't there
    text = str(inspect_dataset(data))
    assert (
        "objects 1 and 2 are two boxes of a that are nearly the same" in text
        and "objects 1 and 5 are nearly the same box, once a and once b" in text
    )


def test_pictures_of_another_split(marked, tmp_path):
    a, b, c, missing = marked
    split = lambda *records: Records(records, marked.class_names)
    beside = tmp_path / "in" / "c.jpg"
    assert copies_elsewhere(marked) == []  # every file is the data set's own
    assert copies_elsewhere(split(a, b)) == [(1, beside)]
    assert copies_elsewhere(split(a, b), [split(a), split(c, missing)]) == [(0, a.image), (1, beside)]
    assert copies_elsewhere(split(a, b), []) == []
    found = inspect_dataset(split(a, b), folder=tmp_path / "page")
    assert found.elsewhere == [("b.jpg", "c.jpg")] and "b.jpg = c.jpg" in str(found)
    assert json.loads(found.to_json())["same_elsewhere"] == [["b.jpg", "c.jpg"]]
    assert "the same bytes as c.jpg" in (tmp_path / "page" / "index.html").read_text()
    assert inspect_dataset(split(a, b), others=[split(a)]).elsewhere[0][0] == "a.jpg"


def test_no_engine_is_loaded():
    code = "import sys, retinanet_nb.inspection; print(sorted({'tensorflow', 'keras', 'jax', 'torch'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_voc2007(retinanet_data):
    data = VOCDataset(retinanet_data / "voc2007", "val")
    result = inspect_dataset(data)
    r, c = data.report, result.coverage
    assert len(c) + c.left_out == r.objects and c.left_out == r.difficult
    assert [n["objects"] for n in c.per_class()] == [
        n["objects"] - n["difficult"] for n in r.per_class.values()
    ]
    assert result.objects.sum() == r.objects and len(result.files) == r.pictures
    for n in c.per_class() + c.per_size():
        assert n["reached"] + n["between"] + n["below"] == n["objects"]


@pytest.mark.parametrize("name", ["index.html", "report.txt", "report.json", "pictures/page-001.jpg"])
def test_a_page_replaces_nothing_of_somebody_elses(marked, tmp_path, name, monkeypatch):
    "Refused before anything is examined; the file's bytes are the same afterwards."
    theirs = tmp_path / "site" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"my own")
    monkeypatch.setattr(inspection, "_examine", lambda *a: pytest.fail("work had begun"))
    with pytest.raises(ValueError, match=Path(name).name):
        inspect_dataset(marked, HyperParameters(image_size=(100, 160)), tmp_path / "site")
    assert theirs.read_bytes() == b"my own"


def test_scans_beside_a_page_stay(marked, tmp_path):
    "Names that only look like a page's are nobody's business."
    scan = tmp_path / "pictures" / "page-000-scan.jpg"
    scan.parent.mkdir()
    scan.write_bytes(b"a scan")
    for _ in range(2):
        inspect_dataset(marked, HyperParameters(image_size=(100, 160)), tmp_path)
    assert scan.read_bytes() == b"a scan" and (tmp_path / "index.html").exists()


def test_number_of_pictures(marked, tmp_path):
    for count in (0, -3):
        with pytest.raises(ValueError, match="pictures must be at least 1"):
            inspect_dataset(marked, HyperParameters(), tmp_path / "page", pictures=count)
    assert not (tmp_path / "page").exists()
