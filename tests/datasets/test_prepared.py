"""Opening a prepared folder: damage of every kind is refused with the file's name, before any of it is used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.datasets.raw_data import make_raw
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import DataError

PART = "interactions/part-00000.parquet"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    options = PrepareOptions(text_encoder="tiny_text", image_encoder="none")
    prepare(make_raw(6000, 100, 200, 3000), folder, options)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "data"))


def read_all(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    data = PreparedData.open(folder)
    return {split: data.split_rows(split) for split in ("train", "validation", "test")}


def edit_meta(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return apply


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return apply


def rewrite(name: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(change(pq.read_table(folder / name)), folder / name)


def rename(table: pa.Table) -> pa.Table:
    return table.rename_columns(["who" if name == "user" else name for name in table.column_names])


def set_cell(column: str, row: int, value: int) -> Callable[[pa.Table], pa.Table]:
    def apply(table: pa.Table) -> pa.Table:
        values = table[column].to_numpy().copy()
        values[row] = value
        return table.set_column(table.column_names.index(column), column, pa.array(values))

    return apply


def cast(column: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(column), column, table[column].cast(kind))


def save(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, array)


DAMAGE = [
    (delete("meta.json"), r"no meta\.json, so not a prepared folder; make one with em3 prepare"),
    (lambda folder: (folder / "meta.json").write_text("{"), r"meta\.json: not valid JSON"),
    (edit_meta(format_version=2), r"meta\.json: format_version is 2, this program reads 1; run em3 prepare again"),
    (edit_meta(counts=None, format_version=None), r"format_version is None"),
    (rewrite(PART, rename), r"part-00000\.parquet: no column 'user' among who, item"),
    (rewrite(PART, cast("item", pa.int64())), r"part-00000\.parquet: column 'item' is int64, expected int32"),
    (rewrite(PART, lambda table: table.slice(1)), r"interactions: \d+ rows, meta\.json says \d+"),
    (rewrite(PART, lambda table: table.slice(0, 0)), r"interactions: 0 rows, meta\.json says"),
    (delete(PART), r"interactions: 0 rows"),
    *((truncate(PART, share), r"part-00000\.parquet: truncated or damaged") for share in (0, 0.01, 0.5, 0.99)),
    (truncate("items.parquet", 0.5), r"items\.parquet: truncated or damaged"),
    (delete("users.parquet"), r"users\.parquet: the file is missing"),
    (delete("vocab/taste.parquet"), r"taste\.parquet: the file is missing"),
    (rewrite("items.parquet", lambda table: table.slice(1)), r"items\.parquet: 200 rows, meta\.json says 201"),
    (truncate("history/items.npy", 0.9), r"items\.npy: truncated or damaged"),
    (truncate("history/offsets.npy", 0.0), r"offsets\.npy: truncated or damaged"),
    (delete("history/offsets.npy"), r"offsets\.npy: the file is missing"),
    (save("history/offsets.npy", np.zeros(3)), r"offsets\.npy: holds float64 \[3\], expected int64"),
    (truncate("tokens/text/tokens.npy", 0.9), r"tokens\.npy: truncated or damaged"),
    (delete("tokens/text/present.npy"), r"present\.npy: the file is missing"),
    (save("history/items.npy", np.array([{"a": 1}], dtype=object)), r"items\.npy: truncated or damaged"),
    (rewrite(PART, set_cell("timestamp", 40, 2999)), r"row 41 of split train: timestamp decreases"),
    (rewrite(PART, set_cell("item", 40, 201)), r"row 40 of split train: item is 201, outside 1\.\.200"),
    (rewrite(PART, set_cell("user", 40, 0)), r"row 40 of split train: user is 0, outside 1\.\."),
    (rewrite(PART, set_cell("label", 40, 2)), r"row 40 of split train: label is 2, outside 0\.\.1"),
    (rewrite(PART, set_cell("history_end", 40, 10**6)), r"row 40 of split train: history_end is 1000000, outside"),
    (rewrite(PART, set_cell("split", 40, 1)), r"rows of split train, meta\.json says"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message[:45] for _, message in DAMAGE])
def test_damage_is_refused_by_name(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)


def test_flipped_bits_never_pass_for_data(folder: Path) -> None:
    good, path = read_all(folder), folder / PART
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = []
    for place in random.integers(0, len(whole) * 8, 200).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read_all(folder)
        except DataError as error:
            refused.append(str(error))
            continue
        for split, columns in good.items():
            assert all(np.array_equal(found[split][name], column) for name, column in columns.items())
    assert len(refused) > 190
    assert all(PART in message or "meta.json says" in message for message in refused)


def test_verify_finds_a_flipped_bit_in_any_file(folder: Path) -> None:
    data = PreparedData.open(folder)
    data.verify()
    for name in ("history/items.npy", "tokens/text/tokens.npy", "users.parquet"):
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(DataError, match="a file has changed"):
            data.verify()
        path.write_bytes(whole)
    data.verify()


def test_statistics_only_save_reading(folder: Path) -> None:
    good = read_all(folder)
    pq.write_table(pq.read_table(folder / PART), folder / PART, row_group_size=100, write_statistics=False)
    for split, columns in read_all(folder).items():
        assert all(np.array_equal(good[split][name], column) for name, column in columns.items())


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(("first", "end"), [(0, 1), (99, 101), (250, 2000), (2390, None), (700, 700)])
def test_a_run_of_rows(folder: Path, statistics: bool, first: int, end: int | None) -> None:
    good = read_all(folder)
    pq.write_table(pq.read_table(folder / PART), folder / PART, row_group_size=100, write_statistics=statistics)
    for name, column in PreparedData.open(folder).split_rows("train", first, end).items():
        assert np.array_equal(column, good["train"][name][first:end])


def test_a_bad_row_of_a_run_is_named_by_its_number_in_the_split(folder: Path) -> None:
    rewrite(PART, set_cell("item", 40, 201))(folder)
    data = PreparedData.open(folder)
    data.split_rows("train", 41)
    with pytest.raises(DataError, match=r"row 40 of split train: item is 201"):
        data.split_rows("train", 30, 50)


def test_large_arrays_stay_on_disk(folder: Path) -> None:
    data = PreparedData.open(folder)
    assert isinstance(data.history_items, np.memmap)
    assert isinstance(data.history_offsets, np.memmap)
    assert data.history_items is data.history_items
