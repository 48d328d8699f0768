"""Amazon reviews in every form they are shipped in, with what can be wrong with them."""

import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.amazon_data import (
    EVENTS,
    FORMS,
    KEPT,
    META_2018,
    json_lines,
    put,
    ratings_csv,
    reviews_2018,
    write_2014,
    write_2018,
    write_csv_2018,
)
from torchrec_em3.datasets import amazon as amazon_module
from torchrec_em3.datasets.amazon import read_amazon
from torchrec_em3.datasets.picture_download import PictureLimits
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.errors import DataError


def events(raw: RawDataset) -> list[tuple[str, str, float, int]]:
    columns = (raw.user_id, raw.item_id, raw.rating, raw.timestamp)
    return [(str(u), str(i), float(r), int(t)) for u, i, r, t in zip(*columns, strict=True)]


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_to_the_same_events(tmp_path: Path, form: str, gz: bool) -> None:
    FORMS[form](tmp_path, gz)
    raw = read_amazon(tmp_path)
    assert events(raw) == KEPT
    assert raw.rating.dtype == np.float32
    assert raw.timestamp.dtype == np.int64
    assert raw.items.item_id.tolist() == ["B00MADEUP1", "B00MADEUP2", "0000MADEX3"]
    described = "" if form.startswith("csv") else "Don't Panic & Relax Bath Salt"
    assert raw.items.title.tolist() == [described, "", ""]
    meta = prepare(raw, tmp_path / "data", PrepareOptions(text_encoder="tiny_text", image_encoder="none"))
    assert (meta["counts"]["interactions"], meta["counts"]["users"], meta["counts"]["items"]) == (5, 3, 3)


def test_repeats_unknown_items_and_repeated_metadata_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_2018(tmp_path)
    with caplog.at_level(logging.INFO):
        raw = read_amazon(tmp_path)
    assert "1 events agree with an earlier one in user, item and second; left out" in caplog.text
    assert "describes 2 of 3 items" in caplog.text
    assert "1 lines describe an item again" in caplog.text
    assert "1 items (first: 0000MADEX3) are not described" in caplog.text
    assert raw.items.text[2] == raw.items.title[2] == ""


def test_pictures_lie_in_a_folder_by_item(tmp_path: Path) -> None:
    write_2014(tmp_path)
    for folder in (tmp_path / "images", tmp_path / "others"):
        folder.mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "B00MADEUP1.jpg")
    Image.new("RGB", (20, 20)).save(tmp_path / "others" / "B00MADEUP2.png")
    (tmp_path / "others" / "B00MADEUP1.txt").write_text("not a picture's name")
    assert read_amazon(tmp_path).items.image.tolist() == ["B00MADEUP1.jpg", "", ""]
    raw = read_amazon(tmp_path, images=tmp_path / "others")
    assert raw.items.image.tolist() == ["", "B00MADEUP2.png", ""]
    with pytest.raises(DataError, match=r"gone: not a folder; give the folder that holds the pictures"):
        read_amazon(tmp_path, images=tmp_path / "gone")
    meta = prepare(raw, tmp_path / "data", PrepareOptions(text_encoder="none", image_encoder="tiny_image"))
    assert [meta["modalities"]["image"][key] for key in ("present", "missing", "broken")] == [1, 2, 0]


def test_only_what_is_asked_for_is_fetched_most_reviewed_items_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_2014(tmp_path)
    put(tmp_path / "reviews_Beauty_5.json", reviews_2018([*EVENTS, ("ADORA000004", "B00MADEUP2", 5.0, EVENTS[0][3])]))
    asked: list[Any] = []
    monkeypatch.setattr(amazon_module, "download_pictures", lambda *given: asked.append(given))
    read_amazon(tmp_path)
    assert asked == []
    limits = PictureLimits(max_pictures=7)
    read_amazon(tmp_path, download=limits)
    [(addresses, folder, used)] = asked
    assert list(addresses.items()) == [
        ("B00MADEUP2", "http://pictures.invalid/images/I/two.png"),
        ("B00MADEUP1", "http://pictures.invalid/images/I/one.jpg"),
    ]
    assert folder == tmp_path / "images"
    assert used is limits


