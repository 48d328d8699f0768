"""Whether a package scores as the trained model does, measured on the whole validation split by raw ids."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import NumericError
from torchrec_em3.evaluate import predict, refresh_bank
from torchrec_em3.metrics import ranking_metrics
from torchrec_em3.process_group import Ranks
from torchrec_em3.serving.rows import Precision
from torchrec_em3.serving.scorer import Request, Scorer
from torchrec_em3.trained_run import TrainedRun

__all__ = ["MAX_AUC_CHANGE", "MAX_LOGIT_CHANGE", "Parity", "measure_parity", "split_requests"]

MAX_LOGIT_CHANGE = 1e-5
"""Largest change of a logit of a float32 package, absolute up to a logit of 1 and relative beyond."""
MAX_AUC_CHANGE = 1e-3
"""Largest change of the AUC of a package of a lower precision."""
ROWS_AT_A_TIME = 4096


class Parity(NamedTuple):
    """How a package's logits compare with the model's on the validation split.

    Attributes:
        rows: Rows compared.
        max_logit_change: Largest difference of two logits.
        auc: AUC of the model; None where it is undefined.
        package_auc: AUC of the package.
    """

    rows: int
    max_logit_change: float
    auc: float | None
    package_auc: float | None


def measure_parity(scorer: Scorer, trained: TrainedRun, precision: Precision, ranks: Ranks) -> Parity:
    """Score the validation split by the model and by the package.

    Raises:
        NumericError: If the two differ by more than the limits above.
    """
    refresh_bank(trained.sharded, ranks)
    expected = predict(trained.sharded, trained.data, "validation", trained.config, ranks)
    trained.sharded.module.eval()
    assert expected is not None, "a single process is rank 0"
    parts = [scorer.logits(part) for part in split_requests(trained.data, "validation", scorer.config.max_history)]
    logit = np.concatenate([logit for part in parts for logit in part])
    auc, package_auc = (_auc(expected.label, each) for each in (expected.logit, logit))
    change = np.abs(logit - expected.logit)
    parity = Parity(len(logit), float(change.max()), auc, package_auc)
    if precision == "fp32":
        excess = change / np.maximum(1.0, np.abs(expected.logit))
        if not excess.max() <= MAX_LOGIT_CHANGE:
            raise NumericError(
                f"the fp32 package changes the logit of validation row {excess.argmax()} from "
                f"{expected.logit[excess.argmax()]} to {logit[excess.argmax()]}, more than {MAX_LOGIT_CHANGE} allows; "
                "nothing was written"
            )
    elif auc is None or package_auc is None:
        raise NumericError("the validation split has one label only, so the change of AUC is undefined; use fp32")
    elif not abs(package_auc - auc) <= MAX_AUC_CHANGE:
        raise NumericError(
            f"the {precision} package changes the validation AUC from {auc:.5f} to {package_auc:.5f}, more than the "
            f"{MAX_AUC_CHANGE} allowed; nothing was written; use a higher --precision"
        )
    return parity


def split_requests(data: PreparedData, split: Any, max_history: int) -> Iterator[list[Request]]:
    """Yield the rows of a split as requests of one candidate, some at a time and in the split's order."""
    columns = data.split_rows(split)
    items, users = (np.array(table["raw_id"].to_pylist(), dtype=object) for table in (data.items, data.users))
    first = np.maximum(data.history_offsets[columns["user"]], columns["history_end"] - max_history)
    for start in range(0, len(first), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        rows = zip(columns["user"][part], columns["item"][part], first[part], columns["history_end"][part], strict=True)
        yield [
            Request(users[user], items[data.history_items[begin:end]].tolist(), [items[item]])
            for user, item, begin, end in rows
        ]


def _auc(label: NDArray, logit: NDArray) -> float | None:
    return ranking_metrics(label, logit)["auc"]
