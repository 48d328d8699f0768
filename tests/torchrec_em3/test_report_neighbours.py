"""The contact sheet: whose neighbours it shows, that its pictures are small and in place, and that titles are text."""

import base64
import io
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.fake_runs import fake_run
from torchrec_em3 import report_neighbours
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import DataError
from torchrec_em3.report import write_report
from torchrec_em3.report_neighbours import MAX_BYTES, contact_sheet
from torchrec_em3.run_record import read_records

HOSTILE = '<script>alert("1")</script>&'


class Sheet(HTMLParser):
    """Pictures, captions and tags of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self.words, self.policy = "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""
        self.pictures += [value or "" for name, value in attrs if tag == "img" and name == "src"]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def data(tiny_cold_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The tiny catalogue with a hostile title for each item."""
    folder = tmp_path_factory.mktemp("sheet") / "data"
    shutil.copytree(tiny_cold_data, folder)
    items = pq.read_table(folder / "items.parquet")
    titles = [f"{HOSTILE} {row}" for row in range(len(items))]
    items = items.set_column(items.schema.get_field_index("title"), "title", [titles])
    pq.write_table(items, folder / "items.parquet")
    return PreparedData.open(folder)


@pytest.fixture(scope="module")
def images(tiny_cold_data: Path) -> Path:
    return tiny_cold_data.parent / "raw"


@pytest.fixture(scope="module")
def run(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "em3", data, content=True)


def number(card: dict[str, str]) -> int:
    """Catalogue row of a card, which its title ends with."""
    return int(card["title"].rpartition(" ")[2])


def test_neighbours_are_the_nearest_in_each_space(run: Path, data: PreparedData, images: Path) -> None:
    (record,) = read_records([run])
    sheet = contact_sheet([record], {record.name: data}, images)
    assert sheet is not None
    vectors, counts = record.embeddings, data.item_train_count
    assert vectors is not None
    assert vectors.content is not None
    place_of = {int(row): place for place, row in enumerate(vectors.item)}
    own = {"content": vectors.present, "ID": counts[vectors.item] > 0}
    shown = [number(row["item"]) for row in sheet["rows"]]
    assert [row["train_count"] for row in sheet["rows"]] == counts[shown].tolist()
    assert (counts[shown] > 0).tolist() == [True] * 4 + [False] * 4
    for row, item in zip(sheet["rows"], shown, strict=True):
        assert [name for name, _ in row["spaces"]] == (["content", "ID"] if counts[item] else ["content"])
        for name, near in row["spaces"]:
            all_vectors = vectors.content if name == "content" else vectors.id
            unit = all_vectors / np.maximum(np.linalg.norm(all_vectors, axis=1, keepdims=True), 1e-12)
            cosine = np.where(own[name], unit @ unit[place_of[item]], -2)
            cosine[place_of[item]] = -2
            found = [place_of[number(card)] for card in near]
            np.testing.assert_allclose(cosine[found], -np.sort(-cosine)[:4], atol=1e-6)


def test_the_page_holds_small_pictures_and_titles_as_text(
    run: Path, data: PreparedData, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_em3.report_maps.project", lambda vectors, seed: np.zeros((len(vectors), 2)))
    page = Sheet(write_report([run], tmp_path / "report.html", images=images))
    assert len(page.pictures) > 30
    assert sum(map(len, page.pictures)) <= MAX_BYTES
    for uri in page.pictures:
        head, _, body = uri.partition(",")
        assert head == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(body))).size) <= 96
    assert HOSTILE in page.words
    assert "script" not in page.tags
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.policy
    assert "img" not in Sheet(write_report([run], tmp_path / "without.html")).tags


def test_the_limit_of_bytes_holds(run: Path, data: PreparedData, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_neighbours, "MAX_BYTES", 5000)
    (record,) = read_records([run])
    sheet = contact_sheet([record], {record.name: data}, images)
    assert sheet is not None
    cards = [row["item"] for row in sheet["rows"]]
    cards += [card for row in sheet["rows"] for _, near in row["spaces"] for card in near]
    pictures = [card["picture"] for card in cards]
    assert 0 < sum(map(len, pictures)) <= 5000
    assert "" in pictures


def test_no_folder_no_picture(run: Path, data: PreparedData, tmp_path: Path) -> None:
    """A folder without the pictures gives titles, one that is not there an error, and none no sheet."""
    (record,) = read_records([run])
    sheet = contact_sheet([record], {record.name: data}, tmp_path)
    assert sheet is not None
    assert {row["item"]["picture"] for row in sheet["rows"]} == {""}
    assert contact_sheet([record], {record.name: data}, None) is None
    assert contact_sheet([record], {}, tmp_path) is None
    with pytest.raises(DataError, match="no such folder"):
        write_report([run], tmp_path / "report.html", images=tmp_path / "nowhere")
