"""The reader of VOC: every irregularity is read rightly or named; the download survives cuts and refuses evil archives."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from retinanet_nb.hyperparameters import VOC_CLASSES
from retinanet_nb.pictures import read_image
from retinanet_nb.records import turn_boxes
from retinanet_nb.voc import VOCDataset, download_voc

from helpers import Server

DATA = os.environ.get("RETINANET_DATA")
real_data = pytest.mark.skipif(not DATA, reason="RETINANET_DATA is not set")


def obj(name="cat", box=(11, 21, 50, 60), more="<difficult>0</difficult><truncated>0</truncated>"):
    x1, y1, x2, y2 = box
    return f"<object><name>{name}</name>{more}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"


def xml(*objects, filename="a.jpg", size=(100, 80)):
    stated = (
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    )
    return f"<annotation><filename>{filename}</filename>{stated}{''.join(objects)}</annotation>"


class Voc:
    """A VOC directory under construction; every picture is 100 wide and 80 high unless said otherwise."""

    def __init__(self, root):
        self.root, self.names = Path(root), []
        for d in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (self.root / d).mkdir(parents=True, exist_ok=True)

    def add(self, name, text=None, picture=".jpg", size=(100, 80), mode="RGB", listed=True, **save):
        if text is not None:
            (self.root / "Annotations" / f"{name}.xml").write_bytes(
                text if isinstance(text, bytes) else text.encode()
            )
        if picture:
            Image.new(mode, size, 128 if mode in "LP" else (200, 30, 30)).save(
                self.root / "JPEGImages" / f"{name}{picture}", **save
            )
        if listed:
            self.names.append(name)
        return self

    def write(self, split="train", text=None):
        (self.root / f"ImageSets/Main/{split}.txt").write_bytes(
            ("\n".join(self.names) + "\n" if text is None else text).encode()
        )
        return self

    def read(self, split="train", **kwargs):
        self.write()
        return VOCDataset(self.root, split, **kwargs)


@pytest.fixture
def voc(tmp_path):
    return Voc(tmp_path / "data")


def one(dataset):
    assert len(dataset) == 1
    return dataset[0]


BOX = [10, 20, 50, 60]  # what `obj()` means in edges


# --- annotations met in the wild -------------------------------------------------------------------------------------

READ_RIGHTLY = {
    "plain": xml(obj()),
    "other order of tags": "<annotation><object><bndbox><ymax>60</ymax><xmax>50</xmax><ymin>21</ymin><xmin>11</xmin></bndbox><name>cat</name></object><size><height>80</height><width>100</width></size></annotation>",
    "xmax, xmin, ymax, ymin": xml(
        "<object><name>cat</name><bndbox><xmax>50</xmax><xmin>11</xmin><ymax>60</ymax><ymin>21</ymin></bndbox></object>"
    ),
    "a part before the box": xml(
        obj(
            more="<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        )
    ),
    "a part after the box": xml(
        obj()[:-9]
        + "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
    ),
    "a name under owner": "<annotation><owner><name>Jinky</name></owner>" + xml(obj())[12:],
    "floats": xml(obj(box=("11.0", "21.0", "50.0", "60.0"))),
    "no flags": xml(obj(more="")),
    "no size": xml(obj(), size=None),
    "size of zero": xml(obj(), size=(0, 0)),
    "another size": xml(obj(), size=(80, 100)),
    "windows path": xml(obj(), filename=r"C:\pictures\new\a.jpg"),
    "file name without extension": xml(obj(), filename="a"),
    "file name with another extension": xml(obj(), filename="a.png"),
    "another file name": xml(obj(), filename="zebra.jpg"),
    "no file name": xml(obj(), filename=""),
    "CRLF": xml(obj()).replace("><", ">\r\n\t<"),
    "byte order mark": b"\xef\xbb\xbf" + xml(obj()).encode(),
    "spaces": xml(obj(name=" cat\n")),
    "UTF-16": ('<?xml version="1.0" encoding="utf-16"?>' + xml(obj(), filename="ä.jpg")).encode("utf-16"),
    "latin-1": ('<?xml version="1.0" encoding="iso-8859-1"?>' + xml(obj(), filename="ä.jpg")).encode(
        "latin-1"
    ),
    "upper case": xml(obj()).replace("object>", "Object>").replace("bndbox>", "BndBox>"),
}


@pytest.mark.parametrize("kind", READ_RIGHTLY)
def test_read_rightly(voc, kind):
    dataset = voc.add("a", READ_RIGHTLY[kind]).read(class_names=["dog", "cat"])
    record = one(dataset)
    assert (
        record.boxes.tolist() == [BOX]
        and record.labels.tolist() == [1]
        and record.boxes.dtype == np.float32
        and record.labels.dtype == np.int32
    )
    assert (
        (record.width, record.height) == (100, 80)
        and not record.difficult.any()
        and not record.truncated.any()
    )
    assert not dataset.report.dropped and not dataset.report.clipped and not dataset.report.refused
    if kind in ("another size", "another file name", "file name with another extension"):
        assert "Annotations/a.xml" in dataset.report.noted[0][0]


@pytest.mark.parametrize(
    "tag,value,expected",
    [
        ("difficult", "1", True),
        ("Difficult", "1", True),
        ("difficult", "true", True),
        ("difficult", "0", False),
        ("difficult", "Unspecified", False),
        ("difficult", "", False),
    ],
)
def test_difficult(voc, tag, value, expected):
    assert one(voc.add("a", xml(obj(more=f"<{tag}>{value}</{tag}>"))).read()).difficult.tolist() == [expected]


def test_counting_from_zero(voc):
    record = one(voc.add("a", xml(obj(box=(0, 0, 100, 80)))).read(one_based=False))
    assert record.boxes.tolist() == [[0, 0, 100, 80]]
    report = voc.read().report
    assert report.clipped and any("one_based=False" in reason for _, reason in report.noted)


REPORTED = {  # text of the second object -> (list, words)
    "no width": (obj(box=(30, 21, 30, 60)), "dropped", "no area"),
    "no height": (obj(box=(30, 21, 40, 21)), "dropped", "no area"),
    "inside out": (obj(box=(40, 21, 30, 60)), "dropped", "no area"),
    "beyond the right edge": (obj(box=(90, 21, 120, 60)), "clipped", "beyond"),
    "beyond the top": (obj(box=(1, -20, 20, 10)), "clipped", "beyond"),
    "wholly outside": (obj(box=(200, 21, 220, 60)), "dropped", "outside"),
    "two names": (obj(more="<name>dog</name>"), "dropped", "2 <name>"),
    "two boxes": (obj(more="<bndbox><xmin>1</xmin></bndbox>"), "dropped", "2 <bndbox>"),
    "two left edges": (obj().replace("<xmin>", "<xmin>3</xmin><xmin>"), "dropped", "2 <xmin>"),
}


@pytest.mark.parametrize("kind", REPORTED)
def test_reported_or_refused(voc, kind):
    text, where, word = REPORTED[kind]
    voc.add("a", xml(obj(), text)).add("b", xml(obj(), filename="b.jpg"))
    dataset = voc.read()
    found = getattr(dataset.report, where)
    assert (
        len(dataset) == 2 and len(found) == 1 and found[0][0] == "Annotations/a.xml" and word in found[0][1]
    )
    assert dataset[0].boxes[0].tolist() == BOX and len(dataset[0].boxes) == (2 if where == "clipped" else 1)
    assert (dataset[0].boxes >= 0).all() and (dataset[0].boxes <= [100, 80, 100, 80]).all()
    with pytest.raises(ValueError, match="Annotations/a.xml.*" + word):
        voc.read(strict=True)


def test_pictures_of_all_kinds(voc):
    voc.add("grey", xml(obj()), mode="L").add("palette", xml(obj()), ".png", mode="P").add(
        "upper", xml(obj()), ".JPG", format="JPEG"
    ).add("jpeg", xml(obj()), ".jpeg").add("alpha", xml(obj()), ".webp")
    dataset = voc.read()
    assert [r.image.name for r in dataset] == [
        "grey.jpg",
        "palette.png",
        "upper.JPG",
        "jpeg.jpeg",
        "alpha.webp",
    ]
    for r in dataset:
        assert read_image(r.image).shape == (r.height, r.width, 3) and r.boxes.tolist() == [BOX]


def test_non_ascii_names(voc):
    decomposed = unicodedata.normalize("NFD", "Böller 3")
    voc.add("Katze ü", xml(obj(), filename="Katze ü.jpg")).add("猫.v2", xml(obj())).add(
        "Böller 3", xml(obj()), picture=None
    )
    Image.new("RGB", (100, 80)).save(voc.root / "JPEGImages" / f"{decomposed}.jpg")
    dataset = voc.read()
    assert len(dataset) == 3 and not dataset.report.refused
    assert [r.image.parent.name for r in dataset] == ["JPEGImages"] * 3


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(tmp_path, turn):
    """The object is painted red; wherever the annotator's program stood, the box finds it again."""
    stored = np.zeros((80, 100, 3), np.uint8)
    stored[20:60, 10:50] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = turn
    for name, in_stored in (("stored", True), ("seen", False)):
        voc = Voc(tmp_path / name)
        Image.fromarray(stored).save(voc.root / "JPEGImages/a.jpg", exif=exif, quality=95)
        red = read_image(voc.root / "JPEGImages/a.jpg")[..., 0] > 127
        ys, xs = np.where(red)
        seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        if in_stored and turn <= 4:
            continue  # nothing in the annotation tells which of the two was meant; boxes count as drawn on the turned picture
        box = (11, 21, 50, 60) if in_stored else (seen[0] + 1, seen[1] + 1, seen[2], seen[3])
        size = (100, 80) if in_stored else red.shape[::-1]
        dataset = voc.add("a", xml(obj(box=box), size=size), picture=None).read()
        record = one(dataset)
        assert (record.height, record.width) == red.shape
        np.testing.assert_array_equal(record.boxes, [seen])
        assert bool(dataset.report.noted) == (turn != 1 and (in_stored or turn <= 4))


