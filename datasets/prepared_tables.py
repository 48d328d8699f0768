"""The tables of a prepared folder beside its events: users, items, and the vocabularies of categorical features.

Shape letters: U user rows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_em3.datasets.indexing import IndexedDataset
from torchrec_em3.datasets.ordered_events import ROW_GROUP_ROWS
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.vocabulary import index_values

__all__ = ["write_items", "write_users", "write_vocabularies"]


def write_users(folder: Path, raw: RawDataset, indexed: IndexedDataset) -> list[dict[str, Any]]:
    """Write `users.parquet` and a vocabulary for each side feature; return the table rows that each feature needs."""
    users = indexed.users
    columns: dict[str, Any] = {"raw_id": users.raw_id, "train_count": users.train_count}
    vocabularies: dict[str, list[str]] = {}
    row_U = np.arange(len(users.raw_id))
    for name, value_of in raw.user_features.items():
        value_U = np.array([value_of.get(raw_id, "") for raw_id in users.raw_id.tolist()], dtype=object)
        vocabularies[name], columns[name] = index_values(value_U, (row_U > 0) & (row_U <= users.known))
    _write_table(folder / "users.parquet", columns)
    return [{"name": "user", "rows": users.known + 1}, *write_vocabularies(folder, vocabularies)]


def write_items(folder: Path, raw: RawDataset, indexed: IndexedDataset) -> pa.Table:
    """Write `items.parquet` and return it."""
    items, position = indexed.items, indexed.catalogue
    columns: dict[str, Any] = {"raw_id": items.raw_id}
    for name in ("title", "text", "image", "category"):
        columns[name] = pa.array(["", *getattr(raw.items, name)[position].tolist()], type=pa.string())
    columns["train_count"] = items.train_count
    return _write_table(folder / "items.parquet", columns)


def write_vocabularies(folder: Path, vocabularies: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Write the values of each feature by row to `vocab/`; return its name and number of rows."""
    (folder / "vocab").mkdir(exist_ok=True)
    for name, values in vocabularies.items():
        rows = np.arange(len(values), dtype=np.int32)
        _write_table(folder / "vocab" / f"{name}.parquet", {"row": rows, "value": values})
    return [{"name": name, "rows": len(values)} for name, values in vocabularies.items()]


def _write_table(path: Path, columns: Mapping[str, Any]) -> pa.Table:
    table = pa.table(dict(columns))
    pq.write_table(table, path, compression="zstd", write_page_checksum=True, row_group_size=ROW_GROUP_ROWS)
    return table
