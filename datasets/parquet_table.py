"""One table in Parquet, read column by column; every complaint names the table, the column and the row, from 0.

A table is one file (`events.parquet`) or a folder of parts (`events/*.parquet`, in the order of their names).

Shape letters: R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset

from torchrec_em3.datasets.ids import ID_TYPE
from torchrec_em3.errors import DataError
from torchrec_em3.registry import closest

__all__ = ["ParquetTable"]

Read = TypeVar("Read")


@dataclass(frozen=True)
class ParquetTable:
    """A table and where it is.

    Attributes:
        place: Its file or folder.
        data: Its parts.
    """

    place: Path
    data: pa_dataset.Dataset

    @classmethod
    def find(cls, folder: Path, name: str) -> "ParquetTable | None":
        """Open `<name>.parquet` or the parts in `<name>/`; None if neither is there.

        Raises:
            DataError: If a file is damaged.
        """
        place = folder / f"{name}.parquet"
        parts = [place] if place.is_file() else sorted((folder / name).glob("[!._]*.parquet"))
        if not parts:
            return None
        place = place if place.is_file() else folder / name
        return cls(place, _guarded(place, lambda: pa_dataset.dataset([str(part) for part in parts])))

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self.data.schema.names)

    def ids(self, name: str) -> pa.DictionaryArray:
        """Return a column of strings or integers as distinct strings and int32 positions; nulls stay."""
        kind = _plain(self._type(name))
        self._expect(name, _is_text(kind) or pa.types.is_integer(kind), "a string or an integer")
        return self._encoded(name)

    def categories(self, name: str) -> pa.DictionaryArray:
        """Return a column of strings, integers or truth values in the same form."""
        kind = _plain(self._type(name))
        suits = _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        self._expect(name, suits, "a string, an integer or a truth value")
        return self._encoded(name)

    def seconds(self, name: str) -> np.ndarray:
        """Return a column of times as seconds since 1970, int64 [R]; a time without a zone is taken for UTC."""
        kind = self._type(name)
        is_time = pa.types.is_timestamp(kind) or pa.types.is_date(kind)
        self._expect(name, is_time or pa.types.is_integer(kind), "a timestamp, or seconds since 1970 as integers")
        column = self._whole(name)
        if is_time:
            column = column.cast(pa.timestamp("s", getattr(kind, "tz", None)), safe=False)
        return _guarded(self.place, lambda: column.cast(pa.int64())).to_numpy()

    def label(self, name: str) -> np.ndarray:
        """Return a column of 0 and 1, or of truth values, as int8 [R]."""
        kind = self._type(name)
        numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        self._expect(name, numeric or pa.types.is_boolean(kind), "0 or 1, or a truth value")
        column = self._whole(name)
        values_R = (column if numeric else column.cast(pa.int8())).to_numpy()
        bad = np.flatnonzero((values_R != 0) & (values_R != 1))
        if bad.size:
            raise DataError(f"{self.place} row {bad[0]}: {name} is {values_R[bad[0]]}, must be 0 or 1")
        return values_R.astype(np.int8)

    def numbers(self, name: str, *, nullable: bool = False) -> np.ndarray:
        """Return a column of numbers as float32 [R]; null, where it may be, as NaN."""
        kind = self._type(name)
        self._expect(name, pa.types.is_integer(kind) or pa.types.is_floating(kind), "a number")
        column = self._column(name) if nullable else self._whole(name)
        return column.cast(pa.float32(), safe=False).to_numpy()

    def texts(self, name: str) -> list[str]:
        """Return a column of strings, integers or truth values as strings; "" is what is null."""
        kind = _plain(self._type(name))
        suits = _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
        self._expect(name, suits, "a string, an integer or a truth value")
        column = self._column(name).cast(kind)
        _guarded(self.place, lambda: column.validate(full=True))
        return pc.fill_null(column.cast(pa.string()), "").to_pylist()

    def _type(self, name: str) -> pa.DataType:
        if name not in self.names:
            among = ", ".join(self.names)
            raise DataError(f"{self.place}: no column '{name}' among {among}.{closest(name, self.names)}")
        return self.data.schema.field(name).type

    def _expect(self, name: str, suits: bool, wanted: str) -> None:
        if not suits:
            raise DataError(f"{self.place}: {name} is of type {self._type(name)}, expected {wanted}")

    def _encoded(self, name: str) -> pa.DictionaryArray:
        """Encode parts one by one, so that the strings of all rows are never there at once."""
        encoded = _guarded(self.place, lambda: [_as_strings(chunk) for chunk in self._chunks(name)])
        return pa.chunked_array(encoded, ID_TYPE).unify_dictionaries().combine_chunks()

    def _chunks(self, name: str) -> list[pa.Array]:
        return _guarded(self.place, lambda: [batch.column(0) for batch in self.data.to_batches(columns=[name])])

    def _column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array(self._chunks(name), self._type(name))

    def _whole(self, name: str) -> pa.ChunkedArray:
        """Return a column that must not have nulls."""
        column = self._column(name)
        if column.null_count:
            row = pc.index(column.is_null(), value=True).as_py()
            raise DataError(f"{self.place} row {row}: {name} is null ({column.null_count} such rows)")
        return column


def _guarded(place: Path, read: Callable[[], Read]) -> Read:
    try:
        return read()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{place}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, whether they are encoded by a dictionary or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _as_strings(chunk: pa.Array) -> pa.DictionaryArray:
    encoded = chunk if isinstance(chunk, pa.DictionaryArray) else chunk.dictionary_encode()
    encoded.dictionary.validate(full=True)  # strings must be UTF-8
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int32()), encoded.dictionary.cast(pa.string()))