@given(st.integers(1, 8), st.lists(st.integers(0, 20), min_size=4, max_size=4))
@settings(deadline=None, max_examples=60)
def test_turn_boxes_against_pixels(turn, corners):
    x1, x2, y1, y2 = sorted(corners[:2]) + sorted(corners[2:])
    x2, y2 = x2 + 1, y2 + 1
    pixels = np.zeros((23, 31))
    pixels[y1:y2, x1:x2] = 1
    seen = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: np.rot90,
    }[turn](pixels)
    ys, xs = np.where(seen)
    assert turn_boxes([[x1, y1, x2, y2]], (23, 31), turn)[0].tolist() == [
        xs.min(),
        ys.min(),
        xs.max() + 1,
        ys.max() + 1,
    ]


@pytest.mark.parametrize("picture", [".jpg", ".png"])
def test_cut_short(voc, picture):
    voc.add("a", xml(obj()), picture).add("b", xml(obj()), picture)
    path = voc.root / f"JPEGImages/a{picture}"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    report = voc.read().report
    assert (
        report.pictures == 1
        and report.refused[0][0] == "Annotations/a.xml"
        and "cut short" in report.refused[0][1]
    )
    with pytest.raises(ValueError, match="Annotations/a.xml.*cut short"):
        voc.read(strict=True)
    path.write_bytes(whole + b"trailing bytes of a camera" * 9)
    assert voc.read().report.pictures == 2


