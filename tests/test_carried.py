"""The detectors that the package carries have names; that of photographs is taken where nobody names one, and its absence is said."""

import json
import os
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from helpers import noise, small
from test_commands import fails, scans

from retinanet_nb import cli, cli_detect, cli_train, model_files
from retinanet_nb.hyperparameters import VOC_CLASSES
from retinanet_nb.retinanet import read_model, retinanet_model
from retinanet_nb.retinanet_box import load_detector, retinanet_box

HERE = model_files.ASSETS
FIGURES = {"voc07_map": 0.4321, "pictures": 2510, "score": 0.27, "data": "VOC 2007, val"}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    "A detector of random weights in place of the carried one of photographs, with its note."
    folder = tmp_path_factory.mktemp("assets")
    model = retinanet_model(20, small(feature_size=16, image_size=(64, 96)), VOC_CLASSES)
    model_files.save_half(retinanet_box(model), folder / "photos.keras")
    (folder / "photos.json").write_text(json.dumps(FIGURES))
    shutil.copy(HERE / "shapes.keras", folder)
    return folder


@pytest.fixture
def carried(stand_in, monkeypatch):
    monkeypatch.setattr(model_files, "ASSETS", stand_in)
    return stand_in


@pytest.fixture
def bare(tmp_path, monkeypatch):
    "A copy of the package that carries the drawn one only."
    (tmp_path / "bare").mkdir()
    shutil.copy(HERE / "shapes.keras", tmp_path / "bare")
    monkeypatch.setattr(model_files, "ASSETS", tmp_path / "bare")


def test_names_stand_for_the_carried_files(carried, monkeypatch, tmp_path):
    assert [load_detector(name).class_names[0] for name in ("photos", "shapes")] == ["aeroplane", "ball"]
    assert model_files.class_names_of("photos") == list(VOC_CLASSES)
    assert model_files.carried_figures() == FIGURES and model_files.carried_figures("shapes") is None
    theirs = read_model("photos").get_layer("retinanet")
    h = small().replace(**model_files.architecture_of("photos"))
    mine = retinanet_model(20, h, weights="photos")
    assert all(np.array_equal(a, b) for a, b in zip(mine.get_weights(), theirs.get_weights()))
    # a folder of that name is meant by ./photos
    monkeypatch.chdir(tmp_path)
    assert model_files.model_file("./photos") != model_files.model_file("photos") == carried / "photos.keras"
    assert cli._weights_file("photos") == str(carried / "photos.keras") and cli._weights_file("a") == "a"
    for damaged in ({"voc07_map": "high"}, {"score": None}, {"data": 3}):
        (carried / "shapes.json").write_text(json.dumps({**FIGURES, **damaged}))
        with pytest.raises(ValueError, match="shapes.json must hold voc07_map"):
            model_files.carried_figures("shapes")


def test_a_copy_without_it_says_so(bare, capsys, tmp_path):
    (picture,) = scans(tmp_path / "scans", 1)
    said = "carries no detector photos"
    for call in (load_detector, model_files.hyperparameters_of, lambda n: retinanet_model(20, weights=n)):
        with pytest.raises(FileNotFoundError, match=said):
            call("photos")
    assert said in fails(capsys, cli.retinanet_detect, "photos", [picture], out=str(tmp_path / "out"))
    assert said in fails(capsys, cli.retinanet_train, str(tmp_path), weights="photos")
    assert "Name it first" in fails(capsys, cli.retinanet_detect, picture, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and model_files.carried_figures() is None


def test_pictures_alone_are_looked_at_by_it(carried, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pictures = scans(tmp_path / "photos", 2)  # a folder whose name is also the detector's
    cli.retinanet_detect("photos", out="found")
    first, last = capsys.readouterr().out.splitlines()
    assert "photos, VOC07 mAP 0.43 on the 2510 pictures of VOC 2007, val; what scores less than 0.27" in first
    assert "retinanet_detect coco photos takes COCO's" in first and "150 MB" in first
    assert "in 2 pictures" in last
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert [os.path.abspath(row["image"]) for row in rows] == pictures


def test_the_usual_threshold_is_the_carried_ones_own(carried, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kept = []
    monkeypatch.setattr(cli_detect, "_detect_all", lambda *given: kept.append(given[-1]) or (0, 1, []))
    (picture,) = scans(tmp_path / "scans", 1)
    for words, threshold in ((("photos", [picture]), 0.27), ((picture,), 0.27), (("shapes", [picture]), 0.5)):
        cli.retinanet_detect(*words, out="found")
        assert kept[-1] == threshold
        cli.retinanet_detect(*words, out="found", score_threshold=0.6)
        assert kept[-1] == 0.6
    monkeypatch.setattr(model_files, "carried_figures", lambda: None)
    assert cli_detect._usual_threshold("photos") == 0.5


def test_which_word_is_a_detector(carried, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("run/config.json", "kept/best.keras", "holiday/a.jpg", "coco/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    look = cli_detect._model_and_words
    for word in ("run", "kept", "shapes", "photos", "x.keras", "x.onnx", "coco"):
        assert look(word, ("a.jpg",)) == (word, ["a.jpg"])
        if word == "coco":  # alone, it is the folder
            assert look(word, ()) == ("photos", [word])
            continue
        with pytest.raises(ValueError, match=f"what is {word} to look at"):
            look(word, None)
    for word in ("holiday", "b.png", "film.mp4", "0", "scans/*", "./coco"):
        assert look(word, ["a.jpg"]) == ("photos", [word, "a.jpg"])


def test_a_training_starts_from_the_nearest(carried, monkeypatch):
    record = SimpleNamespace(height=480, width=640)
    for names, kept in ((["wheel", "ball"], "shapes"), (["ball", "cat"], "photos"), (["cat"], "photos")):

        class Dataset(list):
            class_names = names

        h, why = cli_train._recipe(Dataset([record] * 200), gpu=False)
        assert h.weights == str(carried / f"{kept}.keras") and f"({kept})" in why
        assert h.feature_size == model_files.hyperparameters_of(kept).feature_size
        assert h.image_size == (224, 288) and h.epochs == 60
    monkeypatch.setattr(model_files, "ASSETS", HERE.parent / "nowhere")
    monkeypatch.setattr(model_files, "class_names_of", lambda name: ["ball"])
    assert cli_train._nearest_carried(["cat"]) == "shapes"


@pytest.mark.skipif(
    not (HERE / "photos.keras").is_file(), reason="this copy carries no detector of photographs"
)
def test_the_carried_detector_of_photographs():
    import io
    import zipfile

    path = HERE / "photos.keras"
    assert path.stat().st_size <= 12_000_000
    assert model_files.class_names_of("photos") == list(VOC_CLASSES)
    figures = model_files.carried_figures()
    assert 0.2 < figures["voc07_map"] < 1 and figures["pictures"] == 500
    assert 0.05 < figures["score"] < 0.6
    kinds = set()
    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
        file.visititems(
            lambda name, item: kinds.add(str(item.dtype)) if getattr(item, "ndim", 0) > 1 else None
        )
    assert kinds == {"float16"}
    picture = noise(1, (96, 128))[0]
    from retinanet_nb.retinanet_box import detect

    assert np.isfinite(detect(load_detector("photos"), picture, 0.0).scores).all()
