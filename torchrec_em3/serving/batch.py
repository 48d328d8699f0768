"""Scores the rows of a Parquet file."""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_em3.errors import DataError
from torchrec_em3.serving.scorer import Request, RequestError, Scorer

__all__ = ["score_file"]

ROWS_AT_A_TIME = 16_384
ROWS_A_REQUEST = 1024
"""Rows of one user and history that are scored as the candidates of one request."""
SCORE = "score"


def score_file(scorer: Scorer, source: Path, target: Path) -> int:
    """Write the columns of `source` and the score of each row; return the number of rows.

    `score` is that of the main task; where the package has several, `score_NAME` is that of each other.

    Columns are `user`, `item` (strings or integers), `history` (a list of them, most recent last) and, if wanted, the
    user's side features and sparse features of the request (truth values, too), and dense ones. Rows that follow each
    other and differ in nothing but the item share the work of the history.

    Args:
        scorer: The package.
        source: Parquet file; read some rows at a time.
        target: Parquet file to write, as a whole or not at all.

    Raises:
        DataError: If a file cannot be read or written, or a column or a row is not as described.
    """
    temporary = target.parent / f".{target.name}.tmp"
    try:
        with pq.ParquetFile(source) as file:
            schema = _checked(source, file.schema_arrow, scorer)
            rows = 0
            with pq.ParquetWriter(temporary, schema) as writer:
                for batch in file.iter_batches(ROWS_AT_A_TIME):
                    scores = _score(scorer, source, batch, rows)
                    writer.write_table(pa.table([*batch.columns, *scores], schema=schema))
                    rows += len(batch)
        os.replace(temporary, target)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source} to {target}: {str(error).splitlines()[0]}") from error
    finally:
        # It cannot be where no file can be, and what was raised says so already.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return rows


def _checked(source: Path, schema: pa.Schema, scorer: Scorer) -> pa.Schema:
    """Return the schema of what is written."""
    categories, numbers = _feature_columns(scorer, schema)
    ids = (_is_id, "strings or integers")
    wanted = {"user": ids, "history": (_is_history, "a list of strings or integers"), "item": ids}
    wanted |= dict.fromkeys(categories, (_is_category, "strings, integers or truth values"))
    wanted |= dict.fromkeys(numbers, (_is_number, "a number"))
    for name, (suits, described) in wanted.items():
        if schema.names.count(name) != 1:
            raise DataError(f"{source}: {schema.names.count(name)} columns '{name}', expected 1; {_columns(schema)}")
        found = schema.field(name).type
        # Which type a column of nulls was meant to have, its writer could not know.
        if not (pa.types.is_null(found) or suits(found)):
            raise DataError(f"{source}: column '{name}' is {found}, expected {described}")
    for name in _score_columns(scorer):
        if name in schema.names:
            raise DataError(f"{source}: has a column '{name}' already; drop or rename it")
        schema = schema.append(pa.field(name, pa.float32()))
    return schema


def _score_columns(scorer: Scorer) -> list[str]:
    """Name the columns that are written: the main task's and those of the others."""
    return [SCORE, *(f"{SCORE}_{task}" for task in scorer.config.tasks[1:])]


def _feature_columns(scorer: Scorer, schema: pa.Schema) -> tuple[list[str], list[str]]:
    """Return which categorical and which dense features are there."""
    numbers = [feature.name for feature in scorer.config.dense if feature.name in schema.names]
    return [name for name in scorer.config.given_features if name in schema.names], numbers


def _is_id(found: pa.DataType) -> bool:
    plain = _decoded(found)
    is_text = pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)
    return is_text or pa.types.is_integer(plain)


def _is_category(found: pa.DataType) -> bool:
    return _is_id(found) or pa.types.is_boolean(_decoded(found))


def _is_history(found: pa.DataType) -> bool:
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    return is_list and (pa.types.is_null(found.value_type) or _is_id(found.value_type))


def _is_number(found: pa.DataType) -> bool:
    return pa.types.is_integer(found) or pa.types.is_floating(found)


def _decoded(found: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, whether they are encoded by a dictionary or not."""
    return found.value_type if pa.types.is_dictionary(found) else found


def _columns(schema: pa.Schema) -> str:
    return f"columns: {', '.join(schema.names) or 'none'}"


def _score(scorer: Scorer, source: Path, batch: pa.RecordBatch, first_row: int) -> list[pa.Array]:
    """Return the columns of `_score_columns`."""
    requests, row_of = [], []
    rows = _keyed_rows(source, batch, first_row, *_feature_columns(scorer, batch.schema))
    row = first_row
    for (user, history, features, dense), group in groupby(rows, lambda row: row[0]):
        items = [item for _, item in group]
        for start in range(0, len(items), ROWS_A_REQUEST):
            part = items[start : start + ROWS_A_REQUEST]
            requests.append(Request(user, history, part, dict(features), dict(dense)))
            row_of.append(row)
            row += len(part)
    try:
        score_B = np.concatenate(scorer.score(requests))
    except RequestError as error:
        raise DataError(f"{source} row {row_of[error.place]}: {error.reason}") from error
    return [pa.array(column_B, pa.float32()) for column_B in score_B.reshape(len(batch), -1).T]


def _keyed_rows(
    source: Path, batch: pa.RecordBatch, first_row: int, categories: list[str], numbers: list[str]
) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield user, history, categorical and dense features of each row, and its item; all but the numbers as text."""
    types = {"history": pa.list_(pa.string()), **dict.fromkeys(numbers, pa.float64())}
    names = ("user", "history", "item", *categories, *numbers)
    columns = [batch.column(name).cast(types.get(name, pa.string()), safe=False).to_pylist() for name in names]
    for row, (user, history, item, *values) in enumerate(zip(*columns, strict=True), start=first_row):
        if user is None or item is None or history is None or None in history:
            wrong = "user" if user is None else "item" if item is None else "history"
            raise DataError(f"{source} row {row}: {wrong} is null or holds a null; fill it or drop the row")
        features, dense = _given(categories, values[: len(categories)]), _given(numbers, values[len(categories) :])
        yield (user, tuple(history), features, dense), item


def _given(names: list[str], values: list[Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in zip(names, values, strict=True) if value is not None)