def test_a_cut_thumbnail_is_no_end(voc):
    """An EXIF thumbnail is a whole JPEG with its own end marker; it must not pass for the picture's."""
    thumbnail = io.BytesIO()
    Image.new("RGB", (8, 8)).save(thumbnail, "JPEG")
    exif = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail.getvalue()
    voc.add("a", xml(obj()), exif=exif).add("b", xml(obj()))
    path = voc.root / "JPEGImages/a.jpg"
    assert path.read_bytes().count(b"\xff\xd9") == 2 and voc.read().report.pictures == 2
    path.write_bytes(path.read_bytes()[:-40])
    assert "cut short" in voc.read().report.refused[0][1]


def test_no_picture_at_all(voc):
    voc.add("a", xml(obj()), picture=None).add("b", xml(obj()))
    (voc.root / "JPEGImages/a.jpg").write_text("this is text")
    assert "a.jpg is not a picture" in voc.read().report.refused[0][1]


def test_missing_halves(voc):
    voc.add("whole", xml(obj())).add("no_xml").add(
        "no_picture", xml(obj(), filename="no_picture.jpg"), picture=None
    ).add("nothing", picture=None)
    dataset = voc.read()
    assert [r.image.name for r in dataset] == ["whole.jpg"]
    assert {f for f, _ in dataset.report.refused} == {
        "JPEGImages/no_xml.jpg",
        "Annotations/no_picture.xml",
        "nothing",
    }
    with pytest.raises(ValueError, match="no_xml"):
        voc.read(strict=True)


