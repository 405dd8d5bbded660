"""Files and folders: whole or not at all, on disk before they have their name, and nothing of somebody else's."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from retinanet_nb import files
from retinanet_nb.files import (
    JOURNAL,
    LOCK,
    MANIFEST,
    claim,
    finite,
    fresh_folder,
    locked,
    read_json,
    save_atomically,
    save_together,
    sync,
    write_json,
)


def visible(folder):
    "Names in a folder, without the package's own books."
    return sorted(p.name for p in folder.glob("[!.]*"))


# --- one file --------------------------------------------------------------------------------------------------------


def test_bytes_are_on_disk_before_the_name_is(tmp_path, monkeypatch):
    "A rename that outlives its bytes in a power cut leaves an empty file, so their order is what counts."
    events = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(number):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{number}"))))
        real_sync(number)

    def replace(a, b):
        events.append(("rename", os.path.basename(b)))
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_atomically(tmp_path / "a.txt", lambda p: p.write_text("x"))
    kinds = [kind for kind, _ in events]
    assert kinds == ["sync", "rename", "sync"], events
    assert events[0][1].endswith("a.txt") and events[2][1] == tmp_path.name


def test_together_no_name_comes_before_the_bytes_of_all(tmp_path, monkeypatch):
    events, real_sync, real_replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("sync"), real_sync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), real_replace(a, b)))
    write = lambda p: p.write_text("x")
    save_together((tmp_path / name, write) for name in "abc")
    assert events == ["sync"] * 3 + ["rename"] * 3 + ["sync"]
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_together([(tmp_path / "d", write), (tmp_path, write)])
    assert visible(tmp_path) == ["a", "b", "c"] and not list(tmp_path.glob(".*"))


def test_sync_takes_files_and_folders(tmp_path):
    (tmp_path / "a").write_text("x")
    assert sync(tmp_path / "a") is None and sync(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nowhere")


def test_a_link_keeps_being_one(tmp_path):
    real, link = tmp_path / "disk" / "big.txt", tmp_path / "link.txt"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    save_atomically(link, lambda p: p.write_text("new"))
    assert link.is_symlink() and real.read_text() == "new" and real.stat().st_mode & 0o777 == 0o640
    assert visible(real.parent) == ["big.txt"] and not list(real.parent.glob(".*"))


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "disk is full"), (errno.EROFS, "another folder")])
def test_what_the_disk_says_is_told_with_the_file(tmp_path, number, words):
    target = tmp_path / "model.keras"
    target.write_text("before")

    def write(path):
        path.write_text("half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=words) as error:
        save_atomically(target, write)
    assert "model.keras" in str(error.value) and error.value.errno == number
    assert target.read_text() == "before" and visible(tmp_path) == ["model.keras"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_atomically(tmp_path, lambda p: p.write_text("x"))


def test_numbers_that_json_does_not_know(tmp_path):
    import numpy as np

    value = {
        "a": float("nan"),
        1: [float("-inf"), np.float32(0.5), np.arange(2)],
        "p": tmp_path,
        "t": (True, None),
    }
    assert finite(value) == {"a": None, "1": [None, 0.5, [0, 1]], "p": str(tmp_path), "t": [True, None]}
    text = write_json(tmp_path / "a.json", value).read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
    with pytest.raises(TypeError, match="object"):
        finite({"x": object()})


def test_names_that_are_no_utf8_survive(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    write_json(tmp_path / "a.json", {"image": name})
    assert b"caf\xe9.jpg" in (tmp_path / "a.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"image": name}


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1, 2]", "an object"),
        (b'"' + b"x" * 1_000_000 + b'"', "an object"),
        (b"1" * 5000, "not JSON"),
    ],
    ids=["empty", "cut", "deep", "bytes", "list", "megabyte", "digits"],
)
def test_json_from_outside(tmp_path, data, words):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as error:
        read_json(path)
    assert "config.json" in str(error.value) and len(str(error.value)) < 400


# --- folders ---------------------------------------------------------------------------------------------------------


def test_claim_refuses_what_is_not_ours_and_touches_nothing(tmp_path):
    (tmp_path / "report.json").write_bytes(b"mine")
    with pytest.raises(ValueError, match="report.json"), claim(tmp_path, ["curves.png", "report.json"]):
        pytest.fail("the work had begun")
    assert (tmp_path / "report.json").read_bytes() == b"mine" and visible(tmp_path) == ["report.json"]


def test_claim_knows_its_own_again_and_what_was_changed(tmp_path):
    for text in ("one", "two"):
        with claim(tmp_path, ["a.txt"]) as ours:
            ours.write("a.txt", lambda p: p.write_text(text))
    assert (tmp_path / "a.txt").read_text() == "two"
    (tmp_path / "a.txt").write_text("edited")
    with pytest.raises(ValueError, match="changed it since"), claim(tmp_path, ["a.txt"]):
        pass
    assert (tmp_path / "a.txt").read_text() == "edited"


def test_a_copied_folder_is_still_ours(tmp_path):
    import shutil

    with claim(tmp_path / "a", ["x.json"]) as ours:
        ours.write_json("x.json", {})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with claim(tmp_path / "b", ["x.json"]) as ours:
        ours.write_json("x.json", {"again": 1})
    assert read_json(tmp_path / "b" / "x.json") == {"again": 1}


def test_patterns_go_when_they_are_not_written_again_and_only_ours(tmp_path):
    pattern = [r"pictures/page-\d+\.jpg"]
    with claim(tmp_path, (), pattern) as ours:
        for k in (1, 2):
            ours.write(f"pictures/page-{k}.jpg", lambda p: p.write_bytes(b"x"))
    (tmp_path / "pictures" / "page-scan.jpg").write_bytes(b"scan")
    with claim(tmp_path, (), pattern) as ours:
        ours.write("pictures/page-1.jpg", lambda p: p.write_bytes(b"y"))
    assert visible(tmp_path / "pictures") == ["page-1.jpg", "page-scan.jpg"]
    (tmp_path / "pictures" / "page-7.jpg").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="page-7.jpg"), claim(tmp_path, (), pattern):
        pass


def test_after_a_failure_the_earlier_result_stays(tmp_path):
    pattern = [r"page-\d+\.txt"]
    with claim(tmp_path, ["a.txt"], pattern) as ours:
        ours.write("a.txt", lambda p: p.write_text("old"))
        ours.write("page-1.txt", lambda p: p.write_text("old"))
    with pytest.raises(RuntimeError), claim(tmp_path, ["a.txt"], pattern):
        raise RuntimeError("before anything was written")
    assert visible(tmp_path) == ["a.txt", "page-1.txt"]
    with claim(tmp_path, ["a.txt"]) as ours:  # and it is still known as ours
        ours.write("a.txt", lambda p: p.write_text("new"))


def test_a_dangling_link_is_somebody_elses(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "away" / "a.txt")
    with pytest.raises(ValueError, match="a.txt"), claim(tmp_path, ["a.txt"]):
        pass


def test_adopting_takes_only_the_names_that_are_said(tmp_path):
    for name in ("config.json", "notes.txt"):
        (tmp_path / name).write_text("before there were manifests")
    with claim(tmp_path, ["config.json"], adopt=True) as ours:
        ours.write_json("config.json", {})
        with pytest.raises(ValueError, match="notes.txt"):
            ours.write("notes.txt", lambda p: p.write_text("x"))


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"a": 1}}', "{" * 100_000])
def test_a_manifest_that_is_none(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=MANIFEST.lstrip(".")), claim(tmp_path, ["a"]):
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError, match="out"), claim(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "a file"


HOLD = """
import sys, time
from retinanet_nb.files import claim
with claim(sys.argv[1], ["a.txt"]) as ours:
    ours.write("a.txt", lambda p: p.write_text("theirs"))
    (ours.folder / ".1-1-a.txt").write_text("half a file")
    print("held", flush=True)
    time.sleep(100)
