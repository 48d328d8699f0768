"""Shards: Parquet files of labelled events with the publisher's ids, which arrive in a folder one after the other.

A shard is written under a name that starts with a dot and renamed when it is complete, so what has a shard's name is
whole. Names sort in the order of time. docs/continuous-training.md describes the file.

Shape letters: E events of a shard.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchrec_em3.datasets.labels import task_columns
from torchrec_em3.datasets.prepared import PreparedData, Split
from torchrec_em3.errors import ConfigError, DataError

__all__ = ["END_FILE", "feature_types", "list_shards", "read_shard", "split_into_shards", "write_shard"]

END_FILE = "_END"
"""A file of this name says that no shard will follow those in the folder."""


def list_shards(folder: Path) -> list[str]:
    """Return the names of the complete shards in a folder, in the order of time.

    Raises:
        DataError: If there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; make it, and let complete shards be renamed into it")
    return sorted(path.name for path in folder.glob("*.parquet") if not path.name.startswith((".", "_")))


def feature_types(data: PreparedData) -> dict[str, pa.DataType]:
    """Return the type of each column of a shard that holds a feature of the events of a prepared folder."""
    return dict.fromkeys(data.dense_columns, pa.float32()) | dict.fromkeys(data.sparse_columns, pa.string())


def read_shard(path: Path, tasks: Sequence[str], features: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """Read a whole shard and check it.

    Args:
        path: The file.
        tasks: Names of the tasks, the main one first.
        features: What `feature_types` returns, if there are any.

    Returns:
        user_id, item_id (string), timestamp (int64), `label` and `label_<task>` of each task but the main one (int8),
        the features (null where unknown, or NaN or "" by their type), in order of time, at least one row.

    Raises:
        DataError: If it is missing, truncated or damaged (each page has a checksum), lacks a column or has one of
            another type, holds no rows, a null or an empty id, a label that is neither 0 nor 1, an infinite dense
            feature, or times that decrease.
    """
    features = features or {}
    types = {**_types(tasks), **features}
    try:
        schema = pq.read_schema(path)
        for name, wanted in types.items():
            if name not in schema.names:
                raise DataError(f"{path}: no column '{name}' among {', '.join(schema.names)}; write the shard again")
            if schema.field(name).type != wanted:
                raise DataError(f"{path}: column '{name}' is {schema.field(name).type}, expected {wanted}")
        table = pq.read_table(path, columns=list(types), page_checksum_verification=True, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: truncated or damaged ({reason}); write the shard again and --resume") from error
    _check_rows(path, table, task_columns("label", tasks), features)
    return table


def write_shard(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write a shard so that whoever watches the folder sees it when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.table(dict(columns)), temporary, compression="zstd", write_page_checksum=True)
    os.replace(temporary, path)


def split_into_shards(data: PreparedData, split: Split, count: int, out: Path) -> list[Path]:
    """Write the events of one split as shards of about equal size, and after them the end file.

    Events of one instant stay together, so that each shard begins later than the one before ends.

    Args:
        data: A prepared folder; its sampled negatives cannot be told from events, so it must have none.
        split: Which events.
        count: How many shards are wanted; there are fewer if there are fewer instants.
        out: Folder to make; it must not hold shards yet.

    Raises:
        ConfigError: If the folder has sampled negatives.
        DataError: If `out` is a file or holds shards already, or the prepared folder is damaged.
    """
    if data.meta["negatives"]["rows"]:
        raise ConfigError(f"{data.folder} has sampled negatives, which are no events; prepare it with --negatives 0")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; give a folder")
    if out.is_dir() and list_shards(out):
        raise DataError(f"{out}: holds shards already; give another folder")
    rows = data.split_rows(split)
    instants = np.flatnonzero(np.diff(rows["timestamp"], prepend=-1))
    wanted = len(rows["timestamp"]) * np.arange(count) / count
    cuts = np.unique(instants[np.searchsorted(instants, wanted).clip(max=len(instants) - 1)])
    columns = {
        "user_id": data.users["raw_id"].take(pa.array(rows["user"])),
        "item_id": data.items["raw_id"].take(pa.array(rows["item"])),
        "timestamp": rows["timestamp"],
        **{name: rows[name] for name in (*data.label_columns, *data.dense_columns)},
    }
    for feature, column in zip(data.sparse_features, data.sparse_columns, strict=True):
        columns[column] = pa.array(data.vocabulary(feature.name), pa.string()).take(pa.array(rows[column]))
    paths = []
    for number, (start, end) in enumerate(zip(cuts, [*cuts[1:], len(rows["timestamp"])], strict=True)):
        paths.append(out / f"{number:05d}.parquet")
        write_shard(paths[-1], {name: column[start:end] for name, column in columns.items()})
    (out / END_FILE).touch()
    return paths


def _types(tasks: Sequence[str]) -> dict[str, pa.DataType]:
    ids = dict.fromkeys(("user_id", "item_id"), pa.string())
    return {**ids, "timestamp": pa.int64(), **dict.fromkeys(task_columns("label", tasks), pa.int8())}


def _check_rows(path: Path, table: pa.Table, labels: Sequence[str], features: Mapping[str, pa.DataType]) -> None:
    if table.num_rows == 0:
        raise DataError(f"{path}: no rows; leave empty shards out")
    for name in table.column_names:
        if table[name].null_count and name not in features:
            row = pc.index(table[name].is_null(), value=True).as_py()
            raise DataError(f"{path} row {row}: {name} is null; write the shard again")
    for name in ("user_id", "item_id"):
        row = pc.index(table[name], value="").as_py()
        if row >= 0:
            raise DataError(f"{path} row {row}: {name} is empty; write the shard again")
    for name in labels:
        values_E = table[name].to_numpy()
        bad = np.flatnonzero((values_E != 0) & (values_E != 1))
        if bad.size:
            raise DataError(f"{path} row {bad[0]}: {name} is {values_E[bad[0]]}, must be 0 or 1")
    for name in (name for name, kind in features.items() if pa.types.is_floating(kind)):
        infinite = np.flatnonzero(np.isinf(table[name].to_numpy()))
        if infinite.size:
            raise DataError(f"{path} row {infinite[0]}: {name} is infinite, must be finite, or null if unknown")
    decreasing = np.flatnonzero(np.diff(table["timestamp"].to_numpy()) < 0)
    if decreasing.size:
        raise DataError(f"{path} row {decreasing[0] + 1}: timestamp decreases; sort the shard by time")
