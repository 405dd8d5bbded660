"""COCO and CSV: the same records as VOC's; what is wrong with one object costs that object, what makes the file ambiguous is refused, and every message names the file."""

import json
import random
import sys

import numpy as np
import pytest
from PIL import Image

from retinanet_nb.formats import COCODataset, CSVDataset
from retinanet_nb.hyperparameters import VOC_CLASSES
from retinanet_nb.pictures import read_image
from retinanet_nb.voc import VOCDataset
from test_voc import BOX, Voc, obj, one, xml


@pytest.fixture
def voc(tmp_path):
    return Voc(tmp_path / "data")


# --- COCO ----------------------------------------------------------------------------------------------------


def coco(tmp_path, **changes):
    (tmp_path / "images").mkdir(exist_ok=True)
    for n in ("p.jpg", "q.jpg", "r.jpg"):
        Image.new("RGB", (100, 80)).save(tmp_path / "images" / n)
    data = dict(
        images=[
            dict(id=900, file_name="p.jpg", width=100, height=80),
            dict(id=7, file_name="q.jpg", width=100, height=80),
            dict(id=8, file_name="r.jpg"),
        ],
        categories=[dict(id=90, name="zebra"), dict(id=3, name="cat")],
        annotations=[
            dict(id=1, image_id=900, category_id=90, bbox=[10.5, 20, 30.25, 40], iscrowd=0),
            dict(id=5, image_id=900, category_id=3, bbox=[0, 0, 50, 50], iscrowd=1),
            dict(id=6, image_id=7, category_id=3, bbox=[90, 70, 20, 20]),
            dict(id=9, image_id=7, category_id=3, bbox=[5, 5, 0, 9]),
        ],
    )
    data.update(changes)
    (tmp_path / "c.json").write_text(json.dumps(data))
    return tmp_path / "c.json", tmp_path / "images"


def test_coco(tmp_path):
    dataset = COCODataset(*coco(tmp_path))
    assert (
        dataset.class_names == ("cat", "zebra")
        and dataset.image_ids == [900, 7, 8]
        and dataset.category_ids == [3, 90]
    )
    p, q, r = dataset
    assert (
        p.boxes.tolist() == [[10.5, 20, 40.75, 60], [0, 0, 50, 50]]
        and p.labels.tolist() == [1, 0]
        and p.crowd.tolist() == [False, True]
    )
    assert q.boxes.tolist() == [[90, 70, 100, 80]] and len(r.boxes) == 0
    assert (
        dataset.report.clipped[0][0] == dataset.report.dropped[0][0] == "q.jpg" and dataset.report.crowd == 1
    )
    with pytest.raises(ValueError, match="q.jpg"):
        COCODataset(*coco(tmp_path), strict=True)


def test_coco_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        COCODataset(tmp_path / "none.json")
    path, images = coco(tmp_path)
    with pytest.raises(FileNotFoundError, match="pictures"):
        COCODataset(path, tmp_path / "pictures")
    for changes, words in (
        (dict(categories=None), "c.json is not a COCO file.*categories"),
        (dict(annotations=[dict(id=1, image_id=7, category_id=4, bbox=[1, 1, 2, 2])]), "category 4"),
        (dict(annotations=[dict(id=1, image_id=7, category_id=3, bbox=[1, 1, 2])]), "four numbers"),
        (dict(annotations=[dict(id=12, image_id=7, category_id=3, bbox=["a", 1, 2, 2])]), "annotation 12"),
    ):
        with pytest.raises(ValueError, match=words):
            COCODataset(*coco(tmp_path, **changes))
    path.write_text("{")
    with pytest.raises(ValueError, match="c.json is not JSON"):
        COCODataset(path, images)
    with pytest.raises(ValueError, match="zebra.*cat, dog"):
        COCODataset(*coco(tmp_path), class_names=["cat", "dog"])
    dataset = COCODataset(
        *coco(
            tmp_path,
            annotations=[dict(id=1, image_id=77, category_id=3, bbox=[1, 1, 2, 2])],
            images=[dict(id=1, file_name="p.jpg"), dict(id=2, file_name="gone.jpg")],
        )
    )
    assert (
        len(dataset) == 1
        and "77" in dataset.report.dropped[0][1]
        and dataset.report.refused[0][0] == "gone.jpg"
        and dataset.image_ids == [1]
    )