"""


def test_one_owner_and_a_dead_one_does_not_count(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another process"), locked(tmp_path):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / LOCK).exists()
    # it was killed: what it wrote is known as the package's, and its half file goes
    with claim(tmp_path, ["a.txt"]) as ours:
        assert not list(tmp_path.glob(".1-1-*"))
        ours.write("a.txt", lambda p: p.write_text("ours"))
    assert (tmp_path / "a.txt").read_text() == "ours"


def test_who_has_patience_waits(tmp_path):
    held, done = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path):
            held.set()
            done.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    with pytest.raises(BlockingIOError, match="another process"), locked(tmp_path, patience=0.1):
        pass
    threading.Timer(0.2, done.set).start()
    with locked(tmp_path, patience=10):
        assert done.is_set()
    other.join()


def _make(folder, start, made):
    start.wait()
    made.put(fresh_folder(folder).name)


def test_two_that_begin_at_once_get_two_folders(tmp_path):
    context = multiprocessing.get_context("fork")
    start, made = context.Event(), context.Queue()
    others = [context.Process(target=_make, args=(tmp_path / "run", start, made)) for _ in range(4)]
    for process in others:
        process.start()
    time.sleep(0.1)
    start.set()
    names = sorted(made.get(timeout=30) for _ in others)
    for process in others:
        process.join()
    assert names == ["run", "run-2", "run-3", "run-4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=tmp_path.name), claim(tmp_path, ["a"]):
        pass


def test_writing_is_noted_before_it_is_done(tmp_path, monkeypatch):
    "When a file gets its name, the journal on disk says what is in it; the manifest says nothing before the end."
    seen, real = [], os.replace

    def replace(beside, target):
        if os.path.basename(target) == "a.txt":
            lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_bytes().splitlines()]
            seen.append((lines, read_json(tmp_path / MANIFEST)["files"]))
        real(beside, target)

    with claim(tmp_path, ["a.txt"]) as ours:
        monkeypatch.setattr(os, "replace", replace)
        ours.write("a.txt", lambda p: p.write_text("x"))
        monkeypatch.undo()
    digest = hashlib.sha256(b"x").hexdigest()
    assert seen == [([["a.txt", None], ["a.txt", digest]], {})]
    assert read_json(tmp_path / MANIFEST)["files"] == {"a.txt": digest}
    assert not (tmp_path / JOURNAL).exists()


KILLED = """
import os, signal, sys
from retinanet_nb.files import claim
from retinanet_nb.pictures import write_image
import numpy as np
when, folder = sys.argv[1:]
def die(*paths):
    if os.path.basename(paths[-1]) == "a.png":
        if when == "after":
            real(*paths)
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)
real, os.replace = os.replace, die
with claim(folder, ["a.png"]) as ours:
    ours.take(["a.png"])
    write_image(ours.folder / "a.png", np.zeros((4, 4, 3), np.uint8))
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("earlier", [False, True])
def test_what_was_announced_and_never_written_is_not_ours(tmp_path, when, earlier):
    "Killed beside the rename: what we wrote is ours, and what the owner puts there afterwards is not."
    if earlier:
        with claim(tmp_path, ["a.png"]) as ours:
            ours.write("a.png", lambda p: p.write_bytes(b"an earlier result"))
    run = subprocess.run([sys.executable, "-c", KILLED, when, tmp_path], check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "a.png").exists() == (earlier or when == "after")
    with claim(tmp_path, ["a.png"]):  # the old file or the new one, both ours
        assert not [p for p in tmp_path.glob(".*") if p.name.endswith("a.png")]  # its half file is gone
    (tmp_path / "a.png").write_bytes(b"the only photograph")
    with pytest.raises(ValueError, match="a.png would be replaced"), claim(tmp_path, ["a.png"]):
        pass
    assert (tmp_path / "a.png").read_bytes() == b"the only photograph"


