"""Sequence files in each form, and what becomes of an order without times."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.amazon_data import META_2018, json_lines, put
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.sequences import read_sequences
from torchrec_em3.errors import ConfigError, DataError

SEQUENCES = {
    "AANNA000001": ["B00MADEUP1", "B00MADEUP2", "B00MADEUP1", "0000MADEX3"],
    "ABEN0000002": ["0000MADEX3"],
    "ACEM0000003": ["B00MADEUP2", "0000MADEX3", "B00MADEUP1"],
}
NUMBER = {"B00MADEUP1": 1, "B00MADEUP2": 2, "0000MADEX3": 3}
USER_NUMBER = {user: number for number, user in enumerate(SEQUENCES, 1)}


def write_ids(folder: Path, gz: bool = False) -> None:
    put(folder / "user_sequence.txt", "".join(f"{u} {' '.join(items)}\n" for u, items in SEQUENCES.items()), gz)
    put(folder / "item_generative_indexing_phase_0.txt", "B00MADEUP1 calm bath salt\nB00MADEUP2 \nB00OTHER00 x\n", gz)


def write_numbers(folder: Path, gz: bool = False) -> None:
    rows = [[USER_NUMBER[user], *(NUMBER[item] for item in items)] for user, items in SEQUENCES.items()]
    put(folder / "sequential_data.txt", "".join(" ".join(map(str, row)) + "\n" for row in rows), gz)
    maps = {"user2id": {u: str(n) for u, n in USER_NUMBER.items()}, "item2id": {i: str(n) for i, n in NUMBER.items()}}
    put(folder / "datamaps.json", json.dumps(maps), gz)
    put(folder / "item_plain_text.txt", "B00MADEUP1 calm bath salt\n", gz)


def write_inter(folder: Path, gz: bool = False) -> None:
    inter = {str(USER_NUMBER[user]): [NUMBER[item] for item in items] for user, items in SEQUENCES.items()}
    put(folder / "Made.inter.json", json.dumps(inter, indent=4), gz)
    put(folder / "Made.user2id", "".join(f"{user}\t{number}\n" for user, number in USER_NUMBER.items()), gz)
    put(folder / "Made.item2id", "".join(f"{item}\t{number}\n" for item, number in NUMBER.items()), gz)
    put(
        folder / "Made.item.json", json.dumps({"1": {"title": "calm bath salt", "brand": "", "categories": "Salt"}}), gz
    )


FORMS: dict[str, Callable[[Path, bool], None]] = {"ids": write_ids, "numbers": write_numbers, "inter": write_inter}


def told(raw: RawDataset) -> dict[str, list[str]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for user, item, place in zip(raw.user_id.tolist(), raw.item_id.tolist(), raw.timestamp, strict=True):
        found.setdefault(user, []).append((int(place), item))
    assert all([place for place, _ in items] == list(range(len(items))) for items in found.values())
    return {user: [item for _, item in items] for user, items in found.items()}


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_to_the_same_sequences(tmp_path: Path, form: str, gz: bool) -> None:
    FORMS[form](tmp_path, gz)
    raw = read_sequences(tmp_path)
    assert told(raw) == SEQUENCES
    assert not raw.timed
    assert set(raw.rating.tolist()) == {1.0}
    assert raw.items.item_id.tolist() == ["B00MADEUP1", "B00MADEUP2", "0000MADEX3"]
    assert raw.items.title.tolist() == ["calm bath salt", "", ""]
    assert raw.items.text[0].rstrip(".") == "calm bath salt"


def test_numbers_without_names_are_the_ids(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    (tmp_path / "datamaps.json").unlink()
    assert told(read_sequences(tmp_path)) == {
        str(USER_NUMBER[user]): [str(NUMBER[item]) for item in items] for user, items in SEQUENCES.items()
    }


def test_metadata_and_pictures_of_items_called_by_their_asin(tmp_path: Path) -> None:
    write_ids(tmp_path)
    put(tmp_path / "meta.json", json_lines(META_2018))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / "0000MADEX3.jpg")
    raw = read_sequences(tmp_path, Path("meta.json"), tmp_path / "pictures")
    assert raw.items.title[0] == "Don't Panic & Relax Bath Salt"
    assert raw.items.image.tolist() == ["", "", "0000MADEX3.jpg"]
    assert raw.image_root == tmp_path / "pictures"


def test_the_order_is_the_time_and_the_last_ones_are_left(tmp_path: Path) -> None:
    write_ids(tmp_path)
    options = PrepareOptions(
        split="leave_last", label_threshold=None, negatives=1, text_encoder="tiny_text", image_encoder="none"
    )
    meta = prepare(read_sequences(tmp_path), tmp_path / "data", options)
    data = PreparedData.open(tmp_path / "data")
    users, items = (table["raw_id"].to_pylist() for table in (data.users, data.items))
    seen = {}
    for split in ("train", "validation", "test"):
        rows = data.split_rows(split)
        for user, item, label, end in zip(*(rows[n] for n in ("user", "item", "label", "history_end")), strict=True):
            history = [items[row] for row in data.history_items[data.history_offsets[user] : end]]
            if label:
                seen[users[user], items[item], len(history)] = split
                assert history == SEQUENCES[users[user]][: len(history)]
    assert seen[("AANNA000001", "0000MADEX3", 3)] == seen[("ACEM0000003", "B00MADEUP1", 2)] == "test"
    assert seen[("AANNA000001", "B00MADEUP1", 2)] == "validation"
    assert seen[("ABEN0000002", "0000MADEX3", 0)] == "train"
    assert len(seen) == meta["counts"]["interactions"] - meta["negatives"]["rows"] == 8


def test_a_split_by_time_is_refused(tmp_path: Path) -> None:
    options = PrepareOptions(split="temporal", text_encoder="none", image_encoder="none")
    with pytest.raises(ConfigError, match=r"--split temporal needs the time of every event.*use --split leave_last"):
        prepare(replace(make_raw(), timed=False), tmp_path / "data", options)
    assert not list(tmp_path.iterdir())


def texts(**files: str) -> Callable[[Path], None]:
    return lambda folder: [put(folder / name.replace("__", "."), text) for name, text in files.items()] and None


FAULTS = [
    (texts(), r"expected one of user_sequence\.txt, .* found none"),
    (
        texts(user_sequence__txt="a 1\n", sequential_data__txt="1 1\n"),
        r"found user_sequence\.txt, sequential_data\.txt",
    ),
    (texts(user_sequence__txt="\n"), r"user_sequence\.txt: the file holds no sequences"),
    (texts(user_sequence__txt="ann x y\nben\n"), r"user_sequence\.txt row 2: user 'ben' has no items"),
    (texts(user_sequence__txt="ann x\n\nann y\n"), r"row 3: user 'ann' has a sequence already \(row 1\)"),
    (
        texts(sequential_data__txt="1 1 2\n", datamaps__json='{"user2id": {"ann": "1"}, "item2id": {"x": "1"}}'),
        r"sequential_data\.txt row 1: number 2 is not in .*datamaps\.json",
    ),
    (texts(sequential_data__txt="1 1\n", datamaps__json="{"), r"datamaps\.json: not valid JSON"),
    (texts(sequential_data__txt="1 1\n", datamaps__json='{"user2id": {}}'), r"datamaps\.json: no object 'item2id'"),
    (texts(made__inter__json="[1]"), r"made\.inter\.json: holds a list, expected an object"),
    (texts(made__inter__json='{"0": 5}'), r"made\.inter\.json user 0: holds 5, expected a list of items"),
    (texts(made__inter__json='{"0": [1]}', made__item2id="x\t0\n"), r"user 0: number 1 is not in \*\.item2id"),
    (texts(made__inter__json='{"0": [1]}', made__item2id="x 1\ny 1\n"), r"made\.item2id row 2: .* each number once"),
]


@pytest.mark.parametrize(("write", "message"), FAULTS, ids=[message[:45] for _, message in FAULTS])
def test_faults_are_named(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read_sequences(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


real = pytest.mark.skipif("EM3_REAL_DATA" not in os.environ, reason="EM3_REAL_DATA names no folder of real data")


@real
@pytest.mark.parametrize(
    ("folder", "counts", "described"),
    [
        ("amazon-2014-beauty-sports-seq/Beauty", (198_502, 22_363, 12_101), 12_100),
        ("amazon-2014-beauty-sports-seq/Sports", (296_337, 35_598, 18_357), 18_357),
        ("amazon-instruments-2018-mql4grec", (136_226, 17_112, 6_250), 0),
    ],
)
def test_real_sequences(folder: str, counts: tuple[int, int, int], described: int) -> None:
    raw = read_sequences(Path(os.environ["EM3_REAL_DATA"]) / folder)
    assert (len(raw.rating), len(np.unique(raw.user_id)), len(raw.items.item_id)) == counts
    assert (raw.items.text != "").sum() == described
