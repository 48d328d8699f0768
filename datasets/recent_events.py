"""What a stream of events remembers from one shard to the next: the last events of each user, and who is known.

Shape letters: E events of a shard, N remembered events, U user rows, I catalogue rows, F user side features.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_em3.datasets.indexing import build_histories
from torchrec_em3.datasets.prepared import PreparedData, Split
from torchrec_em3.schema import DenseFeature, SparseFeature

__all__ = ["RecentEvents", "ShardRows"]


@dataclass(frozen=True)
class ShardRows:
    """The events of a shard with their histories, as `BatchStream` reads them.

    Attributes:
        folder: The prepared folder whose catalogue it is.
        users: `raw_id` of each user row, those that came after the preparation included.
        known_users: See `PreparedData`.
        known_items: See `PreparedData`.
        user_feature_names: See `PreparedData`.
        label_columns: See `PreparedData`.
        dense_features: See `PreparedData`.
        sparse_features: See `PreparedData`.
        user_features: int32 [U, F]; users that came after the preparation have row 0, unknown, of each feature.
        history_offsets: int64 [U + 1].
        history_items: int32 [N + E], the remembered events and those of the shard.
        columns: user, item (int32 rows), timestamp, history_end (int64), the labels (int8), the dense features
            (float32) and the sparse ones (rows of their vocabularies), in order of time.
        first_seen: Whether no earlier event has the row's item, bool [E]; false where the catalogue lacks it.
    """

    folder: Path
    users: pa.Table
    known_users: int
    known_items: int
    user_feature_names: list[str]
    label_columns: list[str]
    dense_features: list[DenseFeature]
    sparse_features: list[SparseFeature]
    user_features: np.ndarray
    history_offsets: np.ndarray
    history_items: np.ndarray
    columns: dict[str, np.ndarray]
    first_seen: np.ndarray

    def split_rows(self, split: Split) -> dict[str, np.ndarray]:
        """Return all rows: a shard has one split."""
        return self.columns


class RecentEvents:
    """The last events of every user, in memory, and the raw ids of users and items.

    Users of the prepared folder keep their rows; new ones get the rows behind, which have histories and share row 0 of
    the user table. Items that the catalogue lacks are row 0.
    """

    def __init__(self, data: PreparedData, max_history: int) -> None:
        """Know the users and items of a prepared folder, and no events.

        Args:
            data: The prepared folder.
            max_history: Events that are remembered of each user.
        """
        self._data, self._max_history = data, max_history
        self._items = data.items["raw_id"].combine_chunks()
        self._users = data.users["raw_id"].combine_chunks()
        self._sparse_values = {
            column: pa.array(data.vocabulary(feature.name), pa.string())
            for feature, column in zip(data.sparse_features, data.sparse_columns, strict=True)
        }
        self._offsets = np.zeros(data.user_rows + 1, dtype=np.int64)
        self._events = np.empty(0, dtype=np.int32)
        self._seen = data.item_train_count > 0

    def start(self, before: int) -> None:
        """Remember the events of the prepared folder that happened before a time, whatever their split."""
        data = self._data
        end = data.history_offsets[1:].copy()
        splits: tuple[Split, ...] = ("train", "validation", "test")
        for split in splits:
            rows = data.split_rows(split)
            later = rows["timestamp"] >= before
            np.minimum.at(end, rows["user"][later], rows["history_end"][later])
        happened = np.arange(len(data.history_items)) < np.repeat(end, np.diff(data.history_offsets))
        self._seen[data.history_items[happened]] = True
        self._keep_last(data.history_offsets[:-1], end, data.history_items)

    def open(self, table: pa.Table) -> ShardRows:
        """Return a shard's events with what their users did before; what is remembered stays as it is.

        Args:
            table: What `read_shard` returned. All of it happened later than what is remembered.
        """
        data = self._data
        users, user = self._number_users(table["user_id"])
        item = _rows(table["item_id"], self._items)
        remembered = np.repeat(np.arange(len(self._offsets) - 1), np.diff(self._offsets))
        histories = build_histories(
            np.append(remembered, user),
            np.append(self._events, item),
            np.append(np.full(len(remembered), -1), table["timestamp"].to_numpy()),
            num_user_rows=len(users),
            happened=np.ones(len(remembered) + len(user), dtype=bool),
        )
        unknown = np.zeros((len(users) - data.user_rows, data.user_features.shape[1]), dtype=np.int32)
        columns = {
            "user": user.astype(np.int32),
            "item": item.astype(np.int32),
            "timestamp": table["timestamp"].to_numpy(),
            "history_end": histories.end[len(remembered) :],
            **{name: table[name].to_numpy() for name in (*data.label_columns, *data.dense_columns)},
            **{name: _rows(table[name], values) for name, values in self._sparse_values.items()},
        }
        return ShardRows(
            folder=data.folder,
            users=pa.table({"raw_id": users}),
            known_users=data.known_users,
            known_items=data.known_items,
            user_feature_names=data.user_feature_names,
            label_columns=data.label_columns,
            dense_features=data.dense_features,
            sparse_features=data.sparse_features,
            user_features=np.concatenate([data.user_features, unknown]),
            history_offsets=histories.offsets,
            history_items=histories.items,
            columns=columns,
            first_seen=~self._seen[item] & (item > 0),
        )

    def add(self, table: pa.Table, rows: ShardRows) -> None:
        """Remember the events of a shard, which `open` has given rows."""
        self._users, _ = self._number_users(table["user_id"])
        self._seen[rows.columns["item"]] = True
        self._keep_last(rows.history_offsets[:-1], rows.history_offsets[1:], rows.history_items)

    def write(self, path: Path) -> None:
        """Write what is remembered, as a whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        new_users = np.array(self._users[self._data.user_rows :].to_pylist(), dtype=str)
        with temporary.open("wb") as file:
            np.savez(file, offsets=self._offsets, events=self._events, seen=self._seen, new_users=new_users)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def read(self, path: Path) -> None:
        """Remember what `write` wrote."""
        with np.load(path) as found:
            self._offsets, self._events, self._seen = found["offsets"], found["events"], found["seen"]
            new_users = pa.array(found["new_users"].tolist(), type=pa.string())
        users = self._data.users["raw_id"].combine_chunks()
        self._users = pa.concat_arrays([users, new_users])

    def _number_users(self, ids: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
        """Return the ids of all user rows, new ones behind in the order in which they come, and the row of each id."""
        distinct = pc.unique(ids)
        new = distinct.filter(pc.invert(pc.is_in(distinct, value_set=self._users)))
        users = pa.concat_arrays([self._users, new])
        return users, _rows(ids, users)

    def _keep_last(self, start_U: np.ndarray, end_U: np.ndarray, items: np.ndarray) -> None:
        """Remember the last events of each user among `items[start:end]`."""
        start_U = np.maximum(start_U, end_U - self._max_history)
        length_U = end_U - start_U
        self._offsets = np.append(0, np.cumsum(length_U))
        self._events = items[np.arange(length_U.sum()) + np.repeat(start_U - self._offsets[:-1], length_U)]


def _rows(ids: pa.ChunkedArray, table: pa.Array) -> np.ndarray:
    """Return where each id stands in a table of ids; 0, unknown, where it does not."""
    found: np.ndarray = pc.fill_null(pc.index_in(ids, value_set=table), 0).to_numpy().astype(np.int64)
    return found