def test_files_of_other_names_and_several_of_a_kind(tmp_path: Path) -> None:
    write_2018(tmp_path)
    write_csv_2018(tmp_path)
    put(tmp_path / "meta_other.json", json_lines(META_2018[:1]))
    put(tmp_path / "notes.csv", "a,b\n1,2\n")
    put(tmp_path / "settings.json", '{"indent": 2}\n')
    with pytest.raises(DataError, match=r"several files with reviews \(Beauty\.csv, Beauty_5\.json\).*--reviews"):
        read_amazon(tmp_path)
    with pytest.raises(DataError, match=r"several files with metadata \(meta_Beauty\.json, meta_other\.json\)"):
        read_amazon(tmp_path, Path("Beauty.csv"))
    raw = read_amazon(tmp_path, Path("Beauty.csv"), tmp_path / "meta_other.json")
    assert events(raw) == KEPT
    assert (raw.items.title != "").sum() == 1
    with pytest.raises(DataError, match=r"meta_Beauty\.json: holds no Amazon reviews"):
        read_amazon(tmp_path, Path("meta_Beauty.json"), Path("meta_Beauty.json"))
    with pytest.raises(DataError, match=r"gone\.json: no such file"):
        read_amazon(tmp_path, Path("gone.json"))


def edit(name: str, old: str, new: str, times: int = 1) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, times))

    return apply


def edit_row(row: int, **changes: Any) -> Callable[[Path], None]:
    """Change fields of a review of 2018; None takes the field away."""

    def apply(folder: Path) -> None:
        path = folder / "Beauty_5.json"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records[row - 1] = {key: value for key, value in (records[row - 1] | changes).items() if value is not None}
        path.write_text(json_lines(records))

    return apply


JSON, META, CSV = "Beauty_5.json", "meta_Beauty.json", "Beauty.csv"
FAULTS = [
    ("2018", edit(JSON, '"verified"', "verified"), r"Beauty_5\.json.* row 1: not a JSON object \(Expecting property"),
    ("2018", edit_row(3, overall=None), r"Beauty_5\.json row 3: no overall among verified, reviewerID"),
    ("2018", edit_row(3, overall=float("nan")), r"Beauty_5\.json row 3: overall is nan, which is not a finite number"),
    ("2018", edit_row(3, overall=50), r"Beauty_5\.json row 3: overall is 50, outside 0\.\.5"),
    ("2018", edit_row(3, overall="good"), r"Beauty_5\.json row 3: overall is 'good', which is not a number"),
    ("2018", edit_row(3, overall=[5]), r"Beauty_5\.json row 3: overall is \[5\], which is not a number"),
    ("2018", edit_row(2, reviewerID=" "), r"Beauty_5\.json row 2: reviewerID is ' ', expected an id"),
    ("2018", edit_row(2, reviewerID="a\ud83d"), r"Beauty_5\.json row 2: reviewerID is 'a\\ud83d', expected an id"),
    ("2018", edit_row(2, reviewerID=12), r"Beauty_5\.json row 2: reviewerID is 12, expected an id"),
    ("2018", edit_row(2, asin=None), r"Beauty_5\.json row 2: no asin among"),
    (
        "2018",
        edit_row(2, unixReviewTime="06 17, 2018"),
        r"row 2: unixReviewTime is '06 17, 2018', which is not a whole",
    ),
    ("2018", edit_row(2, unixReviewTime=-5), r"row 2: unixReviewTime is -5, which is not a whole number"),
    ("2018", edit_row(2, unixReviewTime=14 * 10**11), r"row 2: unixReviewTime is 14.*outside 1995\.\.2100; .* seconds"),
    ("2018", edit(META, '{"asin"', '["asin"'), r"meta_Beauty\.json row 1: not a JSON object"),
    ("2018", edit(META, '"B00MADEUP2"', "7"), r"meta_Beauty\.json row 2: no parent_asin or asin among asin, title"),
    (
        "2018",
        edit(META, '{"asin": "B00MADEUP2"', '{"asin": "B00MADEUP2'),
        r"meta_Beauty\.json row 2: not a JSON object",
    ),
    ("2014", edit(META, "{'asin': 'B00MADEUP2'", "{'asin': len('x')"), r"meta_Beauty\.json row 2: not a Python dict"),
    ("csv 2018", edit(CSV, ",4.0,", ",nan,"), r"Beauty\.csv row 3: overall is nan, which is not a finite number"),
    ("csv 2018", edit(CSV, ",4.0,", ","), r"Beauty\.csv row 3: 3 fields, expected 4 \(asin, reviewerID, overall"),
    ("csv 2018", edit(CSV, ",4.0,", ",,"), r"Beauty\.csv row 3: overall is '', which is not a number"),
    ("csv 2018", edit(CSV, "B00MADEUP2,ABEN0000002", ",ABEN0000002"), r"Beauty\.csv row 2: asin is '', expected an id"),
    ("csv 2023", edit(CSV, "000007\n", "\n", 9), r"Beauty\.csv row 2: timestamp is 1400000, .*expected milliseconds"),
    ("csv 2023", edit(CSV, ",timestamp", ",time"), r"Beauty\.csv row 2: no timestamp among user_id, parent_asin"),
]


