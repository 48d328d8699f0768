"""Scores the rows of a Parquet file."""

import os
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_em3.errors import DataError
from torchrec_em3.serving.scorer import Request, Scorer

__all__ = ["score_file"]

ROWS_AT_A_TIME = 16_384
ROWS_A_REQUEST = 1024
"""Rows of one user and history that are scored as the candidates of one request."""
SCORE = "score"


def score_file(scorer: Scorer, source: Path, target: Path) -> int:
    """Write the columns of `source` and the score of each row; return the number of rows.

    `score` is that of the main task; where the package has several, `score_NAME` is that of each other.

    Columns are `user`, `item` (strings or integers), `history` (a list of them, most recent last) and, if wanted, the
    user's side features and sparse and dense features of the request. Rows that follow each other and differ in nothing
    but the item share the work of the history.

    Args:
        scorer: The package.
        source: Parquet file; read some rows at a time.
        target: Parquet file to write, as a whole or not at all.

    Raises:
        DataError: If a file cannot be read or written, or a column or a row is not as described.
    """
    temporary = target.with_name(f".{target.name}.tmp")
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
        temporary.unlink(missing_ok=True)
    return rows


def _checked(source: Path, schema: pa.Schema, scorer: Scorer) -> pa.Schema:
    """Return the schema of what is written."""
    categories, numbers = _feature_columns(scorer, schema)
    for name in ("user", "history", "item", *categories, *numbers):
        if schema.names.count(name) != 1:
            raise DataError(f"{source}: {schema.names.count(name)} columns '{name}', expected 1; {_columns(schema)}")
        found = schema.field(name).type
        if name == "history":
            inner = found.value_type if pa.types.is_list(found) or pa.types.is_large_list(found) else None
            if inner is None or not _is_id(inner):
                raise DataError(f"{source}: column 'history' is {found}, expected a list of strings or integers")
        elif name in numbers:
            if not (pa.types.is_integer(found) or pa.types.is_floating(found)):
                raise DataError(f"{source}: column '{name}' is {found}, expected a number")
        elif not _is_id(found):
            raise DataError(f"{source}: column '{name}' is {found}, expected strings or integers")
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
    return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_integer(found)


def _columns(schema: pa.Schema) -> str:
    return f"columns: {', '.join(schema.names) or 'none'}"


def _score(scorer: Scorer, source: Path, batch: pa.RecordBatch, first_row: int) -> list[pa.Array]:
    """Return the columns of `_score_columns`."""
    requests = []
    rows = _keyed_rows(scorer, source, batch, first_row)
    for (user, history, features, dense), group in groupby(rows, lambda row: row[0]):
        items = [item for _, item in group]
        for start in range(0, len(items), ROWS_A_REQUEST):
            part = items[start : start + ROWS_A_REQUEST]
            requests.append(Request(user, history, part, dict(features), dict(dense)))
    score_B = np.concatenate(scorer.score(requests))
    return [pa.array(column_B, pa.float32()) for column_B in score_B.reshape(len(batch), -1).T]


def _keyed_rows(
    scorer: Scorer, source: Path, batch: pa.RecordBatch, first_row: int
) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yield user, history, categorical and dense features of each row, and its item; all but the numbers as text."""
    categories, numbers = _feature_columns(scorer, batch.schema)
    columns = [batch.column(name).to_pylist() for name in ("user", "history", "item", *categories, *numbers)]
    for row, (user, history, item, *values) in enumerate(zip(*columns, strict=True), start=first_row):
        if user is None or item is None or history is None or None in history:
            wrong = "user" if user is None else "item" if item is None else "history"
            raise DataError(f"{source} row {row}: {wrong} is null or holds a null; fill it or drop the row")
        features = _given(categories, values[: len(categories)], str)
        dense = _given(numbers, values[len(categories) :], float)
        yield (str(user), tuple(map(str, history)), features, dense), str(item)


def _given(names: list[str], values: list[Any], as_type: Callable[[Any], Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, as_type(value)) for name, value in zip(names, values, strict=True) if value is not None)
