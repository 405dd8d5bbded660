"""Folders as they come from other people's disks and programs: read rightly, or told in a sentence that names the file."""

import json
import os

import h5py
import pytest
from PIL import Image

from retinanet_nb.datasets import open_dataset
from retinanet_nb.download import cache_folder
from retinanet_nb.folders import FolderDataset, YOLODataset
from retinanet_nb.formats import COCODataset
from retinanet_nb.hyperparameters import HyperParameters
from retinanet_nb.inspection import inspect_dataset

# what macOS puts beside a file on a disk of another system
BESIDE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(60)


def picture(path, width=100, height=80):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (9, 99, 9)).save(path, "JPEG")


def annotation(path, picture="1.jpg", name="ball", size=None, corners=(5, 5, 40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    path.write_text(
        f"<annotation><filename>{picture}</filename>{size}<object><name>{name}</name><bndbox>{tags}</bndbox></object></annotation>"
    )


def coco(first, n, image_id=int):
    "Images first, as some converters have it; every object with an outline, which makes the file long."
    numbers = range(first, first + n)
    outline = [[10, 10, 40, 10, 40, 40, 10, 40]]
    return json.dumps(
        {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in numbers],
            "categories": [{"id": 1, "name": "ball"}],
            "annotations": [
                {
                    "id": i,
                    "image_id": image_id(i),
                    "category_id": 1,
                    "bbox": [10, 10, 30, 30],
                    "segmentation": outline,
                }
                for i in numbers
            ],
        }
    )


def yolo(folder, names="[ball]", line="0 .5 .5 .2 .2\n"):
    picture(folder / "images/1.jpg")
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels/1.txt").write_text(line)
    (folder / "data.yaml").write_text(f"train: images\nnames: {names}\n")
    return folder


def notes(dataset):
    return str(dataset.report)


# --- what a folder is -------------------------------------------------------------------------------------------------


def test_a_long_coco_file_is_known_whatever_the_order_of_its_lists(tmp_path):
    for i in range(8):
        picture(tmp_path / f"{i}.jpg")
    (tmp_path / "train.json").write_text(coco(0, 2000))
    (tmp_path / "val.json").write_text(coco(5, 3))
    assert (tmp_path / "train.json").stat().st_size > 4 << 16
    assert len(open_dataset(tmp_path, "train")) == 8
    assert len(open_dataset(tmp_path, "val")) == 3


def test_a_table_may_begin_with_a_picture_of_nothing(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.jpg")
    (tmp_path / "train.csv").write_text("0.jpg,,,,,\n1.jpg,1,1,20,20,ball\n")
    (tmp_path / "val.csv").write_text("2.jpg,1,1,20,20,ball\n")
    assert [len(r.labels) for r in open_dataset(tmp_path, "train")] == [0, 1]


def test_copies_that_a_notebook_server_keeps_are_no_data(tmp_path):
    picture(tmp_path / "1.jpg")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("boxes.csv", ".ipynb_checkpoints/boxes-checkpoint.csv"):
        (tmp_path / name).write_text("1.jpg,1,1,20,20,ball\n")
    assert len(open_dataset(tmp_path)) == 1


def test_what_a_mac_leaves_beside_files(tmp_path):
    voc, other = tmp_path / "voc", yolo(tmp_path / "yolo")
    picture(voc / "JPEGImages/1.jpg")
    annotation(voc / "Annotations/1.xml")
    for path in (voc / "Annotations/._1.xml", voc / "JPEGImages/._1.jpg", other / "._data.yaml"):
        path.write_bytes(BESIDE)
    assert [len(open_dataset(folder)) for folder in (voc, other)] == [1, 1]


def test_folders_that_are_links_and_links_that_lead_back(tmp_path):
    yolo(tmp_path / "here")
    picture(tmp_path / "there/2.jpg")
    (tmp_path / "here/images/more").symlink_to(tmp_path / "there")
    (tmp_path / "there/back").symlink_to(tmp_path / "here/images")
    assert [r.image.name for r in YOLODataset(tmp_path / "here")] == ["1.jpg", "2.jpg"]


# --- whose boxes these are --------------------------------------------------------------------------------------------


def test_a_picture_is_not_lent_to_an_annotation_that_lost_its_own(tmp_path):
    picture(tmp_path / "train/1.jpg")
    annotation(tmp_path / "train/1.xml")
    picture(tmp_path / "valid/2.jpg")
    annotation(tmp_path / "valid/2.xml", "2.jpg")
    annotation(tmp_path / "valid/1.xml", name="wheel")
    valid = FolderDataset(tmp_path, "valid")
    assert [r.image.name for r in valid] == ["2.jpg"] and valid.class_names == ("ball",)
    assert "valid/1.xml: there is no" in notes(valid) and "an annotation of its own" in notes(valid)


def test_two_annotations_of_one_picture_are_told(tmp_path):
    picture(tmp_path / "pictures/1.jpg")
    annotation(tmp_path / "ann/1.xml")
    annotation(tmp_path / "ann_old/1.xml", corners=(5, 5, 30, 30))
    assert "ann_old/1.xml: ann/1.xml has the same picture, 1.jpg" in notes(open_dataset(tmp_path))


def test_ids_of_pictures_as_text(tmp_path):
    picture(tmp_path / "0.jpg")
    path = tmp_path / "boxes.json"
    path.write_text(coco(0, 1, image_id=str))
    with pytest.raises(ValueError, match=r"boxes\.json: none of its 1 annotations .* not listed as text"):
        COCODataset(path)


@pytest.mark.parametrize(
    "size, corners, refused",
    [
        ((320, 240), (10, 10, 110, 110), True),  # shrunk: they fit, and lie elsewhere
        ((1280, 960), (10, 10, 110, 110), True),  # enlarged
        ((640, 400), (10, 10, 110, 110), False),  # another shape: cut, and not measured anew
        ((636, 477), (10, 10, 110, 110), False),  # rounded
        ((1280, 960), (10, 10, 900, 700), False),  # beyond what is stated: measured in the picture
    ],
)
def test_pictures_of_another_size_than_stated(tmp_path, size, corners, refused):
    for i in range(2):
        picture(tmp_path / f"JPEGImages/{i}.jpg", *(size if i else (640, 480)))
        annotation(
            tmp_path / f"Annotations/{i}.xml",
            f"{i}.jpg",
            size=(640, 480),
            corners=corners if i else (5, 5, 40, 40),
        )
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 2 - refused
    assert f"1.xml: it says 640×480, the picture is {size[0]}×{size[1]}" in notes(dataset)


def test_shares_instead_of_pixels_are_told(tmp_path):
    picture(tmp_path / "1.jpg")
    (tmp_path / "boxes.csv").write_text("1.jpg,0.1,0.2,0.5,0.6,ball\n")
    assert "are they shares instead of pixels?" in notes(open_dataset(tmp_path))


# --- names ------------------------------------------------------------------------------------------------------------


def test_yaml_has_no_opinion_on_names(tmp_path):
    names = ("no", "se", "010", "1e3", "1:30", "null", "2024-01-01")
    assert YOLODataset(yolo(tmp_path, f"[{', '.join(names)}]")).class_names == names


@pytest.mark.parametrize(
    "names, why",
    [
        ("{0: ball, 0: wheel}", "it says 0 twice"),
        ("[ball, [wheel, tyre]]", "names must be words"),
        ("[ball, ball]", "different and not empty"),
    ],
)
def test_names_that_are_none(tmp_path, names, why):
    with pytest.raises(ValueError, match=f"data.yaml.*{why}"):
        YOLODataset(yolo(tmp_path, names))


def test_splits_that_are_nothing_are_not_there(tmp_path):
    path = yolo(tmp_path) / "data.yaml"
    path.write_text(path.read_text() + "nc: '1'\nval:\ntest: null\n")
    assert len(open_dataset(tmp_path)) == 1


def test_a_yaml_file_that_multiplies_itself(tmp_path):
    path = yolo(tmp_path) / "data.yaml"
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
    path.write_text("\n".join([*lines, "train: images", "names: *a8"]))
    with pytest.raises(ValueError, match="data.yaml.*refers to its own parts"):
        YOLODataset(path)


def test_class_names_in_another_encoding(tmp_path):
    yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_bytes("Schlüssel\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt is not UTF-8 text"):
        open_dataset(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX systems only")
def test_a_page_shows_a_picture_whose_name_is_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        picture(tmp_path / "data/JPEGImages" / name)
    except OSError:
        pytest.skip("this disk takes names in UTF-8 only")
    annotation(tmp_path / "data/Annotations" / os.fsdecode(b"caf\xe9.xml"), "x.jpg")
    inspect_dataset(open_dataset(tmp_path / "data"), HyperParameters(image_size=(96, 96)), tmp_path / "page")
    assert "caf" in (tmp_path / "page/index.html").read_text("utf-8")


# --- files of weights, and where they are kept ------------------------------------------------------------------------


def weights(path, width=8, rows=18):
    "What is looked at first in a file of keras-retinanet."
    shapes = {
        "res5c_branch2c": (1, 1, 1, 1),
        "P3": (3, 3, 8, width),
        "pyramid_regression": (3, 3, 8, 36),
        "pyramid_classification": (3, 3, 8, rows),
    }
    with h5py.File(path, "w") as file:
        for name, shape in shapes.items():
            file.create_dataset(f"m/{name}/kernel:0", shape, "float32")
    return path


@pytest.mark.parametrize(
    "odd, why", [({"width": 5000}, "odd shapes.*feature_size"), ({"rows": 5}, "5 rows of classes")]
)
def test_weights_of_impossible_shapes_are_told_with_their_file(tmp_path, odd, why):
    from retinanet_nb.weights import read_keras_retinanet

    with pytest.raises(ValueError, match=rf"old\.h5 has {why}"):
        read_keras_retinanet(weights(tmp_path / "old.h5", **odd))


def test_one_cache_for_all(tmp_path, monkeypatch):
    monkeypatch.delenv("RETINANET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "retinanet_nb"
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
