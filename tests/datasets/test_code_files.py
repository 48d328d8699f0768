"""Files of codes in each form, and what is wrong with others."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datasets.amazon_data import put
from torchrec_em3.datasets.code_files import find_codes, name_codes, read_codes
from torchrec_em3.errors import ConfigError, DataError

LEVELS = 3
BY_ITEM = st.dictionaries(
    st.text("abc0189", min_size=1, max_size=6),
    st.lists(st.integers(0, 10**9 - 1), min_size=LEVELS, max_size=LEVELS),
    min_size=1,
)


def lettered(codes: list[int], upper: bool) -> list[str]:
    letters = "ABC" if upper else "abc"
    return [f"<{letter}_{code}>" for letter, code in zip(letters, codes, strict=True)]


@settings(max_examples=30, deadline=None)
@given(codes=BY_ITEM, upper=st.booleans())
def test_every_form_says_the_same(
    tmp_path_factory: pytest.TempPathFactory, codes: dict[str, list[int]], upper: bool
) -> None:
    folder = tmp_path_factory.mktemp("codes")
    put(folder / "plain.json", json.dumps(codes))
    put(folder / "lettered.json", json.dumps({item: lettered(value, upper) for item, value in codes.items()}), True)
    pq.write_table(pa.table({"item_id": list(codes), "codes": list(codes.values())}), folder / "codes.parquet")
    for name in ("plain.json", "lettered.json.gz", "codes.parquet"):
        found = read_codes(folder / name)
        assert {item: list(value) for item, value in found.of_item.items()} == codes
        assert found.source == name.removesuffix(".gz")


def test_numbers_of_items_become_ids_where_codes_bear_letters(tmp_path: Path) -> None:
    put(tmp_path / "Made.item2id", "mug\t0\ncup\t1\n")
    put(tmp_path / "Made.index_quant.json", json.dumps({"1": ["<a_7>"], "0": ["<a_0>"]}))
    put(tmp_path / "ids.json", json.dumps({"1": [7]}))
    assert read_codes(tmp_path / "Made.index_quant.json").of_item == {"cup": [7], "mug": [0]}
    assert read_codes(tmp_path / "ids.json").of_item == {"1": [7]}
    put(tmp_path / "more.json", json.dumps({"2": ["<a_7>"]}))
    with pytest.raises(DataError, match=r"more\.json item 2: the number is not in \*\.item2id"):
        read_codes(tmp_path / "more.json")


FAULTS: list[tuple[Any, str]] = [
    ({}, "the file holds no items"),
    ({"mug": []}, r"item mug: holds \[\], expected a list of codes"),
    ({"mug": 5}, "item mug: holds 5"),
    ({"mug": [1, "<b_2>"]}, "item mug: holds"),
    ({"mug": [True]}, r"item mug: holds \[True\]"),
    ({"mug": [1.5]}, "item mug: holds"),
    ({"mug": ["<a_1>", "<c_2>"]}, "item mug: code <c_2> at level 1, expected <b_NUMBER>"),
    ({"mug": ["<a_-1>"]}, "item mug: code <a_-1> at level 0"),
    ([1], "holds a list, expected an object"),
]


@pytest.mark.parametrize(("value", "message"), FAULTS)
def test_faults_are_named(tmp_path: Path, value: Any, message: str) -> None:
    put(tmp_path / "codes.json", json.dumps(value))
    with pytest.raises(DataError, match=message) as caught:
        read_codes(tmp_path / "codes.json")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["mug"]}, r"codes\.parquet: (needs the columns item_id and codes|cannot be read)"),
        ({"item_id": ["mug", "mug"], "codes": [[1], [2]]}, "item mug: is there twice"),
        ({"item_id": ["mug"], "codes": [None]}, "item mug: holds None"),
    ],
)
def test_faults_of_parquet_files_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "codes.parquet")
    with pytest.raises(DataError, match=message):
        read_codes(tmp_path / "codes.parquet")
    (tmp_path / "codes.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"codes\.parquet: cannot be read"):
        read_codes(tmp_path / "codes.parquet")


def test_names_and_files(tmp_path: Path) -> None:
    assert name_codes("", tmp_path) == {}
    assert name_codes("a=x.json, b=/y.json", tmp_path) == {"a": tmp_path / "x.json", "b": Path("/y.json")}
    for wrong in ("x.json", "a=", "=x.json", "a=x.json,a=y.json"):
        with pytest.raises(ConfigError, match="must be NAME=FILE with commas between, each name once"):
            name_codes(wrong, tmp_path)


def test_published_files_are_found_by_their_name(tmp_path: Path) -> None:
    for name in ("Made.index_lemb.json", "Made.index.json", "Made.inter.json", "Made.index_B.json"):
        put(tmp_path / name, "{}")
    put(tmp_path / "Made.index_vit.json", "{}", True)
    assert find_codes(tmp_path) == {
        "lemb": tmp_path / "Made.index_lemb.json",
        "vit": tmp_path / "Made.index_vit.json.gz",
    }


@pytest.mark.skipif("EM3_REAL_DATA" not in os.environ, reason="EM3_REAL_DATA names no folder of real data")
def test_real_codes() -> None:
    found = find_codes(Path(os.environ["EM3_REAL_DATA"]) / "amazon-instruments-2018-mql4grec")
    distinct = {}
    for name, path in found.items():
        codes = read_codes(path).of_item
        assert len(codes) == 6_250
        assert {len(value) for value in codes.values()} == {4}
        distinct[name] = len({tuple(value) for value in codes.values()})
    assert distinct == {"lemb": 5_988, "vitemb": 6_250}
