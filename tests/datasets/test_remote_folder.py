"""Prepared folders behind URLs: equal to the local ones, fetched once, refused in one line where something is wrong."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import tests.tiny_parts  # noqa: F401
from torchrec_em3.build import open_data
from torchrec_em3.cli import run as em3
from torchrec_em3.config import Config
from torchrec_em3.datasets.prepared import PreparedData, hash_content
from torchrec_em3.datasets.remote_folder import local_folder, uploaded_folder
from torchrec_em3.errors import ConfigError, DataError

SIMULATED = ["--catalogue.num_items", "40", "--catalogue.num_users", "20", "--catalogue.num_interactions", "400"]
TINY = ["prepare", "simulated", *SIMULATED, "--text_encoder", "tiny_text", "--image_encoder", "none"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of copies, and stores in memory, of one test."""
    monkeypatch.setenv("EM3_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "prepared"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory://bucket/data", "file://{tmp}/store/data"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp=tmp_path)


def upload(folder: Path, url: str, *, overwrite: bool = False) -> None:
    with uploaded_folder(url, overwrite=overwrite) as place:
        shutil.copytree(folder, place)


def test_what_is_written_to_a_url_is_read_from_it(url: str, tiny_data: Path, cache: Path) -> None:
    upload(tiny_data, url)
    folder = local_folder(url)
    assert folder.parent == cache
    assert hash_content(folder) == hash_content(tiny_data)
    assert (folder / "meta.json").read_bytes() == (tiny_data / "meta.json").read_bytes()
    data = open_data(Config(data=url))
    data.verify()
    assert data.meta == PreparedData.open(tiny_data).meta


def test_a_path_stays_what_it_is(tiny_data: Path) -> None:
    assert local_folder(str(tiny_data)) == tiny_data


def test_a_folder_is_fetched_once_and_anew_when_it_changes(tiny_data: Path, tiny_cold_data: Path) -> None:
    url = "memory://bucket/data"
    upload(tiny_data, url)
    first = local_folder(url)
    marked = first / "fetched_once"
    marked.touch()
    assert local_folder(url) == first
    assert marked.exists()
    upload(tiny_cold_data, url, overwrite=True)
    second = local_folder(url)
    assert second != first
    assert hash_content(second) == hash_content(tiny_cold_data)


def test_a_copy_that_was_interrupted_is_made_again(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, memory = "memory://bucket/data", fsspec.filesystem("memory")
    upload(tiny_data, url)
    original, calls = memory.get_file, []

    def get_file(name: str, target: str) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise ConnectionResetError("peer went away")
        original(name, target)

    monkeypatch.setattr(memory, "get_file", get_file)
    with pytest.raises(DataError, match="ConnectionResetError: peer went away; check address and credentials"):
        local_folder(url)
    assert hash_content(local_folder(url)) == hash_content(tiny_data)


def test_what_was_changed_in_the_store_is_refused(tiny_data: Path, cache: Path) -> None:
    url, memory = "memory://bucket/data", fsspec.filesystem("memory")
    upload(tiny_data, url)
    memory.pipe_file("/bucket/data/history/items.npy", b"other bytes")
    with pytest.raises(DataError, match=r"contents hash to .*meta\.json says"):
        local_folder(url)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("place", ["/bucket/data/meta.json", "/bucket/data/other.txt"])
def test_nothing_is_replaced_unasked(place: str, tiny_data: Path) -> None:
    url, memory = "memory://bucket/data", fsspec.filesystem("memory")
    memory.pipe_file(place, b"{}")
    with pytest.raises(DataError, match=r"already|not a prepared folder"):
        upload(tiny_data, url)
    if place.endswith("other.txt"):
        with pytest.raises(DataError, match="is not empty and not a prepared folder"):
            upload(tiny_data, url, overwrite=True)
    assert memory.cat_file(place) == b"{}"


def test_a_folder_that_failed_is_not_put_anywhere() -> None:
    def fail() -> None:
        with uploaded_folder("memory://bucket/data", overwrite=False) as folder:
            folder.mkdir()
            (folder / "meta.json").write_text("{}")
            raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        fail()
    assert not fsspec.filesystem("memory").find("/bucket")


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("nowhere://bucket/data", ConfigError, "nowhere://bucket/data: Protocol not known: nowhere; install"),
        ("memory://bucket/none", DataError, "memory://bucket/none: no meta.json, so not a prepared folder"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_in_one_line(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        local_folder(url)
    assert "\n" not in str(caught.value)


def test_a_store_whose_package_is_missing_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(ConfigError, match="s3://bucket/data: Install s3fs to access S3; install the package"):
        local_folder("s3://bucket/data")


def test_prepare_writes_to_a_url_and_train_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "memory://bucket/data"
    assert em3([*TINY, "--out", url]) == 0
    assert f"--data {url} --run" in capsys.readouterr().out
    assert em3([*TINY, "--out", url]) == 3
    assert "holds prepared data already" in capsys.readouterr().err
    options = ["--model.embedding_dim", "8", "--loader.batch_size", "128", "--train.epochs", "1"]
    assert em3(["train", "--data", url, "--run", str(tmp_path / "run"), *options]) == 0
    assert em3(["report", str(tmp_path / "run")]) == 0
    assert "cannot be shown" not in (tmp_path / "run" / "report.html").read_text()
