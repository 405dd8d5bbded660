"""Mutated annotations, pictures, model files, run configurations and manifests, read as a user's would be.

    make fuzz                                   10,000 cases of a fresh seed, which is printed
    make fuzz ARGS="--seed 7 --only coco"       the cases of one kind
    make fuzz ARGS="--seed 7 --case 1234"       one case alone, with its traceback

Every case runs in a child process with bounded memory. It fails where the reader hangs, crashes, raises anything but
`ValueError` and `OSError`, says something that doesn't name the file (or takes more than a few lines to say it),
returns nonsense, or writes anything. A failing case is kept in a folder with the command that runs it again.
"""

import argparse
import collections
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from xml.etree import ElementTree

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

SECONDS = 20  # of processor time a case
MEMORY = 4 << 30  # bytes of address space beyond what the libraries take
LONGEST = 1000  # characters of a message
FOLDERS = ("devset", "outfolder", "myrun")  # that a case may be about, as a file
# kind of case: how many of a thousand
KINDS = {
    "voc": 150,
    "split": 80,
    "coco": 170,
    "csv": 120,
    "mapping": 40,
    "yolo": 50,
    "picture": 200,
    "model": 50,
    "pth": 20,
    "config": 50,
    "hyperparameters": 30,
    "selfcheck": 5,
    "manifest": 30,
    "run": 5,
}
# what a kind needs; without it the kind is left out
NEEDS = {
    "yolo": ("retinanet_nb/folders.py", "class YOLODataset"),
    "pth": ("tests/torchvision_reference.py", "def write_pth"),
}
for kind, (file, words) in NEEDS.items():
    file = Path(__file__).resolve().parent.parent / file
    if not file.exists() or words not in file.read_text(encoding="utf-8"):
        del KINDS[kind]


class Failure(Exception):
    """A property that does not hold; the text says which."""


# ---------------------------------------------------------------------------------------------------------------
# Mutations. Each takes the case's own random.Random, so that a case depends on seed and number alone.

NUMBERS = (
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00\x01\x00\x00",
)
WORDS = (
    "NaN", "Infinity", "-Infinity", "1e400", "-1", "0", "1_000", "\u0661\u0662", "0x10", "1,5", "9" * 400, "9" * 5000, "1e-320",
    "true", "null", "", " ", "\x00", "\u202e", "\ud800", "é", "e\u0301", "../../etc/passwd", "C:\\a\\b.jpg", "//", ".",
    "CON", "a" * 300, "a" * 70_000, "x\ny", '"', "<", "&", ",", ";", "'", "%s", "{0}", "\ufeff",
)  # fmt: skip


def mutate_bytes(rng, data):
    """A few random edits of a file's bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        data = rng.choice(BYTE_EDITS)(rng, data)
    return bytes(data)


def _at(rng, data):
    # headers stand in front: every second edit is made there
    return rng.randrange(min(len(data), 64) if rng.random() < 0.5 else len(data)) if data else 0


def _flip(rng, data):
    if data:
        data[_at(rng, data)] ^= 1 << rng.randrange(8)
    return data


def _set(rng, data):
    if data:
        data[_at(rng, data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return data


def _number(rng, data):
    at, new = _at(rng, data), rng.choice(NUMBERS)[: rng.choice((2, 4))]
    data[at : at + len(new)] = new
    return data


def _cut(rng, data):
    return data[: rng.choice((0, 1, len(data) // 2, max(len(data) - 1, 0), _at(rng, data)))]


def _remove(rng, data):
    at = _at(rng, data)
    del data[at : at + rng.choice((1, 2, 7, 100))]
    return data


def _insert(rng, data):
    at = _at(rng, data)
    data[at:at] = rng.choice((rng.randbytes(rng.randrange(1, 50)), bytes(1000), b"\xff" * 30))
    return data


def _append(rng, data):
    return data + rng.choice(
        (b"\x00", rng.randbytes(200), bytes(5000), b"\xff\xd8\xff\xd9", bytes(data[:500]))
    )


def _repeat(rng, data):
    at = _at(rng, data)
    return data[:at] + data[at : at + 200] * 2 + data[at + 200 :]


def _noise(rng, data):
    return bytearray(rng.randbytes(rng.choice((1, 10, 1000))))


BYTE_EDITS = (
    _flip,
    _flip,
    _flip,
    _set,
    _set,
    _number,
    _number,
    _cut,
    _remove,
    _insert,
    _append,
    _repeat,
    _noise,
)


def mutate_text(rng, text):
    """Edits that a text format cares about: other words, other encodings, doubled and missing lines."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        edit = rng.randrange(6)
        if edit == 0:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif edit == 1:
            del lines[at]
        elif edit == 2:
            place = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + rng.choice(WORDS) + lines[at][place:]
        elif edit == 3:
            lines[at] = rng.choice(WORDS)
        elif edit == 4 and lines[at]:
            place = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:place] + lines[at][place + 1 :]
        else:
            words = lines[at].replace(">", "> ").split(",") if "," in lines[at] else lines[at].split(" ")
            words[rng.randrange(len(words))] = rng.choice(WORDS)
            lines[at] = ("," if "," in lines[at] else " ").join(words)
        text = "\n".join(lines)
    return encode(rng, text)


