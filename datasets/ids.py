"""Ids as numbers: each distinct id is kept once, and an event is an int32, so that many events fit in memory.

Shape letters: E events, V distinct ids.
"""

from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from torchrec_em3.errors import DataError

__all__ = [
    "ID_TYPE",
    "IdNumbers",
    "Ids",
    "arrow_strings",
    "check_distinct",
    "count_codes",
    "encode_ids",
    "ids_from_codes",
    "look_up",
    "to_dictionary",
]

Ids: TypeAlias = np.ndarray | pa.DictionaryArray
"""Ids of events: strings, or distinct strings and the position of each event's among them."""

ID_TYPE = pa.dictionary(pa.int32(), pa.string())
"""Type of an arrow array of ids."""
# Entries that are converted or looked up at a time: numpy and arrow both copy what they index by.
_CHUNK = 1 << 20


class IdNumbers:
    """Ids as they come from a file, numbered in order of appearance."""

    def __init__(self) -> None:
        """Know no id."""
        self._number_of: dict[str, int] = {}
        self._numbers = array("i")

    def add(self, value: str) -> None:
        """Append an id."""
        self._numbers.append(self._number_of.setdefault(value, len(self._number_of)))

    @property
    def numbers(self) -> np.ndarray:
        """Number of each id that was added, int32 [E]; a view, so nothing can be added while it is in use."""
        return np.frombuffer(self._numbers, dtype=np.int32)

    @property
    def values(self) -> np.ndarray:
        """The distinct ids by number, str [V]."""
        return np.array(list(self._number_of), dtype=object)

    def encoded(self) -> pa.DictionaryArray:
        """Return the ids in the order in which they were added."""
        return ids_from_codes(self.numbers, self.values)


def check_distinct(ids: Iterable[str | None], place: Path, name: str, first_row: int) -> None:
    """Check the ids of a table in which each stands once.

    Args:
        ids: The ids.
        place: The table, for the messages.
        name: The column.
        first_row: Number of the first row in the table.

    Raises:
        DataError: With table and row, if an id is null, empty or there already.
    """
    row_of: dict[str, int] = {}
    for row, value in enumerate(ids, first_row):
        if not value:
            raise DataError(f"{place} row {row}: {name} is {'null' if value is None else 'empty'}")
        if value in row_of:
            raise DataError(f"{place} row {row}: {name} '{value}' stands in row {row_of[value]} already; keep one")
        row_of[value] = row


def ids_from_codes(code_E: np.ndarray, values_V: np.ndarray) -> pa.DictionaryArray:
    """Return the ids whose positions among distinct ids are given (int32), without a copy of the positions."""
    return pa.DictionaryArray.from_arrays(pa.array(code_E), arrow_strings(values_V))


def arrow_strings(ids: np.ndarray) -> pa.Array:
    """Return an array of str as one arrow array; pyarrow itself splits large ones."""
    array = pa.array(ids, type=pa.string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def to_dictionary(ids: Ids) -> pa.DictionaryArray:
    """Return ids as distinct strings and int32 positions; what has that form already is returned as it is."""
    if isinstance(ids, pa.DictionaryArray):
        return ids if ids.type == ID_TYPE else ids.cast(ID_TYPE)
    starts = range(0, max(len(ids), 1), _CHUNK)
    chunks = [arrow_strings(ids[start : start + _CHUNK]).dictionary_encode() for start in starts]
    return pa.chunked_array(chunks).unify_dictionaries().combine_chunks()


def encode_ids(ids: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct ids in string order and, for each entry of `ids`, its position among them (int32)."""
    encoded = to_dictionary(ids)
    code_E = encoded.indices.to_numpy()
    values_V = np.asarray(encoded.dictionary.to_pylist(), dtype=str)
    order = np.argsort(values_V, kind="stable")
    order = order[count_codes(code_E, len(values_V))[order] > 0]
    # A dictionary that is given may say a thing twice.
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = values_V[order[1:]] != values_V[order[:-1]]
    position_V = np.zeros(len(values_V), dtype=np.int32)
    position_V[order] = np.cumsum(is_new) - 1
    if len(order) == len(values_V) and np.array_equal(position_V, np.arange(len(values_V))):
        return values_V, code_E
    return values_V[order[is_new]], look_up(position_V, code_E)


def count_codes(code_E: np.ndarray, size: int) -> np.ndarray:
    """Return how often each of 0..size - 1 stands among the codes, int64 [size]."""
    counts = np.zeros(size, dtype=np.int64)
    for start in range(0, len(code_E), _CHUNK):
        counts += np.bincount(code_E[start : start + _CHUNK], minlength=size)
    return counts


def look_up(values: np.ndarray, code_E: np.ndarray) -> np.ndarray:
    """Return `values[code_E]` without a copy of all codes as int64, which numpy makes."""
    found_E = np.empty(len(code_E), dtype=values.dtype)
    for start in range(0, len(code_E), _CHUNK):
        found_E[start : start + _CHUNK] = values[code_E[start : start + _CHUNK]]
    return found_E
