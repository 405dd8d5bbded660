"""`--weights coco` from the command line: fetched once, converted, trained from, detected with."""

import hashlib
import json

import cv2
import numpy as np
import pytest
import torchvision_reference as reference
from helpers import Server, numpy
from test_commands import fails

from retinanet_nb import cli, model_files, weights
from retinanet_nb.__main__ import main
from retinanet_nb.model_files import ARCHITECTURE, class_names_of, hyperparameters_of
from retinanet_nb.retinanet import read_model

LAST = "classification_subnet_output"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A narrow file of the published form, served; its name; a cache folder for all tests, so that one conversion does."
    folder = tmp_path_factory.mktemp("published")
    path = folder / "small.pth"
    reference.write_pth(path, reference.older(reference.tensors(1, width=16)))
    body = path.read_bytes()
    name = f"retinanet_resnet50_fpn_coco-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    with Server(body) as server:
        yield server, name, folder / "cache"


@pytest.fixture
def served(published, monkeypatch, tmp_path):
    "The server; its file is coco-v1."
    server, name, cache = published
    monkeypatch.setattr(weights, "_ADDRESS", f"{server.url}/models")
    monkeypatch.setitem(weights._RELEASED, "coco-v1", name)
    monkeypatch.setenv("RETINANET_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return server


@pytest.fixture
def photographs(tmp_path):
    "Four pictures in a folder, boxes beside them: a cat in each, and a racoon."
    folder = tmp_path / "photographs"
    folder.mkdir()
    box = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
    for i in range(4):
        cv2.imwrite(str(folder / f"{i}.jpg"), np.random.default_rng(i).integers(0, 255, (64, 96, 3), "uint8"))
        objects = box.format("cat", 4, 4, 40, 40) + box.format("racoon", 50, 20, 90, 60)
        size = "<size><width>96</width><height>64</height><depth>3</depth></size>"
        (folder / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename>{size}{objects}</annotation>"
        )
    return folder


def by_name(model):
    "Layer and part → weight; BatchNorm of a detector's inner model included."
    return {"/".join(v.path.split("/")[-2:]): numpy(v) for v in model.weights}


def test_a_training_starts_from_coco(served, photographs, capsys):
    rate = 1e-3
    main(
        f"train {photographs} --weights coco-v1 --epochs 1 --batch_size 2 --image_size 64x96 --run run"
        f" --learning_rate {rate} --val_split none --classes racoon,cat".split()
    )
    said = capsys.readouterr()
    assert "the rows of cat" in said.out and "preset fine-tune" in said.out
    path = weights.cache_folder() / "coco-v1.keras"
    assert path.is_file() and [p.name for p in path.parent.glob("*.pth")] == [weights._RELEASED["coco-v1"]]
    assert len(served.asked) == 1 and served.asked[0][0].endswith(weights._RELEASED["coco-v1"])

    theirs, mine = hyperparameters_of(path), hyperparameters_of("run/last.keras")
    for name in (*ARCHITECTURE, "sigma", "freeze_stages", "freeze_batch_norm"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert (mine.backbone, mine.box_std, mine.freeze_stages) == ("resnet50v1.5", (1, 1, 1, 1), 2)
    assert (mine.learning_rate, mine.schedule, mine.precision) == (rate, "cosine", "float32")
    assert mine.image_size == (64, 96)
    assert class_names_of("run/last.keras") == ["racoon", "cat"]

    before, after = by_name(read_model(path)), by_name(read_model("run/last.keras"))
    changed = {name for name in before if LAST not in name and (before[name] != after[name]).any()}
    frozen = {name for name in before if "_bn/" in name or name.startswith(("stem", "c2_"))}
    assert len(frozen) > 200 and not changed & frozen
    assert {"c3_1_1_conv/kernel", "c5_3_3_conv/kernel", "P3/kernel"} <= changed

    # two steps of AdamW move no weight by more than two rates or so
    old, new = before[f"{LAST}/kernel"], after[f"{LAST}/kernel"]
    old, new = old.reshape(*old.shape[:-1], 9, 80), new.reshape(*new.shape[:-1], 9, 2)
    row = old[..., weights.COCO_CLASSES.index("cat")]
    assert np.abs(new[..., 1] - row).max() < 3 * rate < np.abs(new[..., 0] - row).mean()
    bias = after[f"{LAST}/bias"].reshape(9, 2)[:, 0]
    np.testing.assert_allclose(1 / (1 + np.exp(-bias)), 0.01, rtol=0.02)  # the new class begins with π

    assert class_names_of("run/detector.keras") == ["racoon", "cat"]


def test_a_picture_is_looked_at_with_coco(served, photographs, tmp_path):
    cli.retinanet_detect("coco-v1", [str(photographs / "0.jpg")], "found", 0.0)
    assert len(served.asked) == 1  # the test above has fetched it, or this one
    (row,) = json.loads((tmp_path / "found/detections.json").read_text())
    assert row["detections"] and {d["name"] for d in row["detections"]} <= set(weights.COCO_CLASSES)


def test_without_a_network_one_sentence(served, photographs, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(weights, "_ADDRESS", "http://127.0.0.1:9/models")
    monkeypatch.setattr("retinanet_nb.download.time.sleep", lambda seconds: None)
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    for line in (
        f"train {photographs} --weights coco-v1 --run run",
        f"detect coco-v1 {photographs} --out found",
    ):
        name = f"retinanet_{line.split()[0]}"
        with pytest.raises(SystemExit) as e:
            main(line.split())
        *bar, error = capsys.readouterr().err.splitlines()
        assert e.value.code == 1 and error.startswith(f"{name}: the weights could not be had")
        assert weights._RELEASED["coco-v1"] in error and str(tmp_path / "cache") in error
        assert "Traceback" not in "".join(bar)
    assert not (tmp_path / "run").exists()


def test_nothing_is_fetched_for_a_folder_that_is_not_there(served, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    before = len(served.asked)
    error = fails(capsys, cli.retinanet_train, str(tmp_path / "nowhere"), weights="coco-v1")
    assert "nowhere" in error and len(served.asked) == before and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("words", [["photo.jpg"], ["a b.png", "c.png"], ["film.mp4"], ["photographs"]])
def test_a_detector_that_is_not_named(capsys, photographs, monkeypatch, tmp_path, words):
    "Where none is carried, the sentence says which ones there are, with a line that can be copied."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_files, "ASSETS", tmp_path / "nowhere")
    error = fails(capsys, cli.retinanet_detect, words[0], words[1:])
    quoted = f"'{words[0]}'" if " " in words[0] else words[0]
    assert f"retinanet_detect coco {quoted}" in error and "shapes" in error and "MB" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photographs"]


def test_a_detector_with_nothing_to_look_at(capsys):
    assert "what is shapes to look at" in fails(capsys, cli.retinanet_detect, "shapes")
    assert "what is shapes to look at" in fails(capsys, cli.retinanet_detect, "shapes", [])