def test_the_owner_may_come_right_after_the_kill(tmp_path):
    "As above, without a claim in between: the journal alone decides."
    run = subprocess.run([sys.executable, "-c", KILLED, "before", tmp_path], check=False)
    assert run.returncode == -signal.SIGKILL and (tmp_path / JOURNAL).exists()
    (tmp_path / "a.png").write_bytes(b"the only photograph")
    for _ in range(2):
        with pytest.raises(ValueError, match="somebody else made it"), claim(tmp_path, ["a.png"]):
            pass
    assert (tmp_path / "a.png").read_bytes() == b"the only photograph"


@pytest.mark.parametrize(
    "line",
    [
        '["a.txt", "{sum}"',
        '["../a.txt", "{sum}"]',
        '["a.txt", 3]',
        '["a.txt"]',
        "3",
        "[" * 100_000,
        '{"a.txt": "{sum}"}',
        '["b.txt", "{sum}"]',
        "\0",
    ],
    ids=["cut", "outside", "number", "short", "no list", "deep", "object", "another", "zero"],
)
def test_lines_of_a_journal_that_say_nothing(tmp_path, line):
    folder = tmp_path / "out"
    folder.mkdir()
    for path in (folder / "a.txt", tmp_path / "a.txt"):
        path.write_bytes(b"x")
    text = line.replace("{sum}", hashlib.sha256(b"x").hexdigest())
    (folder / JOURNAL).write_text(text + '\n["c.txt", null]\n')
    (folder / ".1-2-c.txt").write_text("half a file of ours")
    with pytest.raises(ValueError, match="somebody else made it"), claim(folder, ["a.txt"]):
        pass
    assert (folder / "a.txt").read_bytes() == b"x"
    with claim(folder, ["c.txt"]):
        assert not list(folder.glob(".1-2-*"))


def test_a_file_that_grows(tmp_path):
    "It is there, empty, before it is noted as growing; at the end it has a checksum like any other."
    for text in ("one", "two"):
        with claim(tmp_path, ["rows.txt"]) as ours:
            path = ours.grow("rows.txt")
            assert path.read_bytes() == b"" and read_json(tmp_path / MANIFEST)["files"] == {"rows.txt": None}
            with path.open("a") as file:
                file.write(text)
        assert path.read_text() == text
    path.write_text("edited")
    with pytest.raises(ValueError, match="changed it since"), claim(tmp_path, ["rows.txt"]):
        pass


