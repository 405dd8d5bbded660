"""Mutated files, a few hundred of them, through every reader; and that the fuzzing itself notices what it is there for."""

import os
import random
import sys

import pytest

import fuzz


@pytest.mark.parametrize("seed", [1])
def test_mutated_files_end_in_a_sentence(seed, tmp_path):
    said = []
    options = fuzz.arguments(["--cases", "400", "--seed", str(seed), "--keep", str(tmp_path / "failures")])
    assert fuzz.fuzz(options, said.append) == {}, "\n".join(said)
    assert "400 cases" in said[-1] and f"seed {seed}" in said[-1]
    assert not (tmp_path / "failures").exists()


def report(monkeypatch, tmp_path, read, check=lambda result: None):
    """What a case reports whose reader is `read`."""

    def case(rng, folder, home):
        (folder / "table.csv").write_text("x")
        return lambda: read(folder / "table.csv"), check

    monkeypatch.setattr(fuzz, "case_csv", case)
    return fuzz.run_case(1, 0, tmp_path / "home", tmp_path / "work", ["csv"])


def raising(error):
    def read(path):
        raise error(path)

    return read


@pytest.mark.parametrize(
    "error", [KeyError, AttributeError, RecursionError, MemoryError, IndexError, TypeError, ZeroDivisionError]
)
def test_other_exceptions_are_failures(monkeypatch, tmp_path, error):
    assert report(monkeypatch, tmp_path, raising(error))["failure"] == error.__name__


def test_sentences_must_name_the_file(monkeypatch, tmp_path):
    good = report(monkeypatch, tmp_path, raising(lambda path: ValueError(f"{path}: line 1 is wrong")))
    assert (good["failure"], good["outcome"]) == (None, "ValueError")
    gone = report(monkeypatch, tmp_path, raising(lambda path: FileNotFoundError(f"no {path.name}")))
    assert (gone["failure"], gone["outcome"]) == (None, "FileNotFoundError")
    for text in ("a line is wrong", "stable.csv is wrong"):
        told = report(monkeypatch, tmp_path, raising(lambda path, text=text: ValueError(text)))
        assert "names no file" in told["failure"], told
    long = report(monkeypatch, tmp_path, raising(lambda path: ValueError(f"{path}{'x' * 2000}")))
    assert "characters" in long["failure"]
    many = report(monkeypatch, tmp_path, raising(lambda path: ValueError(f"{path}" + "\nx" * 9)))
    assert "lines" in many["failure"]


def test_writing_and_nonsense_are_failures(monkeypatch, tmp_path):
    assert report(monkeypatch, tmp_path, lambda path: path.read_text())["outcome"] == "read"
    for write in (
        lambda path: path.with_name("beside").write_text(""),
        lambda path: path.write_text("y"),
        lambda path: path.unlink(),
    ):
        assert "written" in report(monkeypatch, tmp_path, write)["failure"]

    def refuse(result):
        raise fuzz.Failure("nonsense: all of it")

    assert report(monkeypatch, tmp_path, lambda path: 1, refuse)["failure"] == "nonsense"


def test_slow_cases_are_failures(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "SECONDS", 0)
    assert report(monkeypatch, tmp_path, lambda path: sum(range(300_000)))["failure"] == "takes too long"


def test_records_are_looked_at():
    import numpy as np
    from types import SimpleNamespace

    def dataset(**changes):
        flags = np.zeros(1, bool)
        record = dict(
            boxes=np.array([[1, 2, 3, 4.0]]),
            labels=np.array([0]),
            difficult=flags,
            crowd=flags,
            height=24,
            width=32,
        )

        class Set(list):
            class_names = ("ball",)
            report = SimpleNamespace(to_json=lambda: "{}")

        return Set([SimpleNamespace(**{**record, **changes})])

    fuzz.check_records(dataset())
    for changes in (
        dict(boxes=np.array([[1, 2, 3, np.nan]])),
        dict(boxes=np.array([[1, 2, 1, 4.0]])),
        dict(boxes=np.array([[-1, 2, 3, 4.0]])),
        dict(boxes=np.array([[1, 2, 33, 4.0]])),
        dict(boxes=np.zeros((2, 4))),
        dict(labels=np.array([1])),
        dict(crowd=np.zeros(0, bool)),
        dict(height=25),
    ):
        with pytest.raises(fuzz.Failure):
            fuzz.check_records(dataset(**changes))


@pytest.mark.parametrize(
    "words, failure",
    [("os._exit(7)", "crash (7)"), ("os.kill(os.getpid(), 11)", "crash (-11)"), ("time.sleep(60)", "hangs")],
)
def test_a_child_that_dies_or_hangs(monkeypatch, tmp_path, words, failure):
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    child = fuzz.Child(fuzz.arguments(["--seed", "1"]), tmp_path, tmp_path)
    child.command = [sys.executable, "-c", f"import os, time\nprint('ready', flush=True)\ninput()\n{words}"]
    assert child.run(5)["failure"] == failure
    assert child.process is None  # the next case gets another one


def test_cases_depend_on_seed_and_number_alone(tmp_path):
    home = fuzz.templates(tmp_path / "home")
    kinds = ["voc", "split", "coco", "csv", "mapping", "picture", "manifest"]

    def made(seed, number, folder):
        fuzz.run_case(seed, number, home, tmp_path / folder, kinds)
        return fuzz.contents(tmp_path / folder)

    assert made(3, 4, "a") == made(3, 4, "b")
    assert len({str(made(3, n, "c")) for n in range(6)}) == 6


def test_mutations_change_something():
    rng = random.Random(0)
    data = bytes(range(200))
    assert sum(fuzz.mutate_bytes(rng, data) != data for _ in range(100)) > 95
    assert (
        sum(fuzz.mutate_json(rng, fuzz.COCO) != fuzz.json.dumps(fuzz.COCO).encode() for _ in range(100)) > 95
    )
    before = str(fuzz.COCO)
    fuzz.mutate_json(rng, fuzz.COCO)
    assert str(fuzz.COCO) == before  # the original stays


def test_a_failing_case_is_kept(tmp_path):
    options = fuzz.arguments(["--seed", "9", "--only", "csv", "--keep", str(tmp_path / "kept")])
    work = tmp_path / "work"
    (work / "case").mkdir(parents=True)
    (work / "case" / "table.csv").write_text("x")
    told = {"case": 12, "kind": "csv", "failure": "KeyError", "message": "'x'", "trace": "…"}
    how = fuzz.keep(options, told, work, tmp_path)
    assert "--seed 9 --case 12 --only csv" in how
    kept = tmp_path / "kept" / "9-12"
    assert how in (kept / "failure.txt").read_text() and (kept / "files" / "table.csv").read_text() == "x"
    assert os.listdir(kept / "files") == ["table.csv"]
