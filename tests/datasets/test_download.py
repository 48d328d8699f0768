"""Downloads against a server of our own on the loopback, and archives that mean harm."""

import hashlib
import io
import logging
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torchrec_em3.datasets import download as download_module
from torchrec_em3.datasets.download import Source, download, extract
from torchrec_em3.errors import DataError


def make_zip(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


GOOD = make_zip({"ml-1m/ratings.dat": b"1::10::5::978300760\n" * 2000, "ml-1m/README": b"terms"})
GOOD_MD5 = hashlib.md5(GOOD).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers GET by name; counts the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.requests: list[str] = []
        self.stall = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""

    def serve(self, name: str, body: bytes, status: int = 200, **headers: str) -> None:
        self.answers[name] = (status, headers, body)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        name = self.path.removeprefix("/")
        server.requests.append(name)
        time.sleep(server.stall)
        status, headers, body = server.answers.get(name, (404, {}, b"<html>not here</html>"))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds if seconds < 1 else 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download_module, "TIMEOUT_SECONDS", 5)
    monkeypatch.setattr(download_module, "SOURCES", {"ml-1m": Source(6, GOOD_MD5), "ml-latest-small": Source(1, None)})
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_good_download_is_unpacked_once(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.serve("ml-1m.zip", GOOD)
    with caplog.at_level(logging.INFO):
        folder = download("ml-1m", tmp_path / "cache", server.url)
    assert folder == tmp_path / "cache" / "ml-1m"
    assert listing(tmp_path / "cache") == ["ml-1m", "ml-1m/README", "ml-1m/ratings.dat"]
    assert "6 MB" in caplog.text
    assert "not to be redistributed" in caplog.text
    assert download("ml-1m", tmp_path / "cache", server.url) == folder
    assert server.requests == ["ml-1m.zip"]


@pytest.mark.parametrize("form", ["{md5}  ml-latest-small.zip\n", "MD5 (ml-latest-small.zip) = {md5}\n"])
def test_a_changing_archive_is_held_against_the_publishers_file(server: Server, tmp_path: Path, form: str) -> None:
    server.serve("ml-latest-small.zip", GOOD)
    server.serve("ml-latest-small.zip.md5", form.format(md5=GOOD_MD5.upper()).encode())
    assert (download("ml-latest-small", tmp_path, server.url) / "ratings.dat").is_file()
    assert server.requests == ["ml-latest-small.zip.md5", "ml-latest-small.zip"]


def test_a_checksum_file_without_checksum_is_refused(server: Server, tmp_path: Path) -> None:
    server.serve("ml-latest-small.zip.md5", b"<html>under construction</html>")
    with pytest.raises(DataError, match=r"zip\.md5 holds no MD5 but '<html>"):
        download("ml-latest-small", tmp_path, server.url)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "body", [GOOD[:-1] + b"\1", GOOD[: len(GOOD) // 2], b"<html>200 but an error page</html>", b""]
)
def test_wrong_bytes_are_tried_three_times_and_never_kept(server: Server, tmp_path: Path, body: bytes) -> None:
    server.serve("ml-1m.zip", body)
    with pytest.raises(DataError, match=r"differs from its checksum in 3 tries.*--source DIR") as caught:
        download("ml-1m", tmp_path, server.url)
    assert "\n" not in str(caught.value)
    assert server.requests == ["ml-1m.zip"] * 3
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {}, r"cannot fetch http://127.*ml-1m\.zip \(404 Client Error.*unpack it.*--source DIR"),
        (302, {"Location": "file:///etc/passwd"}, r"cannot fetch .*No connection adapters"),
        (200, {"Content-Length": str(len(GOOD) + 10)}, r"cannot fetch|differs from its checksum"),
    ],
)
def test_refusals_of_the_server(
    server: Server, tmp_path: Path, status: int, headers: dict[str, str], message: str
) -> None:
    server.serve("ml-1m.zip", GOOD[:-10], status, **headers)
    with pytest.raises(DataError, match=message):
        download("ml-1m", tmp_path, server.url)
    assert listing(tmp_path) == []