def test_a_file_that_was_not_written_again_keeps_its_checksum(tmp_path):
    with claim(tmp_path, ["a.txt"]) as ours:
        ours.write("a.txt", lambda p: p.write_text("ours"))
    with claim(tmp_path, ["a.txt"]) as ours:
        ours.take(["a.txt"])
        (tmp_path / "a.txt").write_text("edited meanwhile")
    with pytest.raises(ValueError, match="changed it since"), claim(tmp_path, ["a.txt"]):
        pass


def test_only_the_folder_that_was_claimed_takes_notes(tmp_path):
    with claim(tmp_path / "a", ["x.txt"]) as one, claim(tmp_path / "b", ["x.txt"]) as other:
        one.take(["x.txt"])
        save_atomically(tmp_path / "b" / "x.txt", lambda p: p.write_text("not announced there"))
        save_atomically(tmp_path / "x.txt", lambda p: p.write_text("outside"))
        one.write("x.txt", lambda p: p.write_text("x"))
        assert set(one.sums) == {"x.txt"} and not other.sums
    save_atomically(tmp_path / "a" / "x.txt", lambda p: p.write_text("after the end"))
    with pytest.raises(ValueError, match="changed it since"), claim(tmp_path / "a", ["x.txt"]):
        pass


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/outside.txt", "", "a/../../outside.txt", "a//b", "a\0b"]
)
def test_a_manifest_reaches_no_further_than_its_folder(tmp_path, name):
    "A doctored manifest must not let the package delete or replace anything outside."
    folder = tmp_path / "out"
    folder.mkdir()
    outside, half = tmp_path / "outside.txt", tmp_path / ".1-2-outside.txt"
    outside.write_text("theirs")
    half.write_text("theirs")
    (folder / MANIFEST).write_text(json.dumps({"files": {name: None}}))
    with pytest.raises(ValueError, match=MANIFEST.lstrip(".")), claim(folder, (), [r".*outside\.txt"]):
        pass
    assert outside.read_text() == half.read_text() == "theirs"


def test_what_went_wrong_first_is_told(tmp_path, monkeypatch):
    "A disk that is full takes no manifest either; the error is still the one that stopped the work."

    def full(path, write):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(KeyError, match="the work"), claim(tmp_path, ["a.txt"]):
        monkeypatch.setattr(files, "save_atomically", full)
        raise KeyError("the work")


@pytest.mark.skipif(os.name == "nt", reason="these are no names there")
@pytest.mark.parametrize("name", ["12:30.jpg", "a\\b.jpg", "..cat.jpg", "more/cat...jpg"])
def test_unusual_names_are_ours_again(tmp_path, name):
    "Results are named after pictures, whatever those are called."
    for text in ("one", "two"):
        with claim(tmp_path, [name]) as ours:
            ours.write(name, lambda p: p.write_text(text))
    assert (tmp_path / name).read_text() == "two"


def test_what_changes_while_we_work_is_somebody_elses(tmp_path):
    with claim(tmp_path, ["a.txt"]) as ours:
        ours.write("a.txt", lambda p: p.write_text("ours"))
        (tmp_path / "a.txt").write_text("edited meanwhile")
    with pytest.raises(ValueError, match="changed it since"), claim(tmp_path, ["a.txt"]):
        pass


def test_nothing_is_deleted_behind_a_link(tmp_path):
    pattern, disk = [r"pictures/page-\d+\.jpg"], tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pictures").symlink_to(disk)
    with claim(tmp_path / "out", (), pattern) as ours:
        ours.write("pictures/page-1.jpg", lambda p: p.write_bytes(b"x"))
    with claim(tmp_path / "out", (), pattern):
        pass
    assert visible(disk) == ["page-1.jpg"]


def test_names_as_long_as_they_may_be(tmp_path):
    name = "ü" * 120 + ".keras"  # 246 bytes
    seen = []
    save_atomically(tmp_path / name, lambda p: (seen.append(p.suffix), p.write_text("x")))
    assert visible(tmp_path) == [name] and seen == [".keras"]


def test_a_fresh_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", ""):
        with pytest.raises(ValueError, match="no name"):
            fresh_folder(name)


def test_patterns_look_no_further_than_they_must(tmp_path):
    "A page in a home folder must not walk through all that lies in it."
    (tmp_path / "elsewhere").mkdir(mode=0o000)
    (tmp_path / "elsewhere").chmod(0o755)
    (tmp_path / "elsewhere" / "page-1.txt").write_text("not ours, and not in the way")
    with claim(tmp_path, (), [r"page-\d+\.txt"]) as ours:
        ours.write("page-1.txt", lambda p: p.write_text("x"))
    assert (tmp_path / "elsewhere" / "page-1.txt").read_text().startswith("not ours")