def test_the_picture_under_its_written_name(voc):
    voc.add("a", xml(obj(), filename="IMG_7"), picture=None)
    Image.new("RGB", (100, 80)).save(voc.root / "JPEGImages/IMG_7.jpg")
    dataset = voc.read()
    assert one(dataset).image.name == "IMG_7.jpg" and dataset.report.noted


def test_annotated_at_another_size(voc):
    voc.add("a", xml(obj(), obj(box=(150, 100, 190, 150)), size=(200, 160))).add("b", xml(obj()))
    report = voc.read().report
    assert (
        report.refused[0][0] == "Annotations/a.xml"
        and "200×160" in report.refused[0][1]
        and report.pictures == 1
    )


def test_image_sets(voc):
    for n in ("a", "b", "c", "d 1", "e.v2"):
        voc.add(n, xml(obj(), filename=f"{n}.jpg"))
    read = lambda text: [r.image.name for r in voc.write("list", text).read("list")]
    assert read("\r\na\r\n\r\n  b  \r\n") == ["a.jpg", "b.jpg"]
    assert read("a.jpg\nJPEGImages\\b.jpg\nJPEGImages/c.jpg\ne.v2\n") == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
        "e.v2.jpg",
    ]
    assert read("a  1\nb -1\nc  0\nd 1\n") == ["a.jpg", "c.jpg", "d 1.jpg"]
    assert read("a\nb\na") == ["a.jpg", "b.jpg"]
    assert [r.image.name for r in voc.write("one", "a\nb").write("two", "b\nc").read("one+two")] == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
    ]
    assert len(voc.read("all")) == 5


def test_every_irregularity_in_one_directory(voc):
    """Everything that the field's annotations are known for, together: whatever is written there is read to the right box or listed by file and reason."""
    expected = {}  # stem -> boxes that must be read
    for n, (kind, text) in enumerate(READ_RIGHTLY.items()):
        voc.add(f"read-{n:02d}", text)
        expected[f"read-{n:02d}"] = [BOX]
    for n, (kind, (text, where, _)) in enumerate(REPORTED.items()):
        voc.add(f"bad-{n}", xml(obj(), text, filename=f"bad-{n}.jpg"))
        expected[f"bad-{n}"] = (
            [BOX]
            if where == "dropped"
            else [BOX, {"beyond the right edge": [89, 20, 100, 60], "beyond the top": [0, 0, 20, 10]}[kind]]
        )
    for name, suffix, mode in (
        ("grey", ".jpg", "L"),
        ("palette", ".png", "P"),
        ("Größe ü 猫", ".JPG", "RGB"),
    ):
        voc.add(
            name,
            xml(obj(), filename=name + suffix),
            suffix,
            mode=mode,
            **({"format": "JPEG"} if suffix == ".JPG" else {}),
        )
        expected[name] = [BOX]
    exif = Image.Exif()
    exif[0x0112] = 6
    voc.add(
        "turned", xml(obj(), filename="turned.jpg"), exif=exif
    )  # annotated as stored, 100×80; seen as 80×100
    expected["turned"] = [[20, 10, 60, 50]]
    voc.add("empty", xml(filename="empty.jpg"))
    expected["empty"] = []
    voc.add("cut", xml(obj(), obj(), filename="cut.jpg"))
    path = voc.root / "JPEGImages/cut.jpg"
    path.write_bytes(path.read_bytes()[:-30])
    voc.add("no-xml").add("no-picture", xml(obj(), filename="no-picture.jpg"), picture=None).add(
        "neither", picture=None
    )
    voc.add("absent", xml(obj(), filename="absent.jpg"), listed=False)  # a per-class list says -1
    voc.write(text="\r\n\r\n".join([f"{n}  1" if n == "grey" else n for n in voc.names] + ["absent -1", ""]))

    dataset = VOCDataset(voc.root, "train", class_names=["cat"])
    report = dataset.report
    assert {r.image.stem: r.boxes.tolist() for r in dataset} == expected
    assert {file for file, _ in report.refused} == {
        "Annotations/cut.xml",
        "JPEGImages/no-xml.jpg",
        "Annotations/no-picture.xml",
        "neither",
    }
    assert len(report.dropped) == sum(where == "dropped" for _, where, _ in REPORTED.values()) and len(
        report.clipped
    ) == sum(where == "clipped" for _, where, _ in REPORTED.values())
    assert all(
        file and reason
        for kind in (report.dropped, report.clipped, report.refused, report.noted)
        for file, reason in kind
    )
    # Nothing is lost without a word: every object of every listed annotation is in a record, or dropped, or its picture refused.
    refused, written = {Path(f).stem for f, _ in report.refused}, 0
    for stem in expected:
        text = (voc.root / f"Annotations/{stem}.xml").read_bytes()
        written += (
            (text.decode("utf-16") if text[:2] in (b"\xff\xfe", b"\xfe\xff") else text.decode("latin-1"))
            .lower()
            .count("<object>")
        )
    assert written == report.objects + len(report.dropped) and not refused & expected.keys()
    for record in dataset:
        assert read_image(record.image).shape == (record.height, record.width, 3)


