"""Columns of events in an order that is applied when they are read or written, so that each is in memory once.

Shape letters: E events.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from torchrec_em3.datasets.ids import look_up

__all__ = ["ROW_GROUP_ROWS", "OrderedEvents", "write_events"]

ROW_GROUP_ROWS = 1 << 17
"""Small enough that a damaged row group costs little to find, large enough that zstd and statistics pay."""


class OrderedEvents(Mapping[str, np.ndarray]):
    """Columns by name; each look-up makes the whole column in order anew."""

    def __init__(self, columns: Mapping[str, np.ndarray], order_E: np.ndarray) -> None:
        """Keep the columns as they are.

        Args:
            columns: Columns of one length, in any order.
            order_E: Position in `columns` of each event, integers.
        """
        self._columns, self._order_E = columns, order_E

    @property
    def num_rows(self) -> int:
        """Number of events."""
        return len(self._order_E)

    def rows(self, start: int, end: int) -> dict[str, np.ndarray]:
        """Return the columns of the events `start` to `end - 1`."""
        order = self._order_E[start:end]
        return {name: column[order] for name, column in self._columns.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column in order."""
        return look_up(self._columns[name], self._order_E)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the columns."""
        return iter(self._columns)

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self._columns)


def write_events(folder: Path, events: OrderedEvents, max_part_rows: int) -> None:
    """Write events to `part-*.parquet` in a new folder, a row group at a time."""
    folder.mkdir()
    schema = pa.table(events.rows(0, 0)).schema
    with tqdm(total=events.num_rows, desc="write events", unit="event", unit_scale=True, disable=None) as bar:
        for part, first in enumerate(range(0, events.num_rows, max_part_rows)):
            end = min(first + max_part_rows, events.num_rows)
            path = folder / f"part-{part:05d}.parquet"
            with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
                for start in range(first, end, ROW_GROUP_ROWS):
                    columns = events.rows(start, min(start + ROW_GROUP_ROWS, end))
                    writer.write_table(pa.table(columns), row_group_size=ROW_GROUP_ROWS)
                    bar.update(len(columns["user"]))
