"""Parquet files of a prepared folder: pages are compared with their checksums, faults become one line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_em3.errors import DataError

__all__ = ["check_table", "read_parquet", "read_split"]

Loaded = TypeVar("Loaded")


def read_parquet(path: Path, read: Callable[[pq.ParquetFile], Loaded]) -> Loaded:
    """Return what `read` makes of an opened parquet file; pages are compared with their checksums.

    Raises:
        DataError: If the file is missing, truncated or damaged.
    """
    if not path.is_file():
        raise DataError(f"{path}: the file is missing; run em3 prepare again")
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            return read(file)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: truncated or damaged ({reason}); run em3 prepare again") from error


def check_table(path: Path, types: Mapping[str, pa.DataType], rows: int | None = None) -> int:
    """Compare the schema and the number of rows in the footer of a parquet file with what is expected.

    Returns:
        The number of rows.

    Raises:
        DataError: If a column is missing or of another type, or there are more or fewer rows than expected.
    """
    schema, found = read_parquet(path, lambda file: (file.schema_arrow, file.metadata.num_rows))
    for name, wanted in types.items():
        if name not in schema.names:
            raise DataError(f"{path}: no column '{name}' among {', '.join(schema.names)}; run em3 prepare again")
        if schema.field(name).type != wanted:
            actual = schema.field(name).type
            raise DataError(f"{path}: column '{name}' is {actual}, expected {wanted}; run em3 prepare again")
    if rows is not None and found != rows:
        raise DataError(f"{path}: {found} rows, meta.json says {rows}; run em3 prepare again")
    return int(found)


def read_split(path: Path, split: int, first: int, end: int) -> tuple[pa.Table, int]:
    """Read a run of the rows of one split from a file of interactions, and no row group without any of them.

    Args:
        path: The file.
        split: Number of the split.
        first: Where the run begins among the file's rows of the split; negative: with the first.
        end: Where it ends, exclusive.

    Returns:
        The rows, and how many rows of the split the file has altogether.

    Raises:
        DataError: If the file is damaged.
    """

    def read(file: pq.ParquetFile) -> tuple[pa.Table, int]:
        tables, seen = [file.schema_arrow.empty_table()], 0
        for group in range(file.num_row_groups):
            try:
                rows = _count(file, group, split)
                start, stop = max(first - seen, 0), min(end - seen, rows)
                seen += rows
                if start < stop:
                    table = file.read_row_group(group)
                    tables.append(table.filter(pc.equal(table["split"], split)).slice(start, stop - start))
            except (OSError, pa.ArrowException) as error:
                raise OSError(f"row group {group}: {error}") from error
        return pa.concat_tables(tables), seen

    return read_parquet(path, read)


def _count(file: pq.ParquetFile, group: int, split: int) -> int:
    """Return how many rows of a split a row group has, from its statistics if they say it, else from its column."""
    column = file.schema_arrow.names.index("split")
    metadata = file.metadata.row_group(group)
    statistics = metadata.column(column).statistics
    if statistics is not None and statistics.has_min_max:
        if not statistics.min <= split <= statistics.max:
            return 0
        if statistics.min == statistics.max:
            return int(metadata.num_rows)
    return int(pc.sum(pc.equal(file.read_row_group(group, columns=["split"])["split"], split)).as_py() or 0)
