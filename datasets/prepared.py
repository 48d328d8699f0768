"""A prepared folder opened for reading: checked when opened, typed access, nothing read before it is used.

Shape letters: E events, I item rows, U user rows (row 0, "unknown", included in both), F user side features.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from torchrec_em3.datasets.checked_parquet import check_table, read_parquet, read_split
from torchrec_em3.datasets.event_features import dense_column, sparse_column
from torchrec_em3.datasets.labels import DEFAULT_TASK, task_columns
from torchrec_em3.datasets.splits import TEST, TRAIN, VALIDATION
from torchrec_em3.errors import DataError
from torchrec_em3.schema import DenseFeature, FeatureSchema, SparseFeature

__all__ = ["FORMAT_VERSION", "PreparedData", "Split", "hash_content"]

FORMAT_VERSION = 1

Split = Literal["train", "validation", "test"]

_SPLIT_NUMBER: Mapping[str, int] = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
_EVENT_TYPES: Mapping[str, pa.DataType] = {
    "user": pa.int32(),
    "item": pa.int32(),
    "label": pa.int8(),
    "rating": pa.float32(),
    "timestamp": pa.int64(),
    "history_end": pa.int64(),
    "split": pa.int8(),
}
_ITEM_TYPES: Mapping[str, pa.DataType] = {
    **dict.fromkeys(("raw_id", "title", "text", "image", "category"), pa.string()),
    "train_count": pa.int64(),
}
_META_KEYS = frozenset(
    {"dataset", "split", "seed", "counts", "user_features", "modalities", "simulated", "time_cuts", "content_hash"}
)


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder; make one with `PreparedData.open`.

    Attributes:
        folder: Where it is.
        meta: Contents of meta.json; of a folder that was written before there were tasks, with its one task added.
    """

    folder: Path
    meta: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "PreparedData":
        """Open a folder that `em3 prepare` wrote.

        Reads meta.json and the footers and headers of the other files, so it costs milliseconds at any size.

        Args:
            folder: The folder.

        Raises:
            DataError: If it is no prepared folder or of another format version; or if a file is missing, truncated, of
                another type or of another length than meta.json says.
        """
        data = cls(folder, _read_meta(folder))
        data._check_tables()
        data._check_arrays()
        return data

    @property
    def user_rows(self) -> int:
        """Rows of the user table, row 0 included."""
        return int(self.meta["counts"]["users"]) + 1

    @property
    def item_rows(self) -> int:
        """Rows of the catalogue, row 0 included."""
        return int(self.meta["counts"]["items"]) + 1

    @property
    def known_users(self) -> int:
        """Users with training events; they are rows 1 to this number."""
        return int(self.meta["counts"]["known_users"])

    @property
    def known_items(self) -> int:
        """Items with training events; they are rows 1 to this number."""
        return int(self.meta["counts"]["known_items"])

    @property
    def user_feature_names(self) -> list[str]:
        """Names of the sparse user features: "user" first, then the columns of `user_features`."""
        return [feature["name"] for feature in self.meta["user_features"]]

    @property
    def sparse_features(self) -> list[SparseFeature]:
        """The sparse features of the events; folders of earlier versions have none."""
        return list(FeatureSchema.from_meta(self.meta).sparse)

    @property
    def dense_features(self) -> list[DenseFeature]:
        """The dense features, in the order of the columns of `Batch.dense`; folders of earlier versions have none."""
        return list(FeatureSchema.from_meta(self.meta).dense)

    @property
    def dense_columns(self) -> list[str]:
        """The columns of `split_rows` that hold the dense features, in their order."""
        return [dense_column(feature.name) for feature in self.dense_features]

    @property
    def sparse_columns(self) -> list[str]:
        """The columns of `split_rows` that hold the sparse features of the events, in their order."""
        return [sparse_column(feature.name) for feature in self.sparse_features]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, the main one first."""
        return [task["name"] for task in self.meta["tasks"]]

    @property
    def label_columns(self) -> list[str]:
        """The columns of `split_rows` that hold the labels, in the order of `tasks`; the first is "label"."""
        return task_columns("label", self.tasks)

    @property
    def tokens_folder(self) -> Path:
        """Folder of the token store, with one folder a modality; it need not exist where no encoder was chosen."""
        return self.folder / "tokens"

    @property
    def codes_folder(self) -> Path:
        """Folder of the code store, with one folder for each quantiser; it need not exist where there are no codes."""
        return self.folder / "codes"

    @cached_property
    def history_offsets(self) -> np.ndarray:
        """Where each user's events begin in `history_items`, int64 [U + 1], memory-mapped."""
        return _load_array(self.folder / "history" / "offsets.npy", np.int64, (self.user_rows + 1,))

    @cached_property
    def history_items(self) -> np.ndarray:
        """Catalogue row of each event, one user after the other, in time order; int32, memory-mapped.

        Sampled negatives are not among them.
        """
        shape = (int(self.history_offsets[-1]),)
        return _load_array(self.folder / "history" / "items.npy", np.int32, shape)

    @cached_property
    def items(self) -> pa.Table:
        """The catalogue: raw_id, title, text, image, category, train_count; row i is catalogue row i."""
        return read_parquet(self.folder / "items.parquet", lambda file: file.read())

    @cached_property
    def users(self) -> pa.Table:
        """The users: raw_id, train_count and one column a side feature; row u is user row u."""
        return read_parquet(self.folder / "users.parquet", lambda file: file.read())

    @cached_property
    def user_features(self) -> np.ndarray:
        """Vocabulary row of each user's side features, int32 [U, F], columns as in `user_feature_names[1:]`."""
        columns = [self.users[name].to_numpy() for name in self.user_feature_names[1:]]
        return np.stack(columns, axis=1) if columns else np.zeros((self.user_rows, 0), dtype=np.int32)

    @cached_property
    def item_train_count(self) -> np.ndarray:
        """Training events of each catalogue row, int64 [I]."""
        return self.items["train_count"].to_numpy()

    @cached_property
    def user_train_count(self) -> np.ndarray:
        """Training events of each user row, int64 [U]."""
        return self.users["train_count"].to_numpy()

    def split_rows(self, split: Split, first: int = 0, end: int | None = None) -> dict[str, np.ndarray]:
        """Return the events of one split in global time order, or a run of them.

        Row groups without a wanted row are not read, but for the column `split` of those that hold several splits.

        Args:
            split: Which events.
            first: Row of the split to begin with.
            end: Row of the split to end before; all that follow if None.

        Returns:
            user, item and `sparse_<name>` of each sparse feature (int32 rows); label and `label_<task>` of each task
            but the main one (int8); rating and `dense_<name>` of each dense feature (float32, NaN where unknown);
            timestamp, history_end (int64) and, in simulated data, probability (float32); all of one length.

        Raises:
            DataError: If a file is damaged (each page has a checksum), or times decrease or values are out of range;
                the message names the file and the row group or the row.
        """
        expected = self.meta["counts"][split]
        end = expected if end is None else end
        tables, seen = [], 0
        for path in self._parts():
            table, rows = read_split(path, _SPLIT_NUMBER[split], first - seen, end - seen)
            tables.append(table)
            seen += rows
        if seen != expected:
            raise DataError(f"{self.folder}: {seen} rows of split {split}, meta.json says {expected}; prepare it again")
        names = [name for name in self._event_types() if name != "split"]
        columns = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in names}
        self._check_rows(split, columns, first)
        return columns

    def vocabulary(self, feature: str) -> list[str]:
        """Return the values of a side feature of users or a sparse feature of events by row; row 0 is unknown."""
        values: list[str] = read_parquet(self.folder / "vocab" / f"{feature}.parquet", lambda f: f.read())[
            "value"
        ].to_pylist()
        return values

    def verify(self) -> None:
        """Read every byte of the data and compare it with the hash in meta.json.

        Raises:
            DataError: If anything has changed since the folder was written.
        """
        found = hash_content(self.folder)
        if found != self.meta["content_hash"]:
            raise DataError(
                f"{self.folder}: contents hash to {found[:12]}, meta.json says {str(self.meta['content_hash'])[:12]}; "
                "a file has changed: run em3 prepare again"
            )

    def _parts(self) -> list[Path]:
        return sorted((self.folder / "interactions").glob("part-*.parquet"))

    def _event_types(self) -> Mapping[str, pa.DataType]:
        labels = dict.fromkeys(self.label_columns, pa.int8())
        features = dict.fromkeys(self.dense_columns, pa.float32()) | dict.fromkeys(self.sparse_columns, pa.int32())
        probability = {"probability": pa.float32()} if self.meta["simulated"] else {}
        return {**_EVENT_TYPES, **labels, **features, **probability}

    def _check_tables(self) -> None:
        features = self.meta["user_features"][1:]
        users = {"raw_id": pa.string(), "train_count": pa.int64(), **{f["name"]: pa.int32() for f in features}}
        check_table(self.folder / "items.parquet", _ITEM_TYPES, self.item_rows)
        check_table(self.folder / "users.parquet", users, self.user_rows)
        for feature in [*features, *self.meta.get("sparse", ())]:
            path = self.folder / "vocab" / f"{feature['name']}.parquet"
            check_table(path, {"row": pa.int32(), "value": pa.string()}, feature["rows"])
        rows = sum(check_table(path, self._event_types()) for path in self._parts())
        expected = self.meta["counts"]["interactions"]
        if rows != expected:
            folder = self.folder / "interactions"
            raise DataError(f"{folder}: {rows} rows, meta.json says {expected}; run em3 prepare again")

    def _check_arrays(self) -> None:
        events, rows = len(self.history_items), self.meta["counts"]["interactions"]
        if events > rows:
            folder = self.folder / "history"
            raise DataError(f"{folder}: {events} events, but meta.json says {rows} interactions; run em3 prepare again")
        for name, modality in self.meta["modalities"].items():
            tokens = self.tokens_folder / name
            shape = (self.item_rows, modality["max_tokens"], modality["dim"])
            _load_array(tokens / "tokens.npy", modality.get("dtype", "float16"), shape)
            _load_array(tokens / "lengths.npy", np.int32, (self.item_rows,))
            _load_array(tokens / "present.npy", np.bool_, (self.item_rows,))
        for name, spec in self.meta.get("codes", {}).items():
            _load_array(self.codes_folder / name / "codes.npy", np.int32, (self.item_rows, spec["levels"]))
            _load_array(self.codes_folder / name / "present.npy", np.bool_, (self.item_rows,))

    def _check_rows(self, split: Split, columns: Mapping[str, np.ndarray], number: int) -> None:
        """Check the rows of a split from a number on."""
        decreasing = np.flatnonzero(np.diff(columns["timestamp"]) < 0)
        if decreasing.size:
            row = number + int(decreasing[0]) + 1
            raise DataError(f"{self.folder} row {row} of split {split}: timestamp decreases; run em3 prepare again")
        where = self.folder, split, number
        for name, last in {"user": self.user_rows - 1, "item": self.item_rows - 1}.items():
            _refuse(where, name, columns[name], 1, last)
        for name in self.label_columns:
            _refuse(where, name, columns[name], 0, 1)
        for feature in self.sparse_features:
            name = sparse_column(feature.name)
            _refuse(where, name, columns[name], 0, feature.rows - 1)
        first, end = (self.history_offsets[columns["user"] + shift] for shift in (0, 1))
        _refuse(where, "history_end", columns["history_end"], first, end - 1)


