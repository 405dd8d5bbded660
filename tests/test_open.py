"""What a path holds, told by looking: every layout that people have, and pictures held out of it."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from retinanet_nb.datasets import hold_out, open_dataset, recognize, shared_pictures, split_by
from retinanet_nb.folders import FolderDataset, YOLODataset
from retinanet_nb.formats import CSVDataset
from retinanet_nb.records import Records
from retinanet_nb.shapes import make_shapes
from retinanet_nb.voc import VOCDataset


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open") / "shapes"
    return make_shapes(folder, train=12, val=4, test=1, size=(64, 96), seed=2)


def same(one, other):
    "Whether two data sets have the same objects in pictures of the same names."
    rows = lambda d: {
        Path(r.image).stem: sorted(
            (d.class_names[k], *np.round(b, 2).tolist()) for b, k in zip(r.boxes, r.labels)
        )
        for r in d
    }
    a, b = rows(one), rows(other)
    assert a.keys() == b.keys()
    for name in a:
        assert [x[0] for x in a[name]] == [x[0] for x in b[name]]
        if a[name]:
            assert np.allclose([x[1:] for x in a[name]], [x[1:] for x in b[name]], atol=0.02)


def yolo_lines(dataset, record):
    w, h = record.width, record.height
    return "".join(
        f"{k} {(x1 + x2) / 2 / w:.8f} {(y1 + y2) / 2 / h:.8f} {(x2 - x1) / w:.8f} {(y2 - y1) / h:.8f}\n"
        for (x1, y1, x2, y2), k in zip(record.boxes.tolist(), record.labels)
    )


def write_yolo(root, shapes, roboflow):
    "A YOLO data set of the drawn one, laid out as Ultralytics or as Roboflow does it."
    data = {}
    for split, name in (("train", "train"), ("val", "valid" if roboflow else "val")):
        dataset = VOCDataset(shapes, split)
        images, labels = (
            (f"{name}/images", f"{name}/labels") if roboflow else (f"images/{name}", f"labels/{name}")
        )
        for part in (images, labels):
            (root / part).mkdir(parents=True)
        for record in dataset:
            shutil.copy(record.image, root / images)
            (root / labels / f"{record.image.stem}.txt").write_text(yolo_lines(dataset, record))
        data[split] = f"../{images}" if roboflow else images
    names = list(dataset.class_names)
    data |= {"nc": len(names), "names": names if roboflow else dict(enumerate(names))}
    (root / "data.yaml").write_text(json.dumps(data))  # which YAML contains
    return root


@pytest.mark.parametrize("roboflow", [False, True])
def test_yolo_of_both_layouts(shapes, tmp_path, roboflow):
    root = write_yolo(tmp_path / "yolo", shapes, roboflow)
    for path in (root, root / "data.yaml"):
        layout = recognize(path)
        assert (
            layout.format == "YOLO" and set(layout.splits) == {"train", "val"} and layout.default == "train"
        )
        for split in ("train", "val"):
            same(open_dataset(path, split), VOCDataset(shapes, split))
    assert len(open_dataset(root)) == 12 and len(open_dataset(root, "trainval")) == 16
    same(open_dataset(root, "valid"), VOCDataset(shapes, "val"))
    with pytest.raises(FileNotFoundError, match="it has train, val"):
        open_dataset(root, "test")


def test_yolo_says_what_is_wrong(shapes, tmp_path):
    root = write_yolo(tmp_path / "yolo", shapes, False)
    yaml = json.loads((root / "data.yaml").read_text())

    def fails(why, error=ValueError, **changes):
        (root / "data.yaml").write_text(json.dumps({**yaml, **changes}))
        with pytest.raises(error, match=why):
            YOLODataset(root)

    fails("lists no classes", names=[])
    fails("without gaps", names={"0": "a", "2": "b"})
    fails("must be words, different", names=["a", "a"], nc=2)
    fails("nc: 9", nc=9)
    fails("There is no .*nowhere", FileNotFoundError, train="nowhere")
    fails("it has val", FileNotFoundError, train=None)
    fails("data.yaml: train: '/' is the whole disk", train="/")
    (root / "empty").mkdir()
    shutil.copy(next((root / "images/train").iterdir()), root / "empty")
    fails("none of 1 pictures has a text file", train="empty")
    for broken, why in (
        ("train: [", "is not YAML"),
        ("nc: " + "9" * 5000, "lists no classes"),
        ("at: 2001-99-99", "lists no classes"),
    ):
        (root / "data.yaml").write_text(broken)
        with pytest.raises(ValueError, match=f"data.yaml {why}"):
            YOLODataset(root)
    (root / "data.yaml").write_text(json.dumps({**yaml, "train": "list.txt"}))
    first = sorted((root / "images/train").iterdir())[0]
    (root / "list.txt").write_text(f"./images/train/{first.name}\n\n")
    assert len(YOLODataset(root)) == 1
    (root / "labels/train" / f"{first.stem}.txt").unlink()
    with pytest.raises(ValueError, match="looked for in labels/"):
        YOLODataset(root)


def test_an_export_inside_another_is_not_read_as_the_other(shapes, tmp_path):
    "Roboflow's ../train/images leads out of the folder, to whatever has been unpacked there."
    outer = write_yolo(tmp_path / "outer", shapes, True)
    inner = write_yolo(outer / "inner", shapes, True)
    same(open_dataset(outer, "val"), VOCDataset(shapes, "val"))
    with pytest.raises(
        ValueError, match="val: ../valid/images leads to .*another data set.*write val: valid/images"
    ):
        open_dataset(inner, "val")
    shutil.rmtree(inner / "valid")  # left out of the inner one: still not the outer one's
    with pytest.raises(ValueError, match="another data set"):
        open_dataset(inner, "val")
    alone = tmp_path / "settings" / "data.yaml"  # dots that mean what they say
    alone.parent.mkdir()
    alone.write_text((outer / "data.yaml").read_text().replace("../", "../outer/"))
    same(open_dataset(alone, "val"), VOCDataset(shapes, "val"))


@pytest.mark.parametrize("shape", [(4, 3), (3, 2), (2, 2)])
def test_points_of_a_pose_are_no_outline(shapes, tmp_path, shape):
    root = write_yolo(tmp_path / "pose", shapes, False)
    point = " 0.25 0.75 2"[: 12 if shape[1] == 3 else 10]
    for text in (root / "labels").rglob("*.txt"):
        text.write_text("".join(line + point * shape[0] + "\n" for line in text.read_text().splitlines()))
    yaml = json.loads((root / "data.yaml").read_text())
    (root / "data.yaml").write_text(json.dumps({**yaml, "kpt_shape": shape}))
    found = open_dataset(root, "train")
    same(found, VOCDataset(shapes, "train"))
    assert "outlines" not in str(found.report)
    if shape == (4, 3):
        (root / "data.yaml").write_text(json.dumps(yaml))
        with pytest.raises(ValueError, match="line 1: .*a pose without kpt_shape"):
            open_dataset(root, "train")
    for wrong in (17, [17], [17, 0], [1.5, 2], ["a", 3]):
        (root / "data.yaml").write_text(json.dumps({**yaml, "kpt_shape": wrong}))
        with pytest.raises(ValueError, match="kpt_shape must be two numbers"):
            open_dataset(root, "train")


@pytest.mark.parametrize("names", ["classes.txt", "labels/classes.txt", "obj.names"])
def test_yolo_without_a_yaml(shapes, tmp_path, names):
    "As labelImg, Label Studio and CVAT write it; with folders of splits, and all in one."
    root = write_yolo(tmp_path / "yolo", shapes, False)
    (root / "data.yaml").unlink()
    (root / names).write_text("\n".join(VOCDataset(shapes, "train").class_names) + "\n")
    assert recognize(root).format == "YOLO" and set(recognize(root).splits) == {"train", "val"}
    for split in ("train", "val"):
        same(open_dataset(root, split), VOCDataset(shapes, split))
    shutil.copy(next(root.rglob("*.jpg")), root)  # one in no split: then there are none
    assert set(recognize(root).splits) == {"all"} and len(open_dataset(root)) == 17
    flat = tmp_path / "flat"
    flat.mkdir()
    (root / next(root.glob("*.jpg")).name).unlink()
    for path in [*root.rglob("*.jpg"), *root.rglob("*0.txt"), root / names]:
        shutil.copy(path, flat)
    if names.startswith("labels"):
        (flat / "labels").mkdir()
        (flat / "classes.txt").rename(flat / names)
    found = open_dataset(flat)
    assert found.layout.default == "all" and len(found) == 16
    assert sum(len(r.labels) > 0 for r in found) > 0
    (flat / names).write_text("ball\n\nbrick\n")  # a blank line is a class too
    with pytest.raises(ValueError, match="must be words, different and not empty"):
        open_dataset(flat)


def test_what_is_left_over_of_a_yolo_folder_is_told(shapes, tmp_path):
    root = write_yolo(tmp_path / "yolo", shapes, False)
    one, two, *_ = sorted((root / "images/train").iterdir())
    one.unlink()  # its text file stays
    (root / "labels/train/notes.txt").write_text("made in spring\n")
    shutil.copy(two, two.with_suffix(".jpeg"))
    notes = [why for _, why in open_dataset(root).report.noted]
    assert f"text files without a picture: 1, the first {one.stem}.txt" in notes
    assert f"it shares {two.stem}.txt with {two.stem}.jpeg" in notes
    assert open_dataset(root, "val").report.noted == []


@pytest.mark.parametrize("folder", ["", "images"])
def test_pictures_in_folders_of_splits_and_xml_in_one(shapes, tmp_path, folder):
    "The pictures' folders are the splits then; a test that nobody sees would be trained on."
    shutil.copytree(shapes / "Annotations", tmp_path / "annotations")
    for split in ("train", "val", "test"):
        pictures(VOCDataset(shapes, split), tmp_path / folder / split)
    layout = recognize(tmp_path)
    assert layout.format == "folder" and set(layout.splits) == {"train", "val", "test"}
    for split in ("train", "val", "test"):
        same(open_dataset(tmp_path, split), VOCDataset(shapes, split))
    assert len(open_dataset(tmp_path)) == 12 and len(open_dataset(tmp_path, "all")) == 17


def test_a_folder_in_a_folder_is_meant(shapes, tmp_path):
    write_yolo(tmp_path / "unzipped" / "yolo", shapes, False)
    (tmp_path / "unzipped" / "__MACOSX").mkdir()
    same(open_dataset(tmp_path / "unzipped", "val"), VOCDataset(shapes, "val"))


def write_coco(path, dataset):
    images, objects = [], []
    for i, r in enumerate(dataset):
        images.append({"id": i, "file_name": r.image.name, "width": r.width, "height": r.height})
        for (x1, y1, x2, y2), k in zip(r.boxes.tolist(), r.labels.tolist()):
            box = [x1, y1, x2 - x1, y2 - y1]
            objects.append({"id": len(objects), "image_id": i, "category_id": k, "bbox": box})
    names = [{"id": i, "name": n} for i, n in enumerate(dataset.class_names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": names}))


def write_table(path, dataset):
    rows = ["Class,filename,XMIN,ymin,xmax,ymax,width,height"]
    for r in dataset:
        for box, k in zip(r.boxes.tolist(), r.labels):
            rows.append(
                f"{dataset.class_names[k]},{r.image.name},{','.join(map(str, box))},{r.width},{r.height}"
            )
    path.write_text("\n".join(rows) + "\n")


def pictures(dataset, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for record in dataset:
        shutil.copy(record.image, folder)


@pytest.mark.parametrize("where", [".", "images", "../images"])
def test_coco_and_a_table_find_their_pictures(shapes, tmp_path, where):
    dataset = VOCDataset(shapes, "train")
    home = tmp_path / "annotations"
    pictures(dataset, home / where)
    write_coco(home / "all.json", dataset)
    write_table(home / "all.csv", dataset)
    for name, kind in (("all.json", "COCO"), ("all.csv", "CSV")):
        found = open_dataset(home / name)
        assert found.layout.format == kind
        same(found, dataset)
        assert (where == ".") == (not any("pictures lie in" in why for _, why in found.report.noted))


def test_a_folder_of_coco_files_has_its_splits(shapes, tmp_path):
    for split, year in (("train", "train2017"), ("val", "val2017")):
        dataset = VOCDataset(shapes, split)
        pictures(dataset, tmp_path / year)
        write_coco(tmp_path / "annotations" / f"instances_{year}.json", dataset)
    (tmp_path / "annotations" / "notes.json").write_text("{}")
    layout = recognize(tmp_path)
    assert layout.format == "COCO" and set(layout.splits) == {"train", "val"}
    for split in ("train", "val"):
        same(open_dataset(tmp_path, split), VOCDataset(shapes, split))
    shutil.copy(
        tmp_path / "annotations/instances_val2017.json", tmp_path / "annotations/captions_val2017.json"
    )
    with pytest.raises(ValueError, match="which of them are meant is unclear"):
        recognize(tmp_path)


def test_roboflow_keeps_a_coco_file_or_a_table_in_each_split(shapes, tmp_path):
    for split, name in (("train", "train"), ("val", "valid")):
        dataset = VOCDataset(shapes, split)
        pictures(dataset, tmp_path / "coco" / name), pictures(dataset, tmp_path / "csv" / name)
        write_coco(tmp_path / "coco" / name / "_annotations.coco.json", dataset)
        write_table(tmp_path / "csv" / name / "_annotations.csv", dataset)
    for kind in ("coco", "csv"):
        for split in ("train", "val"):
            same(open_dataset(tmp_path / kind, split), VOCDataset(shapes, split))


@pytest.mark.parametrize(
    "folders", [("images", "annotations"), ("Images", "ANNOTATIONS"), ("JPEGIMAGES", "xmls")]
)
def test_a_voc_directory_by_other_names(shapes, tmp_path, folders):
    for mine, theirs in zip(folders, ("JPEGImages", "Annotations")):
        shutil.copytree(shapes / theirs, tmp_path / mine)
    assert recognize(tmp_path).format == "VOC" and recognize(tmp_path).default == "all"
    same(open_dataset(tmp_path), VOCDataset(shapes, "all"))
    shutil.copytree(shapes / "ImageSets", tmp_path / "imagesets")
    assert len(open_dataset(tmp_path, "train")) == 12


def test_xml_beside_the_pictures_and_in_sub_folders(shapes, tmp_path):
    flat, deep = tmp_path / "flat", tmp_path / "deep"
    for part in ("JPEGImages", "Annotations"):
        shutil.copytree(shapes / part, flat, dirs_exist_ok=True)
        shutil.copytree(shapes / part, deep / ("sub/images" if part[0] == "J" else "sub/xml/old"))
    (flat / ".hidden").mkdir()
    (flat / ".hidden" / "x.xml").write_text("<project/>")
    for root in (flat, deep):
        assert recognize(root).format == "folder"
        same(open_dataset(root), VOCDataset(shapes, "all"))
    victim = sorted(flat.glob("*.xml"))[0]
    victim.unlink()
    report = FolderDataset(flat).report
    assert report.refused == [(f"{victim.stem}.jpg", "the picture has no annotation")]


def test_what_is_no_data_set_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no data set"):
        recognize(tmp_path / "absent")
    (tmp_path / "a.jpg").touch()
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match="it holds 1 pictures, and at its top a.jpg, config.yaml, data.csv"):
        recognize(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="neither a folder nor"):
        recognize(tmp_path / "notes.txt")


def test_a_table_takes_titles_in_any_order_and_case(shapes, tmp_path):
    dataset = VOCDataset(shapes, "train")
    pictures(dataset, tmp_path)
    write_table(tmp_path / "t.csv", dataset)
    same(CSVDataset(tmp_path / "t.csv"), dataset)


def test_held_out_pictures(shapes, tmp_path):
    dataset = VOCDataset(shapes, "all")
    few, held = hold_out(dataset, 0.3, seed=5)
    again = hold_out(dataset, 0.3, seed=5)[1]
    other = hold_out(dataset, 0.3, seed=6)[1]
    names = [r.image.name for r in held]
    assert names == [r.image.name for r in again] != [r.image.name for r in other]
    assert sorted([*names, *(r.image.name for r in few)]) == sorted(r.image.name for r in dataset)
    assert 3 <= len(held) <= 7 and held.class_names == dataset.class_names
    for wrong in (0, 1, -1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            hold_out(dataset, wrong)
    back = split_by(dataset, lambda i: dataset[i].image.name in names)
    assert [r.image for r in back[1]] == [r.image for r in held]


def test_a_rare_class_is_on_both_sides(shapes):
    "Two pictures in a hundred have the second class: one of them is held out, whatever the share and the seed."
    from dataclasses import replace

    dataset = VOCDataset(shapes, "all")
    pool = [dataset[i % len(dataset)] for i in range(100)]
    records = [
        replace(
            r, boxes=[[0, 0, 9, 9]], labels=[int(i in (7, 60))], difficult=None, truncated=None, crowd=None
        )
        for i, r in enumerate(pool)
    ]
    for i, record in enumerate(records):  # each picture another file
        path = shapes.parent / f"copy-{i}.jpg"
        path.write_bytes(record.image.read_bytes() + bytes([i]))
        records[i] = replace(record, image=path)
    for share in (0.1, 0.2, 0.5, 0.9):
        for seed in range(2):
            parts = hold_out(Records(records, ("common", "rare")), share, seed)
            assert [p.report.per_class["rare"]["pictures"] for p in parts] == [1, 1]
            assert abs(len(parts[1]) - 100 * share) <= 2


def test_copies_stay_together(shapes, tmp_path):
    dataset = list(VOCDataset(shapes, "train"))
    from dataclasses import replace

    copies = []
    for record in dataset[:6]:
        path = tmp_path / f"copy-{record.image.name}"
        shutil.copy(record.image, path)
        copies.append(replace(record, image=path))
    names = VOCDataset(shapes, "train").class_names
    whole = Records([*dataset, *copies], names)
    for seed in range(5):
        few, held = hold_out(whole, 0.4, seed)
        assert shared_pictures(few, held) == []
    pairs = shared_pictures(Records(dataset, names), Records(copies, names))
    assert len(pairs) == 6 and all(b.name == f"copy-{a.name}" for a, b in pairs)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
def test_names_that_are_no_utf8_can_be_held_out(shapes, tmp_path):
    for part in ("JPEGImages", "Annotations"):
        shutil.copytree(shapes / part, tmp_path, dirs_exist_ok=True)
    odd = os.fsdecode(b"caf\xe9")
    first = sorted(tmp_path.glob("*.xml"))[0]
    first.rename(tmp_path / f"{odd}.xml")
    (tmp_path / f"{first.stem}.jpg").rename(tmp_path / f"{odd}.jpg")
    few, held = hold_out(open_dataset(tmp_path), 0.3)
    assert len(few) + len(held) == 17
