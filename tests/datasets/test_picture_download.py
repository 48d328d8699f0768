"""Pictures from a server on this machine: what is kept, what is refused, where it stops, and going on later."""

import io
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.datasets.test_download import Server
from torchrec_em3.datasets import picture_download as module
from torchrec_em3.datasets.images import load_image
from torchrec_em3.datasets.picture_download import (
    FETCHED,
    LIMIT,
    PictureLimits,
    download_pictures,
    local_pictures,
    secure_address,
)
from torchrec_em3.errors import ConfigError, DataError


def picture(form: str = "JPEG", side: int = 30, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.3)))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # A server with a certificate would need more than the standard library; that https is used is tested below.
    monkeypatch.setattr(module, "SCHEME", "http")
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 5)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pictures_are_fetched_once_and_the_next_run_goes_on(server: Server, tmp_path: Path) -> None:
    names = ["I/a.jpg", "I/b.png?size=2", "I/c", "I/d.jpg"]
    for name in names[:3]:
        server.serve(name, picture("PNG" if "b" in name else "JPEG"))
    addresses = {item: f"https://{server.url[7:]}{name}" for item, name in zip("ABCD", names, strict=True)}
    assert download_pictures(addresses, tmp_path / "new", PictureLimits()) == {
        FETCHED: 3,
        "answered with status 404": 1,
    }
    assert listing(tmp_path / "new") == ["A.jpg", "B.png", "C.jpg"]
    assert local_pictures(tmp_path / "new") == {"A": "A.jpg", "B": "B.png", "C": "C.jpg"}
    assert load_image(tmp_path / "new" / "A.jpg").status == "present"
    server.requests.clear()
    server.serve("I/d.jpg", picture())
    assert download_pictures(addresses, tmp_path / "new", PictureLimits()) == {FETCHED: 1}
    assert server.requests == ["I/d.jpg"]
    assert download_pictures(addresses, tmp_path / "new", PictureLimits()) == {}
    assert server.requests == ["I/d.jpg"]


def test_what_is_no_picture_is_counted_by_reason_and_never_kept(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = picture(side=200)
    server.serve("page.jpg", b"<html>sorry</html>")
    server.serve("half.jpg", whole[: len(whole) // 2])
    server.serve("empty.jpg", b"")
    server.serve("blank.jpg", picture("GIF", side=1))
    server.serve("moved.jpg", b"", 302, Location=f"{server.url}good.jpg")
    server.serve("good.jpg", whole)
    server.serve("cut.jpg", whole[:-10], **{"Content-Length": str(len(whole))})
    server.serve("large.jpg", whole + b"\0" * 100_000)
    addresses = {name.upper(): f"{server.url}{name}.jpg" for name in server_names(server)}
    addresses |= {"FILE": "file:///etc/hostname", "NONE": "no address", "../../evil": f"{server.url}good.jpg"}
    with caplog.at_level(logging.WARNING):
        counts = download_pictures(addresses, tmp_path, PictureLimits(max_picture_bytes=50_000))
    assert counts.pop(FETCHED) == 1
    assert counts.pop("have no web address") == 2
    assert counts.pop("belong to ids that cannot be file names") == 1
    assert counts.pop("answered with status 302") == 1
    assert counts.pop("larger than 50000 bytes") == 1
    assert counts.pop("blank") == 1
    assert counts.pop("unusable (a web page, not a picture)") == 1
    assert counts.pop("unusable (empty file)") == 1
    assert sum(counts.values()) == 2, counts
    assert all("truncated" in reason or "not fetched" in reason for reason in counts)
    assert listing(tmp_path) == ["GOOD.jpg"]
    assert "1 pictures blank, first: http://127.0.0.1" in caplog.text


def server_names(server: Server) -> list[str]:
    return [name.removesuffix(".jpg") for name in server.answers]


def test_numbers_and_bytes_are_limited_and_the_rest_is_left_for_later(server: Server, tmp_path: Path) -> None:
    body = picture()
    for number in range(6):
        server.serve(f"{number}.jpg", body)
    addresses = {f"I{number}": f"{server.url}{number}.jpg" for number in range(6)}
    counts = download_pictures(addresses, tmp_path, PictureLimits(max_pictures=2, connections=1))
    assert counts == {FETCHED: 2, LIMIT: 4}
    assert listing(tmp_path) == ["I0.jpg", "I1.jpg"]
    counts = download_pictures(addresses, tmp_path, PictureLimits(max_total_bytes=2 * len(body) + 1, connections=1))
    assert counts == {FETCHED: 2, LIMIT: 2}
    assert listing(tmp_path) == ["I0.jpg", "I1.jpg", "I2.jpg", "I3.jpg"]
    assert "5.jpg" not in server.requests


def test_time_is_limited(server: Server, tmp_path: Path) -> None:
    server.serve("a.jpg", picture())
    server.stall = 0.2
    addresses = {f"I{number}": f"{server.url}a.jpg" for number in range(50)}
    counts = download_pictures(addresses, tmp_path, PictureLimits(max_seconds=0.3, connections=1))
    assert counts[LIMIT] >= 47
    assert counts.total() == 50


def test_a_server_that_is_not_there_is_a_count_and_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    counts = download_pictures({"A": "https://127.0.0.1:9/a.jpg"}, tmp_path, PictureLimits())
    assert counts == {"not fetched (ConnectionError)": 1}
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("address", "secure"),
    [
        ("https://shop.invalid/I/a.jpg", "https://shop.invalid/I/a.jpg"),
        ("http://shop.invalid/I/a%20b.jpg?x=1", "https://shop.invalid/I/a%20b.jpg?x=1"),
        ("ftp://shop.invalid/a.jpg", None),
        ("file:///etc/passwd", None),
        ("https://user:word@shop.invalid/a.jpg", None),
        ("https:///a.jpg", None),
        ("https://[::1/a.jpg", None),
        ("a.jpg", None),
        ("", None),
    ],
)
def test_only_https_is_ever_asked(address: str, secure: str | None) -> None:
    assert secure_address(address) == secure


def test_a_folder_that_cannot_be_written_is_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot be made \(File exists\); name another folder with --images"):
        download_pictures({}, tmp_path / "file", PictureLimits())


@pytest.mark.parametrize("name", ["max_pictures", "max_picture_bytes", "max_total_bytes", "max_seconds", "connections"])
def test_limits_are_above_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"option download\.{name} is 0, must be above 0"):
        PictureLimits(**{name: 0})