def hash_content(folder: Path) -> str:
    """Return the SHA-256 over name and bytes of every parquet and npy file below `folder`, in order of their names."""
    digest = hashlib.sha256()
    files = [path for path in folder.rglob("*") if path.suffix in (".parquet", ".npy")]
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _refuse(where: tuple[Path, Split, int], name: str, values: np.ndarray, low: Any, high: Any) -> None:
    bad = np.flatnonzero((values < low) | (values > high))
    if bad.size:
        (folder, split, number), row = where, int(bad[0])
        limits = "..".join(str(np.broadcast_to(bound, values.shape)[row]) for bound in (low, high))
        raise DataError(
            f"{folder} row {number + row} of split {split}: {name} is {values[row]}, outside {limits}; "
            "run em3 prepare again"
        )


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.is_file():
        raise DataError(f"{folder}: no meta.json, so not a prepared folder; make one with em3 prepare")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); run em3 prepare again") from error
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version is {version}, this program reads {FORMAT_VERSION}; run em3 prepare again"
        )
    missing = _META_KEYS - meta.keys()
    if missing:
        raise DataError(f"{path}: no '{min(missing)}'; run em3 prepare again")
    return {"tasks": [{"name": DEFAULT_TASK, "label_threshold": meta.get("label_threshold")}], **meta}


def _load_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise DataError(f"{path}: the file is missing; run em3 prepare again") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); run em3 prepare again") from error
    if array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}"
        raise DataError(f"{path}: holds {found}, expected {np.dtype(dtype)} {list(shape)}; run em3 prepare again")
    return array