@pytest.mark.parametrize("said,taken", [("a.png", "a.png"), ("a.jpg", "a.jpg"), (r"C:\x\A.PNG", "a.png")])
def test_the_extension_that_the_file_names_wins(voc, said, taken):
    voc.add("a", xml(obj(), filename=said, size=None), ".png", size=(120, 90))
    dataset = voc.add("a", picture=".jpg", listed=False).read()
    assert one(dataset).image.name == taken and len(dataset.report.noted) == ("x" in said)
    assert one(dataset).width == (120 if taken == "a.png" else 100)


@pytest.mark.parametrize("said", ["", "a", "zebra.jpg", "a.bmp"])
def test_two_pictures_of_one_stem_and_no_word_which(voc, said):
    voc.add("a", xml(obj(), filename=said), ".png").add("a", picture=".jpg", listed=False)
    dataset = voc.read()
    assert one(dataset).image.name == "a.jpg"
    assert "a.jpg and a.png" in dataset.report.noted[0][1]


def test_a_box_beyond_the_edge_by_a_hair(voc):
    """Arithmetic in somebody's program is no irregularity, a pixel is one."""
    voc.add("a", xml(obj(box=(11, 21, 100.000001, 80.1)))).add("b", xml(obj(box=(0.95, 1, 9, 9))))
    dataset = voc.read(strict=True)
    assert [r.boxes[0].tolist() for r in dataset] == [[10, 20, 100, 80], [0, 0, 9, 9]]
    assert not dataset.report.clipped
    for box in ((11, 21, 100.2, 60), (11, 21, 101, 60), (0.5, 21, 50, 60)):
        voc.add("a", xml(obj(box=box)), listed=False)
        assert len(voc.read().report.clipped) == 1
        with pytest.raises(ValueError, match="Annotations/a.xml.*beyond"):
            voc.read(strict=True)


def test_an_area_that_float32_does_not_see(voc):
    voc.add("a", xml(obj(), obj(box=("11", "21", "10.0000000001", "60")))).write()
    dataset = VOCDataset(voc.root, "train", one_based=False)
    assert len(one(dataset).boxes) == 1 and "no area" in dataset.report.dropped[0][1]
    dataset = voc.read()  # from 1: the box is 10 to 10.0000000001
    assert len(one(dataset).boxes) == 1 and "no area" in dataset.report.dropped[0][1]


def test_a_folder_that_may_not_be_looked_into_is_not_empty(voc, monkeypatch):
    voc.add("a", xml(obj())).write()
    listed = Path.iterdir

    def refusing(name):
        def iterdir(self):
            if self.name == name:
                raise PermissionError(13, "Permission denied", str(self))
            return listed(self)

        return iterdir

    for name in ("JPEGImages", "Annotations"):
        monkeypatch.setattr(Path, "iterdir", refusing(name))
        with pytest.raises(PermissionError, match=f"{name}.*permission"):
            VOCDataset(voc.root, "train")


