"""Files of semantic codes, as papers and quantisers write them.

A code is a number, or a number with its level's letter, `<a_170>`: level a is the first, in either case of letters.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_em3.datasets.raw import RawCodes
from torchrec_em3.datasets.records import bare_name, read_object
from torchrec_em3.datasets.sequences import read_numbers
from torchrec_em3.errors import ConfigError, DataError

__all__ = ["find_codes", "name_codes", "read_codes"]

_LETTERED = re.compile(r"<([A-Za-z])_(\d{1,9})>")
_INDEX_FILE = re.compile(r".+\.index_([a-z][a-z0-9_]*)\.json")

logger = logging.getLogger(__name__)


def name_codes(text: str, source: Path) -> dict[str, Path]:
    """Read `NAME=FILE,NAME=FILE`; files are paths or within `source`.

    Raises:
        ConfigError: If it does not read so, or a name is there twice.
    """
    found: dict[str, Path] = {}
    for part in filter(None, text.split(",")):
        name, _, file = (piece.strip() for piece in part.partition("="))
        if not name or not file or name in found:
            raise ConfigError(f"--codes {text} must be NAME=FILE with commas between, each name once")
        found[name] = source / file
    return found


def find_codes(source: Path) -> dict[str, Path]:
    """Return the files `*.index_NAME.json` of a folder (plain or .gz) by NAME, as MQL4GRec publishes codes."""
    matches = ((path, _INDEX_FILE.fullmatch(bare_name(path))) for path in sorted(source.glob("*.index_*.json*")))
    return {match.group(1): path for path, match in matches if match}


def read_codes(path: Path) -> RawCodes:
    """Read a file of codes by item.

    Args:
        path: `*.parquet` with the columns `item_id` (string) and `codes` (list of integers), or a JSON object of lists
            by item id (plain or .gz). Where the folder holds a file `*.item2id`, the keys of a JSON object with
            lettered codes are numbers that it turns into ids.

    Raises:
        DataError: With file and item, if the file is unreadable or an entry is not a list of codes.
    """
    entries = _read_parquet(path) if path.suffix == ".parquet" else read_object(path).items()
    id_of = {} if path.suffix == ".parquet" else read_numbers(path.parent, "item")
    found: dict[str, Sequence[int]] = {}
    for key, value in entries:
        codes, lettered = _parse(value, f"{path} item {key[:40]}")
        if lettered and id_of and key not in id_of:
            raise DataError(f"{path} item {key[:40]}: the number is not in *.item2id of {path.parent}")
        item = id_of.get(key, key) if lettered else key
        if item in found:
            raise DataError(f"{path} item {key[:40]}: is there twice; keep one")
        found[item] = codes
    if not found:
        raise DataError(f"{path}: the file holds no items")
    logger.info("%s: codes of %d items", path, len(found))
    return RawCodes(bare_name(path), found)


def _parse(value: Any, where: str) -> tuple[Sequence[int], bool]:
    """Return the numbers, and whether they bore letters."""
    if isinstance(value, list) and value:
        if all(isinstance(code, int) and not isinstance(code, bool) for code in value):
            return value, False
        if all(isinstance(code, str) for code in value):
            return [_number(code, level, where) for level, code in enumerate(value)], True
    raise DataError(f"{where}: holds {str(value)[:40]}, expected a list of codes such as [170, 224] or ['<a_170>']")


def _number(code: str, level: int, where: str) -> int:
    match = _LETTERED.fullmatch(code)
    letter = chr(ord("a") + level)
    if match is None or match.group(1).lower() != letter:
        raise DataError(f"{where}: code {code[:40]} at level {level}, expected <{letter}_NUMBER>")
    return int(match.group(2))


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.read_table(path, columns=["item_id", "codes"])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if table.column_names != ["item_id", "codes"]:
        raise DataError(f"{path}: needs the columns item_id and codes, found {', '.join(table.column_names) or 'none'}")
    for key, value in zip(table["item_id"].to_pylist(), table["codes"].to_pylist(), strict=True):
        yield str(key), value
