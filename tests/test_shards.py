"""Detection in shards: what is made, what is kept, what is refused; and once over Ray, where it is installed."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_commands import Stub, failing_line, foreign, scans

from retinanet_nb import cli, retinanet_box, shards
from retinanet_nb.shards import detect_in_shards, on_ray, one_by_one, read_shard, shards_of


@pytest.fixture
def asked(monkeypatch, tmp_path):
    "A request of eleven pictures in shards of three, one of them broken, with a detector that costs nothing."
    monkeypatch.setattr(retinanet_box, "load_detector", lambda path: Stub(10**9))
    pictures, model = scans(tmp_path / "scans", 11), foreign(tmp_path, "x.keras")
    Path(pictures[4]).write_bytes(b"no picture")
    ask = partial(detect_in_shards, folder=tmp_path / "out", shard_size=3, spread=one_by_one)
    return ask, model, pictures, tmp_path / "out"


def names(folder):
    return sorted(path.name for path in folder.glob("[!.]*"))


def test_shards_hold_every_picture_once_in_order():
    for count, size in ((1, 1), (1, 9), (9, 3), (10, 3), (2000, 7)):
        paths = [f"{k}.png" for k in range(count)]
        made = shards_of(paths, size, "parquet")
        assert [path for shard in made for path in shard.paths] == paths
        assert {len(shard.paths) for shard in made[:-1]} <= {size}
        assert [shard.file for shard in made] == sorted({shard.file for shard in made})
    assert shards_of(["a.png"] * 100_001, 1)[100_000].file == "shard-100000.jsonl"
    for wrong in (([], 3), (["a.png"], 0), (["a.png"], 3, "csv")):
        with pytest.raises(ValueError):
            shards_of(*wrong)


def test_the_rows_are_those_of_the_command(asked, capsys):
    ask, model, pictures, out = asked
    counted = ask(model, pictures)
    assert (counted.shards, counted.fresh, counted.pictures, len(counted.refused)) == (4, 4, 10, 1)
    rows = [row for name in names(out) if "shard" in name for row in read_shard(out / name)]
    assert [row["image"] for row in rows] == pictures
    assert pictures[4] in rows[4]["error"]
    assert set(rows[4]) == {"image", "error"} and rows[4]["error"] == counted.refused[0]
    failing_line(
        capsys,
        cli.retinanet_detect,
        str(model),
        pictures,
        out=str(out.parent / "plain"),
        only_json=True,
    )
    plain = json.loads((out.parent / "plain" / "detections.json").read_text())
    assert plain == [row for row in rows if "error" not in row]
    assert counted.objects == sum(len(row["detections"]) for row in plain)


@pytest.mark.parametrize("answers", range(4))
def test_only_what_is_missing_is_made(asked, answers):
    "Whatever order the answers come in, and wherever they stop."
    ask, model, pictures, out = asked

    def stops(options, items):
        for item in items[::-1][:answers]:
            yield from one_by_one(options, [item])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(model, pictures, spread=stops)
    there = [f"shard-0000{k}.jsonl" for k in range(4)][4 - answers :]
    assert names(out) == ["request.json", *there]
    before = {name: (out / name).stat().st_mtime_ns for name in there}
    assert ask(model, pictures).fresh == 4 - answers
    assert before == {name: (out / name).stat().st_mtime_ns for name in there}
    assert ask(model, pictures, spread=None).fresh == 0  # nobody is asked
    (out / "shard-00002.jsonl").unlink()
    assert ask(model, pictures).fresh == 1


def test_a_killed_process_leaves_whole_shards(asked, tmp_path):
    ask, model, pictures, out = asked
    code = f"""
import os, sys, types
from test_commands import Stub
from retinanet_nb.shards import detect_in_shards, one_by_one
box = types.SimpleNamespace(load_detector=lambda path: Stub(), snapshot=lambda detector: detector)
sys.modules["retinanet_nb.retinanet_box"] = box  # spares the engine
def dies(options, items):
    for answer in one_by_one(options, items):
        if answer["shard"] == 2:
            os.kill(os.getpid(), 9)
        yield answer
detect_in_shards({str(model)!r}, {pictures!r}, {str(out)!r}, shard_size=3, spread=dies)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    assert names(out) == ["request.json", "shard-00000.jsonl", "shard-00001.jsonl"]
    assert ask(model, pictures).fresh == 2


def test_another_request_is_refused(asked):
    ask, model, pictures, out = asked
    ask(model, pictures)
    before = {name: (out / name).read_bytes() for name in names(out)}
    for change, word in (
        (dict(paths=pictures[1:]), "11 pictures instead of 10"),
        (dict(paths=pictures[::-1]), "other pictures"),
        (dict(shard_size=4), "shard_size was 3, now it is 4"),
        (dict(score_threshold=0.7), "score_threshold was 0.5"),
        (dict(engine="openvino"), "engine"),
    ):
        with pytest.raises(ValueError, match=word) as error:
            ask(model, **{"paths": pictures, **change})
        assert str(out) in str(error.value) and "choose another folder" in str(error.value)
    model.write_text("another detector")
    with pytest.raises(ValueError, match="another detector"):
        ask(model, pictures)
    assert before == {name: (out / name).read_bytes() for name in names(out)}


def test_shards_without_their_request_are_made_again(asked):
    ask, model, pictures, out = asked
    ask(model, pictures)
    (out / "request.json").unlink()
    assert ask(model, pictures[::-1]).fresh == 4
    assert read_shard(out / "shard-00000.jsonl")[0]["image"] == pictures[-1]