def test_an_annotation_that_may_not_be_read(voc, monkeypatch):
    voc.add("a", xml(obj())).add("b", xml(obj())).write()
    (voc.root / "Annotations/a.xml").unlink()
    (voc.root / "Annotations/a.xml").mkdir()  # reading it fails, for root too
    with pytest.raises(ValueError, match=r"a\.xml cannot be read"):
        VOCDataset(voc.root, "train")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_names_that_are_not_utf8(voc):
    """A name of other bytes leads to its picture, through the list too, and can be reported."""
    name = b"L\xf6we".decode("utf-8", "surrogateescape")
    voc.add("b", xml(obj(), obj(box=(5, 5, 5, 9)))).write()
    for old, new in (
        ("Annotations/b.xml", f"Annotations/{name}.xml"),
        ("JPEGImages/b.jpg", f"JPEGImages/{name}.jpg"),
    ):
        (voc.root / old).rename(voc.root / new)
    (voc.root / "ImageSets/Main/train.txt").write_bytes(b"L\xf6we\n")
    for split in ("train", "all"):
        dataset = VOCDataset(voc.root, split)
        assert read_image(one(dataset).image).shape == (80, 100, 3)
        assert json.loads(dataset.report.to_json().encode())["dropped"][0][0] == f"Annotations/{name}.xml"
        assert b"L\\udcf6we.xml" in str(dataset.report).encode()


def test_two_annotations_of_one_name(voc):
    voc.add("a", xml(obj())).add("b", xml(obj()))
    (voc.root / "Annotations/a.XML").write_text(xml(obj("dog")))
    if len(list((voc.root / "Annotations").iterdir())) == 2:
        pytest.skip("this file system does not tell a.xml from a.XML")
    assert any("a.XML has the same name" in why for _, why in voc.read().report.noted)


def test_values_of_megabytes_are_cut(voc):
    huge = "x" * 2_000_000
    voc.add("a", xml(obj(huge, (5, 5, 5, 9)), obj(), filename=huge))
    dataset = voc.read()
    assert dataset.report.dropped and dataset.report.noted
    assert all(len(w) < 400 for _, w in dataset.report.dropped + dataset.report.noted)
    with pytest.raises(ValueError, match="a.xml") as error:
        voc.add("a", xml(obj(huge))).read(class_names=["cat"])
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("split", [None, 5, (), ["train", 7], [("2007",)], ""])
def test_splits_that_are_none(voc, split):
    voc.add("a", xml(obj())).write()
    with pytest.raises(ValueError, match=f"{voc.root.name}: split must be"):
        VOCDataset(voc.root, split)


# --- directories, splits, classes ------------------------------------------------------------------------------------


def test_years_together(tmp_path):
    kit = tmp_path / "VOCdevkit"
    for year, name in (("2007", "a"), ("2012", "2012_b")):
        Voc(kit / f"VOC{year}").add(name, xml(obj(), filename=f"{name}.jpg")).write("trainval").write("val")
    names = lambda root, split: [r.image.name for r in VOCDataset(root, split)]
    for root in (kit, tmp_path):
        assert names(root, "2007_trainval+2012_trainval") == ["a.jpg", "2012_b.jpg"]
        assert names(root, ("2012", "val")) == names(root, (2012, "val")) == ["2012_b.jpg"]
        assert names(root, [("2007", "val"), ("2012", "val")]) == ["a.jpg", "2012_b.jpg"]
        with pytest.raises(ValueError, match="VOC2007, VOC2012.*2007_val"):
            VOCDataset(root, "val")
        with pytest.raises(FileNotFoundError, match="VOC2009.*VOC2007, VOC2012"):
            VOCDataset(root, "2009_val")
    assert names(kit / "VOC2007", "2007_val") == names(kit / "VOC2007", "val") == ["a.jpg"]
    with pytest.raises(FileNotFoundError, match="VOC2012"):
        VOCDataset(kit / "VOC2007", "2012_val")


def test_missing_directories_say_what_is_there(voc, tmp_path):
    voc.add("a", xml(obj())).write()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        VOCDataset(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="'tset'.*train"):
        VOCDataset(voc.root, "tset")
    (tmp_path / "other/pictures").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="Annotations.*pictures/"):
        VOCDataset(tmp_path / "other", "train")
    with pytest.raises(ValueError, match="no picture"):
        VOCDataset(voc.write("empty", "\n\n").root, "empty")


def test_class_names(voc):
    voc.add("a", xml(obj("wheel"), obj("ball", (1, 1, 9, 9))))
    assert voc.read().class_names == ("ball", "wheel") and voc.read()[0].labels.tolist() == [1, 0]
    assert voc.read(class_names=["wheel", "leaf", "ball"])[0].labels.tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"a\.xml.*'wheel'.*ball, leaf"):
        voc.read(class_names=["ball", "leaf"])
    with pytest.raises(ValueError, match="class_names"):
        voc.read(class_names=["ball", "ball"])
    voc.add("a", xml(obj("cat"), obj("dog", (1, 1, 9, 9))), picture=None)
    dataset = voc.read()
    assert (
        dataset.class_names == VOC_CLASSES
        and len(VOC_CLASSES) == 20
        and dataset[0].labels.tolist() == [7, 11]
    )


