"""Files with one record a line (JSON, Python literals or CSV), plain or gzip, of any size.

One line is in memory at a time. Rows are counted as lines, from 1; a CSV header is row 1.
"""

import ast
import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchrec_em3.errors import DataError

__all__ = [
    "MAX_LINE_BYTES",
    "Record",
    "bare_name",
    "decode_line",
    "is_utf8",
    "read_lines",
    "read_object",
    "read_records",
]

MAX_LINE_BYTES = 16 << 20
"""Longest line that is read; a file without line breaks would otherwise be read whole."""

_MAX_JSON_BYTES = 1 << 30

Record = dict[str, Any]


def bare_name(path: Path) -> str:
    """Return the file's name without a `.gz` behind it."""
    return path.name.removesuffix(".gz")


def read_records(path: Path, names: tuple[str, ...] = ()) -> Iterator[tuple[int, Record]]:
    """Yield row and fields of each record; empty lines are passed over.

    Args:
        path: `*.csv` is CSV, any other name one JSON object a line, or one Python dict of literals a line, which is
            read as data and never executed. A name that ends in `.gz` is decompressed.
        names: Names of the fields of a CSV file without header; empty where row 1 names them.

    Raises:
        DataError: With file and row, if the file is unreadable or truncated, or a line is too long or malformed.
    """
    if bare_name(path).endswith(".csv"):
        yield from _read_csv(path, names)
        return
    for row, line in read_lines(path):
        yield row, _parse(path, row, line)


def read_lines(path: Path, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield row and bytes of each line that is not empty.

    Raises:
        DataError: With file and row, if the file is unreadable or truncated, or a line is too long.
    """
    row = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(max_line_bytes + 1):
                row += 1
                if len(line) > max_line_bytes:
                    raise DataError(f"{path} row {row}: longer than {max_line_bytes} bytes; expected one record a line")
                if not line.isspace():
                    yield row, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip data is truncated or damaged after row {row} ({error}); fetch the file again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_object(path: Path) -> Record:
    """Return the one JSON object that a file holds.

    Raises:
        DataError: If the file is unreadable, truncated or holds something else.
    """
    text = "".join(decode_line(path, row, line) for row, line in read_lines(path, _MAX_JSON_BYTES))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({' '.join(str(error).split())[:80]})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def decode_line(path: Path, row: int, line: bytes) -> str:
    """Return the text of a line; DataError with file and row if it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} row {row}: not UTF-8 text ({error.reason})") from error


def is_utf8(text: str) -> bool:
    """Return whether a string can be written; JSON may hold half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(path: Path, row: int, line: bytes) -> Record:
    # Python writes a dict with single quotes, which JSON knows nothing of.
    literal = line.lstrip().startswith(b"{'")
    try:
        record = ast.literal_eval(line.decode().strip()) if literal else json.loads(line)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        kind = "a Python dict of literals" if literal else "a JSON object"
        raise DataError(f"{path} row {row}: not {kind} ({_reason(error)})") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} row {row}: holds a {type(record).__name__}, expected an object with fields")
    return record


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return " ".join(str(error).split())[:80] or type(error).__name__


def _read_csv(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, Record]]:
    row = 0

    def decode() -> Iterator[str]:
        nonlocal row
        for number, line in read_lines(path):
            row = number
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} row {number}: not UTF-8 text ({error.reason})") from error

    try:
        for fields in csv.reader(decode(), strict=True):
            if not names:
                names = tuple(field.strip() for field in fields)
            elif len(fields) != len(names):
                raise DataError(f"{path} row {row}: {len(fields)} fields, expected {len(names)} ({', '.join(names)})")
            else:
                yield row, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} row {row}: not CSV ({error})") from error