OBJECT = dict(id=1, image_id=900, category_id=3, bbox=[10, 20, 40, 40])


@pytest.mark.parametrize(
    "changes,words",
    [
        (
            dict(images=[dict(id=1, file_name="p.jpg"), dict(id=1, file_name="q.jpg")]),
            "two images have the id 1, 'p.jpg' and 'q.jpg'",
        ),
        (dict(images=[dict(id=1, file_name="p.jpg"), dict(id=1)]), "two images have the id 1"),
        (
            dict(categories=[dict(id=3, name="cat"), dict(id=3, name="dog")]),
            "two categories have the id 3, 'cat' and 'dog'",
        ),
        (
            dict(categories=[dict(id=3, name="cat"), dict(id=4, name=" cat")]),
            "two categories are called 'cat'",
        ),
        (dict(categories=[]), "no categories"),
        (dict(categories=[dict(id=3)]), "id and a name"),
        (dict(categories=[dict(name="cat")]), "id and a name"),
        (dict(categories=[dict(id=True, name="cat")]), "id and a name"),
        (dict(categories=[dict(id=[3], name="cat")]), "id and a name"),
        (dict(categories=[dict(id=3, name=7)]), "id and a name"),
        (dict(categories=[dict(id=3, name="\ud800")]), "id and a name"),
        (dict(categories=["cat"]), "id and a name"),
    ],
)
def test_what_makes_coco_ambiguous_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match="c.json.*" + words):
        COCODataset(*coco(tmp_path, **changes))


@pytest.mark.parametrize("name", ["images", "categories", "annotations"])
@pytest.mark.parametrize("value", [None, 5, "abc", {"1": {"id": 1}}, True, 1.5])
def test_coco_lists_that_are_none(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"c.json is not a COCO file: '{name}'.*list"):
        COCODataset(*coco(tmp_path, **{name: value}))


@pytest.mark.parametrize("value", [5, "abc", None, [1], True])
def test_coco_lists_of_other_things(tmp_path, value):
    path, images = coco(tmp_path, images=[value])
    with pytest.raises(ValueError, match="c.json.*no picture"):
        COCODataset(path, images)
    path, images = coco(
        tmp_path, images=[value, dict(id=900, file_name="p.jpg")], annotations=[value, OBJECT]
    )
    dataset = COCODataset(path, images)
    assert one(dataset).boxes.tolist() == [BOX]
    assert len(dataset.report.refused) == 1 and len(dataset.report.dropped) == 1
    with pytest.raises(ValueError, match="c.json.*none of its 2 annotations"):
        COCODataset(*coco(tmp_path, annotations=[value, value]))


BAD_OBJECTS = {
    "an unknown category": (dict(category_id=4), "category 4"),
    "no category": (dict(category_id=None), "category None"),
    "a list as category": (dict(category_id=[3]), "category"),
    "true as category": (dict(category_id=True), "category True"),
    "an unknown image": (dict(image_id=77), "image 77"),
    "a text for a number as image": (dict(image_id="900"), "image 900"),
    "a dictionary as image": (dict(image_id={}), "image"),
    "no box": (dict(bbox=None), "no bbox"),
    "an outline only": (dict(bbox=[], segmentation=[[1, 1, 5, 5, 1, 5]]), "a segmentation but no bbox"),
    "text as box": (dict(bbox="1234"), "'1234'|1234 as bbox"),
    "three numbers": (dict(bbox=[1, 2, 3]), "four numbers"),
    "a number as box": (dict(bbox=7), "four numbers"),
    "a flag in the box": (dict(bbox=[1, 2, True, 4]), "four numbers"),
    "a word in the box": (dict(bbox=["a", 2, 3, 4]), "four numbers"),
    "an underscore": (dict(bbox=["1_0", 2, 3, 4]), "four numbers"),
    "other digits": (dict(bbox=["١٢", 2, 3, 4]), "four numbers"),
    "infinity": (dict(bbox=[1, 2, float("inf"), 4]), "four numbers"),
    "not a number": (dict(bbox=[1, 2, float("nan"), 4]), "four numbers"),
    "ten to the four hundredth": (dict(bbox=[1, 2, 10**400, 4]), "four numbers"),
    "a sum beyond all numbers": (dict(bbox=[1e308, 2, 1e308, 4]), "four numbers"),
    "no width": (dict(bbox=[1, 2, 0, 4]), "no area"),
    "a negative height": (dict(bbox=[1, 2, 3, -4]), "no area"),
    "a strange crowd": (dict(iscrowd="perhaps"), "iscrowd"),
    "a list as crowd": (dict(iscrowd=[]), "iscrowd"),
    "a megabyte": (dict(bbox="x" * 1_000_000), "xxx"),
}