BAD_XML = {
    "not XML": "<annotation><object>",
    "empty": "",
    "another root": "<html></html>",
    "no box": "<annotation><object><name>cat</name></object></annotation>",
    "no name": xml(obj(name="")),
    "a word for a number": xml(obj(box=("left", 1, 2, 3))),
    "not finite": xml(obj(box=("nan", 1, 2, 3))),
    "infinite": xml(obj(box=(1, 1, "inf", 3))),
    "a missing corner": xml(obj()).replace("<ymax>60</ymax>", ""),
    "an underscore in a number": xml(obj(box=("1_0", 1, 20, 30))),
    "digits of another script": xml(obj(box=("١٢", 1, 20, 30))),
    "a number of a megabyte": xml(obj(box=("1" * 1_000_000, 1, 20, 30))),
    "a word of a megabyte": xml(obj(more=f"<difficult>{'perhaps' * 150_000}</difficult>")),
    "a tag of a megabyte": f"<{'a' * 1_000_000}/>",
    "a strange flag": xml(obj(more="<difficult>perhaps</difficult>")),
    "binary": b"\x00\xff\x13",
    "undeclared latin-1": xml(obj(), filename="ä").encode("latin-1"),
    "entities": '<!DOCTYPE b [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotation><filename>&b;</filename></annotation>',
    "a file as entity": '<!DOCTYPE b [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotation><filename>&a;</filename></annotation>',
}


@pytest.mark.parametrize("kind", BAD_XML)
def test_annotations_that_make_no_sense(voc, kind):
    voc.add("a", BAD_XML[kind]).add("b", xml(obj()))
    with pytest.raises(ValueError, match=r"a\.xml") as error:
        voc.read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not isinstance(error.value, UnicodeError)


def test_report(voc):
    voc.add(
        "a",
        xml(
            obj(more="<difficult>1</difficult>"),
            obj("dog", (1, 1, 9, 9), "<truncated>1</truncated>"),
            obj("dog", (5, 5, 5, 9)),
        ),
    ).add("b", xml()).add("c", picture=None)
    report = voc.read().report
    assert (report.pictures, report.empty, report.objects, report.difficult, report.truncated) == (
        2,
        1,
        2,
        1,
        1,
    )
    assert report.per_class["dog"] == dict(pictures=1, objects=1, difficult=0, truncated=1)
    text = str(report)
    for word in ("2 pictures", "1 without objects", "Annotations/a.xml", "no area", "dog"):
        assert word in text
    data = json.loads(report.to_json())
    assert (
        data["objects"] == 2 and data["dropped"][0][0] == "Annotations/a.xml" and data["refused"][0][0] == "c"
    )


def test_import_is_light():
    code = "import sys, retinanet_nb.voc; print([m for m in ('keras', 'tensorflow', 'jax', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


# --- fetching --------------------------------------------------------------------------------------------------------


def archive(
    path,
    names=(
        "VOCdevkit/VOC2007/JPEGImages/a.jpg",
        "VOCdevkit/VOC2007/Annotations/a.xml",
        "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt",
    ),
    edit=lambda m: m,
):
    with tarfile.open(path, "w") as tar:
        for n in names:
            m = tarfile.TarInfo(n)
            data = (n * 3000).encode()
            m.size = len(data)
            tar.addfile(edit(m), io.BytesIO(data))
    return path, hashlib.md5(path.read_bytes()).hexdigest()


def test_download_and_unpack(tmp_path):
    tar, md5 = archive(tmp_path / "x.tar")
    with Server(tar.read_bytes(), cuts=[1000, 50_000]) as server:
        for _ in range(2):
            target = download_voc(
                "2007",
                "train",
                tmp_path / "root",
                tmp_path / "cache",
                mirror=server.url,
                md5=md5,
                progress=False,
            )
        assert server.ranges == [
            None,
            "bytes=1000-",
            "bytes=51000-",
        ]  # gone on twice, and not asked again
        assert server.asked[0][0] == "/voc2007/VOCtrainval_06-Nov-2007.tar"
    assert target == tmp_path / "root/VOCdevkit/VOC2007" and (
        target / "Annotations/a.xml"
    ).read_text().startswith("VOCdevkit/VOC2007/Annotations/a.xml")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["VOCtrainval_06-Nov-2007.tar"]
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["VOCdevkit"]


