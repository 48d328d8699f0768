"""The code store: what is written is read, by row, and whatever is wrong is one clear line."""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets.codes import CodeStore, write_codes
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawCodes
from torchrec_em3.errors import DataError
from torchrec_em3.schema import CodeSpec, FeatureSchema

RAW_IDS = ["", "mug", "cup", "jar"]
CODES = RawCodes("made.json", {"mug": (3, 0), "jar": (1, 5), "elsewhere": (9, 9)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Codes of rows 1 and 3; row 2 has none."""
    write_codes(tmp_path / "quant", CODES, RAW_IDS)
    return tmp_path


def test_fetch_returns_what_was_written(folder: Path) -> None:
    store = CodeStore(folder)
    codes_UL, present_U = store.fetch(torch.tensor([3, 0, 1, 2, 3], dtype=torch.int32))["quant"]
    assert store.num_rows == 4
    assert codes_UL.dtype == torch.int64
    assert codes_UL.tolist() == [[1, 5], [0, 0], [3, 0], [0, 0], [1, 5]]
    assert present_U.tolist() == [True, False, True, False, True]
    assert store.fetch(torch.tensor([1]), device="meta")["quant"].codes_UL.device.type == "meta"
    assert pickle.loads(pickle.dumps(store)).fetch(torch.tensor([1]))["quant"].codes_UL.tolist() == [[3, 0]]


def test_the_description_counts_items(tmp_path: Path) -> None:
    meta = write_codes(tmp_path / "quant", CODES, RAW_IDS)
    kept = {"source": "made.json", "levels": 2, "codes_per_level": 6}
    assert meta == kept | {"present": 2, "missing": 1}
    assert json.loads((tmp_path / "quant" / "meta.json").read_text()) == kept


@settings(max_examples=20, deadline=None)
@given(
    codes=st.lists(st.none() | st.lists(st.integers(0, 2**31 - 2), min_size=3, max_size=3), min_size=1).filter(any),
    data=st.data(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, codes: list[Sequence[int] | None], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("codes")
    raw_ids = ["", *(f"i{row}" for row in range(len(codes)))]
    given_codes = {raw_id: item for raw_id, item in zip(raw_ids[1:], codes, strict=True) if item is not None}
    write_codes(folder / "quant", RawCodes("made", given_codes), raw_ids)
    rows = data.draw(st.lists(st.integers(0, len(codes)), max_size=20))
    codes_UL, present_U = CodeStore(folder).fetch(torch.tensor(rows, dtype=torch.int64))["quant"]
    for row, found, present in zip(rows, codes_UL.tolist(), present_U.tolist(), strict=True):
        assert found == list(given_codes.get(raw_ids[row], (0, 0, 0)))
        assert present == (raw_ids[row] in given_codes)


@pytest.mark.parametrize(
    ("of_item", "message"),
    [
        ({"elsewhere": (1,)}, r"none of its 1 items is in the catalogue, such as 'jar'"),
        ({"": (1,)}, "none of its 1 items"),
        ({"mug": (1, 2), "jar": (1,)}, r"item 'jar': 1 levels, others have 2"),
        ({"mug": ()}, r"item 'mug': 0 levels"),
        ({"mug": (1, -2)}, r"item 'mug': \[1, -2\], outside 0\.\.2147483646"),
        ({"mug": (2**31,)}, r"item 'mug': \[2147483648\], outside"),
    ],
)
def test_codes_that_cannot_be_are_refused(tmp_path: Path, of_item: dict[str, Sequence[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_codes(tmp_path / "quant", RawCodes("made", of_item), RAW_IDS)
    assert not (tmp_path / "quant").exists()


@pytest.mark.parametrize("row", [-1, 4])
def test_rows_outside_are_refused(folder: Path, row: int) -> None:
    with pytest.raises(DataError, match=rf"item row {row} is outside the code store .*rows 0 to 3"):
        CodeStore(folder).fetch(torch.tensor([1, row]))


@pytest.mark.parametrize("code", [-1, 6])
def test_a_code_out_of_range_would_read_another_level_and_is_refused(folder: Path, code: int) -> None:
    codes = np.load(folder / "quant" / "codes.npy")
    codes[3, 1] = code
    np.save(folder / "quant" / "codes.npy", codes)
    store = CodeStore(folder)
    assert store.fetch(torch.tensor([1, 2]))["quant"].present_U.tolist() == [True, False]
    with pytest.raises(DataError, match=rf"quant row 3: code {code} of level 1 is outside 0\.\.5; run em3 prepare"):
        store.fetch(torch.tensor([1, 3]))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def shorten(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def retype(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float64))


@pytest.mark.parametrize("name", ["codes.npy", "present.npy"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink, shorten, retype])
def test_damaged_stores_are_refused(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / "quant" / name)
    with pytest.raises(DataError, match=r"code store .*quant.*run em3 prepare again") as caught:
        CodeStore(folder)
    assert "\n" not in str(caught.value)


def test_codes_of_different_catalogues_are_refused(folder: Path) -> None:
    write_codes(folder / "other", CODES, RAW_IDS[:2])
    with pytest.raises(DataError, match="codes differ in rows"):
        CodeStore(folder)


def test_no_codes_at_all(tmp_path: Path) -> None:
    store = CodeStore(tmp_path / "codes")
    assert store.num_rows == 0
    assert store.fetch(torch.tensor([1, 2])) == {}


NO_ENCODERS = PrepareOptions(text_encoder="none", image_encoder="none")


def test_a_prepared_folder_holds_its_codes_and_guards_them(tmp_path: Path) -> None:
    raw = make_raw()
    known = {item: (number, number % 3) for number, item in enumerate(raw.items.item_id.tolist()) if number % 4}
    raw = replace(raw, codes={"quant": RawCodes("made", known)})
    meta = prepare(raw, tmp_path / "data", NO_ENCODERS)
    data = PreparedData.open(tmp_path / "data")
    data.verify()
    assert FeatureSchema.from_meta(meta).codes == (CodeSpec("quant", 2, 30),)
    codes_UL, present_U = CodeStore(data.codes_folder).fetch(torch.arange(data.item_rows))["quant"]
    for raw_id, codes, present in zip(data.items["raw_id"].to_pylist(), codes_UL, present_U, strict=True):
        assert (tuple(codes.tolist()), bool(present)) == (known.get(raw_id, (0, 0)), raw_id in known)
    path = data.codes_folder / "quant" / "codes.npy"
    np.save(path, np.load(path)[::-1])
    with pytest.raises(DataError, match="contents hash to"):
        PreparedData.open(tmp_path / "data").verify()
    shorten(path)
    with pytest.raises(DataError, match=r"codes\.npy: holds int32 \[30, 2\], expected int32 \[31, 2\]"):
        PreparedData.open(tmp_path / "data")


@pytest.mark.parametrize("name", ["text", "image", "My codes", "a.b", ""])
def test_names_that_are_taken_or_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    raw = replace(make_raw(), codes={name: RawCodes("made", {"i1": (1,)})})
    with pytest.raises(DataError, match=f"codes '{name}' need another name"):
        prepare(raw, tmp_path / "data", NO_ENCODERS)
