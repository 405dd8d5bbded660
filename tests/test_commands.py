"""The console commands end to end, and bad input: one sentence, exit status 1, no traceback."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from retinanet_nb import cli
from retinanet_nb.shapes import make_shapes

BIN = Path(sys.executable).parent


def command(name, *args):
    return subprocess.run([BIN / name, *map(str, args)], capture_output=True, text=True, timeout=600)


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
    done = command("retinanet_train", data, "--split", "train", "--run", trained, "--resume")
    assert done.returncode == 0, done.stderr
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
        "15",
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
    assert 1 <= done < 15 and (run / "detector.keras").exists()
    again = command("retinanet_train", "--resume", run)  # from another folder
    assert again.returncode == 0, again.stderr
    history = json.loads((run / "history.json").read_text())
    assert [e["epoch"] for e in history] == list(range(1, 16)) and all("val_voc07_map" in e for e in history)


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


def test_inspect_writes_a_page_and_a_report(data, tmp_path):
    done = command(
        "retinanet_inspect",
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
    assert done.returncode == 0, done.stderr
    assert "10 pictures" in done.stdout and str(tmp_path / "page" / "index.html") in done.stdout
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


def test_detect_takes_folders_and_files_and_says_which_is_broken(trained, data, tmp_path):
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
    done = command("retinanet_detect", trained / "detector.keras", tmp_path / "pictures", "--out", out)
    assert done.returncode == 1 and "broken.jpg" in done.stderr and "Traceback" not in done.stderr
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
    assert not list(tmp_path.glob("run/*"))


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
    for line in done.stdout.split("options:")[1].strip().splitlines():
        if line.strip().startswith("--"):
            assert len(line.split(None, 2)) == 3, f"no explanation: {line}"


def test_demo_from_drawing_to_gallery(tmp_path):
    "The whole demonstration on a few pictures; what it reaches in full is the business of `make demo`."
    done = command("retinanet_demo", "--out", tmp_path / "demo", "--epochs", 1, "--pictures", 16)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "demo" / "gallery" / "index.html").read_text()
    for source in re.findall(r'src="([^"]+)"', page):
        assert (tmp_path / "demo" / "gallery" / source).stat().st_size > 500
    assert page.count("<figure>") >= 24 and str(tmp_path / "demo" / "gallery" / "index.html") in done.stdout


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
