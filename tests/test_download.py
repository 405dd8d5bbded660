"""Downloads: cut anywhere they arrive whole, nothing of somebody else's is replaced, and evil archives stay packed."""

import errno
import hashlib
import io
import random
import tarfile
import time

import pytest
from retinanet_nb import download
from retinanet_nb.download import fetch, unpack

from helpers import Server

BODY = random.Random(0).randbytes(100_000)  # the same in every process of the tests
MD5, SHA = hashlib.md5(BODY).hexdigest(), hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("checksum", [MD5, SHA, SHA[:8], None])
def test_cut_twice_and_whole_in_the_end(tmp_path, checksum):
    with Server(BODY, cuts=[1000, 50_000]) as server:
        assert (
            fetch(server.url + "/f", tmp_path / "new" / "f", checksum, progress=False)
            == tmp_path / "new" / "f"
        )
        assert server.ranges == [None, "bytes=1000-", "bytes=51000-"]
        assert (tmp_path / "new" / "f").read_bytes() == BODY and names(tmp_path / "new") == ["f"]
        if checksum:  # there already: nothing is asked
            fetch(server.url + "/f", tmp_path / "new" / "f", checksum, progress=False)
            assert len(server.asked) == 3


@pytest.mark.parametrize("checksum, first", [(SHA, "bytes=60000-"), (None, None)])
def test_an_earlier_call_is_gone_on_with(tmp_path, checksum, first):
    "With a checksum; without one nothing could tell whether both halves are of one file."
    with Server(BODY, cuts=[60_000] + [0] * 5) as server:
        with pytest.raises(OSError, match="could not be downloaded.*kept in .*part"):
            fetch(server.url + "/f", tmp_path / "f", checksum, progress=False)
        (part,) = tmp_path.iterdir()
        assert part.name.endswith(".part") and part.read_bytes() == BODY[:60_000]
        server.asked.clear()
        fetch(server.url + "/f", tmp_path / "f", checksum, progress=False)
        assert server.ranges[0] == first
    assert (tmp_path / "f").read_bytes() == BODY and names(tmp_path) == ["f"]


def test_parts_of_two_addresses_are_not_mixed(tmp_path):
    (tmp_path / "f.part").write_bytes(b"somebody else's")
    other = download._part("http://elsewhere/f", tmp_path / "f")
    other.write_bytes(b"another mirror's")
    with Server(BODY) as server:
        fetch(server.url + "/f", tmp_path / "f", SHA, progress=False)
        assert server.ranges == [None]
    assert (tmp_path / "f.part").read_bytes() == b"somebody else's" and other.exists()


def test_servers_that_cannot_go_on(tmp_path):
    with Server(BODY, cuts=[70_000], ranges=False) as server:
        fetch(server.url + "/f", tmp_path / "f", MD5, progress=False)
    assert (tmp_path / "f").read_bytes() == BODY
    with Server(BODY, cuts=[70_000] * 99, ranges=False) as server, pytest.raises(OSError, match="broke off"):
        fetch(server.url + "/f", tmp_path / "g", progress=False)
    assert len(server.asked) < 20 and not (tmp_path / "g").exists()
    with Server(BODY, cuts=[70_000], shift=5) as server, pytest.raises(OSError, match="at another place"):
        fetch(server.url + "/f", tmp_path / "h", progress=False)


def test_a_server_that_states_no_length(tmp_path):
    with Server(BODY, length=False) as server:
        fetch(server.url + "/f", tmp_path / "f", MD5, progress=False)
    assert (tmp_path / "f").read_bytes() == BODY
    with Server(BODY, length=False, cuts=[500]) as server, pytest.raises(ValueError, match="checksum"):
        fetch(server.url + "/f", tmp_path / "g", MD5, progress=False)


def test_all_has_arrived_already(tmp_path):
    "Killed between the last byte and the rename: the server has nothing left to send."
    with Server(BODY) as server:
        download._part(server.url + "/f", tmp_path / "f").write_bytes(BODY)
        fetch(server.url + "/f", tmp_path / "f", SHA, progress=False)
    assert (tmp_path / "f").read_bytes() == BODY and names(tmp_path) == ["f"]


def test_wrong_checksum_and_no_answer(tmp_path):
    for wrong in ("0" * 32, "0" * 64, "0" * 8):
        with Server(BODY) as server, pytest.raises(ValueError, match=f"checksum .* instead of {wrong}"):
            fetch(server.url + "/f", tmp_path / "f", wrong, progress=False)
    with Server(BODY, status=404) as server, pytest.raises(OSError, match="404"):
        fetch(server.url + "/f", tmp_path / "f", progress=False)
    with pytest.raises(OSError, match="127.0.0.1:9"):
        fetch("http://127.0.0.1:9/x", tmp_path / "f", progress=False)
    assert not list(tmp_path.iterdir())


