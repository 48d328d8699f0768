"""Shuffling by strata: the same steps on any number of ranks, each of which reads its part."""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_em3.batch import TARGET, Batch
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.strata_order import STRATA, StrataOrder
from torchrec_em3.errors import ConfigError

PART = "interactions/part-00000.parquet"


def stream(folder: Path, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> BatchStream:
    data, place = PreparedData.open(folder), {"rank": rank, "world_size": world_size}
    return BatchStream(data, "train", batch_size=batch_size, max_history=5, seed=seed, shuffle="strata", **place)


def rows(batches: Iterable[Batch]) -> Counter[tuple[int, int]]:
    """Users and items; a simulated user meets an item once at most."""
    pairs = Counter[tuple[int, int]]()
    for batch in batches:
        pairs.update(zip(batch.user.tolist(), batch.sparse[TARGET].values().tolist(), strict=True))
    return pairs


def steps(folder: Path, size: int, world_size: int, row: int = 0) -> list[Counter[tuple[int, int]]]:
    """Return the rows of each global batch."""
    ranks = [stream(folder, size // world_size, rank, world_size) for rank in range(world_size)]
    for rank in ranks:
        rank.seek(0, row)
    return [rows(step) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, 4, 96])
def test_a_step_has_the_same_rows_on_any_number_of_ranks(tiny_data: Path, world_size: int) -> None:
    alone = steps(tiny_data, 192, 1)
    assert len(alone) == PreparedData.open(tiny_data).meta["counts"]["train"] // 192
    assert steps(tiny_data, 192, world_size) == alone


@settings(max_examples=10, deadline=None)
@given(done=st.integers(0, 12), world_size=st.integers(1, 5))
def test_an_epoch_continued_at_another_number_of_ranks_loses_and_doubles_nothing(
    tiny_data: Path, done: int, world_size: int
) -> None:
    before = steps(tiny_data, 128, 1)[:done]
    after = steps(tiny_data, 64 * world_size, world_size, row=done * 128)
    seen = sum([*before, *after], Counter[tuple[int, int]]())
    count = PreparedData.open(tiny_data).meta["counts"]["train"]
    assert set(seen.values()) == {1}
    assert count - seen.total() < 64 * world_size, "only what does not fill a step may be left out"


def test_every_step_has_equally_many_rows_of_each_stratum(tiny_data: Path) -> None:
    columns = PreparedData.open(tiny_data).split_rows("train")
    number = {pair: row for row, pair in enumerate(zip(columns["user"], columns["item"], strict=True))}
    bounds = [stratum * len(number) // STRATA for stratum in range(STRATA)]
    for step in steps(tiny_data, 192, 1):
        strata = np.searchsorted(bounds, [number[pair] for pair in step], side="right") - 1
        assert np.bincount(strata).tolist() == [3] * STRATA


def test_epochs_and_seeds_are_ordered_differently(tiny_data: Path) -> None:
    source = stream(tiny_data, 128)
    first, second = ([rows([batch]) for batch in source] for _ in range(2))
    assert first != second
    assert [rows([batch]) for batch in stream(tiny_data, 128, seed=1)] != first
    assert [rows([batch]) for batch in stream(tiny_data, 128)] == first


def test_ranks_read_their_own_row_groups(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    pq.write_table(pq.read_table(folder / PART), folder / PART, row_group_size=100)
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def count(file: pq.ParquetFile, group: int, columns: list[str] | None = None) -> Any:
        if columns is None:
            read.append(group)
        return original(file, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    groups = []
    for rank in range(4):
        read.clear()
        stream(folder, 32, rank, 4)
        groups.append(set(read))
    train = PreparedData.open(folder).meta["counts"]["train"]
    assert set.union(*groups) == set(range(-(-train // 100)))
    assert sum(map(len, groups)) <= -(-train // 100) + 3, "neighbours share at most the row group that a bound cuts"


def rows_of_ranks(world_size: int) -> list[range]:
    return [StrataOrder(6400, 0, rank=rank, world_size=world_size, batch_size=64).rows for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 64])
def test_ranks_divide_the_rows(world_size: int) -> None:
    assert [row for part in rows_of_ranks(world_size) for row in part] == list(range(6400))


@pytest.mark.parametrize("world_size", [3, 5, 128])
def test_neighbours_share_a_stratum_where_ranks_do_not_divide_their_number(world_size: int) -> None:
    parts = rows_of_ranks(world_size)
    assert {row for part in parts for row in part} == set(range(6400))
    assert max(map(len, parts)) < 6400 / world_size + 2 * 100


def test_a_step_that_is_not_made_of_whole_rounds_is_refused(tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"multiple of 64 rows .* --loader.batch_size is 20 on 3 of them"):
        stream(tiny_data, 20, 0, 3)