def test_a_silent_server_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "TIMEOUT_SECONDS", 0.05)
    server.stall = 0.3
    with pytest.raises(DataError, match=r"cannot fetch .*no connection.*--source DIR"):
        download("ml-1m", tmp_path, server.url)
    assert listing(tmp_path) == []


def test_no_network_and_unknown_names(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot fetch http://127\.0\.0\.1:9/ml-1m\.zip \(no connection\).*--source"):
        download("ml-1m", tmp_path, "http://127.0.0.1:9/")
    with pytest.raises(DataError, match=r"unknown data set 'ml1m'; known: .*Did you mean 'ml-1m'"):
        download("ml1m", tmp_path, server.url)


def special(name: str, mode: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo(name)
        member.create_system = 3
        member.external_attr = mode << 16
        archive.writestr(member, "/etc/passwd")
    return buffer.getvalue()


def encrypted() -> bytes:
    data = bytearray(make_zip({"d/a": b"x"}))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    return bytes(data)


def lying() -> bytes:
    """A member that unpacks to more than the archive declares."""
    data = bytearray(make_zip({"d/a": b"\0" * 100_000}))
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(mark) + offset
        data[start : start + 4] = (10).to_bytes(4, "little")
    return bytes(data)


ATTACKS = {
    "parent": (make_zip({"d/../../evil": b"x"}), r"'d/\.\./\.\./evil' has an absolute or outside path"),
    "absolute": (make_zip({"/tmp/evil": b"x"}), r"has an absolute or outside path"),
    "drive": (make_zip({"C:/evil": b"x"}), r"has a name that is not portable"),
    "backslash": (make_zip({"d\\..\\evil": b"x"}), r"has a name that is not portable"),
    "nul": (make_zip({"d/a": b"x"}).replace(b"d/a", b"d/\0"), r"has a name that is not portable"),
    "symlink": (special("d/link", stat.S_IFLNK | 0o777), r"is a link or a special file"),
    "device": (special("d/null", stat.S_IFCHR | 0o666), r"is a link or a special file"),
    "fifo": (special("d/pipe", stat.S_IFIFO | 0o666), r"is a link or a special file"),
    "twice": (make_zip({"d/ab": b"x", "d/xb": b"y"}).replace(b"d/xb", b"d/ab"), r"'d/ab' is there twice"),
    "case": (make_zip({"d/a": b"x", "D/A": b"y"}), r"'D/A' is there twice"),
    "nested": (make_zip({"d/inner.zip": GOOD}), r"is an archive itself"),
    "encrypted": (encrypted(), r"is encrypted"),
    "bomb": (make_zip({"d/zeros": b"\0" * 30_000_000}), r"is compressed more than 200 times"),
    "many": (make_zip({f"d/{number}": b"" for number in range(1001)}), r"1001 members of 0 bytes"),
    "lying": (lying(), r"not a readable zip archive"),
    "crc": (make_zip({"d/a": b"abcdef"}, zipfile.ZIP_STORED).replace(b"abcdef", b"abcdeF"), r"not a readable zip"),
    "loose": (make_zip({"a": b"x", "b": b"y"}), r"2 entries at its top, expected one folder"),
    "cut": (GOOD[:-40], r"not a readable zip archive"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_archives_are_refused_whole(tmp_path: Path, attack: str) -> None:
    data, message = ATTACKS[attack]
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=message):
        extract(inside / "a.zip", inside / "target")
    assert listing(tmp_path) == ["inside", "inside/a.zip"]


def test_the_total_size_is_limited_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(GOOD)
    monkeypatch.setattr(download_module, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(DataError, match=r"2 members of 40005 bytes in all, limits are 1000 and 1000"):
        extract(tmp_path / "a.zip", tmp_path / "target")
    assert listing(tmp_path) == ["a.zip"]
