"""From a folder to a detector without reading: what the commands settle by themselves, and what they write down."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from retinanet_nb import cli, cli_train
from retinanet_nb.hyperparameters import PRESETS
from retinanet_nb.model_files import carried_file
from retinanet_nb.shapes import make_shapes
from test_commands import CARRIED, fails, foreign, stub  # noqa: F401


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    "Twenty pictures with their XML beside them, one of a name that is no UTF-8."
    root = tmp_path_factory.mktemp("flat")
    shapes = make_shapes(root / "shapes", train=20, val=4, test=1, size=(96, 128), seed=4)
    folder = root / "my pictures"
    folder.mkdir()
    for split in ("JPEGImages", "Annotations"):
        for path in (shapes / split).glob("train*"):
            shutil.copy(path, folder)
    if sys.platform == "linux":
        for path in list(folder.glob("train*1.*"))[:2]:
            twin = path.with_suffix(".xml" if path.suffix == ".jpg" else ".jpg")
            if twin.exists():
                for one in (path, twin):
                    one.rename(folder / f"{os.fsdecode(b'caf' + bytes([0xE9]))}{one.suffix}")
                break
    return folder


@pytest.fixture
def asked(monkeypatch):
    "What `train` was asked for by the command, which then fails."
    from retinanet_nb import training

    got = {}

    def stop(dataset, hyperparameters, validation=None, about=None, **kwargs):
        got.update(dataset=dataset, h=hyperparameters, validation=validation, about=about["data"])
        raise ValueError("enough")

    monkeypatch.setattr(training, "train", stop)
    return got


def train(capsys, *args, **kwargs):
    "What the command printed before it came to the training."
    with pytest.raises(SystemExit):
        cli.retinanet_train(*map(str, args), **kwargs)
    out, error = capsys.readouterr()
    assert "enough" in error, error
    return out


def test_nothing_but_a_folder(capsys, asked, flat, monkeypatch):
    monkeypatch.setattr(cli_train, "_has_gpu", lambda: False)
    out = train(capsys, flat)
    h, tiny = asked["h"], PRESETS["tiny"]
    assert (len(asked["dataset"]) + len(asked["validation"]), h.backbone) == (20, "tiny")
    assert (
        h.weights == str(carried_file("shapes"))
        and h.anchors == tiny.anchors
        and h.learning_rate == tiny.learning_rate
    )
    assert h.image_size[0] < h.image_size[1] and all(side % 32 == 0 for side in h.image_size)
    assert (h.epochs, h.batch_size) == (60, 2) and h.scale_jitter == (0.8, 1.2)
    for words in ("my pictures: folder (20 XML files in it)", "held out", "no graphics card", "proposed: "):
        assert words in out
    names = asked["about"]["held_out"]
    assert names == [r.image.name for r in asked["validation"]] and asked["about"]["split"] == "all"


def test_a_graphics_card_and_whatever_is_named(capsys, asked, flat, monkeypatch):
    monkeypatch.setattr(cli_train, "_has_gpu", lambda: True)
    out = train(capsys, flat, epochs=7, set="color_jitter=0")
    h = asked["h"]
    assert (h.backbone, h.weights, h.epochs, h.color_jitter) == ("resnet50", None, 7, 0)
    assert "a graphics card is there" in out
    for said in (
        dict(preset="tiny"),
        dict(backbone="mobilenetv2"),
        dict(image_size="160"),
        dict(weights="shapes"),
    ):
        assert "proposed" not in train(capsys, flat, **said)
        h = asked["h"]
        sizes = {"backbone": (512, 512), "weights": (192, 256)}
        assert h.image_size == sizes.get(next(iter(said)), (160, 160))
    assert h.weights == str(carried_file("shapes")) and h.backbone == "tiny"  # what the file brings along
    assert "proposed: canvas" in train(capsys, flat, preset="tiny", auto=True)


def test_weights_bring_their_canvas(capsys, asked, flat, monkeypatch):
    "That of the file's card, as far as the usual picture fills it and the machine bears it, unless one is named."
    card = PRESETS["fine-tune"].replace(image_size=(1024, 1024))
    monkeypatch.setattr("retinanet_nb.model_files.hyperparameters_of", lambda path: card)
    records = [SimpleNamespace(height=h, width=w) for h, w in ((480, 640), (480, 640), (10, 9000))]
    for gpu, size in ((True, (768, 1024)), (False, (448, 576))):
        canvas, why = cli_train._canvas_for_weights(records, card.image_size, gpu)
        assert canvas == size and why.startswith("weights trained at 1024×1024")
        assert ("no graphics card" in why) == (not gpu)
        monkeypatch.setattr(cli_train, "_has_gpu", lambda gpu=gpu: gpu)
        for words in ({}, {"preset": "fine-tune"}):
            out = train(capsys, flat, weights="shapes", **words)
            # pictures of 96×128 are not enlarged beyond twice their size
            assert asked["h"].image_size == (192, 256) and "canvas 192×256" in out and why in out
    for words in ({"image_size": "64"}, {"set": "image_size=[64,64]"}):
        assert "trained at" not in train(capsys, flat, weights="shapes", **words)
        assert asked["h"].image_size == (64, 64)
    assert "trained at" not in train(capsys, flat, weights="shapes", preset="tiny")
    assert "trained at" not in train(capsys, flat, weights="imagenet")
    assert asked["h"].image_size == (512, 512)


@pytest.mark.parametrize("text, count", [("0.25", 5), ("25%", 5), ("none", 0), ("0.5", 10)])
def test_a_share_is_held_out(capsys, asked, flat, text, count):
    train(capsys, flat, preset="tiny", val_split=text)
    held = asked["validation"]
    assert abs((len(held) if held else 0) - count) <= (1 if count else 0)


def test_splits_that_are_there_are_taken(capsys, asked, flat):
    shapes = flat.parent / "shapes"
    train(capsys, shapes, preset="tiny")
    assert (len(asked["dataset"]), len(asked["validation"])) == (20, 4)
    train(capsys, shapes, preset="tiny", split="train")
    assert (len(asked["dataset"]), asked["validation"]) == (20, None)
    out = train(capsys, shapes, preset="tiny", split="train", val_split="trainval")
    assert "also trained on, byte for byte: 20" in out


def test_validation_that_contradicts_itself(capsys, flat, tmp_path):
    table = foreign(tmp_path, "other.csv")
    for val in ("val", "0.2", "none"):
        error = fails(capsys, cli.retinanet_train, str(flat), val_split=val, val_data=str(table))
        assert "leave one of them out" in error and str(table) in error
    assert "between 0 and 1" in fails_last(capsys, cli.retinanet_train, str(flat), val_split="1.5")


def fails_last(capsys, *args, **kwargs):
    with pytest.raises(SystemExit):
        args[0](*args[1:], **kwargs)
    return capsys.readouterr().err


def test_a_resumed_run_is_told_nothing_else(capsys, asked, flat, tmp_path):
    "What contradicts the run is refused; what was said when it began may be said again."
    train(capsys, flat, preset="tiny", val_split="25%", classes="ball,brick,leaf,starfish,wheel", seed=1)
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        config = {
            "class_names": list(asked["dataset"].class_names),
            "hyperparameters": json.loads(asked["h"].to_json()),
            "data": asked["about"],
        }
        text = json.dumps(config, ensure_ascii=False).encode("utf-8", "surrogateescape")
        (folder / "config.json").write_bytes(text)
    one, two = map(str, folders)
    names = ",".join(config["class_names"])
    for said, words in (
        ({"run": two}, "are two folders"),
        ({"preset": "paper"}, "--preset paper is not what the run"),
        ({"auto": True}, "--auto is not what"),
        ({"classes": "a,b"}, f"(--classes {names})"),
        ({"val_split": "0.5"}, "(--val_split 25%)"),
        ({"val_split": "none"}, "--val_split none is not"),
    ):
        assert words in fails(capsys, cli.retinanet_train, resume=one, **said)
    held = asked["about"]["held_out"]
    for said in ({}, {"preset": "tiny"}, {"classes": names}, {"val_split": "0.25"}, {"run": f"{one}/../one"}):
        asked.clear()
        train(capsys, resume=one, **said)
        assert asked["about"]["held_out"] == held and len(asked["validation"]) == len(held)
        assert asked["about"]["preset"] == "tiny"


@pytest.mark.parametrize(
    "had, value, fine",
    [
        ("0.2", "20%", True),
        ("0.2", "0.3", False),
        ("0.2", "val", False),
        (None, "val", True),
        ("val", "test", False),
    ],
)
def test_which_validation_may_stand_for_which(had, value, fine):
    assert cli_train._may_stand_for(had, value) is fine
    assert cli_train._may_stand_for(had, __file__)  # a file that has moved


def test_a_run_of_a_folder_to_the_end(capsys, flat, tmp_path):
    "Trained, held out, evaluated by the run's folder alone, and resumed with the same pictures."
    run = tmp_path / "run"
    small = dict(image_size="64x96", set="feature_size=16,subnet_depth=1,precision=float32", preset="tiny")
    cli.retinanet_train(str(flat), run=str(run), epochs=1, **small)
    config = json.loads((run / "config.json").read_bytes().decode("utf-8", "surrogateescape"))
    held = config["data"]["held_out"]
    assert config["pictures"] + len(held) == 20 and config["validation_pictures"] == len(held)
    capsys.readouterr()
    cli.retinanet_evaluate(str(run))
    assert json.loads((run / "evaluation-held-out" / "report.json").read_text())["pictures"] == len(held)
    assert (run / "evaluation-held-out" / "index.html").is_file()
    cli.retinanet_train(resume=str(run))  # complete, so nothing happens but reading it all again
    line = fails_last(capsys, cli.retinanet_train, resume=str(run), epochs=3)
    assert "laid out for 1 epoch," in line and f"--weights {run}/last.keras --epochs 2" in line


def test_evaluate_says_what_it_lacks(capsys, tmp_path):
    assert "which data set" in fails(capsys, cli.retinanet_evaluate, str(CARRIED))
    (tmp_path / "empty").mkdir()
    error = fails(capsys, cli.retinanet_evaluate, str(tmp_path / "empty"), "nowhere")
    assert "neither detector.keras nor best.keras nor last.keras" in error


def video_file(path, frames=5, size=(64, 48)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, size)
    for i in range(frames):
        writer.write(np.full((*size[::-1], 3), 40 * i, np.uint8))
    writer.release()
    return path


def test_a_video_is_annotated(capsys, stub, tmp_path):  # noqa: F811
    film, out = video_file(tmp_path / "film.avi"), tmp_path / "out"
    for batch_size in (2, 8):
        cli.retinanet_detect(str(CARRIED), [str(film)], out=str(out), batch_size=batch_size)
        assert "5 objects in 5 frames" in capsys.readouterr().out
        rows = json.loads((out / "detections.json").read_text())
        assert [row["frame"] for row in rows] == list(range(5)) and rows[3]["seconds"] == 0.3
        (found,) = rows[0]["detections"]
        assert (found["name"], found["score"]) == ("ball", 0.9)
        video = cv2.VideoCapture(str(out / "film.mp4"))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and round(video.get(cv2.CAP_PROP_FPS)) == 10
    assert "lies in the folder" in fails(
        capsys, cli.retinanet_detect, str(CARRIED), [str(film)], out=str(tmp_path)
    )
    assert "taken alone" in fails(capsys, cli.retinanet_detect, str(CARRIED), [str(film), "0"], out=str(out))
    broken = foreign(tmp_path, "broken.mp4")
    assert "cannot be opened" in fails_last(
        capsys, cli.retinanet_detect, str(CARRIED), [str(broken)], out=str(out)
    )
    error = fails(capsys, cli.retinanet_detect, str(CARRIED), ["absent.mp4"], out=str(out))
    assert "there is no video absent.mp4" in error


def test_addresses_and_patterns(capsys, monkeypatch, stub, tmp_path):  # noqa: F811
    from test_commands import never, scans

    pictures = scans(tmp_path / "scans", 3)
    cli.retinanet_detect("shapes", [str(tmp_path / "scans" / "*.png")], out=str(tmp_path / "out"))
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 3
    assert "3 objects in 3 pictures" in capsys.readouterr().out
    cli.retinanet_detect("shapes", pictures[:1], out=str(tmp_path / "one"))
    assert "1 object in 1 picture:" in capsys.readouterr().out
    monkeypatch.setattr("retinanet_nb.retinanet_box.load_detector", never)
    for word in ("https://example.org/cat.jpg", "http://example.org/film.mp4"):
        error = fails(capsys, cli.retinanet_detect, str(CARRIED), [word], out=str(tmp_path / "out"))
        assert "it is an address: download the file" in error
    error = fails(
        capsys, cli.retinanet_detect, "https://example.org/x.keras", pictures, out=str(tmp_path / "out")
    )
    assert "it is an address" in error


def test_the_time_left_is_counted_from_the_first_finished_step(capsys, monkeypatch):
    from retinanet_nb import progress as books

    now = [0.0]
    monkeypatch.setattr(books.time, "monotonic", lambda: now[0])
    progress = books._Progress(steps=100, epochs=2, done=0)
    now[0] = 60.0  # the first step builds the network
    for _ in range(6):
        progress.on_train_batch_end(0, {"loss": 1.0})
        now[0] += 3.0
    progress.bar.close()
    assert progress.bar.n == 6 and "about 10 minutes to go, at 3 s a step" in capsys.readouterr().out
    assert [books._duration(s) for s in (2, 50, 600, 9000)] == [
        "2 s",
        "a minute",
        "10 minutes",
        "2.5 hours",
    ]


def test_a_warm_up_is_a_small_part_of_a_short_run():
    from retinanet_nb.training import learning_rate_schedule

    h = PRESETS["tiny"]
    rate = learning_rate_schedule(h, 144)
    assert float(rate(28)) == pytest.approx(h.learning_rate, rel=1e-3) and float(rate(14)) < h.learning_rate


def test_detect_takes_paths_and_batches(stub, tmp_path):  # noqa: F811
    from retinanet_nb.retinanet_box import detect
    from test_commands import Stub, scans

    paths, sizes = scans(tmp_path, 5), []

    class Counting(Stub):
        def predict_on_batch(self, images):
            sizes.append(len(images))
            return super().predict_on_batch(images)

    one = detect(Counting(), paths[0])
    assert one.names == ("ball",) and len(detect(Counting(), [Path(p) for p in paths], batch_size=2)) == 5
    assert sizes == [1, 2, 2, 1]
    with pytest.raises(FileNotFoundError, match="absent"):
        detect(Counting(), str(tmp_path / "absent.jpg"))
    for wrong in (-1, 0):
        with pytest.raises(ValueError, match="batch_size"):
            detect(Counting(), paths, batch_size=wrong)


def test_a_record_reads_the_size_of_its_picture(tmp_path):
    from retinanet_nb.records import Record
    from test_commands import scans

    (path,) = scans(tmp_path, 1)
    record = Record(path, boxes=[[1, 2, 3, 4]], labels=[0])
    assert (record.width, record.height, len(Record(path).boxes)) == (96, 48, 0)


def test_what_is_no_data_set_is_told_to_train(tmp_path):
    from retinanet_nb.training import train

    for wrong in ([], [(np.zeros((8, 8, 3)), [])], iter(()), "folder"):
        with pytest.raises(TypeError, match="a sequence of Record with class_names was expected"):
            train(wrong, PRESETS["tiny"], run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