@pytest.mark.parametrize("kind", BAD_OBJECTS)
def test_one_bad_object_costs_one_object(tmp_path, kind):
    changes, words = BAD_OBJECTS[kind]
    bad = {**OBJECT, "id": 12, **changes}
    dataset = COCODataset(*coco(tmp_path, annotations=[OBJECT, bad, {**OBJECT, "id": 2, "image_id": 7}]))
    assert [r.boxes.tolist() for r in dataset] == [[BOX], [BOX], []]
    ((file, why),) = dataset.report.dropped
    assert file in ("p.jpg", "c.json") and why.startswith("annotation 12") and len(why) < 300
    assert any(w in why for w in words.split("|"))
    with pytest.raises(ValueError, match="c.json.*annotation 12"):
        COCODataset(*coco(tmp_path, annotations=[OBJECT, bad]), strict=True)


@pytest.mark.parametrize(
    "value,crowd",
    [("0", False), ("1", True), (0, False), (1.0, True), (False, False), (True, True), (None, False)],
)
def test_iscrowd(tmp_path, value, crowd):
    dataset = COCODataset(*coco(tmp_path, annotations=[{**OBJECT, "iscrowd": value}]))
    assert dataset[0].crowd.tolist() == [crowd]


def test_areas(tmp_path):
    """COCO's own where it has them; the clipped box's for an object without."""
    objects = [
        {**OBJECT, "area": 123.5},
        {**OBJECT, "bbox": [90, 70, 20, 20]},
        {**OBJECT, "area": "much"},
        {**OBJECT, "area": float("inf")},
        {**OBJECT, "bbox": [5, 5, 0, 9], "area": 77},
    ]
    p, q, _ = COCODataset(*coco(tmp_path, annotations=[*objects, {**OBJECT, "image_id": 7}]))
    assert p.areas.tolist() == [123.5, 100, 1600, 1600] and p.areas.dtype == np.float32
    assert q.areas is None


def test_what_is_said_twice_is_taken_once(tmp_path):
    dataset = COCODataset(
        *coco(
            tmp_path,
            images=[dict(id=900, file_name="p.jpg"), dict(id=900, file_name="./p.jpg", width=100)],
            categories=[dict(id=3, name="cat"), dict(id=3, name="cat ")],
            annotations=[OBJECT, OBJECT],
        )
    )
    assert one(dataset).boxes.tolist() == [BOX, BOX] and dataset.class_names == ("cat",)
    noted = str(dataset.report.noted)
    assert (
        "id 900 is listed twice" in noted
        and "category 3 is listed twice" in noted
        and "id of an earlier" in noted
    )


def test_one_file_under_two_ids_is_one_picture(tmp_path):
    other = {**OBJECT, "id": 2, "image_id": 7, "bbox": [0, 0, 5, 5]}
    twin = {**OBJECT, "id": 3, "image_id": 7}
    for order in ([OBJECT, other, twin], [twin, other, OBJECT]):
        dataset = COCODataset(
            *coco(
                tmp_path,
                images=[dict(id=900, file_name="p.jpg"), dict(id=7, file_name="x\\..\\p.jpg")],
                annotations=order,
            )
        )
        assert sorted(one(dataset).boxes.tolist()) == [[0, 0, 5, 5], BOX] and dataset.image_ids == [900]
        assert any("900 and 7" in why for _, why in dataset.report.noted)