def encode(rng, text):
    """Mostly UTF-8, which is what everybody writes."""
    how = rng.choice(("utf-8",) * 30 + ("utf-8-sig", "utf-16", "latin-1", "utf-32"))
    return text.encode(how, "surrogatepass" if how.startswith("utf-8") else "replace")


ODD = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 1e9, -1e9, 1e308, 0.5, float("nan"), float("inf"), -float("inf"), "", "x",
    "1234", "NaN", "0", "true", "1_000", "é", "../x", "/etc/passwd", "a" * 5000, [], {}, [1, 2], [[]], {"a": 1}, [None] * 4,
    "@huge", "@deep", "@number",
)  # fmt: skip


def _places(value, path=()):
    """Every place in a JSON value, as the keys that lead to it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _inside(value, path):
    for key in path:
        value = value[key]
    return value


def mutate_json(rng, value, places=None):
    """A JSON value with a few places changed, as bytes; `places` chooses among its paths."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = [p for p in _places(value) if places is None or places(p)] or [()]
        path = rng.choice(paths)
        if not path:
            if rng.random() < 0.05:
                value = copy.deepcopy(rng.choice(ODD))
            continue
        holder, key = _inside(value, path[:-1]), path[-1]
        edit = rng.randrange(8)
        if edit == 0:
            del holder[key]
        elif edit == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif edit == 1:
            holder[rng.choice(list(holder))] = copy.deepcopy(holder[key])
        elif edit == 2:
            holder[key] = copy.deepcopy(_inside(value, rng.choice(paths)))
        elif edit == 3 and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice(
                (-holder[key], str(holder[key]), holder[key] * 1000, holder[key] + 0.5, [holder[key]])
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return json_bytes(rng, value)


def json_bytes(rng, value):
    """JSON text with what Python's writer refuses: huge numbers, endless nesting."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    deep = rng.choice((50, 2_000, 200_000))
    for word, raw in (
        ('"@huge"', "9" * rng.choice((30, 400, 5000))),
        ('"@number"', rng.choice(("1E400", "-0", "1e-400", "0.1e1"))),
        ('"@deep"', ("[" * deep + "]" * deep) if deep % 100 else '{"a":' * deep + "1" + "}" * deep),
    ):
        text = text.replace(word, raw)
    if rng.random() < 0.1:
        return mutate_text(rng, text)
    return (
        mutate_bytes(rng, text.encode("utf-8", "surrogatepass")) if rng.random() < 0.1 else encode(rng, text)
    )


# ---------------------------------------------------------------------------------------------------------------
# What is mutated: a small data set in each format, made once.

NAMES = ("ball", "brick")
XML = """<annotation>
<folder>JPEGImages</folder>
<filename>p0.jpg</filename>
<size><width>32</width><height>24</height><depth>3</depth></size>
<object>
<name>ball</name>
<difficult>0</difficult>
<truncated>1</truncated>
<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>18</ymax></bndbox>
</object>
<object>
<name>brick</name>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>32</xmax><ymax>24</ymax></bndbox>
</object>
</annotation>"""
COCO = {
    "info": {"year": 2026},
    "images": [{"id": i, "file_name": f"p{i}.jpg", "width": 32, "height": 24} for i in range(3)],
    "categories": [{"id": 1, "name": "ball", "supercategory": "toy"}, {"id": 7, "name": "brick"}],
    "annotations": [
        {
            "id": n,
            "image_id": n % 3,
            "category_id": (1, 7)[n % 2],
            "bbox": [2, 3, 10.5, 12],
            "iscrowd": 0,
            "area": 126.0,
        }
        for n in range(4)
    ],
}
TABLE = "path,x1,y1,x2,y2,class\np0.jpg,3,4,20,18,ball\np0.jpg,1,1,31,20,brick\np1.jpg,2.5,3,9,12,brick\np2.jpg,,,,,"
MAPPING = "ball,0\nbrick,1"


def picture_bytes():
    """One small picture in every format, name → bytes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (24, 32, 4), np.uint8)
    smooth = np.add.outer(np.arange(24) * 5, np.arange(32) * 4).astype(np.uint8)
    color = Image.fromarray(np.stack([smooth, smooth[::-1], noise[..., 0] // 4], 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((smooth.astype(np.uint16) * 257))
    made = {}

    def put(name, image, **options):
        file = io.BytesIO()
        image.save(
            file, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.rpartition(".")[2].upper()), **options
        )
        made[name] = file.getvalue()

    put("color.jpg", color, quality=90)
    put("turned.jpg", color, exif=exif)
    put("progressive.jpg", color, progressive=True)
    put("grey.jpg", color.convert("L"))
    put("cmyk.jpg", color.convert("CMYK"))
    put("color.png", color)
    put("alpha.png", Image.fromarray(noise))
    put("palette.png", color.convert("P"), transparency=3)
    put("deep.png", deep)
    put("bits.png", color.convert("1"))
    put("exif.png", color, exif=exif)
    put("lossy.webp", color)
    put("lossless.webp", Image.fromarray(noise), lossless=True, exif=exif)
    put("plain.tif", color)
    put("turned.tif", color, exif=exif, compression="tiff_lzw")
    put("deep.tif", deep)
    put("color.bmp", color)
    put("color.gif", color.convert("P"))
    return made


def templates(folder):
    """Everything that the cases start from, written into `folder` once."""
    folder.mkdir(parents=True)
    pictures = picture_bytes()
    (folder / "pictures").mkdir()
    for name, data in pictures.items():
        (folder / "pictures" / name).write_bytes(data)
    return folder


def model_files(folder):
    """A tiny detector and the training model in it, made when the first case asks for them."""
    made = folder / "models"
    if not made.exists():
        import keras
        from retinanet_nb.hyperparameters import HyperParameters
        from retinanet_nb.retinanet import retinanet_model
        from retinanet_nb.retinanet_box import retinanet_box

        keras.utils.set_random_seed(0)
        h = HyperParameters(
            backbone="tiny",
            feature_size=8,
            subnet_depth=1,
            image_size=(64, 64),
            max_detections=5,
            pre_nms_top_k=20,
        )
        model = retinanet_model(2, h, list(NAMES))
        beside = folder / f"models-{os.getpid()}"
        beside.mkdir()
        model.save(beside / "training.keras")
        retinanet_box(model).save(beside / "detector.keras")
        beside.rename(made)
    return made


def finished_run(folder):
    """A run of one epoch on three pictures, made when the first case asks for it."""
    made = folder / "run"
    if not made.exists():
        from retinanet_nb.hyperparameters import HyperParameters
        from retinanet_nb.training import train

        h = HyperParameters(
            backbone="tiny", feature_size=8, subnet_depth=1, image_size=(64, 64), epochs=1, batch_size=3
        )
        beside = folder / f"run-{os.getpid()}"
        train(records(folder), h, run=beside, progress=False, workers=0)
        beside.rename(made)
    return made


def records(folder):
    """The three pictures as plain records."""
    import numpy as np
    from retinanet_nb.records import Record, Records

    one = folder / "pictures" / "color.png"
    return Records(
        [Record(one, 32, 24, np.array([[2, 3, 20, 18]]), np.array([i % 2])) for i in range(3)], NAMES
    )


# ---------------------------------------------------------------------------------------------------------------
# The cases: each writes its files into `case` and returns what to call. `check(result)` looks at what came back.


def put_pictures(case, home):
    """Three whole pictures beside the annotations."""
    case.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        shutil.copy(home / "pictures" / "color.jpg", case / f"p{i}.jpg")


def check_records(dataset):
    """What every data set promises."""
    import numpy as np

    for r in dataset:
        n = len(r.labels)
        shapes = [np.shape(v) for v in (r.boxes, r.difficult, r.crowd)]
        if shapes != [(n, 4), (n,), (n,)]:
            raise Failure(f"a record with {n} labels has arrays of shapes {shapes}")
        if not np.isfinite(r.boxes).all():
            raise Failure("a box is not finite")
        if n and not (0 <= r.labels.min() and r.labels.max() < len(dataset.class_names)):
            raise Failure("a label is out of range")
        if n and not ((r.boxes[:, 2:] > r.boxes[:, :2]).all() and (r.boxes[:, :2] >= 0).all()):
            raise Failure("a box has no area or begins outside of its picture")
        if n and not ((r.boxes[:, 2] <= r.width).all() and (r.boxes[:, 3] <= r.height).all()):
            raise Failure("a box reaches beyond its picture")
        if (r.height, r.width) != (24, 32):
            raise Failure(f"a picture of 24×32 is said to be {r.height}×{r.width}")
    if len({str(n) for n in dataset.class_names}) != len(dataset.class_names):
        raise Failure("a class name occurs twice")
    str(dataset.report), json.loads(dataset.report.to_json())


def mutated_xml(rng):
    """A VOC annotation, as a tree with changed elements or as text or bytes with changed places."""
    how = rng.random()
    if how < 0.55:
        return mutated_tree(rng)
    if how < 0.7:
        return mutate_bytes(rng, XML.encode())
    if how < 0.73:
        deep = rng.choice((100, 5_000, 100_000))
        return ("<annotation>" + "<object>" * deep + "</object>" * deep + "</annotation>").encode()
    if how < 0.76:
        bomb = "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(8))
        return f'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">{bomb}]><annotation><filename>&i;</filename></annotation>'.encode()
    return mutate_text(rng, XML)


def mutated_tree(rng):
    """Elements with other texts and tags, missing, twice, or somewhere else: XML all the same."""
    root = ElementTree.fromstring(XML)
    for _ in range(rng.choice((1, 1, 2, 4))):
        inner = [(holder, element) for holder in root.iter() for element in holder]
        if not inner:
            break
        holder, element = rng.choice(inner)
        edit = rng.randrange(7)
        if edit == 0:
            holder.remove(element)
        elif edit == 1:
            holder.append(copy.deepcopy(element))
        elif edit == 2:
            element.tag = rng.choice((element.tag.upper(), "x", "{space}" + element.tag, "object", "bndbox"))
        elif edit == 3:
            element.text = f"{rng.uniform(-50, 80):.3f}"
        elif edit == 4:
            rng.choice(inner)[1].append(copy.deepcopy(element))
        else:
            element.text = rng.choice([w for w in WORDS if w.isprintable()])
    return encode(rng, ElementTree.tostring(root, "unicode"))


def voc_folder(rng, case, home, xml, listed):
    """A VOC directory with three pictures, one annotation of which is `xml`."""
    root = case / "devset"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True)
    put_pictures(root / "JPEGImages", home)
    (root / "Annotations" / "p0.xml").write_bytes(xml)
    for i in (1, 2):
        (root / "Annotations" / f"p{i}.xml").write_text(XML.replace("p0", f"p{i}"))
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(listed)
    return root


def case_voc(rng, case, home):
    from retinanet_nb.voc import VOCDataset, parse_annotation

    root = voc_folder(rng, case, home, mutated_xml(rng), b"p0\np1\np2\n")
    if rng.random() < 0.3:
        return lambda: parse_annotation(root / "Annotations" / "p0.xml"), lambda result: None
    options = dict(strict=rng.random() < 0.2, one_based=rng.random() < 0.8)
    return lambda: VOCDataset(root, rng.choice(("train", "all")), **options), check_records


def case_split(rng, case, home):
    from retinanet_nb.voc import VOCDataset

    lines = "p0\np1\np2" if rng.random() < 0.5 else "p0  1\np1 -1\np2  0"
    data = mutate_text(rng, lines) if rng.random() < 0.7 else mutate_bytes(rng, lines.encode())
    root = voc_folder(rng, case, home, XML.encode(), data)
    split = "train"
    if rng.random() < 0.2:
        split = rng.choice(
            (
                "val",
                "2007_train",
                "train+train",
                "../train",
                "all+train",
                "é",
                "a" * 300,
                "train\x00",
            )
        )
    return lambda: VOCDataset(root, split), check_records


def case_coco(rng, case, home):
    from retinanet_nb.formats import COCODataset

    put_pictures(case, home)
    text, how = json.dumps(COCO), rng.random()
    data = (
        mutate_bytes(rng, text.encode())
        if how < 0.1
        else mutate_text(rng, text)
        if how < 0.2
        else mutate_json(rng, COCO)
    )
    (case / "instances.json").write_bytes(data)
    strict = rng.random() < 0.2
    return lambda: COCODataset(case / "instances.json", strict=strict), check_records


def case_csv(rng, case, home):
    from retinanet_nb.formats import CSVDataset

    put_pictures(case, home)
    data = mutate_text(rng, TABLE) if rng.random() < 0.75 else mutate_bytes(rng, TABLE.encode())
    (case / "table.csv").write_bytes(data)
    (case / "names.csv").write_text(MAPPING)
    names = case / "names.csv" if rng.random() < 0.5 else None
    return lambda: CSVDataset(case / "table.csv", names), check_records


YAML = """# drawn by hand
path: .
train: images/train
val: [images/train]
nc: 2
names:
  0: cat
  1: a dog
"""
LINES = "0 0.5 0.5 0.25 0.5\n1 0.25 0.125 0.25 0.25\n1 0.1 0.1 0.4 0.1 0.4 0.6\n"


def case_yolo(rng, case, home):
    from retinanet_nb.folders import YOLODataset

    pictures, labels = case / "images" / "train", case / "labels" / "train"
    put_pictures(pictures, home)
    labels.mkdir(parents=True)
    for i in range(2):  # the third picture has no objects
        (labels / f"p{i}.txt").write_text(LINES)
    (case / "data.yaml").write_text(YAML)
    path, text = (case / "data.yaml", YAML) if rng.random() < 0.4 else (labels / "p0.txt", LINES)
    data = mutate_text(rng, text) if rng.random() < 0.75 else mutate_bytes(rng, text.encode())
    path.write_bytes(data)
    split = rng.choice(("train", "val"))
    return lambda: YOLODataset(case / "data.yaml", split), check_records


def case_pth(rng, case, home):
    import numpy as np
    from retinanet_nb.weights import read_pth
    from torchvision_reference import write_pth

    path, state = case / "weights.pth", {"a.weight": np.ones((3, 2), np.float32), "b.num": np.arange(2)}
    write_pth(path, state)
    if rng.random() < 0.5:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    else:  # the archive is whole, and one of its files is not
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        name = rng.choice(sorted(files))
        files[name] = mutate_bytes(rng, files[name])
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)

    def check(arrays):
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) or array.nbytes > 1e6:
                raise Failure(f"{name!r} is {type(array).__name__}")

    return lambda: read_pth(path), check


