"The drawn data set: truth against masks, VOC layout, the same bytes for the same seed, nothing half made."

import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from retinanet_nb import shapes
from retinanet_nb.pictures import read_image
from retinanet_nb.shapes import SHAPE_CLASSES, draw_scene, make_shapes, recurring_picture


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene((11, i)) for i in range(150)]


def extent(mask):
    "x1, y1, x2, y2 from the sorted coordinates of the true pixels."
    points = np.argwhere(mask)
    return [points[:, 1].min(), points[:, 0].min(), points[:, 1].max() + 1, points[:, 0].max() + 1]


def test_boxes_are_the_masks_extent(scenes):
    for image, objects in scenes:
        assert image.shape == (160, 160, 3) and image.dtype == np.uint8
        for o in objects:
            assert o.box.tolist() == extent(o.mask) and o.box.dtype == np.float32
            assert SHAPE_CLASSES[o.label] == o.name and o.mask.shape == (160, 160)


def test_marks(scenes):
    for _, objects in scenes:
        for i, o in enumerate(objects):
            x1, y1, x2, y2 = o.box
            touches = x1 == 0 or y1 == 0 or x2 == 160 or y2 == 160
            assert touches or not o.truncated
            seen = o.mask & ~np.any(
                [later.mask for later in objects[i + 1 :]] or [np.zeros_like(o.mask)], axis=0
            )
            if not o.truncated:
                assert o.visible == pytest.approx(seen.sum() / o.mask.sum())  # all of it lies inside
            else:
                assert o.visible < seen.sum() / o.mask.sum()
            assert 0.1 < o.visible <= 1 and o.difficult == (o.visible < 1 / 3)
    marks = np.array([(o.truncated, o.difficult) for _, objects in scenes for o in objects])
    assert 0.03 < marks[:, 0].mean() < 0.25 and 0.003 < marks[:, 1].mean() < 0.1


def test_masks_are_what_was_drawn():
    "The same scene with and without its last thing differs at that thing's mask; its shadow may only darken what lies outside."

    def draw(last):
        scene = shapes._Scene("paper", (120, 160), np.random.default_rng(3))
        scene.place("wheel", (70, 60), 40, 0.2)
        before = scene.canvas.copy()
        if last:
            scene.place(last, (100.3, 70.8), 25.5, 0.7)
        return before, scene.canvas, scene.things[-1]

    for name in SHAPE_CLASSES:
        before, after, (_, _, mask, _) = draw(name)
        changed = np.abs(after - before).max(-1) > 0.02
        assert changed[mask].mean() > 0.9
        inner = mask.copy()  # one pixel around the mask may be partly covered
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            inner |= np.roll(mask, (dy, dx), (0, 1))
        assert (after[~inner] <= before[~inner] + 1e-5).all()


@pytest.mark.parametrize("name", SHAPE_CLASSES)
def test_things_fill_their_circle(name):
    for angle in (0.0, 1.1, 4.0):
        x0, y0, rgb, cover = shapes._sprite(name, (50.25, 60.75), 30.0, angle, 1.0, np.random.default_rng(1))
        assert (
            np.isfinite(rgb).all()
            and 0 <= rgb.min()
            and rgb.max() <= 1.0001
            and 0 <= cover.min()
            and cover.max() <= 1
        )
        ys, xs = np.nonzero(cover > 0.5)
        far = np.hypot(xs + x0 + 0.5 - 50.25, ys + y0 + 0.5 - 60.75).max()
        assert 27 < far < 31.5
        assert (
            cover[0].max() == cover[-1].max() == cover[:, 0].max() == cover[:, -1].max() == 0
        )  # the patch cuts nothing off


def test_variety(scenes):
    objects = [o for _, objects in scenes for o in objects]
    sides = np.array([max(o.box[2:] - o.box[:2]) for o in objects])
    assert sides.min() < 20 and sides.max() > 95 and sides.max() < 120
    assert min(np.bincount([o.label for o in objects], minlength=5)) > 0.1 * len(objects)
    counts = [len(objects) for _, objects in scenes]
    assert min(counts) == 0 and max(counts) >= 4
    flat = [image.std() for image, objects in scenes if not objects]
    assert flat and min(flat) > 2  # even empty pictures are textured


def test_seeds():
    assert np.array_equal(draw_scene(4)[0], draw_scene(4)[0])
    assert not np.array_equal(draw_scene(4)[0], draw_scene(5)[0])
    rng = np.random.default_rng(4)
    assert np.array_equal(draw_scene(rng)[0], draw_scene(4)[0])
    assert not np.array_equal(draw_scene(rng)[0], draw_scene(4)[0])  # the generator has moved on
    assert draw_scene(0, (50, 90))[0].shape == (50, 90, 3)
    with pytest.raises(ValueError, match="8×9"):
        draw_scene(0, (8, 9))