@pytest.mark.parametrize(
    "info",
    [
        dict(id=None, file_name="q.jpg"),
        dict(file_name="q.jpg"),
        dict(id=[], file_name="q.jpg"),
        dict(id=5),
        dict(id=5, file_name=7),
        dict(id=5, file_name=""),
        dict(id=5, file_name="q\0.jpg"),
        dict(id=5, file_name="q" * 1_000_000),
        dict(id=5, file_name="q" * 1000),
        dict(id=5, file_name="gone.jpg"),
        dict(id=5, file_name="."),
    ],
)
def test_one_bad_picture_costs_one_picture(tmp_path, info):
    objects = [OBJECT, {**OBJECT, "image_id": 5}]
    dataset = COCODataset(
        *coco(tmp_path, images=[info, dict(id=900, file_name="p.jpg")], annotations=objects)
    )
    assert one(dataset).boxes.tolist() == [BOX] and dataset.image_ids == [900]
    ((file, why),) = dataset.report.refused
    assert len(file) < 400 and len(why) < 400


@pytest.mark.parametrize("width", ["x", [100], {}, float("inf"), -5, True, 10**400])
def test_a_width_that_is_none(tmp_path, width):
    dataset = COCODataset(
        *coco(
            tmp_path, images=[dict(id=900, file_name="p.jpg", width=width, height=80)], annotations=[OBJECT]
        )
    )
    assert one(dataset).boxes.tolist() == [BOX] and dataset.report.noted[0][0] == "p.jpg"


def test_ids_of_all_kinds(tmp_path):
    """Numbers come before texts, texts of digits by their number; 3.0 is 3, and "3" is something else."""
    names = {3.0: "a", "10": "c", "9": "b", "x": "d"}
    dataset = COCODataset(
        *coco(
            tmp_path,
            images=[dict(id="p", file_name="p.jpg"), dict(id=7.0, file_name="q.jpg")],
            categories=[dict(id=i, name=n) for i, n in reversed(names.items())],
            annotations=[
                {**OBJECT, "image_id": "p", "category_id": "9"},
                {**OBJECT, "image_id": 7, "category_id": 3},
                {**OBJECT, "image_id": "7", "category_id": 3},
            ],
        )
    )
    assert dataset.class_names == ("a", "b", "c", "d") and dataset.category_ids == [3, "9", "10", "x"]
    assert [r.labels.tolist() for r in dataset] == [[1], [0]] and dataset.image_ids == ["p", 7]
    assert "image 7" in dataset.report.dropped[0][1]


@pytest.mark.parametrize(
    "text,words",
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"images":' * 100_000, "nested too deeply"),
        ("[]", "an object"),
        ("null", "an object"),
        ('{"images": [' + "9" * 5000 + "]}", "JSON"),
        ("{}", "images|categories"),
        ("\x00", "JSON"),
    ],
)
def test_json_that_is_no_coco(tmp_path, text, words):
    path, images = coco(tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"c.json.*({words})"):
        COCODataset(path, images)


