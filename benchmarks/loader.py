"""The loader alone: rows per second, and what each rank reads of the interactions.

python benchmarks/loader.py --data DATA
python benchmarks/loader.py --world_size 2 --shuffles '[rows,strata]'
"""

import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pyarrow.parquet as pq
import torch
from jsonargparse import auto_cli
from synthetic import write_synthetic
from turns import endless_batches

from torchrec_em3.config import Config, LoaderConfig
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.process_group import Ranks

MB = 1e6


@dataclass
class Reads:
    """Column chunks that were read from Parquet files, as they are stored."""

    bytes: int = 0
    whole_row_groups: int = 0


@contextmanager
def counted_reads() -> Iterator[Reads]:
    """Count what is read of row groups meanwhile."""
    reads, read = Reads(), pq.ParquetFile.read_row_group

    def read_and_count(file: pq.ParquetFile, group: int, columns: list[str] | None = None) -> Any:
        chunks = [file.metadata.row_group(group).column(number) for number in range(file.metadata.num_columns)]
        wanted = [chunk for chunk in chunks if columns is None or chunk.path_in_schema in columns]
        reads.bytes += sum(chunk.total_compressed_size for chunk in wanted)
        reads.whole_row_groups += len(wanted) == len(chunks)
        return read(file, group, columns=columns)

    with patch.object(pq.ParquetFile, "read_row_group", read_and_count):
        yield reads


def stored(data: PreparedData) -> tuple[int, int]:
    """Return the bytes and the number of all row groups of the interactions."""
    footers = [pq.read_metadata(path) for path in (data.folder / "interactions").glob("*.parquet")]
    groups = [footer.row_group(group) for footer in footers for group in range(footer.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(chunk.total_compressed_size for chunk in chunks), len(groups)


def measure(data: PreparedData, config: Config, ranks: Ranks, steps: int) -> None:
    """Print what a rank reads until its first batch, and how fast it yields the next ones."""
    all_bytes, all_groups = stored(data)
    batches = endless_batches(config, data, ranks)
    with counted_reads() as reads:
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    rows = sum(len(batch) for batch in itertools.islice(batches, steps))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"{config.loader.shuffle}, rank {ranks.rank} of {ranks.world_size}: read {reads.whole_row_groups} of "
        f"{all_groups} row groups, {reads.bytes / MB:.2f} of {all_bytes / MB:.2f} MB"
    )
    print(f"{rows} rows: {rows / wall:,.0f} rows/s, {cpu / rows * 1000:.5f} CPU s per 1,000 rows", flush=True)


def main(
    data: str = "",
    batch_size: int = 4096,
    max_history: int = 50,
    steps: int = 200,
    world_size: int = 1,
    shuffles: tuple[Literal["rows", "strata"], ...] = ("rows",),
) -> None:
    """Print what each rank reads, its rows per second and CPU seconds per 1,000 rows.

    Args:
        data: Prepared folder; synthetic data if empty.
        batch_size: Rows per step on each rank.
        max_history: Longest history.
        steps: Batches to read.
        world_size: Ranks, one after the other in this process.
        shuffles: Values of --loader.shuffle, one after the other.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = (
            Path(data)
            if data
            else write_synthetic(Path(folder) / "data", num_users=5_000, num_items=5_000, num_events=1_500_000)
        )
        for shuffle in shuffles:
            config = Config(loader=LoaderConfig(batch_size=batch_size, max_history=max_history, shuffle=shuffle))
            for rank in range(world_size):
                ranks = Ranks(rank, world_size, world_size, torch.device("cpu"), None)
                measure(PreparedData.open(path), config, ranks, steps)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
