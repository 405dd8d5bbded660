"""The console commands end to end, and bad input: one sentence, exit status 1, no traceback."""

import csv
import errno
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import python

from retinanet_nb import cli, cli_detect, cli_train
from retinanet_nb.__main__ import main
from retinanet_nb.shapes import make_shapes

BIN = Path(sys.executable).parent


def command(name, *args):
    return subprocess.run([BIN / name, *map(str, args)], capture_output=True, text=True, timeout=600)


def typed(*words):
    "What `python -m retinanet_nb` does with these words, in this process: the engine is imported already."
    main(list(map(str, words)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=8, val=2, test=4, size=(96, 96), seed=1
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "first"
    done = command(
        "retinanet_train",
        data,
        "--split",
        "train",
        "--val_split",
        "val",
        "--preset",
        "tiny",
        "--epochs",
        1,
        "--image_size",
        "96x96",
        "--set",
        "feature_size=16,subnet_depth=1,score_threshold=0.001",
        "--run",
        run,
    )
    assert done.returncode == 0, done.stderr
    assert str(run / "detector.keras") in done.stdout and "8 pictures" in done.stdout
    return run


def test_train_then_resume(trained, data):
    assert len(json.loads((trained / "history.json").read_text())) == 1
    typed("train", data, "--split", "train", "--run", trained, "--resume")
    assert len(json.loads((trained / "history.json").read_text())) == 1  # it was complete: nothing more to do


def test_a_run_remembers_absolute_places(trained, data, tmp_path, monkeypatch):
    "Data and weights given relative to one folder are found again from another."
    from retinanet_nb import training

    asked = {}

    def stop(dataset, hyperparameters, *args, about, **kwargs):
        asked.update(weights=hyperparameters.weights, **about["data"])
        raise ValueError("enough")

    monkeypatch.setattr(training, "train", stop)
    monkeypatch.chdir(trained.parent)
    with pytest.raises(SystemExit):
        cli.retinanet_train(str(data), split="train", preset="tiny", weights=f"{trained.name}/last.keras")
    assert (
        asked["weights"] == str((trained / "last.keras").resolve())
        and asked["path"] == str(data.resolve())
        and asked["split"] == "train"
    )


def test_ctrl_c_then_resume_by_the_folder_alone(data, tmp_path):
    "The run remembers its data, its splits and its numbers."
    run = tmp_path / "run"
    line = [
        BIN / "retinanet_train",
        data.name,
        "--split",
        "train",
        "--val_split",
        "val",
        "--preset",
        "tiny",
        "--epochs",
        "6",
        "--image_size",
        "96x96",
        "--set",
        "feature_size=16,subnet_depth=1",
        "--run",
        run,
    ]
    process = subprocess.Popen(
        list(map(str, line)),
        cwd=data.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # ignored where the tests themselves run in the background
    deadline = time.monotonic() + 400
    while process.poll() is None and not (run / "history.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 130 and "resume" in error and "Traceback" not in error, error
    done = len(json.loads((run / "history.json").read_text()))
    assert 1 <= done < 6 and (run / "detector.keras").exists()
    typed("train", "--resume", run)  # from another folder
    history = json.loads((run / "history.json").read_text())
    assert [e["epoch"] for e in history] == list(range(1, 7)) and all("val_voc07_map" in e for e in history)


def test_evaluate_prints_the_table_and_writes_it(trained, data, tmp_path):
    done = command(
        "retinanet_evaluate", trained / "detector.keras", data, "--split", "test", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "COCO" in done.stdout and "mean" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pictures"] == 4 and 0 <= report["voc07_map"] <= 1
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("curves.png", "confusion.png"))
    assert "missed objects:" in done.stdout and "false alarms:" in done.stdout
    page = (tmp_path / "index.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) >= 5 and all((tmp_path / source).stat().st_size > 300 for source in sources)


def test_inspect_writes_a_page_and_a_report(capsys, data, tmp_path):
    typed(
        "inspect",
        data,
        "--split",
        "train+val",
        "--preset",
        "tiny",
        "--out",
        tmp_path / "page",
        "--pictures",
        3,
    )
    said = capsys.readouterr().out
    assert "10 pictures" in said and str(tmp_path / "page" / "index.html") in said
    page = (tmp_path / "page" / "index.html").read_text()
    if "Nothing needs changing" not in page:
        assert f"retinanet_train {data} --split train+val --preset tiny" in page  # the whole command
    json.loads((tmp_path / "page" / "report.json").read_text())


def test_selfcheck_ends_with_the_stage_that_fails(capsys, data, tmp_path):
    "Anchors of 400 pixels and more see nothing on a canvas of 96; the whole check that succeeds is in test_selfcheck.py."
    error = fails(
        capsys,
        cli.retinanet_selfcheck,
        str(data),
        split="train",
        preset="tiny",
        image_size="96x96",
        anchor_sizes="400,500,600,700,800",
        out=str(tmp_path / "check"),
    )
    assert "'anchors'" in error


def test_detect_takes_folders_and_files_and_says_which_is_broken(capsys, trained, data, tmp_path):
    pictures = tmp_path / "pictures" / "inner"
    pictures.mkdir(parents=True)
    for i, name in enumerate(sorted((data / "JPEGImages").iterdir())[:3]):
        shutil.copy(name, pictures / f"picture {i}.jpg")
    single = tmp_path / "größer.png"
    cv2.imencode(".png", np.zeros((50, 200, 3), np.uint8))[1].tofile(single)
    out = tmp_path / "out"
    done = command(
        "retinanet_detect",
        trained / "detector.keras",
        tmp_path / "pictures",
        single,
        "--out",
        out,
        "--score_threshold",
        0.001,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "detections.json").read_text())
    assert [Path(r["image"]).name for r in rows] == [
        "picture 0.jpg",
        "picture 1.jpg",
        "picture 2.jpg",
        "größer.png",
    ]
    for row in rows:
        assert Path(row["annotated"]).exists()
        scores = [d["score"] for d in row["detections"]]
        assert scores == sorted(scores, reverse=True)
        for d in row["detections"]:
            x1, y1, x2, y2 = d["box"]
            assert 0 <= x1 <= x2 <= row["width"] and 0 <= y1 <= y2 <= row["height"]
    assert sum(len(r["detections"]) for r in rows) > 0
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as e:
        typed("detect", trained / "detector.keras", tmp_path / "pictures", "--out", out)
    error = capsys.readouterr().err
    assert e.value.code == 1 and "broken.jpg" in error and "Traceback" not in error
    assert len(json.loads((out / "detections.json").read_text())) == 3  # the others are not lost


def fails(capsys, command, /, *args, **kwargs):
    "Standard error of a command that must end with status 1."
    with pytest.raises(SystemExit) as e:
        command(*args, **kwargs)
    assert e.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.startswith(command.__name__) and error.count("\n") == 1
    return error


def test_bad_input_to_train(capsys, data, tmp_path):
    assert "nowhere" in fails(capsys, cli.retinanet_train, str(tmp_path / "nowhere"))
    assert "'tran'" in fails(capsys, cli.retinanet_train, str(data), split="tran")
    assert "pixie" in fails(capsys, cli.retinanet_train, str(data), classes="ball,pixie", split="train")
    assert "'tinny'" in fails(capsys, cli.retinanet_train, str(data), preset="tinny")
    assert "240:320" in fails(capsys, cli.retinanet_train, str(data), image_size="240:320")
    assert "learning_rate" in fails(capsys, cli.retinanet_train, str(data), set="learning_rat=1")
    assert "resnet5" in fails(
        capsys, cli.retinanet_train, str(data), split="train", backbone="resnet5", run=str(tmp_path / "run")
    )
    assert "fine-tune" in fails(capsys, cli.retinanet_train, str(data), split="train", preset="fine-tune")
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as f:
        csv.writer(f).writerow([sorted((data / "JPEGImages").iterdir())[0], 1, 1, 20, 20, "ball"])
    assert "no file val" in fails(
        capsys, cli.retinanet_train, str(table), val_split="val"
    )  # never the training pictures instead
    assert "folder of the run" in fails(capsys, cli.retinanet_train, str(data), resume=True)
    assert "config.json" in fails(capsys, cli.retinanet_train, str(data), resume=True, run=str(tmp_path))
    assert not list(tmp_path.glob("run/*"))  # a mistake costs nobody the folder


def test_a_broken_annotation_is_named(capsys, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    victim = sorted((broken / "Annotations").glob("train*"))[0]
    victim.write_text("<annotation><object>")
    assert victim.name in fails(
        capsys,
        cli.retinanet_train,
        str(broken),
        split="train",
        strict=True,
        preset="tiny",
        run=str(tmp_path / "run"),
    )


def test_bad_input_to_evaluate_and_detect(capsys, trained, data, tmp_path):
    text = tmp_path / "text.keras"
    text.write_text("not a model")
    assert "text.keras" in fails(capsys, cli.retinanet_evaluate, str(text), str(data))
    assert "absent.keras" in fails(capsys, cli.retinanet_evaluate, str(tmp_path / "absent.keras"), str(data))
    detector = str(trained / "detector.keras")
    assert "absent.jpg" in fails(capsys, cli.retinanet_detect, detector, [str(tmp_path / "absent.jpg")])
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, cli.retinanet_detect, detector, [str(tmp_path / "empty")])
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as f:
        csv.writer(f).writerow([sorted((data / "JPEGImages").iterdir())[0], 1, 1, 20, 20, "unicorn"])
    assert "unicorn" in fails(capsys, cli.retinanet_evaluate, detector, str(table))


@pytest.mark.parametrize(
    "name",
    [
        "retinanet_train",
        "retinanet_evaluate",
        "retinanet_detect",
        "retinanet_demo",
        "retinanet_inspect",
        "retinanet_selfcheck",
    ],
)
def test_help_reads_well(name):
    done = command(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: " + name)
    lines = done.stdout.split("options:")[1].strip().splitlines()
    for line, below in zip(lines, [*lines[1:], ""]):
        if line.strip().startswith("--"):
            # where an option is long, its explanation stands below
            explained = len(line.split(None, 2)) == 3 or below.startswith(" " * 10)
            assert explained, f"no explanation: {line}"


def test_demo_from_drawing_to_gallery(tmp_path):
    "The whole demonstration on a few pictures; what it reaches in full is the business of `make demo`."
    done = command("retinanet_demo", "--out", tmp_path / "demo", "--epochs", 1, "--pictures", 16)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "demo" / "gallery" / "index.html").read_text()
    for source in re.findall(r'src="([^"]+)"', page):
        assert (tmp_path / "demo" / "gallery" / source).stat().st_size > 500
    assert page.count("<figure>") >= 24 and str(tmp_path / "demo" / "gallery" / "index.html") in done.stdout


def test_a_demonstration_that_was_stopped_goes_on_as_it_says(capsys, monkeypatch, tmp_path):
    "Ctrl-C after the first of two steps; the lines to type are commands, and they work."
    import keras

    from retinanet_nb import demo

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            os.kill(os.getpid(), signal.SIGINT)

    train, drawn = demo.train, demo.make_shapes
    monkeypatch.setattr(demo, "train", lambda *args, **kwargs: train(*args, **kwargs, callbacks=[Stop()]))
    few = dict(train=16, val=2, test=2)
    monkeypatch.setattr(demo, "make_shapes", lambda out, **kwargs: drawn(out, **{**kwargs, **few}))
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as e:
            cli.retinanet_demo(out="my demo", epochs=1, pictures=16)
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert e.value.code == 130 and "train(" not in said and not list(Path("my demo/gallery").glob("*.html"))
    lines = re.findall(r"^(?:go on with|and then): +(retinanet_\w+) (.*)$", said, re.M)
    told = {name: shlex.split(words) for name, words in lines}
    assert told["retinanet_train"] == ["--resume", "my demo/run"]
    cli.retinanet_train(resume=told["retinanet_train"][1])
    (entry,) = json.loads(Path("my demo/run/history.json").read_text())
    assert entry["epoch"] == 1 and "val_voc07_map" in entry
    cli.retinanet_evaluate(*told["retinanet_evaluate"])
    assert json.loads(Path("my demo/run/evaluation-test/report.json").read_text())["pictures"] == 2


def test_hidden_files_are_no_pictures_unless_they_are_named(tmp_path):
    for name in ("a.jpg", "._a.jpg", ".a-k3x.jpg", ".Trashes/b.jpg", "c/d.png", "c/.d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [tmp_path / "a.jpg", tmp_path / "c" / "d.png"]
    assert cli.find_pictures([tmp_path]) == found
    assert cli.find_pictures([tmp_path / "**" / "*"]) == found
    assert cli.find_pictures([tmp_path / "._a.jpg"]) == [tmp_path / "._a.jpg"]


def test_find_pictures_takes_files_as_they_come_and_folders_sorted(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt", "inner/c.jpeg"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).touch()
    single = tmp_path / "folder" / "notes.txt"  # a file that is named is taken, whatever it is called
    found = cli.find_pictures([single, tmp_path / "folder"])
    assert [p.relative_to(tmp_path / "folder").as_posix() for p in found] == [
        "notes.txt",
        "a.PNG",
        "b.jpg",
        "inner/c.jpeg",
    ]


def test_a_picture_is_found_once(tmp_path):
    for name in ("a.jpg", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = {tmp_path / "a.jpg", tmp_path / "sub" / "b.jpg"}
    for words in ([tmp_path / "**"], [tmp_path / "**" / "*"], [tmp_path, tmp_path / "sub"]):
        found = cli.find_pictures(words)
        assert len(found) == 2 and set(found) == expected, words


def test_many_pictures_of_one_name():
    paths = [Path(f"camera {k}/frame.png") for k in range(1000)]
    names = cli_detect._annotated_names([Path("frame_2.png"), *paths])
    assert names[:5] == ["frame_2.jpg", "frame.jpg", "frame_.jpg", "frame_3.jpg", "frame_4.jpg"]
    assert len(set(names)) == 1001 and max(map(len, names)) < 20


CARRIED = Path(cli.__file__).parent / "assets" / "shapes.keras"


def never(*args, **kwargs):
    raise AssertionError("the work began")


def snapshot(folder):
    "The bytes of all files below a folder but the project's own notes."
    return {
        p.relative_to(folder): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith(".retinanet_nb")
    }


def foreign(folder, name):
    "Puts a file of somebody else's there; returns it."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"mine")
    return path


PAGE = ["index.html", "pictures/page-001.jpg", "pictures/page-012.png"]


@pytest.mark.parametrize("name", ["report.json", "curves.png", "confusion.png", *PAGE])
def test_evaluate_refuses_a_foreign_file_before_the_work(capsys, monkeypatch, data, tmp_path, name):
    from retinanet_nb import retinanet_box

    monkeypatch.setattr(retinanet_box, "load_detector", never)
    foreign(tmp_path / "site", name)
    before = snapshot(tmp_path)
    error = fails(capsys, cli.retinanet_evaluate, str(CARRIED), str(data), "test", out=str(tmp_path / "site"))
    assert Path(name).name in error and snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["cat.jpg", "detections.json", "detections.jsonl"])
@pytest.mark.parametrize("link", [False, True])
def test_detect_refuses_a_foreign_file_before_the_work(capsys, monkeypatch, data, tmp_path, name, link):
    from retinanet_nb import retinanet_box

    monkeypatch.setattr(retinanet_box, "load_detector", never)
    if link:
        (tmp_path / "album").mkdir()
        (tmp_path / "album" / name).symlink_to(foreign(tmp_path / "elsewhere", "kept"))
    else:
        foreign(tmp_path / "album", name)
    shutil.copy(next((data / "JPEGImages").iterdir()), tmp_path / "cat.png")
    before = snapshot(tmp_path)
    error = fails(
        capsys, cli.retinanet_detect, str(CARRIED), [str(tmp_path / "cat.png")], out=str(tmp_path / "album")
    )
    assert name in error and snapshot(tmp_path) == before


@pytest.mark.parametrize("name", [f"gallery/{name}" for name in PAGE] + ["shapes/notes.txt"])
def test_demo_refuses_a_foreign_file_before_the_work(capsys, monkeypatch, tmp_path, name):
    from retinanet_nb import demo

    monkeypatch.setattr(demo, "train", never)
    foreign(tmp_path / "demo", name)
    before = snapshot(tmp_path)
    fails(capsys, cli.retinanet_demo, out=str(tmp_path / "demo"), pictures=4, epochs=1)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["detector.keras", "folder.keras", "model.h5", "file/detector.keras"])
def test_demo_refuses_a_bad_detector_before_the_work(capsys, monkeypatch, tmp_path, name):
    from retinanet_nb import demo

    monkeypatch.setattr(demo, "run_demo", never)
    foreign(tmp_path, "detector.keras")
    foreign(tmp_path, "file")
    (tmp_path / "folder.keras").mkdir()
    before = snapshot(tmp_path)
    error = fails(capsys, cli.retinanet_demo, out=str(tmp_path / "demo"), detector=str(tmp_path / name))
    assert "--detector" in error and name in error and snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["report.txt", "report.json", "index.html", "pictures/page-001.jpg"])
def test_inspect_refuses_a_foreign_file_before_the_work(capsys, monkeypatch, data, tmp_path, name):
    from retinanet_nb import inspection

    monkeypatch.setattr(inspection, "suggestions", never)
    foreign(tmp_path / "page", name)
    before = snapshot(tmp_path)
    fails(capsys, cli.retinanet_inspect, str(data), "train", out=str(tmp_path / "page"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["selfcheck.json", "curve.png"])
def test_selfcheck_refuses_a_foreign_file_before_the_work(capsys, monkeypatch, data, tmp_path, name):
    from retinanet_nb import selfcheck

    monkeypatch.setattr(selfcheck, "Bench", never)
    foreign(tmp_path / "check", name)
    before = snapshot(tmp_path)
    fails(capsys, cli.retinanet_selfcheck, str(data), "train", preset="tiny", out=str(tmp_path / "check"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["config.json", "history.json", "curves.png", "last.keras", "detector.keras"]
)
def test_train_refuses_a_foreign_file_before_the_work(capsys, monkeypatch, data, tmp_path, name):
    from retinanet_nb import training

    monkeypatch.setattr(training, "build_trainer", never)
    foreign(tmp_path / "run", name)
    before = snapshot(tmp_path)
    fails(capsys, cli.retinanet_train, str(data), split="train", preset="tiny", run=str(tmp_path / "run"))
    assert snapshot(tmp_path) == before


COMMANDS = {
    cli.retinanet_train: ("data",),
    cli.retinanet_inspect: ("data",),
    cli.retinanet_selfcheck: ("data",),
    cli.retinanet_evaluate: ("model", "data"),
    cli.retinanet_detect: ("model", "images"),
    cli.retinanet_demo: (),
    cli.retinanet_export: ("model",),
}
WRONG = {
    "batch": (-1, -3),
    "batch_size": (-1, 0),
    "score_threshold": (math.nan, 2, -0.1),
    "iou_threshold": (math.nan, 0, 1.5),
    "seed": (-1, 2**32),
    "pictures": (-3, 0),
    "steps": (-1, 0),
    "devices": (-1, 0),
    "ray_workers": (-1, 0),
    "shard_size": (-1, 0),
    "epochs": (-1, 0),
    "validate_every": (-1, 0),
    "patience": (-1, 0),
    "learning_rate": (0, -1, math.nan, math.inf),
    "checkpoint_minutes": (0, -1, math.nan),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_out_of_range_are_named_before_any_work(capsys, monkeypatch, tmp_path, name):
    "No data, model or picture is even looked for, and every command that has the option is asked."
    monkeypatch.chdir(tmp_path)
    for module in (cli_train, cli_detect):
        monkeypatch.setattr(module, "open_dataset", never)
    monkeypatch.setattr(cli_detect, "find_pictures", never)
    asked = 0
    for function, positions in COMMANDS.items():
        if name in inspect.signature(function).parameters:
            for value in WRONG[name]:
                error = fails(capsys, function, **dict.fromkeys(positions, "absent"), **{name: value})
                assert f"--{name}" in error and str(value) in error
                asked += 1
    assert asked and not list(tmp_path.iterdir())


def test_every_number_among_the_options_has_a_range():
    for function in COMMANDS:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.annotation in (int, float):
                assert name in cli.RANGES and name in WRONG, (function.__name__, name)


@pytest.mark.parametrize("function", COMMANDS, ids=lambda f: f.__name__)
def test_a_folder_to_write_into_that_is_a_file(capsys, tmp_path, function):
    if function is cli.retinanet_export:  # what it writes is a file
        return
    path = foreign(tmp_path, "notes")
    for name in ("out", "run"):
        if name in inspect.signature(function).parameters:
            error = fails(
                capsys, function, **dict.fromkeys(COMMANDS[function], "absent"), **{name: str(path)}
            )
            assert f"--{name}" in error and "is a file" in error and path.read_bytes() == b"mine"


def test_an_export_replaces_only_where_it_is_told(capsys, monkeypatch, stub, tmp_path):
    from retinanet_nb import export

    asked = []
    monkeypatch.setattr(export, "export_detector", lambda *a: asked.append(a) or {"boxes": 0, "scores": 0})
    path = foreign(tmp_path, "x.onnx")
    error = fails(capsys, cli.retinanet_export, "shapes", out=str(path))
    assert "exists: give another name, or say --replace" in error and not asked
    cli.retinanet_export("shapes", out=str(path), replace=True)
    assert asked and "exported:" in capsys.readouterr().out


def coco_file(path, data, split):
    "The COCO file of a split of a VOC folder."
    from retinanet_nb.voc import VOCDataset

    dataset, images, objects = VOCDataset(data, split), [], []
    for i, r in enumerate(dataset):
        images.append({"id": i, "file_name": Path(r.image).name, "width": r.width, "height": r.height})
        for box, label in zip(r.boxes.tolist(), r.labels.tolist()):
            x1, y1, x2, y2 = box
            objects.append(
                {"id": len(objects) + 1, "image_id": i, "category_id": label + 1, "iscrowd": 0}
                | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            )
    names = [{"id": i + 1, "name": n} for i, n in enumerate(dataset.class_names)]
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": names}))
    return path


TINY = dict(
    preset="tiny", epochs=1, image_size="96x96", set="feature_size=16,subnet_depth=1,precision=float32"
)


def test_train_on_the_layout_of_coco(capsys, data, tmp_path):
    "train2017/ and val2017/ hold the pictures, two JSON files the objects; the run remembers all four."
    lists = {}
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for line in (data / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            shutil.copy(data / "JPEGImages" / f"{line}.jpg", tmp_path / f"{split}2017")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        lists[split] = coco_file(tmp_path / "annotations" / f"instances_{split}2017.json", data, split)
    cli.retinanet_train(
        str(lists["train"]),
        images=str(tmp_path / "train2017"),
        val_data=str(lists["val"]),
        val_images=str(tmp_path / "val2017"),
        run=str(tmp_path / "run"),
        **TINY,
    )
    assert "8 pictures" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["pictures"], config["validation_pictures"]) == (8, 2)
    assert config["data"]["val_images"] == str(tmp_path / "val2017")
    (entry,) = json.loads((tmp_path / "run" / "history.json").read_text())
    assert entry["val_voc07_map"] is None or 0 <= entry["val_voc07_map"] <= 1
    assert "val_images" in fails(
        capsys, cli.retinanet_train, str(lists["train"]), val_images=str(tmp_path / "val2017")
    )


def test_train_on_a_table(capsys, data, tmp_path):
    from retinanet_nb.voc import VOCDataset

    tables = {}
    for split in ("train", "val"):
        tables[split] = tmp_path / f"{split}.csv"
        dataset = VOCDataset(data, split)
        with tables[split].open("w", newline="") as file:
            for record in dataset:
                for box, label in zip(record.boxes.tolist(), record.labels.tolist()):
                    csv.writer(file).writerow([record.image, *box, dataset.class_names[label]])
    (tmp_path / "elsewhere").mkdir()
    cli.retinanet_train(str(tables["train"]), val_data=str(tables["val"]), run=str(tmp_path / "run"), **TINY)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert 1 <= config["pictures"] <= 8 and config["validation_pictures"] >= 1
    assert (tmp_path / "run" / "detector.keras").is_file()
    absent = tmp_path / "absent.csv"
    assert str(absent) in failing_line(
        capsys, cli.retinanet_train, str(tables["train"]), val_data=str(absent)
    )


def test_values_of_set_as_people_type_them(monkeypatch, data, capsys):
    from retinanet_nb import training

    asked = {}

    def stop(dataset, hyperparameters, *args, **kwargs):
        asked.update(h=hyperparameters, **kwargs)
        raise ValueError("enough")

    monkeypatch.setattr(training, "train", stop)
    text = "clip_norm=None,flip=.5,force_match=False,scale_jitter=[.8,1.2],optimizer=sgd,alpha=null"
    assert "enough" in fails(capsys, cli.retinanet_train, str(data), split="train", set=text)
    h = asked["h"]
    assert (h.clip_norm, h.flip, h.force_match, h.optimizer, h.alpha) == (None, 0.5, False, "sgd", None)
    assert tuple(h.scale_jitter) == (0.8, 1.2)
    assert cli._assignments('a=True,b=-.5,c={"x": [1, 2]}') == {"a": True, "b": -0.5, "c": {"x": [1, 2]}}
    assert "flip twice" in fails(capsys, cli.retinanet_train, str(data), set="flip=0,flip=1")
    assert "epochs" in fails(capsys, cli.retinanet_train, str(data), set="epochs=3", epochs=4)
    assert "clip_norm" in fails(capsys, cli.retinanet_train, str(data), set="clip_norm=" + "[" * 100_000)


def test_options_reach_the_training(monkeypatch, data, capsys):
    from retinanet_nb import training

    asked = {}

    def stop(dataset, hyperparameters, validation=None, *, checkpoint_minutes, **kwargs):
        asked.update(h=hyperparameters, minutes=checkpoint_minutes, validation=validation, **kwargs)
        raise ValueError("enough")

    monkeypatch.setattr(training, "train", stop)
    said = dict(split="train", val_split="val", best_metric="coco", checkpoint_minutes=2.5, validate_every=3)
    assert "enough" in fails(capsys, cli.retinanet_train, str(data), **said)
    assert (asked["h"].best_metric, asked["minutes"], asked["validate_every"]) == ("coco", 2.5, 3)
    assert len(asked["validation"]) == 2 and asked["about"]["data"]["checkpoint_minutes"] == 2.5
    assert "best_metric" in fails(capsys, cli.retinanet_train, str(data), best_metric="recall")


@pytest.mark.parametrize("name", [f.__name__ for f in COMMANDS])
def test_version_of_every_command(name):
    from retinanet_nb import __version__

    done = command(name, "--version")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"retinanet_nb {__version__}", "")


def test_names_stay_where_they_were():
    "What has moved is found in the old place, and nothing is read before it is asked for."
    python(
        """
import sys
from retinanet_nb import cli
assert not {"retinanet_nb.cli_train", "retinanet_nb.cli_detect"} & set(sys.modules)
for name in "ABOUT FEWEST KINDS PASSES open_dataset EVALUATED ROWS RESULT VIDEOS FORMATS MOST_PICTURES find_pictures".split():
    assert getattr(cli, name) is not None
from retinanet_nb.cli import retinanet_demo, retinanet_detect, retinanet_evaluate, retinanet_export
from retinanet_nb.cli import retinanet_inspect, retinanet_selfcheck, retinanet_train
assert retinanet_detect.__module__ == "retinanet_nb.cli_detect"
assert not hasattr(cli, "retinanet_fly") and not hasattr(cli, "_has_gpu")
assert not {"keras", "numpy", "cv2"} & set(sys.modules)
"""
    )


def test_the_package_is_a_command(data, tmp_path):
    def module(*words):
        line = [sys.executable, "-m", "retinanet_nb", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True, timeout=300)

    listed = module()
    assert listed.returncode == 0
    for function in COMMANDS:
        assert re.search(rf"^  {function.__name__.removeprefix('retinanet_')}\b", listed.stdout, re.M)
    assert module("--version").stdout.startswith("retinanet_nb ")
    assert module("nonsense").returncode == 2
    done = module("train", tmp_path / "nowhere")
    assert done.returncode == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr
    done = module("inspect", data, "--split", "train", "--out", tmp_path / "page", "--pictures", 1)
    assert done.returncode == 0 and (tmp_path / "page" / "index.html").is_file(), done.stderr


DAMAGED = {
    "nested": "[" * 100_000,
    "a list": "[]",
    "class names": {"class_names": [1, 2]},
    "no class names": {"class_names": None},
    "hyperparameters": {"hyperparameters": {"epochs": "many"}},
    "hyperparameters of another kind": {"hyperparameters": [1]},
    "unknown hyperparameter": {"hyperparameters": {"epoch": 1}},
    "data": {"data": [1]},
    "path": {"data": {"path": 5}},
    "strict": {"data": {"strict": "no"}},
    "validate_every": {"data": {"validate_every": 0}},
    "validate_every of another kind": {"data": {"validate_every": True}},
    "checkpoint_minutes": {"data": {"checkpoint_minutes": -1}},
    "images": {"data": {"images": {"a": "b" * 10_000}}},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_config_is_named(capsys, data, tmp_path, kind):
    from retinanet_nb.hyperparameters import preset

    damage = DAMAGED[kind]
    config = {
        "hyperparameters": json.loads(preset("tiny").to_json()),
        "class_names": ["ball"],
        "data": {"path": str(data), "split": "train"},
    }
    text = damage if isinstance(damage, str) else json.dumps(config | damage)
    (tmp_path / "config.json").write_text(text)
    error = fails(capsys, cli.retinanet_train, resume=str(tmp_path))
    assert str(tmp_path / "config.json") in error and len(error) < 500 + len(str(tmp_path))


class Stub:
    "A detector that finds one ball in every picture, until it breaks."

    class_names = ("ball",)

    class hyperparameters:
        image_size = (96, 96)

    def __init__(self, steps=10**9):
        self.steps = steps

    def predict_on_batch(self, images):
        self.steps -= 1
        if self.steps < 0:
            raise FloatingPointError("the network broke")
        n = len(images)
        boxes = np.tile(np.float32([[8, 8, 40, 40]]), (n, 1, 1))
        return boxes, np.full((n, 1), 0.9, np.float32), np.zeros((n, 1), np.int32)


@pytest.fixture
def stub(monkeypatch):
    from retinanet_nb import retinanet_box

    def use(steps=10**9):
        monkeypatch.setattr(retinanet_box, "load_detector", lambda path: Stub(steps))

    use()
    return use


def scans(folder, count):
    from retinanet_nb.pictures import write_image

    return [
        str(write_image(folder / f"{i:03}.png", np.full((48, 96, 3), 5 * i % 256, np.uint8)))
        for i in range(count)
    ]


def test_what_was_found_before_a_failure_is_kept(capsys, stub, tmp_path):
    pictures, out = scans(tmp_path / "scans", 23), tmp_path / "out"
    stub(steps=5)
    model = foreign(tmp_path, "x.keras")
    assert "broke" in failing_line(
        capsys, cli.retinanet_detect, str(model), pictures, out=str(out), batch_size=4
    )
    rows = json.loads((out / "detections.json").read_text())
    assert [row["image"] for row in rows] == pictures[:20]  # all that the five steps gave
    assert all(Path(row["annotated"]).is_file() for row in rows)
    assert not (out / "detections.jsonl").exists()
    # a failure before the first picture leaves the earlier result
    stub(steps=0)
    failing_line(capsys, cli.retinanet_detect, str(model), pictures, out=str(out), batch_size=4)
    assert json.loads((out / "detections.json").read_text()) == rows
    # and the same line once more goes through: all that lies there is ours
    stub()
    cli.retinanet_detect(str(model), pictures, out=str(out), batch_size=4)
    rows = json.loads((out / "detections.json").read_text())
    assert [row["image"] for row in rows] == pictures
    assert {tuple(row) for row in rows} == {("image", "annotated", "height", "width", "detections")}
    assert rows[0]["detections"] == [
        {"box": [8.0, 8.0, 40.0, 40.0], "score": 0.9, "label": 0, "name": "ball"}
    ]


def failing_line(capsys, function, *args, **kwargs):
    "The last line on standard error of a command that ends with status 1, after whatever bars it drew."
    with pytest.raises(SystemExit) as e:
        function(*args, **kwargs)
    assert e.value.code == 1
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert "Traceback" not in error and line.startswith(f"{function.__name__}: "), error
    return line


def test_what_is_on_the_disk_after_ctrl_c_has_its_row(monkeypatch, stub, tmp_path):
    from retinanet_nb import retinanet_box

    class Stopped(Stub):
        "Ctrl-C comes while the network looks at the tenth batch."

        def predict_on_batch(self, images):
            if self.steps == 1:
                raise KeyboardInterrupt
            time.sleep(0.02)
            return super().predict_on_batch(images)

    pictures, out = scans(tmp_path / "scans", 48), tmp_path / "out"
    monkeypatch.setattr(retinanet_box, "load_detector", lambda path: Stopped(10))
    with pytest.raises(SystemExit) as e:
        cli.retinanet_detect(str(foreign(tmp_path, "x.keras")), pictures, out=str(out), batch_size=4)
    rows = json.loads((out / "detections.json").read_text())
    assert e.value.code == 130 and len(rows) >= 16
    assert {Path(row["annotated"]) for row in rows} == set(out.glob("*.jpg"))


def test_words_and_options_in_any_order(stub, tmp_path):
    pictures, model = scans(tmp_path / "scans", 2), foreign(tmp_path, "x.keras")
    for k, words in enumerate(
        (
            [model, "--out", tmp_path / "0", *pictures],
            [model, pictures[0], "--out", tmp_path / "1", pictures[1]],
            ["--out", tmp_path / "2", "--only_json", model, *pictures],
        )
    ):
        typed("detect", *words)
        assert len(json.loads((tmp_path / str(k) / "detections.json").read_text())) == 2
    given = cli._typed(cli.retinanet_evaluate, ["photos", "--split", "test", "data"])
    assert (given["model"], given["data"], given["split"]) == ("photos", "data", "test")
    # and as it is installed
    done = command("retinanet_detect", "shapes", "--only_json", tmp_path / "absent.jpg")
    assert done.returncode == 1 and "there is no picture" in done.stderr, done.stderr


def test_pictures_of_phones_and_cameras_are_named(capsys, monkeypatch, stub, tmp_path):
    from retinanet_nb.pictures import read_image, write_image

    pictures, model = scans(tmp_path / "scans", 2), foreign(tmp_path, "x.keras")
    foreign(tmp_path / "scans", "IMG_2.HEIC")
    foreign(tmp_path / "scans", "001.heic")  # the same picture can be read beside it
    line = failing_line(
        capsys, cli.retinanet_detect, str(model), [str(tmp_path / "scans")], out=str(tmp_path / "out")
    )
    assert "1 of 3 pictures could not be read" in line and "IMG_2.HEIC" in line
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [row["image"] for row in rows] == pictures
    monkeypatch.setattr(cli_detect, "_detector_file", lambda model: model)
    single = str(tmp_path / "scans" / "IMG_2.HEIC")
    assert "IMG_2.HEIC is not a picture" in failing_line(
        capsys, cli.retinanet_detect, single, out=str(tmp_path / "one")
    )
    # a raw file begins like the TIFF file of a preview
    raw = write_image(tmp_path / "x.tif", np.zeros((20, 30, 3), np.uint8)).rename(tmp_path / "x.NEF")
    with pytest.raises(ValueError, match="x.NEF is not a picture that can be read"):
        read_image(raw)
    # a sample needs only some
    assert cli_detect._canvases(str(tmp_path / "scans"), (96, 96)).shape == (2, 96, 96, 3)


def test_what_was_written_is_no_picture_for_the_next_run(capsys, monkeypatch, stub, tmp_path):
    model, found = str(foreign(tmp_path, "x.keras")), []
    scans(tmp_path / "holiday" / "old", 2)
    monkeypatch.chdir(tmp_path / "holiday")
    for words, out in (
        (["."], "detections"),
        (["."], "detections"),
        (["old"], "old/in"),
        (["old"], "old/in"),
    ):
        cli.retinanet_detect(model, words, out=out)
        found.append(json.loads((Path(out) / "detections.json").read_text()))
    assert [len(rows) for rows in found] == [2] * 4 and found[0] == found[1] and found[2] == found[3]
    # named by itself, or somebody else's: as before
    for words in (["detections/000.jpg"], ["detections"]):
        assert "lies in the folder" in fails(capsys, cli.retinanet_detect, model, words)
    shutil.copy("old/000.png", "detections/mine.png")
    assert "detections/mine.png lies in the folder" in fails(capsys, cli.retinanet_detect, model, ["."])


def test_a_saved_model_is_no_folder_of_pictures(capsys, tmp_path):
    foreign(tmp_path / "served", "saved_model.pb")
    (picture,) = scans(tmp_path / "scans", 1)
    error = fails(capsys, cli.retinanet_detect, str(tmp_path / "served"), [picture])
    assert "served is a SavedModel" in error and ".keras" in error


def test_the_bar_of_a_download_is_seen(capfd, monkeypatch):
    from retinanet_nb import model_files, shards

    bar = lambda model: os.write(2, b"40 %")
    monkeypatch.setattr(model_files, "model_file", bar)
    monkeypatch.setattr(shards, "opened_detector", lambda model, *how: model_files.model_file(model))
    cli_detect._any_detector("coco")
    assert capfd.readouterr().err == "40 %"  # and not the one in silence


def test_names_that_somebody_took_after_a_failure_are_theirs(capsys, stub, tmp_path):
    pictures, out, model = scans(tmp_path / "scans", 12), tmp_path / "out", foreign(tmp_path, "x.keras")
    stub(steps=1)
    failing_line(capsys, cli.retinanet_detect, str(model), pictures, out=str(out), batch_size=4)
    path = foreign(out, "011.jpg")  # noted as to be written, and never written
    stub()
    assert "011.jpg" in fails(capsys, cli.retinanet_detect, str(model), pictures, out=str(out), batch_size=4)
    assert path.read_bytes() == b"mine"


def test_broken_and_too_large_pictures_are_left_out_and_told(capsys, monkeypatch, stub, tmp_path):
    import struct
    import zlib

    pictures, model = scans(tmp_path / "scans", 9), foreign(tmp_path, "x.keras")
    pictures.insert(4, str(foreign(tmp_path / "scans", "broken.png")))
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = lambda name, body: (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    )
    huge = tmp_path / "scans" / "huge.png"
    huge.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    pictures.append(str(huge))
    line = failing_line(
        capsys, cli.retinanet_detect, str(model), pictures, out=str(tmp_path / "out"), batch_size=3
    )
    assert "2 of 11" in line and "broken.png" in line and "huge.png" in line and "million" in line
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [row["image"] for row in rows] == [p for p in pictures if Path(p).stem.isdigit()]


def test_rows_alone(capsys, stub, tmp_path):
    "With --only_json the rows are the same but for the annotated pictures, of which there are none."
    pictures, model = scans(tmp_path / "scans", 9), foreign(tmp_path, "x.keras")
    cli.retinanet_detect(str(model), pictures, out=str(tmp_path / "both"), batch_size=4)
    cli.retinanet_detect(str(model), pictures, out=str(tmp_path / "rows"), batch_size=4, only_json=True)
    both, rows = (json.loads((tmp_path / n / "detections.json").read_text()) for n in ("both", "rows"))
    assert all(Path(row.pop("annotated")).is_file() for row in both) and rows == both
    assert [p.name for p in (tmp_path / "rows").glob("[!.]*")] == ["detections.json"]
    assert capsys.readouterr().out.splitlines()[-1].endswith("detections.json")
    error = fails(capsys, cli.retinanet_detect, str(model), ["film.mp4"], only_json=True)
    assert "--only_json" in error


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
def test_names_that_are_not_utf8(capsys, stub, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (source,), model = scans(tmp_path / "scans", 1), foreign(tmp_path, "x.keras")
    odd = tmp_path / "scans" / f"{name}.png"
    os.rename(source, odd)
    for again in range(2):
        cli.retinanet_detect(str(model), [str(tmp_path / "scans")], out=str(tmp_path / "out"))
    text = (tmp_path / "out" / "detections.json").read_bytes().decode("utf-8")  # strictly
    (row,) = json.loads(text)
    assert row["image"] == str(odd) and Path(row["annotated"]) == tmp_path / "out" / f"{name}.jpg"
    assert Path(row["annotated"]).is_file()
    (tmp_path / "scans" / f"{name}2.png").write_bytes(b"broken")
    assert "could not be read" in failing_line(
        capsys, cli.retinanet_detect, str(model), [str(tmp_path / "scans")], out=str(tmp_path / "out")
    )


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(capsys, monkeypatch, stub, tmp_path):
    scans(tmp_path / "scans", 2), scans(tmp_path / "scans" / "inner", 2)
    true = os.scandir

    def scandir(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return true(path)

    monkeypatch.setattr(os, "scandir", scandir)
    error = fails(capsys, cli.retinanet_detect, "x.keras", [str(tmp_path / "scans")])
    assert "inner" in error and "cannot be read" in error


@cli._command
def retinanet_sham(what: str, batch_size: int = 1):
    "A command that fails as it is told."
    from tqdm import tqdm

    bar = tqdm(total=3)
    bar.update()
    if what == "full":
        from retinanet_nb.files import save_atomically

        def write(path):
            raise OSError(errno.ENOSPC, "No space left on device")

        save_atomically("precious.json", write)
    if what == "engine":
        raise type("ResourceExhaustedError", (Exception,), {})("OOM when allocating tensor\n" * 100)
    if what == "torch":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
    if what == "memory":
        raise MemoryError
    if what == "csv":
        raise csv.Error("field larger than field limit (131072)")
    if what == "fault":
        raise TypeError("a fault of the program")
    os.kill(os.getpid(), getattr(signal, what))
    time.sleep(5)


def test_errors_stand_on_a_line_of_their_own(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for what in ("engine", "torch", "memory"):
        assert "lower --batch_size" in failing_line(capsys, retinanet_sham, what)
    assert "131072" in failing_line(capsys, retinanet_sham, "csv")
    full = failing_line(capsys, retinanet_sham, "full")
    assert "precious.json" in full and "disk is full" in full
    with pytest.raises(TypeError):
        retinanet_sham("fault")


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals_end_with_their_status(capsys, name, status):
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as e:
            retinanet_sham(name)
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert e.value.code == status and signal.getsignal(signal.SIGTERM) == before[1]


def test_after_sigterm_the_command_to_type_is_told(data, tmp_path):
    "The run is kept, the status is 143, and the line that was told goes on with it."
    run = tmp_path / "my run"
    words = [data, "--split", "train", "--preset", "tiny", "--epochs", 500, "--image_size", "96x96"]
    words += ["--set", "feature_size=16,subnet_depth=1", "--run", run]
    process = subprocess.Popen(
        [str(BIN / "retinanet_train"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and not (run / "history.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    error = process.communicate(timeout=200)[1]
    assert process.returncode == 143 and "Traceback" not in error, error
    assert error.splitlines()[-1].endswith(f"retinanet_train --resume '{run}'")
    assert (run / "config.json").is_file() and list((run / "checkpoints").iterdir())


def test_after_ctrl_c_the_command_to_type_is_told(capsys, monkeypatch, data, tmp_path):
    from types import SimpleNamespace

    from retinanet_nb import training

    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.setattr(
        training, "train", lambda *args, **kwargs: SimpleNamespace(folder=folder, interrupted=True)
    )
    with pytest.raises(SystemExit) as e:
        cli.retinanet_train(str(data), split="train")
    assert e.value.code == 130
    assert f"retinanet_train --resume '{folder}'" in capsys.readouterr().err


def test_the_front_page_finds_what_is_there():
    "README shows one box for each of the five objects, with the right name."
    from retinanet_nb.boxes import overlaps
    from retinanet_nb.retinanet_box import detect, load_detector
    from retinanet_nb.shapes import SHAPE_CLASSES, recurring_picture

    image, boxes, labels = recurring_picture()
    found = detect(load_detector(CARRIED), image)
    assert sorted(found.names) == sorted(SHAPE_CLASSES[label] for label in labels)
    iou = np.asarray(overlaps(boxes, found.boxes))
    for row, label in zip(iou, labels):
        assert row.max() > 0.6 and found.labels[row.argmax()] == label
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"{name:9} {score:.2f}" in page for name, score in zip(found.names, found.scores))


def test_weights_bring_their_network_along(trained, data, tmp_path, monkeypatch):
    "Without a word on the network it is the file's; what is said counts for more."
    from retinanet_nb import training

    asked = {}

    def stop(dataset, hyperparameters, *args, **kwargs):
        asked["h"] = hyperparameters
        raise ValueError("enough")

    monkeypatch.setattr(training, "train", stop)
    for more in ({}, {"set": "feature_size=24"}):
        with pytest.raises(SystemExit):
            cli.retinanet_train(str(data), split="train", weights=str(trained / "last.keras"), **more)
        h = asked["h"]
        assert (h.backbone, h.subnet_depth) == ("tiny", 1)  # the preset from-scratch has resnet50 and 4
        assert h.feature_size == (24 if more else 16)