def test_coco_tolerance(tmp_path):
    path, images = coco(tmp_path, annotations=[{**OBJECT, "bbox": [-1e-6, 40, 100.05, 40.000001]}])
    assert COCODataset(path, images, strict=True)[0].boxes.tolist() == [[0, 40, 100, 80]]
    path, images = coco(tmp_path, annotations=[{**OBJECT, "bbox": [0, 40, 100.2, 40]}])
    assert COCODataset(path, images).report.clipped
    with pytest.raises(ValueError, match="c.json: p.jpg.*beyond"):
        COCODataset(path, images, strict=True)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_names_that_are_not_utf8(tmp_path):
    path, images = coco(tmp_path, images=[dict(id=900, file_name="p.jpg")], annotations=[OBJECT])
    name = b"L\xf6we.jpg".decode("utf-8", "surrogateescape")
    (images / "p.jpg").rename(images / name)
    path.write_bytes(path.read_bytes().replace(b"p.jpg", b"L\xf6we.jpg"))
    table = tmp_path / "t.csv"
    table.write_bytes(b"images/L\xf6we.jpg,10,20,50,60,cat\nimages/L\xf6we.jpg,5,5,5,9,cat\n")
    for dataset in (COCODataset(path, images), CSVDataset(table)):
        assert one(dataset).image.name == name and read_image(one(dataset).image).shape == (80, 100, 3)
        dataset.report.to_json().encode(), str(dataset.report).encode()
    table.write_bytes(b"images/L\xf6we.jpg,10,20,50,60,L\xf6we\n")
    with pytest.raises(ValueError, match="t.csv, line 1: the class .*udcf6.* not UTF-8"):
        CSVDataset(table)


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_csv(tmp_path):
    coco(tmp_path)
    path = tmp_path / "t.csv"
    path.write_bytes(
        "﻿path,x1,y1,x2,y2,class\r\nimages/p.jpg,1,2,30.5,40,cat\r\n\r\nimages/q.jpg,,,,,\r\nimages\\p.jpg,1,1,99,120,dog\r\nimages/p.jpg,5,5,5,9,cat\r\n".encode()
    )
    dataset = CSVDataset(path)
    assert dataset.class_names == VOC_CLASSES
    assert {(r.image.name, len(r.boxes)) for r in dataset} >= {("q.jpg", 0)} and dataset.report.objects == 2
    assert dataset.report.clipped and "line 6" in dataset.report.dropped[0][1]
    (tmp_path / "classes.csv").write_text("dog,0\ncat,1\n")
    assert CSVDataset(path, tmp_path / "classes.csv").class_names == ("dog", "cat")
    for text, words in (
        ("a.jpg,1,2,3\n", "line 1"),
        ("images/p.jpg,1,2,x,4,cat\n", "line 1.*four numbers"),
        ("images/p.jpg,1,2,3,4,\n", "line 1"),
        ("images/p.jpg,1,2,3,4,cow\n", "'cow'.*dog, cat"),
        ("gone.jpg,1,2,3,4,cat\n", "gone.jpg"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            CSVDataset(path, tmp_path / "classes.csv")
    for text in ("dog,0\ncat,2\n", "dog\n", "dog,x\n"):
        (tmp_path / "classes.csv").write_text(text)
        with pytest.raises(ValueError, match="classes.csv"):
            CSVDataset(path, tmp_path / "classes.csv")


BAD_CSV = {
    "a quote that is never closed": ('{0}\n"{0}\n{0}\n', "line 2: a quote is opened"),
    "a quote closed three lines on": ('{0}\n{0}\n"{0}\n{0}\n{0}"\n', "line 3: a quote is opened"),
    "a quote before the class": ('{0}\nimages/p.jpg,1,2,3,4,"cat\n{0}\n', "line 2: a quote is opened"),
    "a quote in a quote": ('images/p.jpg,1,2,3,4,"c"at"\n', "line 1"),
    "a field of 200,000": ("images/p.jpg,1,2,3,4," + "c" * 200_000 + "\n", "line 1: field larger"),
    "an underscore": ("{0}\nimages/p.jpg,1_0,2,30,40,cat\n", "line 2: four numbers"),
    "other digits": ("images/p.jpg,١٢,2,30,40,cat\n", "line 1: four numbers"),
    "infinity": ("images/p.jpg,1,2,inf,40,cat\n", "line 1: four numbers"),
    "ten to the four hundredth": ("images/p.jpg,1,2,1" + "0" * 400 + ",40,cat\n", "line 1: four numbers"),
    "too long a number": ("images/p.jpg,1,2," + "1" * 100_000 + ",40,cat\n", "line 1: four numbers"),
    "a path too long": ("p" * 100_000 + ",1,2,3,4,cat\n", "line 1: six fields"),
    "a zero byte": ("images/p.jpg\0,1,2,3,4,cat\n", "zero bytes"),
    "no path": (",1,2,3,4,cat\n", "line 1: six fields"),
    "titles without a picture": ("a,b,xmin,ymin,xmax,ymax,class\n", "titles .* lack"),
    "titles without a class": ("path,b,xmin,ymin,xmax,ymax,kind\n", "titles .* lack"),
    "fewer fields than titles": (
        "class,path,xmin,ymin,xmax,ymax,w\ncat,images/p.jpg,1,2,3,4\n",
        "line 2: 7 fields",
    ),
    "nothing": ("\n\n", "no picture"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_tables_that_cannot_be_read(tmp_path, kind):
    coco(tmp_path)
    text, words = BAD_CSV[kind]
    (tmp_path / "t.csv").write_text(text.replace("{0}", "images/p.jpg,10,20,50,60,cat"))
    with pytest.raises(ValueError, match="t.csv.*" + words) as error:
        CSVDataset(tmp_path / "t.csv")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_utf16_is_said(tmp_path):
    (tmp_path / "t.csv").write_bytes("images/p.jpg,1,2,3,4,cat\n".encode("utf-16"))
    with pytest.raises(ValueError, match="t.csv is not UTF-8"):
        CSVDataset(tmp_path / "t.csv")


def test_one_file_under_several_spellings_is_one_picture(tmp_path):
    coco(tmp_path)
    path = tmp_path / "t.csv"
    spellings = (
        "images/p.jpg",
        "./images/p.jpg",
        "A\\..\\images\\p.jpg",
        "images//p.jpg",
        str(tmp_path / "images/p.jpg"),
    )
    path.write_text("".join(f"{name},{k},{k},50,60,cat\n" for k, name in enumerate(spellings)) * 2)
    dataset = CSVDataset(path)
    assert len(one(dataset).boxes) == 10 and read_image(one(dataset).image).shape == (80, 100, 3)
    assert len(dataset.report.noted) == 4 and dataset.report.noted[0][0] == "images/p.jpg"


def test_a_quoted_field_stays_one(tmp_path):
    coco(tmp_path)
    (tmp_path / "images/p.jpg").rename(tmp_path / 'images/p, "old".jpg')
    (tmp_path / "t.csv").write_text('"images/p, ""old"".jpg",10,20,50,60,"cat"\r"images/q.jpg",,,,,\r')
    dataset = CSVDataset(tmp_path / "t.csv")
    assert [r.boxes.tolist() for r in dataset] == [[BOX], []]


def test_columns_by_their_titles(tmp_path):
    coco(tmp_path)
    path = tmp_path / "t.csv"
    path.write_text(
        "Filename,Width,HEIGHT,Class,xMin,yMin,xMax,yMax\n"
        "images/p.jpg,100,80,cat,10,20,50,60\nimages/q.jpg,100,80,,,,,\nimages/r.jpg,99,80,dog,1,1,5,5\n"
    )
    dataset = CSVDataset(path)
    assert [r.boxes.tolist() for r in dataset] == [[BOX], [], [[1, 1, 5, 5]]]
    assert [file for file, _ in dataset.report.noted] == ["images/r.jpg"]  # its size is another
    path.write_text("label,y2,x2,y1,x1,image\ncat,60,50,20,10,images/p.jpg\n")
    assert one(CSVDataset(path)).boxes.tolist() == [BOX]
    path.write_text("x,x1,y1,x2,y2,z\nimages/p.jpg,10,20,50,60,cat\n")  # always been skipped
    assert one(CSVDataset(path)).boxes.tolist() == [BOX]


@pytest.mark.parametrize(
    "text,words",
    [
        ("cat,0\ndog,1\ncat,2\n", "line 3: the class 'cat' is listed twice"),
        ("cat,0\ncat,1\n", "line 2"),
        ("cat,0\ndog,0\n", "from 0 to 1"),
        ("cat,0_0\n", "line 1"),
        ("cat,٠\n", "line 1"),
        ("cat,0.5\n", "line 1"),
        (",0\n", "line 1"),
        ("", "from 0"),
    ],
)
def test_mappings_that_are_none(tmp_path, text, words):
    coco(tmp_path)
    (tmp_path / "t.csv").write_text("images/p.jpg,10,20,50,60,cat\n")
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(ValueError, match="classes.csv.*" + words):
        CSVDataset(tmp_path / "t.csv", tmp_path / "classes.csv")


# --- all of them -----------------------------------------------------------------------------------------------------

ODD = [
    None,
    True,
    0,
    -1,
    1e308,
    10**400,
    float("inf"),
    "",
    "0",
    "x",
    "1_0",
    [],
    [1],
    {},
    "\0",
    "\ud800",
    7.0,
    "900",
]


def places(value, at=()):
    """Where in nested lists and dictionaries something stands."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*at, key)
        yield from places(part, (*at, key))


def test_six_hundred_spoilt_files(tmp_path):
    """Whatever stands in place of whatever: a data set, or one sentence that names the file."""
    rng, outcomes = random.Random(7), {True: 0, False: 0}
    path, images = coco(tmp_path)
    good, table = path.read_text(), tmp_path / "t.csv"
    rows = "images/p.jpg,1,2,30,40,cat\nimages/p.jpg,5,5,50,60,dog\nimages/q.jpg,,,,,\n"
    for turn in range(600):
        if turn % 2:
            data = json.loads(good)
            for at in rng.sample(list(places(data)), rng.choice((1, 1, 2))):
                inner = data
                for key in at[:-1]:
                    inner = (
                        inner[key] if isinstance(inner, (list, dict)) and inner else {key: {}, at[-1]: 0}[key]
                    )
                if isinstance(inner, (list, dict)):
                    inner[at[-1] if isinstance(inner, dict) else 0] = rng.choice(ODD) if inner else None
            path.write_text(json.dumps(data))
            read, file = lambda: COCODataset(path, images), "c.json"
        else:
            at = rng.randrange(len(rows))
            more = rng.choice(
                ['"', ",", "\n", "\r", "-", "1_", "١", "nan", "./", "\\", "\udcff", "x" * 140_000]
            )
            table.write_text(rows[:at] + more + rows[at + rng.randrange(3) :], errors="surrogateescape")
            read, file = lambda: CSVDataset(table), "t.csv"
        try:
            dataset = read()
            dataset.report.to_json().encode(), str(dataset.report).encode()
            outcomes[True] += 1
        except ValueError as error:
            assert file in str(error) and len(str(error)) < 1000
            outcomes[False] += 1
    assert min(outcomes.values()) > 60


def test_the_three_readers_agree(voc, tmp_path):
    voc.add("a", xml(obj(), obj("dog", (1, 1, 100, 80)))).write()
    picture = {"id": 5, "file_name": "a.jpg"}
    (tmp_path / "c.json").write_text(
        json.dumps(
            dict(
                images=[picture],
                categories=[dict(id=1, name="cat"), dict(id=2, name="dog")],
                annotations=[
                    dict(id=1, image_id=5, category_id=1, bbox=[10, 20, 40, 40]),
                    dict(id=2, image_id=5, category_id=2, bbox=[0, 0, 100, 80]),
                ],
            )
        )
    )
    (tmp_path / "t.csv").write_text(
        "data/JPEGImages/a.jpg,10,20,50,60,cat\ndata/JPEGImages/a.jpg,0,0,100,80,dog\n"
    )
    names = ["cat", "dog"]
    for record in (
        one(VOCDataset(voc.root, "train", names)),
        one(COCODataset(tmp_path / "c.json", voc.root / "JPEGImages", names)),
        one(CSVDataset(tmp_path / "t.csv", names)),
    ):
        assert (
            record.boxes.tolist() == [BOX, [0, 0, 100, 80]]
            and record.labels.tolist() == [0, 1]
            and (record.width, record.height) == (100, 80)
        )
        assert record.image.resolve() == (voc.root / "JPEGImages/a.jpg").resolve()