def test_there_is_no_such_archive(tmp_path):
    with pytest.raises(ValueError, match="2011"):
        download_voc("2011", root=tmp_path)


def test_an_archive_in_the_cache_is_never_deleted(tmp_path):
    tar, md5 = archive(tmp_path / "x.tar")
    cached = tmp_path / "cache/VOCtrainval_06-Nov-2007.tar"
    cached.parent.mkdir()
    cached.write_bytes(b"somebody's own archive")
    get = lambda server, **more: download_voc(
        2007,
        root=tmp_path / "root",
        cache=tmp_path / "cache",
        url=server.url + "/any.tar",
        md5=md5,
        progress=False,
        **more,
    )
    with Server(tar.read_bytes()) as server:
        with pytest.raises(FileExistsError, match="VOCtrainval_06-Nov-2007.tar.*kept.*away"):
            get(server)
        assert not server.asked and cached.read_bytes() == b"somebody's own archive"
        cached.write_bytes(tar.read_bytes())  # put there by hand, and right: used, and kept too
        get(server, keep_tar=False)
        assert not server.asked and cached.read_bytes() == tar.read_bytes()
        cached.unlink()
        (tmp_path / "root/VOCdevkit/VOC2007/ImageSets/Main/trainval.txt").unlink()
        get(server, keep_tar=False)
        assert server.asked[0][0] == "/any.tar" and not list(cached.parent.iterdir())


def test_unpacking_replaces_nothing(tmp_path):
    tar, md5 = archive(tmp_path / "x.tar")
    target = tmp_path / "root/VOCdevkit/VOC2007"
    mended, same = target / "Annotations/a.xml", target / "JPEGImages/a.jpg"
    mended.parent.mkdir(parents=True)
    same.parent.mkdir()
    mended.write_text("mended by hand")
    same.write_bytes(b"VOCdevkit/VOC2007/JPEGImages/a.jpg" * 3000)
    get = lambda server: download_voc(
        2007, root=tmp_path / "root", cache=tmp_path / "cache", url=server.url, md5=md5, progress=False
    )
    with Server(tar.read_bytes()) as server:
        with pytest.raises(FileExistsError, match="a.xml is there already and differs"):
            get(server)
        assert mended.read_text() == "mended by hand" and not (target / "ImageSets").exists()
        assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["VOCdevkit"]
        mended.unlink()
        os.utime(same, (1, 1))
        get(server)
        assert same.stat().st_mtime == 1 and mended.read_text().startswith("VOCdevkit")
        mended.unlink()
        mended.symlink_to(tmp_path / "nowhere")  # a link, even to nothing, is somebody's
        (target / "ImageSets/Main/trainval.txt").unlink()
        with pytest.raises(FileExistsError, match="a.xml"):
            get(server)
        assert mended.is_symlink()


# --- real pictures ---------------------------------------------------------------------------------------------------


@real_data
def test_bccd():
    parts = [VOCDataset(Path(DATA) / "bccd", s) for s in ("trainval", "test")]
    assert [len(p) for p in parts] == [292, 72] and parts[0].class_names == ("Platelets", "RBC", "WBC")
    assert sum(p.report.objects for p in parts) == 4886 and sum(len(p.report.dropped) for p in parts) == 2
    with pytest.raises(ValueError, match="BloodImage_00338.xml"):
        VOCDataset(Path(DATA) / "bccd", "trainval", strict=True)


@real_data
def test_voc2007_counts():
    dataset = VOCDataset(Path(DATA) / "voc2007", "train+val")
    report = dataset.report
    assert (report.pictures, report.objects, report.difficult, report.truncated) == (
        4000,
        11974,
        2307,
        6213,
    ) and dataset.class_names == VOC_CLASSES
    assert not report.dropped and not report.clipped and not report.refused
    # the same counts by another way: plain text search
    text = "".join(p.read_text() for p in (Path(DATA) / "voc2007/Annotations").glob("*.xml"))
    assert (
        text.count("<object>") == report.objects
        and text.count("<difficult>1<") == report.difficult
        and text.count("<truncated>1<") == report.truncated
    )