def test_asked_for_nonsense(tmp_path):
    for url in ("file:///etc/passwd", "ftp://x/y", "x"):
        with pytest.raises(ValueError, match="http:// or https://"):
            fetch(url, tmp_path / "f")
    for checksum in ("abc", "G" * 32, "", "A" * 64):
        with pytest.raises(ValueError, match="32 hexadecimal digits"):
            fetch("http://127.0.0.1:9/x", tmp_path / "f", checksum)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path):
    "A file, a folder, a dangling link: none is replaced, and nobody is asked."
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "link"):
        for checksum in (None, SHA):
            with (
                Server(BODY) as server,
                pytest.raises(FileExistsError, match=f"{name} is there already.* it is kept"),
            ):
                fetch(server.url + "/f", tmp_path / name, checksum, progress=False)
            assert server.ranges == []
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path) == ["file", "folder", "link"]


def test_what_appears_in_the_meantime_stays(tmp_path, monkeypatch):
    real = download._download

    def and_somebody_writes(*args):
        real(*args)
        (tmp_path / "f").write_text("mine")

    monkeypatch.setattr(download, "_download", and_somebody_writes)
    with Server(BODY) as server, pytest.raises(FileExistsError, match="appeared during the download"):
        fetch(server.url + "/f", tmp_path / "f", SHA, progress=False)
    assert (tmp_path / "f").read_text() == "mine"


def test_two_at_once(tmp_path):
    with (
        Server(BODY) as server,
        download._alone(download._part(server.url + "/f", tmp_path / "f"), tmp_path / "f"),
    ):
        with pytest.raises(BlockingIOError, match="another process is downloading"):
            fetch(server.url + "/f", tmp_path / "f", SHA, progress=False)
        assert server.ranges == []
    with Server(BODY) as server:
        fetch(server.url + "/f", tmp_path / "f", SHA, progress=False)
    assert names(tmp_path) == ["f"]


def test_a_full_disk_is_not_tried_again(tmp_path, monkeypatch):
    real = open

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", *args, **kwargs):
        return Full() if str(path).endswith(".part") and mode == "wb" else real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", opened)
    with Server(BODY) as server, pytest.raises(OSError, match="the disk is full: .*part"):
        fetch(server.url + "/f", tmp_path / "f", SHA, progress=False)
    assert server.ranges == [None]


# --- archives ----------------------------------------------------------------------------------------------------------


def archive(path, members, edit=lambda m: m):
    with tarfile.open(path, "w") as tar:
        for name in members:
            member, data = tarfile.TarInfo(name), name.encode() * 30
            member.size = len(data)
            tar.addfile(edit(member), io.BytesIO(data))
    return path


def _as(kind, target=""):
    def edit(member):
        member.type, member.linkname, member.size = kind, target, 0
        return member

    return edit


@pytest.mark.parametrize(
    "name,edit",
    [
        ("/etc/evil", None),
        ("top/../../evil", None),
        ("../evil", None),
        ("evil", None),
        ("top2/evil", None),
        ("top\\..\\..\\evil", None),
        ("C:/evil", None),
        (".", None),
        ("top/link", _as(tarfile.SYMTYPE, "/etc")),
        ("top/link", _as(tarfile.SYMTYPE, "good")),
        ("top/hard", _as(tarfile.LNKTYPE, "/etc/passwd")),
        ("top/device", _as(tarfile.CHRTYPE)),
        ("top/pipe", _as(tarfile.FIFOTYPE)),
    ],
)
def test_evil_archives(tmp_path, name, edit):
    archive(tmp_path / "x.tar", ("top/good", name), lambda m: edit(m) if edit and m.name == name else m)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="x.tar is not safe"):
        unpack(tmp_path / "x.tar", tmp_path / "out", top="top")
    assert not list((tmp_path / "out").iterdir()) and names(tmp_path) == ["out", "x.tar"]


def test_unpacks_and_replaces_nothing(tmp_path):
    (tmp_path / "src/top/deep").mkdir(parents=True)
    (tmp_path / "src/top/deep/a").write_text("a")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "src", arcname=".")  # as `tar c .` does, with an entry for the folder itself
    unpack(tmp_path / "x.tar", tmp_path / "out", top="top")
    assert (tmp_path / "out/top/deep/a").read_text() == "a"
    (tmp_path / "out/top/deep/a").write_text("mine")
    archive(tmp_path / "y.tar", ("top/b", "top/deep/a"))
    with pytest.raises(FileExistsError, match="deep/a is there already"):
        unpack(tmp_path / "y.tar", tmp_path / "out", top="top")
    assert (tmp_path / "out/top/deep/a").read_text() == "mine" and not (tmp_path / "out/top/b").exists()


def test_not_an_archive(tmp_path):
    (tmp_path / "x.tar").write_text("text")
    with pytest.raises(ValueError, match="x.tar is not a tar"):
        unpack(tmp_path / "x.tar", tmp_path)
