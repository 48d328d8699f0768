"""Whether an export scores as the trained model does, on the whole validation split; a package is asked by raw ids.

Shape letters: B rows of the split, T tasks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.datasets.event_features import dense_column, sparse_column
from torchrec_em3.datasets.prepared import PreparedData, Split
from torchrec_em3.errors import NumericError
from torchrec_em3.evaluate import Predictions, predict, refresh_bank
from torchrec_em3.export_tables import CatalogueContent
from torchrec_em3.metrics import ranking_metrics
from torchrec_em3.process_group import Ranks
from torchrec_em3.serving.rows import Precision
from torchrec_em3.serving.scorer import Request, Scorer
from torchrec_em3.tier_edges import rows_at_tier_edges
from torchrec_em3.trained_run import TrainedRun

__all__ = ["Parity", "compare", "measure_parity", "model_predictions", "split_requests"]

MAX_LOGIT_CHANGE = 1e-5
"""Largest change of a logit of a float32 export, absolute up to a logit of 1 and relative beyond."""
MAX_AUC_CHANGE = 1e-3
"""Largest change of the AUC of a package of a lower precision."""
ROWS_AT_A_TIME = 4096


class Parity(NamedTuple):
    """How a package's logits compare with the model's on the validation split.

    Attributes:
        rows: Rows compared.
        max_logit_change: Largest difference of two logits.
        auc: AUC of the model, for the main task; None where it is undefined.
        package_auc: AUC of the package.
        exempt: Rows left out of `max_logit_change` (see `tier_edges`).
    """

    rows: int
    max_logit_change: float
    auc: float | None
    package_auc: float | None
    exempt: int = 0


def measure_parity(scorer: Scorer, trained: TrainedRun, content: CatalogueContent | None, ranks: Ranks) -> Parity:
    """Score the validation split by the model and by the package.

    Args:
        scorer: The package.
        trained: The run that it was made of.
        content: Content of the catalogue, if the model has any.
        ranks: A single process.

    Raises:
        NumericError: If the two differ by more than the limits above.
    """
    expected = model_predictions(trained, ranks)
    parts = [scorer.logits(part) for part in split_requests(trained.data, "validation", scorer.config.max_history)]
    logit_B = np.concatenate([logit for part in parts for logit in part])
    return compare(logit_B, expected, scorer.config.precision, rows_at_tier_edges(trained, content))


def model_predictions(trained: TrainedRun, ranks: Ranks) -> Predictions:
    """Score the validation split as `em3 evaluate` does, with one process; refreshes the content bank."""
    refresh_bank(trained.sharded, ranks)
    predictions = predict(trained.sharded, trained.data, "validation", trained.config, ranks)
    trained.sharded.module.eval()
    assert predictions is not None, "a single process is rank 0"
    return predictions


def compare(logit_B: NDArray, expected: Predictions, precision: Precision, exempt_B: NDArray[np.bool_]) -> Parity:
    """Return how `logit_B`, or logit_BT for several tasks, compares with the model's predictions.

    Args:
        logit_B: Logits of the export.
        expected: The model's predictions.
        precision: Of the export; float32 is compared by logits, any other by AUC.
        exempt_B: Rows of which no logit is compared (see `tier_edges`); the AUC is, if there are any.

    Raises:
        NumericError: If the two differ by more than the limits above.
    """
    logit_BT, expected_BT, label_BT = (x.reshape(len(x), -1) for x in (logit_B, expected.logit, expected.label))
    change_BT = np.abs(logit_BT - expected_BT)
    tasks = list(zip(label_BT.T, expected_BT.T, logit_BT.T, strict=True))
    aucs = [(_auc(label, of_model), _auc(label, of_export)) for label, of_model, of_export in tasks]
    if precision == "fp32":
        _check_logits(np.where(exempt_B[:, None], 0.0, change_BT), expected_BT, logit_BT)
    if precision != "fp32" or exempt_B.any():
        for auc, package_auc in aucs:
            _check_auc(auc, package_auc, precision)
    return Parity(len(logit_B), float(change_BT[~exempt_B].max(initial=0.0)), *aucs[0], int(exempt_B.sum()))


def _check_logits(change_BT: NDArray, expected_BT: NDArray, logit_BT: NDArray) -> None:
    excess_BT = change_BT / np.maximum(1.0, np.abs(expected_BT))
    place = np.unravel_index(int(excess_BT.argmax()), excess_BT.shape)
    if not excess_BT[place] <= MAX_LOGIT_CHANGE:
        raise NumericError(
            f"the export changes the logit of validation row {place[0]} from {expected_BT[place]} to "
            f"{logit_BT[place]}, more than {MAX_LOGIT_CHANGE} allows; nothing was written"
        )


def _check_auc(auc: float | None, package_auc: float | None, precision: Precision) -> None:
    if auc is None or package_auc is None:
        raise NumericError("the validation split has one label only, so the change of AUC is undefined; use fp32")
    if not abs(package_auc - auc) <= MAX_AUC_CHANGE:
        raise NumericError(
            f"the {precision} package changes the validation AUC from {auc:.5f} to {package_auc:.5f}, more than the "
            f"{MAX_AUC_CHANGE} allowed; nothing was written; use a higher --precision"
        )


def split_requests(data: PreparedData, split: Split, max_history: int) -> Iterator[list[Request]]:
    """Yield the rows of a split as requests of one candidate, some at a time and in the split's order."""
    columns = data.split_rows(split)
    items, users = (np.array(table["raw_id"].to_pylist(), dtype=object) for table in (data.items, data.users))
    dense = {feature.name: columns[dense_column(feature.name)] for feature in data.dense_features}
    sparse = {
        feature.name: np.array(data.vocabulary(feature.name), dtype=object)[columns[sparse_column(feature.name)]]
        for feature in data.sparse_features
    }
    first = np.maximum(data.history_offsets[columns["user"]], columns["history_end"] - max_history)
    for start in range(0, len(first), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        rows = zip(columns["user"][part], columns["item"][part], first[part], columns["history_end"][part], strict=True)
        yield [
            Request(
                users[user],
                items[data.history_items[begin:end]].tolist(),
                [items[item]],
                features={name: value[row] for name, value in sparse.items()},
                dense={name: float(value[row]) for name, value in dense.items()},
            )
            for row, (user, item, begin, end) in enumerate(rows, start)
        ]


def _auc(label: NDArray, logit: NDArray) -> float | None:
    return ranking_metrics(label, logit)["auc"]