@pytest.mark.parametrize(("form", "spoil", "message"), FAULTS, ids=[fault[2][:45] for fault in FAULTS])
def test_a_fault_is_named_by_file_row_and_field(
    tmp_path: Path, form: str, spoil: Callable[[Path], None], message: str
) -> None:
    FORMS[form](tmp_path, False)
    spoil(tmp_path)
    named = {"reviews": None, "metadata": None} if form.startswith("csv") else {"metadata": Path("meta_Beauty.json")}
    with pytest.raises(DataError, match=message) as caught:
        read_amazon(tmp_path, **named)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_files_that_cannot_be_used_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Amazon reviews recognised"):
        read_amazon(tmp_path)
    put(tmp_path / "Beauty_5.json", "")
    with pytest.raises(DataError, match=r"no Amazon reviews recognised"):
        read_amazon(tmp_path)
    with pytest.raises(DataError, match=r"Beauty_5\.json: holds no Amazon reviews"):
        read_amazon(tmp_path, Path("Beauty_5.json"))
    put(tmp_path / "Beauty_5.json", '[{"reviewerID": "A", "asin": "B"}]\n')
    with pytest.raises(DataError, match=r"no Amazon reviews.*Beauty_5\.json row 1: holds a list, expected an object"):
        read_amazon(tmp_path)
    with pytest.raises(DataError, match=r"not a folder"):
        read_amazon(tmp_path / "Beauty_5.json")


def test_a_truncated_gzip_file_is_never_taken_for_the_whole(tmp_path: Path) -> None:
    users = [(f"A{number:09d}X", f"B{number % 977:09d}", 5.0, 1_400_000_000 + number) for number in range(3000)]
    whole = gzip.compress(reviews_2018(users).encode())
    path = tmp_path / "Beauty_5.json.gz"
    for data in (whole[: len(whole) // 2], whole[:-6], whole[:-8] + b"\0" * 8):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"Beauty_5\.json\.gz: the gzip data is truncated or damaged after row \d+"):
            read_amazon(tmp_path)
    path.write_bytes(whole)
    assert len(read_amazon(tmp_path).rating) == 3000


def test_a_csv_whose_columns_cannot_be_told_apart_reads_as_2014(tmp_path: Path) -> None:
    """The order of 2014, user first, holds unless only the first field looks like an ASIN."""
    put(tmp_path / "ratings.csv", ratings_csv("user item rating time").replace("AANNA000001", "#oc-R1MADEUP"))
    assert [event[0] for event in events(read_amazon(tmp_path))].count("#oc-R1MADEUP") == len(KEPT) - 2


real = pytest.mark.skipif("EM3_REAL_DATA" not in os.environ, reason="EM3_REAL_DATA names no folder of real data")


@real
def test_real_gift_cards() -> None:
    raw = read_amazon(Path(os.environ["EM3_REAL_DATA"]) / "amazon-gift-cards-2018")
    assert (len(raw.rating), len(np.unique(raw.user_id)), len(raw.items.item_id)) == (2972 - 3, 458, 148)
    assert (raw.timestamp.min(), raw.timestamp.max()) == (1327968000, 1534896000)
    assert (raw.items.title != "").sum() == 148
    pictured = raw.items.item_id[raw.items.image != ""]
    assert len(pictured) == 115
    assert not any("<" in text or "&amp;" in text for text in raw.items.text)