def test_what_is_somebody_elses_stays(asked):
    ask, model, pictures, out = asked
    out.mkdir()
    (out / "shard-00003.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="shard-00003.jsonl would be replaced"):
        ask(model, pictures, spread=None)
    assert names(out) == ["shard-00003.jsonl"] and (out / "shard-00003.jsonl").read_text() == "mine"


def test_openvino_keeps_its_weights_elsewhere(tmp_path):
    model, weights = tmp_path / "x.xml", tmp_path / "x.bin"
    model.write_text("network")
    weights.write_text("weights")
    first = shards.request_of(model, ["a.png"])
    weights.write_text("others")
    assert shards.request_of(model, ["a.png"])["detector"] != first["detector"]


def test_a_worker_that_fails_ends_it_with_its_sentence(asked, monkeypatch):
    ask, model, pictures, out = asked

    def broken(path):
        raise ModuleNotFoundError("there is no engine on this machine")

    monkeypatch.setattr(retinanet_box, "load_detector", broken)
    with pytest.raises(ValueError, match="no engine on this machine"):
        ask(model, pictures)
    monkeypatch.setattr(retinanet_box, "load_detector", lambda path: Stub(1))  # fails in its second step
    with pytest.raises(ValueError, match="a worker failed"):
        ask(model, pictures, batch_size=3)
    assert names(out) == ["request.json", "shard-00000.jsonl"]
    with pytest.raises(ValueError, match="3 shards got no answer"):
        ask(model, pictures, spread=lambda options, items: (x for x in ()))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_formats_and_names_that_are_not_utf8(asked, format, tmp_path, monkeypatch):
    if format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow isn't installed: pip install 'retinanet_nb[ray]'")
    ask, model, pictures, out = asked
    odd = tmp_path / "scans" / os.fsdecode(b"caf\xe9.png")
    os.rename(pictures[0], odd)
    monkeypatch.chdir(tmp_path)
    relative = [os.path.relpath(path, tmp_path) for path in (odd, *pictures[1:])]
    ask(model, relative, format=format)
    rows = read_shard(out / f"shard-00000.{format}")
    assert [row["image"] for row in rows[1:]] == relative[1:3]
    assert rows[0]["image"] == (relative[0] if format == "jsonl" else "scans/caf\\udce9.png")
    assert all(set(row) == {"image", "height", "width", "detections"} for row in rows)
    assert set(read_shard(out / f"shard-00001.{format}")[1]) == {"image", "error"}


def test_the_options_of_ray(asked, capsys, monkeypatch):
    ask, model, pictures, out = asked
    detect = partial(failing_line, capsys, cli.retinanet_detect, str(model))
    assert "--shard_size goes with --ray" in detect(pictures, shard_size=5)
    assert "--ray" in detect(["film.mp4"], ray=True)
    assert "--shard_format must be jsonl or parquet" in detect(pictures, ray=True, shard_format="csv")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'retinanet_nb[ray]'" in detect(pictures, ray=True, out=str(out))
    assert not out.exists()
    with pytest.raises(ModuleNotFoundError, match="this needs ray"):
        next(on_ray({}, [{}]))


def test_the_command_in_shards(asked, capsys, monkeypatch):
    ask, model, pictures, out = asked
    given = []
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
    monkeypatch.setattr(
        shards, "on_ray", lambda *items, workers: (given.append(workers), one_by_one(*items))[1]
    )
    options = dict(ray=True, ray_workers=7, shard_size=3, out=str(out))
    for told in ("4 shards in", "4 of them from before"):
        with pytest.raises(SystemExit):
            cli.retinanet_detect(str(model), pictures, **options)
        printed = capsys.readouterr()
        assert told in printed.out and "in 10 pictures" in printed.out
        assert "1 of 11 pictures could not be read" in printed.err
    assert given == [7]


def test_over_ray(capsys, tmp_path):
    "Twenty drawn pictures on two cores, in shards of eight; one shard is lost and made again."
    ray = pytest.importorskip("ray", reason="Ray isn't installed: pip install 'retinanet_nb[ray]'")
    from retinanet_nb.pictures import write_image
    from retinanet_nb.shapes import draw_scene

    pictures = [str(write_image(tmp_path / "scans" / f"{k:02}.png", draw_scene(k)[0])) for k in range(20)]
    Path(pictures[9]).write_bytes(b"no picture")
    out, plain = tmp_path / "out", tmp_path / "plain"
    options = dict(ray=True, ray_workers=2, shard_size=8, out=str(out))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert "1 of 20 pictures" in failing_line(capsys, cli.retinanet_detect, "shapes", pictures, **options)
        files = [out / f"shard-0000{k}.jsonl" for k in range(3)]
        before = [path.read_bytes() for path in files]
        times = [path.stat().st_mtime_ns for path in files]
        files[1].unlink()
        with pytest.raises(SystemExit):
            cli.retinanet_detect("shapes", pictures, **options)
        assert "3 shards in" in (printed := capsys.readouterr().out) and "2 of them from before" in printed
        assert ray.is_initialized()  # whoever started it ends it
    finally:
        ray.shutdown()
    assert [path.read_bytes() for path in files] == before
    assert [path.stat().st_mtime_ns == time for path, time in zip(files, times)] == [True, False, True]

    detect_in_shards("shapes", pictures, plain, shard_size=8, spread=one_by_one)
    rows, alone = (
        [row for path in files for row in read_shard(folder / path.name)] for folder in (out, plain)
    )
    assert [row["image"] for row in rows] == pictures and "error" in rows[9]
    found = [[d["name"] for d in row.get("detections", ())] for row in rows]
    assert (
        found == [[d["name"] for d in row.get("detections", ())] for row in alone]
        and sum(map(len, found)) > 20
    )
    boxes, expected = (
        np.array([d["box"] for row in some if "error" not in row for d in row["detections"]])
        for some in (rows, alone)
    )
    np.testing.assert_allclose(boxes, expected, atol=0.05)