def case_mapping(rng, case, home):
    from retinanet_nb.formats import CSVDataset

    put_pictures(case, home)
    data = mutate_text(rng, MAPPING) if rng.random() < 0.75 else mutate_bytes(rng, MAPPING.encode())
    (case / "table.csv").write_text(TABLE)
    (case / "names.csv").write_bytes(data)
    return lambda: CSVDataset(case / "table.csv", case / "names.csv"), check_records


SIZES = (0, 1, 3, 33, 255, 4000, 20_000, 65_535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)


def huge(rng, name, data):
    """The picture with another size in its header (and, for PNG, the checksum that goes with it)."""
    data, w, h = bytearray(data), rng.choice(SIZES), rng.choice(SIZES)
    if name.endswith("png"):
        data[16:24] = struct.pack(">II", w, h)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif name.endswith("jpg"):
        at = next(i for i in range(len(data) - 9) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
        data[at + 5 : at + 9] = struct.pack(">HH", h & 0xFFFF, w & 0xFFFF)
    elif name.endswith("bmp"):
        data[18:26] = struct.pack(
            "<ii", w if w < 1 << 31 else -w % (1 << 31), rng.choice((h & 0x7FFFFFFF, -(h & 0x7FFFFFFF)))
        )
    elif name.endswith("gif"):
        data[6:10] = struct.pack("<HH", w & 0xFFFF, h & 0xFFFF)
    elif name.endswith("webp"):
        at = 24 if data[12:16] == b"VP8X" else 26 if data[12:16] == b"VP8 " else 21
        data[at : at + 4] = struct.pack("<I", (w & 0x3FFF) | (h & 0x3FFF) << 16)
    else:
        for tag, value in ((256, w), (257, h)):
            at = data.find(struct.pack("<HHI", tag, 4, 1))
            at = at if at >= 0 else data.find(struct.pack("<HHI", tag, 3, 1))
            if at >= 0:
                data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(data)


def bomb(rng):
    """A PNG of a few kilobytes that grows to many megabytes."""
    side = rng.choice((3_000, 12_000, 30_000))
    rows, packer = bytes(1 + -(-side // 8)), zlib.compressobj(1)
    data = b"".join(packer.compress(rows * 100) for _ in range(side // 100)) + packer.flush()
    chunk = lambda kind, body: (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def case_picture(rng, case, home):
    from retinanet_nb import pictures

    name = rng.choice(sorted(p.name for p in (home / "pictures").iterdir()))
    data, how = (home / "pictures" / name).read_bytes(), rng.random()
    if how < 0.25:
        data = huge(rng, name, data)
    elif how < 0.26:
        name, data = "bomb.png", bomb(rng)
    if how > 0.15:
        data = mutate_bytes(rng, data)
    if rng.random() < 0.1:
        name = name.rpartition(".")[0] + rng.choice(
            (".jpg", ".png", ".tif", ".bmp", ".webp", ".gif", ".txt", "")
        )
    path = case / name
    path.write_bytes(data)
    return lambda: read_both_ways(pictures, path), lambda result: None


def read_both_ways(pictures, path):
    """Header and pixels agree: both refuse the file, or both say the same size."""
    import numpy as np

    def attempt(read):
        try:
            return read(path)
        except (ValueError, OSError) as error:
            return error

    header = attempt(pictures.read_header)
    image = attempt(pictures.read_image)
    if isinstance(image, Exception):
        if isinstance(header, Exception):
            about(header, path.parent)
        raise image
    if isinstance(header, Exception):
        raise Failure(f"the header is refused ({header}) and the picture is read") from header
    if not (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        raise Failure(f"a picture came as {image.dtype} of shape {image.shape}")
    if image.shape[:2] != (header.height, header.width):
        raise Failure(f"the header says {header.height}×{header.width}, the picture has {image.shape[:2]}")


def case_model(rng, case, home):
    from retinanet_nb.retinanet_box import load_detector

    name = rng.choice(("detector.keras", "detector.keras", "training.keras"))
    source = model_files(home) / name
    (case / name).write_bytes(mutated_archive(rng, source))
    return lambda: load_detector(case / name), lambda detector: check_detector(detector)


def mutated_archive(rng, source):
    """A .keras file with one member changed, missing, doubled or renamed, or with changed bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    how = rng.random()
    if how < 0.65:
        members["config.json"] = mutated_config(rng, json.loads(members["config.json"]))
    elif how < 0.7:
        name = rng.choice(sorted(members))
        members[name] = mutate_bytes(rng, members[name])
    elif how < 0.8:
        members["model.weights.h5"] = mutated_weights(rng, members["model.weights.h5"])
    elif how < 0.9:
        members["metadata.json"] = mutate_json(rng, json.loads(members["metadata.json"]))
    else:
        name = rng.choice(sorted(members))
        value = members.pop(name)
        if rng.random() < 0.7:
            members[
                rng.choice(("../evil", "/evil", "x" * 300, name.upper(), name + "/", "é", "a/" * 200 + "b"))
            ] = value
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def mutated_config(rng, config):
    """The configuration of a model: our own layers' fields, the hyperparameters inside, or any place."""
    ours = ("AnchorParameters", "card", "detections", "filter", "anchors", "boxes", "clipped")
    cards = [p for p in _places(config) if p and p[-1] == "hyperparameters"]
    if rng.random() < 0.4 and cards:
        path = rng.choice(cards)
        holder = _inside(config, path[:-1])
        inner = mutate_json(rng, json.loads(holder[path[-1]]))
        holder[path[-1]] = inner.decode("utf-8", "surrogateescape")
        return json.dumps(config).encode("utf-8", "surrogateescape")
    if rng.random() < 0.6:
        near = [
            p
            for p in _places(config)
            if p[-1:] == ("name",) and isinstance(_inside(config, p), str) and _inside(config, p) in ours
        ]
        if near:
            root = rng.choice(near)[:-1]
            return mutate_json(rng, config, lambda p: p[: len(root)] == root and p != root)
    return mutate_json(rng, config)


def mutated_weights(rng, data):
    """An HDF5 file with numbers that are none, with another shape, or without one of its arrays."""
    import h5py
    import numpy as np

    file = io.BytesIO(data)
    with h5py.File(file, "r+") as h5:
        found = []
        h5.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        name = rng.choice(sorted(found))
        value = h5[name][()]
        how = rng.randrange(4)
        if how == 0:
            h5[name][...] = np.full_like(value, rng.choice((np.nan, np.inf, 1e30, -1e30)))
        else:
            del h5[name]
            if how == 1:
                h5[name] = np.zeros(rng.choice(((1,), (7, 7), (*value.shape, 2))), "float32")
            elif how == 2:
                h5[name] = "text"
    return file.getvalue()


def check_detector(detector):
    """A detector that was accepted has finite weights and can be asked."""
    import numpy as np

    for w in detector.weights:
        if not np.isfinite(np.asarray(w, "float32")).all():
            raise Failure(f"the weight {w.path} is not finite")
    h = detector.hyperparameters
    if h.max_detections <= 1000 and h.pre_nms_top_k <= 10_000:
        boxes, scores, labels = (np.asarray(x) for x in detector(np.zeros((1, 64, 64, 3), "uint8")))
        if len(detector.class_names) <= labels.max():
            raise Failure("a label has no name")
        if np.isnan(boxes).any() or np.isnan(scores).any():
            raise Failure("a box or a score is no number")


def run_config():
    """What `train` writes, with data that isn't there."""
    from retinanet_nb.hyperparameters import HyperParameters

    return {
        "class_names": list(NAMES),
        "pictures": 3,
        "files": "0123456789abcdef",
        "validation_pictures": 0,
        "hyperparameters": json.loads(HyperParameters(backbone="tiny", image_size=(64, 64)).to_json()),
        "engine": "tensorflow",
        "data": {
            "path": "nowhere.csv",
            "split": "trainval",
            "val_split": None,
            "images": None,
            "validate_every": 1,
        },
    }


def case_config(rng, case, home):
    from retinanet_nb import cli

    run = case / "myrun"
    run.mkdir()
    config, how = run_config(), rng.random()
    data = json.dumps(config).encode()
    if how < 0.1:
        data = mutate_bytes(rng, data)
    elif how < 0.2:
        data = mutate_text(rng, data.decode())
    else:
        data = mutate_json(rng, config)
    (run / "config.json").write_bytes(data)
    return lambda: as_command(cli.retinanet_train, resume=str(run)), lambda result: None


def as_command(command, **options):
    """A command's sentence on standard error, as the error it stands for."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command(**options)
    except SystemExit as stop:
        if stop.code != 1:
            raise Failure(f"exit status {stop.code}") from stop
        raise ValueError(said.getvalue().strip()) from None


def case_hyperparameters(rng, case, home):
    from retinanet_nb.hyperparameters import HyperParameters

    value, how = json.loads(HyperParameters().to_json()), rng.random()
    data = mutate_text(rng, json.dumps(value)) if how < 0.2 else mutate_json(rng, value)
    text = data.decode("utf-8", "surrogateescape")
    (case / "text.json").write_bytes(data)

    def again(h):
        if HyperParameters.from_json(h.to_json()) != h:
            raise Failure("hyperparameters change when they are written and read")

    return lambda: named(HyperParameters.from_json, text), again


def named(read, text):
    """Readers of text know no file: their message counts as if it named one."""
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"text.json: {error}") from error


def case_selfcheck(rng, case, home):
    from retinanet_nb.hyperparameters import HyperParameters
    from retinanet_nb.selfcheck import SelfCheck

    value = {
        "ok": True, "failed": None, "stages": [], "pictures": ["a.jpg"], "learning_rate": 0.001,
        "history": [{"loss": 1.0}], "tests": [[1, 0.5]], "hyperparameters": json.loads(HyperParameters().to_json()),
    }  # fmt: skip
    data = mutate_json(rng, value)
    (case / "text.json").write_bytes(data)
    return lambda: named(SelfCheck.from_json, data.decode("utf-8", "surrogateescape")), lambda result: None


def case_manifest(rng, case, home):
    from retinanet_nb.files import JOURNAL, MANIFEST, claim

    folder = case / "outfolder"
    folder.mkdir()
    files = {"ours.txt": b"ours", "cat.jpg": b"somebody's", ".1-2-cat.jpg": b"half"}
    if rng.random() < 0.3:
        files["pictures/page-1.jpg"] = b"theirs"
    for name, data in {**files, "../outside.txt": b"far away", "../.1-2-outside.txt": b"half"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    digest = hashlib.sha256(b"ours").hexdigest()
    listed = {"ours.txt": digest, "cat.jpg": hashlib.sha256(b"other").hexdigest()}
    if rng.random() < 0.4:
        listed[
            rng.choice(("../outside.txt", str(case / "outside.txt"), "", ".", "x" * 300, "a\x00b", ".."))
        ] = rng.choice((None, digest))
    value = {"made by": "retinanet_nb", "files": listed}
    data, how = json.dumps(value).encode(), rng.random()
    if how < 0.15:
        data = mutate_bytes(rng, data)
    elif how < 0.25:
        data = mutate_text(rng, data.decode())
    elif how < 0.75:
        data = mutate_json(rng, value)
    (folder / MANIFEST).write_bytes(data)
    if rng.random() < 0.5:  # and a process was killed here
        rows = [("ours.txt", None), ("ours.txt", digest), ("cat.jpg", None), ("../outside.txt", digest)]
        rows = rng.sample(rows, rng.randint(0, 4)) + [(None, digest), (["x"], 1)][: rng.randint(0, 2)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        how = rng.random()
        data = mutate_bytes(rng, text.encode()) if how < 0.3 else text.encode()
        (folder / JOURNAL).write_bytes(mutate_text(rng, text) if how > 0.7 else data)

    def use():
        with claim(folder, ["ours.txt", "new.txt"], [r"pictures/page-\d+\.jpg", r".*outside\.txt"]) as mine:
            mine.write("ours.txt", lambda path: path.write_text("new"))

    return use, lambda result: None


def case_run(rng, case, home):
    from retinanet_nb.hyperparameters import HyperParameters
    from retinanet_nb.training import train

    shutil.copytree(finished_run(home), case / "myrun")
    files = [p for p in (case / "myrun").rglob("*") if p.is_file() and p.suffix in (".json", ".h5", ".keras")]
    path = rng.choice(sorted(files))
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_bytes(mutate_json(rng, json.loads(data)))
    elif path.suffix == ".keras":
        path.write_bytes(mutated_archive(rng, path))
    else:
        path.write_bytes(mutate_bytes(rng, data))
    h = HyperParameters(
        backbone="tiny", feature_size=8, subnet_depth=1, image_size=(64, 64), epochs=1, batch_size=3
    )
    return lambda: train(
        records(home), h, run=case / "myrun", resume=True, progress=False, workers=0
    ), lambda result: None


# ---------------------------------------------------------------------------------------------------------------
# One case: made, run, judged.


def kind_of(rng, only):
    return rng.choices(list(KINDS), list(KINDS.values()))[0] if only is None else rng.choice(only)


def contents(folder):
    """Every file below a folder with its bytes' checksum."""
    return {
        p.relative_to(folder).as_posix(): hashlib.md5(p.read_bytes()).hexdigest() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def about(error, case):
    """The message is a sentence or two and names one of the case's files."""
    text = str(error)
    names = {p.name for p in case.rglob("*") if p.is_file() or p.name in FOLDERS} | {
        "p0",
        "p1",
        "p2",
        "nowhere.csv",
    }
    if "there is no data set" in text:  # a run's config.json names another one
        return
    if str(case) not in text and not any(re.search(rf"(?<!\w){re.escape(n)}(?!\w)", text) for n in names):
        raise Failure(f"the message names no file: {text[:300]!r}") from error
    if len(text) > LONGEST:
        raise Failure(f"the message has {len(text):,} characters: {text[:300]!r}") from error
    if text.count("\n") > 3:
        raise Failure(f"the message has {text.count(chr(10))} lines: {text[:300]!r}") from error


def judge(kind, call, check, case):
    """Run one case; returns how it ended, raises where it ended badly."""
    writes = kind in ("manifest", "run", "config")
    before = contents(case)
    try:
        result = call()
    except (ValueError, OSError) as error:
        about(error, case)
        outcome = "FileNotFoundError" if isinstance(error, FileNotFoundError) else "ValueError"
        outcome = outcome if isinstance(error, (ValueError, FileNotFoundError)) else "OSError"
        if os.environ.get("FUZZ_MESSAGES"):
            with open(os.environ["FUZZ_MESSAGES"], "a", errors="backslashreplace") as file:
                print(
                    kind, outcome, str(error)[:400].replace(str(case), "CASE").replace("\n", " ⏎ "), file=file
                )
    else:
        check(result)
        outcome = "read"
    after = contents(case)
    if not writes and after != before:
        raise Failure(f"written: {sorted(set(after) ^ set(before)) or 'a file is changed'}")
    if kind == "manifest":
        for name in set(before) & {"outside.txt", ".1-2-outside.txt", "outfolder/pictures/page-1.jpg"}:
            if after.get(name) != before[name]:
                raise Failure(f"{name} was not ours, and is changed or gone")
    return outcome


def place_of(error):
    """The innermost line of the package in a traceback, to tell failures apart."""
    frames = traceback.extract_tb(error.__traceback__)
    cause = error.__cause__
    if isinstance(error, Failure) and cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
    ours = [f for f in frames if "retinanet_nb" in f.filename and "tests" not in Path(f.filename).parts[-2:]]
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else ""


def run_case(seed, number, home, work, only=None):
    """Make and run case `number`; a dictionary for the report."""
    rng = random.Random(f"{seed}:{number}")
    kind = kind_of(rng, only)
    case = work / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir(parents=True)
    started, told = time.process_time(), {"case": number, "kind": kind, "failure": None}
    try:
        call, check = globals()[f"case_{kind}"](rng, case, home)
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told["outcome"] = judge(kind, call, check, case)
    except Exception as error:
        name = type(error).__name__ if not isinstance(error, Failure) else str(error).partition(":")[0]
        told.update(
            failure=f"{name}",
            place=place_of(error),
            message=str(error)[:300],
            trace=traceback.format_exc()[-6000:],
        )
    told["seconds"] = time.process_time() - started
    if told["failure"] is None and told["seconds"] > SECONDS:
        told.update(
            failure="takes too long",
            place=kind,
            message=f"{told['seconds']:.0f} s of processor time",
            trace="",
        )
    return told


# ---------------------------------------------------------------------------------------------------------------
# The child that runs cases, and the parent that watches it.


def serve(seed, home, work, only):
    """Run the cases whose numbers come in on standard input; one line of JSON for each on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(os.devnull, "w")
    warm_up(home, only)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_case(seed, int(line), home, work, only)), file=answers, flush=True)


def warm_up(home, only):
    """Import everything before the memory is bounded, so that no case pays for it."""
    import cv2  # noqa: F401
    import numpy as np
    import retinanet_nb.folders
    import retinanet_nb.formats
    import retinanet_nb.pictures
    import retinanet_nb.voc  # noqa: F401

    kinds = only or list(KINDS)
    if set(kinds) & {"model", "run", "selfcheck"}:
        from retinanet_nb.retinanet_box import load_detector

        load_detector(model_files(home) / "detector.keras")(np.zeros((1, 64, 64, 3), "uint8"))
    if "run" in kinds:
        finished_run(home)


class Child:
    """A process that runs cases; started again where it dies or hangs."""

    def __init__(self, options, home, work):
        self.command = [sys.executable, __file__, "--serve", str(home), "--seed", str(options.seed)]
        self.command += ["--work", str(work), *(["--only", *options.only] if options.only else [])]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._answer(600) != "ready":
            raise SystemExit(
                "the child that runs the cases could not start: python tests/fuzz.py --case 0 shows why"
            )

    def _answer(self, seconds):
        ready = select.select([self.process.stdout], [], [], seconds)[0]
        return self.process.stdout.readline().strip() if ready else None

    def run(self, number):
        """The report of one case; a crash and a hang are reports too."""
        if self.process is None:
            self.start()
        print(number, file=self.process.stdin, flush=True)
        answer = self._answer(10 * SECONDS)
        if answer:
            return json.loads(answer)
        self.process.kill()
        code = self.process.wait()
        self.process = None
        failure = "hangs" if answer is None else f"crash ({code})"
        return {
            "case": number,
            "kind": "?",
            "failure": failure,
            "place": "",
            "message": "",
            "trace": "",
            "seconds": 0,
        }

    def stop(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def keep(options, report, work, home):
    """The files of a failing case, its traceback, and how to run it alone."""
    folder = options.keep / f"{options.seed}-{report['case']}"
    if (work / "case").exists():
        shutil.copytree(work / "case", folder / "files", dirs_exist_ok=True)
    only = f" --only {' '.join(options.only)}" if options.only else ""
    how = f"python tests/fuzz.py --seed {options.seed} --case {report['case']}{only}"
    (folder / "failure.txt").write_text(
        f"{report['kind']}: {report['failure']} {report['message']}\n\n{how}\n\n{report['trace']}",
        errors="backslashreplace",
    )
    return how


def fuzz(options, show=print):
    """Run the cases; returns the failures, grouped."""
    groups, outcomes, slowest = collections.defaultdict(list), collections.Counter(), (0, None)
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        home, work = templates(Path(folder) / "templates"), Path(folder) / "work"
        child = Child(options, home, work)
        for number in range(options.start, options.start + options.cases):
            report = child.run(number)
            slowest = max(slowest, (report["seconds"], number))
            if report["failure"] is None:
                outcomes[report["kind"], report["outcome"]] += 1
                continue
            group = groups[report["kind"], report["failure"], report["place"]]
            group.append(number)
            if len(group) <= 2:
                how = keep(options, report, work, home)
                show(
                    f"FAILED {report['kind']} {report['failure']} {report['place']}: {report['message'][:200]!a}\n   {how}"
                )
        child.stop()
    summary(options, groups, outcomes, slowest, time.time() - started, show)
    return dict(groups)


def summary(options, groups, outcomes, slowest, seconds, show):
    """How the cases ended, by kind, and what failed."""
    kinds = sorted({k for k, _ in outcomes} | {k for k, _, _ in groups})
    ends = ("read", "ValueError", "FileNotFoundError", "OSError")
    show(f"\n{'':16}" + "".join(f"{e:>18}" for e in ends) + f"{'failed':>18}")
    for kind in kinds:
        failed = sum(len(v) for k, v in groups.items() if k[0] == kind)
        show(f"{kind:16}" + "".join(f"{outcomes[kind, e]:18,}" for e in ends) + f"{failed:18,}")
    for (kind, failure, place), cases in sorted(groups.items(), key=lambda g: -len(g[1])):
        show(f"{len(cases):6,} × {kind}: {failure} {place}; cases {', '.join(map(str, cases[:5]))}")
    failed = sum(map(len, groups.values()))
    show(
        f"seed {options.seed}: {options.cases:,} cases in {seconds:.0f} s, {failed:,} failed"
        f" in {len(groups)} ways; the slowest took {slowest[0]:.1f} s (case {slowest[1]})"
    )


def arguments(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="how many (default: 10,000)")
    parser.add_argument("--start", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, help="default: a fresh one, which is printed")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), help="kinds of cases")
    parser.add_argument("--case", type=int, help="run this one alone, in this process, with its traceback")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder for failing cases")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(3))
    return options


def main():
    options = arguments()
    if options.serve:
        serve(options.seed, options.serve, options.work, options.only)
    elif options.case is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            home = templates(Path(folder) / "templates")
            report = run_case(options.seed, options.case, home, Path(folder) / "work", options.only)
        print(report.pop("trace", ""))
        print(json.dumps(report))
        sys.exit(report["failure"] is not None)
    else:
        print(f"seed {options.seed}", flush=True)
        sys.exit(bool(fuzz(options, lambda text: print(text, flush=True))))


if __name__ == "__main__":
    main()