def test_recurring_picture():
    image, boxes, labels = recurring_picture()
    assert image.shape == (240, 320, 3) and image.dtype == np.uint8
    assert boxes.dtype == np.float32 and boxes.shape == (len(labels), 4) and len(set(labels.tolist())) == 5
    assert (
        (boxes[:, 2:] > boxes[:, :2]).all()
        and (boxes >= 0).all()
        and (boxes[:, [0, 2]] <= 320).all()
        and (boxes[:, [1, 3]] <= 240).all()
    )
    image[:], boxes[:] = 0, 0
    assert recurring_picture()[0].any() and recurring_picture()[1].any()


def test_voc_layout(tmp_path):
    root = make_shapes(tmp_path / "s", train=5, val=3, test=2, size=(100, 140), seed=2)
    assert root == tmp_path / "s" and sorted(p.name for p in root.iterdir()) == [
        "Annotations",
        "ImageSets",
        "JPEGImages",
        "shapes.json",
    ]
    names = {p.stem: p.read_text().split() for p in (root / "ImageSets/Main").iterdir()}
    assert {k: len(v) for k, v in names.items()} == dict(train=5, val=3, trainval=8, test=2)
    assert (
        names["trainval"] == names["train"] + names["val"] and len({*names["trainval"], *names["test"]}) == 10
    )
    assert (
        sorted(p.stem for p in (root / "JPEGImages").iterdir())
        == sorted(p.stem for p in (root / "Annotations").iterdir())
        == sorted(names["trainval"] + names["test"])
    )
    for number, split in enumerate(("train", "val", "test")):
        for i, name in enumerate(names[split]):
            image, objects = draw_scene((2, number, i), (100, 140))
            assert np.abs(read_image(root / f"JPEGImages/{name}.jpg").astype(int) - image).mean() < 5
            tree = ET.parse(root / f"Annotations/{name}.xml").getroot()
            assert [tree.findtext(t) for t in ("filename", "size/width", "size/height", "size/depth")] == [
                f"{name}.jpg",
                "140",
                "100",
                "3",
            ]
            found = [
                (
                    f.findtext("name"),
                    *(
                        int(f.findtext(t))
                        for t in (
                            "truncated",
                            "difficult",
                            "bndbox/xmin",
                            "bndbox/ymin",
                            "bndbox/xmax",
                            "bndbox/ymax",
                        )
                    ),
                )
                for f in tree.findall("object")
            ]
            assert found == [
                (o.name, o.truncated, o.difficult, o.box[0] + 1, o.box[1] + 1, o.box[2], o.box[3])
                for o in objects
            ]


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_same_bytes_in_another_process(tmp_path):
    here = make_shapes(tmp_path / "a", train=3, val=1, test=1, seed=9)
    code = f"from retinanet_nb.shapes import make_shapes; make_shapes({str(tmp_path / 'b')!r}, train=3, val=1, test=1, seed=9)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "123"})
    assert contents(here) == contents(tmp_path / "b")
    other = contents(make_shapes(tmp_path / "c", train=3, val=1, test=1, seed=10))
    assert (
        other.keys() == contents(here).keys()
        and other["JPEGImages/train_00000.jpg"] != contents(here)["JPEGImages/train_00000.jpg"]
    )


def test_nothing_half_made_and_nothing_overwritten(tmp_path, monkeypatch):
    root = tmp_path / "s"
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_scene(*args)

    monkeypatch.setattr(shapes, "draw_scene", fails)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(root, train=4, val=0, test=0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    root.mkdir()  # an empty directory may be used
    make_shapes(root, train=2, val=0, test=0)
    before = contents(root)
    monkeypatch.setattr(shapes, "draw_scene", lambda *_: pytest.fail("drawn again"))
    assert make_shapes(root, train=2, val=0, test=0) == root and contents(root) == before
    with pytest.raises(FileExistsError, match="does not hold this very data set"):
        make_shapes(root, train=3, val=0, test=0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        make_shapes(tmp_path / "file", train=1, val=0, test=0)
    with pytest.raises(ValueError, match="negative"):
        make_shapes(tmp_path / "n", val=-1)
    assert contents(root) == before and (tmp_path / "file").read_text() == "mine"


def test_several_processes_draw_the_same_bytes(tmp_path):
    def drawn(name, workers):
        root = make_shapes(tmp_path / name, train=5, val=2, test=0, size=(48, 64), seed=4, workers=workers)
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert drawn("one", 1) == drawn("three", 3)
