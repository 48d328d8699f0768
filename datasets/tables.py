"""Delimited text files into typed columns, where every complaint names the file, the row and the field.

Rows are counted as a person would: from 1, a header being row 1. (Only where quoted fields contain line breaks is that
not the line number.)
"""

import csv
import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from torchrec_em3.errors import DataError
from torchrec_em3.registry import closest

__all__ = ["Layout", "column_names", "find_file", "first_line", "read_table", "text_column"]

# Stands in for a delimiter of several characters ("::"), which pyarrow cannot split at. Not printable, so in no title.
_ONE_BYTE_DELIMITER = "\x1f"
_INTEGER = r"^[+-]?[0-9]{1,18}$"
_DECIMAL = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"


@dataclass(frozen=True)
class Layout:
    """How one kind of file lays out its fields.

    Attributes:
        delimiter: Between fields; may have several characters.
        names: Names of the fields in order, for files without a header; empty where the first row is the header.
        renames: Name used here by the header's name, for publishers who say `userId`.
        quoted: Fields may stand in double quotes and then contain delimiters and line breaks.
        latin1: Bytes that are not UTF-8 are Latin-1; otherwise they are an error.
        typed_header: The header says `name:type` (RecBole); the type is dropped.
    """

    delimiter: str
    names: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    quoted: bool = False
    latin1: bool = False
    typed_header: bool = False


def find_file(folder: Path, pattern: str) -> Path | None:
    """Return the first file of `folder` that matches `pattern`, else the first that matches `pattern.gz`, else None."""
    for name in (pattern, f"{pattern}.gz"):
        for path in sorted(folder.glob(name)):
            if path.is_file():
                return path
    return None


def column_names(path: Path, layout: Layout) -> tuple[str, ...]:
    """Return the names of the file's columns as `read_table` knows them.

    Raises:
        DataError: If the file cannot be read or decompressed.
    """
    return layout.names or _header(layout, _read_bytes(path, limit=1 << 16))


def first_line(path: Path) -> str:
    """Return the first line of a plain or gzip file, at most 64 kB of it, without its line break.

    Raises:
        DataError: If the file cannot be read or decompressed.
    """
    return _read_bytes(path, limit=1 << 16).partition(b"\n")[0].rstrip(b"\r").decode("latin-1")


def read_table(
    path: Path, layout: Layout, types: Mapping[str, pa.DataType], *, known: tuple[str, ...] | None = ()
) -> pa.Table:
    """Read the columns named in `types` from a plain or gzip file.

    Args:
        path: The file; a name that ends in `.gz` is decompressed.
        layout: How its fields lie.
        types: Wanted columns, all of which must be there: string, integer or floating-point.
        known: Further columns that may be there and are left out. None allows any.

    Returns:
        One column for each key of `types`, in that order, without nulls, at least one row.

    Raises:
        DataError: If the file is unreadable, truncated or empty, a column is missing, repeated or unknown, a row has
            another number of fields, or a field cannot be converted.
    """
    data = _read_bytes(path).rstrip(b"\r\n") + b"\n"
    if layout.latin1:
        data = _to_utf8(data)
    names = layout.names or _header(layout, data)
    _check_names(path, names, types, known)
    skip = 0 if layout.names else 1
    try:
        table = _parse(path, layout, data, names, skip, types)
    except pa.ArrowInvalid as error:
        raise _explain(path, layout, data, names, skip, types, error) from error
    if table.num_rows == 0:
        raise DataError(f"{path}: the file holds no rows; expected {', '.join(types)} in each")
    return table


def text_column(table: pa.Table, name: str) -> pa.DictionaryArray:
    """Return a string column as distinct strings and positions."""
    return table[name].dictionary_encode().unify_dictionaries().combine_chunks()


def _read_bytes(path: Path, limit: int = -1) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is truncated or damaged ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _to_utf8(data: bytes) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1").encode()
    return data


def _header(layout: Layout, data: bytes) -> tuple[str, ...]:
    line = data.partition(b"\n")[0].rstrip(b"\r").removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
    fields = next(csv.reader([line]), []) if layout.quoted and layout.delimiter == "," else line.split(layout.delimiter)
    renames = dict(layout.renames)
    plain = [field.strip().partition(":")[0] if layout.typed_header else field.strip() for field in fields]
    return tuple(renames.get(name, name) for name in plain)


def _check_names(
    path: Path, names: tuple[str, ...], wanted: Mapping[str, pa.DataType], known: tuple[str, ...] | None
) -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(
            f"{path} row 1: column '{min(repeated)}' stands there {names.count(min(repeated))} times; keep one"
        )
    for name in wanted:
        if name not in names:
            hint = closest(name, [found for found in names if found not in wanted])
            raise DataError(f"{path} row 1: no column '{name}' among {', '.join(names)}.{hint}")
    if known is None:
        return
    expected = [*wanted, *known]
    for name in names:
        if name not in expected:
            hint = closest(name, expected)
            raise DataError(f"{path} row 1: unknown column '{name}'; known: {', '.join(expected)}.{hint}")


def _parse(
    path: Path, layout: Layout, data: bytes, names: tuple[str, ...], skip: int, types: Mapping[str, pa.DataType]
) -> pa.Table:
    wrong: list[pa_csv.InvalidRow] = []

    def keep_first(row: pa_csv.InvalidRow) -> str:
        wrong.append(row)
        return "error" if len(wrong) > 1 else "skip"

    delimiter = layout.delimiter
    if len(delimiter) > 1:
        data = data.replace(delimiter.encode(), _ONE_BYTE_DELIMITER.encode())
        delimiter = _ONE_BYTE_DELIMITER
    # One thread, because pyarrow numbers rows only then; one block where it fits, because no field may be longer.
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            pa_csv.ReadOptions(
                use_threads=False, block_size=min(len(data) + 1, 1 << 28), skip_rows=skip, column_names=list(names)
            ),
            pa_csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if layout.quoted else False,
                newlines_in_values=layout.quoted,
                ignore_empty_lines=False,
                invalid_row_handler=keep_first,
            ),
            pa_csv.ConvertOptions(null_values=[], column_types=dict(types), include_columns=list(types)),
        )
    except pa.ArrowInvalid:
        if not wrong:
            raise
    if wrong:
        row = wrong[0]
        raise DataError(
            f"{path} row {row.number}: {row.actual_columns} fields, expected {len(names)} ({', '.join(names)})"
        )
    return table


def _explain(
    path: Path,
    layout: Layout,
    data: bytes,
    names: tuple[str, ...],
    skip: int,
    types: Mapping[str, pa.DataType],
    error: pa.ArrowInvalid,
) -> DataError:
    """Find the first field that cannot be converted: the slow road, taken only once something is wrong."""
    raw = _parse(path, layout, data, names, skip, dict.fromkeys(types, pa.binary()))
    for name, wanted in types.items():
        if pa.types.is_string(wanted):
            good = np.array([_is_utf8(value) for value in raw[name].to_pylist()])
            kind = "UTF-8 text"
        else:
            integer = pa.types.is_integer(wanted)
            kind = "a whole number" if integer else "a number"
            good = pc.match_substring_regex(raw[name], _INTEGER if integer else _DECIMAL).to_numpy()
        if not good.all():
            row = int(np.argmin(good))
            value = raw[name][row].as_py().decode(errors="replace")
            shown = repr(value[:40]) if value else "empty"
            return DataError(f"{path} row {row + skip + 1}: {name} is {shown}, which is not {kind}")
    return DataError(f"{path}: {str(error).splitlines()[0]}")


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
