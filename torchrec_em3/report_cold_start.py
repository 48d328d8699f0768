"""The report's cold-start curve: how test AUC grows with the number of training rows that an item has.

Shape letters: n test rows, I items, R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.metrics import ranking_metrics
from torchrec_em3.plots import Line, line_chart
from torchrec_em3.run_record import Place, TestRows
from torchrec_em3.significance import same_rows
from torchrec_em3.variants import Variant
from torchrec_em3.verdict import small_slice

__all__ = ["RESAMPLES", "cold_start_curves", "resampled_aucs"]

BINS = ((0, 0), (1, 3), (4, 10), (11, 31), (32, 100), (101, 316), (317, 1000), (1001, None))
"""Least and largest number of training rows: no row at all, then half decades."""
RESAMPLES = 200
SEED = 0


def cold_start_curves(variants: Sequence[Variant], data: Mapping[str, PreparedData]) -> list[dict[str, Any]]:
    """Return a curve for each split of data that any variant has test predictions of.

    Args:
        variants: One line each. Where a variant has several seeds, their AUCs are averaged.
        data: Prepared folder by name of the run, for the training rows of items; may lack runs.

    Returns:
        For each place: `chart`; `legend`, names with their series; `rows`, each with the bin's `name`, the number of
        its `items` and test rows `n`, whether they are few, `small`, and a `cell` a variant: `auc`, `low`, `high`.
    """
    places: dict[Place, list[Variant]] = {}
    for variant in variants:
        places.setdefault(variant.place, []).append(variant)
    curves = (_curve(peers, data) for peers in places.values())
    return [curve for curve in curves if curve is not None]


def _curve(variants: Sequence[Variant], data: Mapping[str, PreparedData]) -> dict[str, Any] | None:
    kept = [(variant, _test_rows(variant, data)) for variant in variants]
    kept = [(variant, rows) for variant, rows in kept if rows]
    if not kept:
        return None
    folder = next(data[run.name] for run in kept[0][0].runs if run.name in data)
    rows: list[dict[str, Any]] = []
    for low, high in BINS:
        masks = [_in_bin(folder.item_train_count[runs[0].item], low, high) for _, runs in kept]
        n = int(masks[0].sum())
        if n:
            row = {"name": _name(low, high), "n": n, "small": small_slice(n)}
            row["items"] = len(np.unique(kept[0][1][0].item[masks[0]]))
            cells = [_cell(runs, mask_n) for (_, runs), mask_n in zip(kept, masks, strict=True)]
            rows.append(row | {"cells": cells})
    lines = [_line(variant.name, series, rows) for series, (variant, _) in enumerate(kept)]
    # Bins are named by where they begin: whole names would run into each other.
    ticks = [(float(place), row["name"].split("-")[0]) for place, row in enumerate(rows)]
    return {
        "chart": line_chart(lines, "training rows of the item, from", "test AUC", ticks),
        "legend": [(variant.name, len(runs)) for variant, runs in kept],
        "rows": rows,
    }


def _test_rows(variant: Variant, data: Mapping[str, PreparedData]) -> list[TestRows]:
    """Return the predictions of the variant's runs whose items the data knows, if they are of the same rows."""
    usable = [
        run.test_rows
        for run in variant.runs
        if run.test_rows is not None
        and run.name in data
        and run.test_rows.item.max(initial=0) < data[run.name].item_rows
    ]
    return [rows for rows in usable if same_rows(usable[0], rows)]


def _in_bin(count_n: NDArray[np.int64], low: int, high: int | None) -> NDArray[np.bool_]:
    mask_n: NDArray[np.bool_] = (count_n >= low) & (count_n <= (np.inf if high is None else high))
    return mask_n


def _name(low: int, high: int | None) -> str:
    if high is None:
        return f"{low}+"
    return str(low) if low == high else f"{low}-{high}"


def _cell(runs: Sequence[TestRows], mask_n: NDArray[np.bool_]) -> dict[str, float | None]:
    """Return the mean AUC of the runs in one bin, and the ends of its 95% interval over items."""
    item_n, label_n = runs[0].item[mask_n], runs[0].label[mask_n]
    aucs = [ranking_metrics(label_n, rows.logit[mask_n])["auc"] for rows in runs]
    found = [auc for auc in aucs if auc is not None]
    if not found:
        return {"auc": None, "low": None, "high": None}
    # Runs share their draws of items, so averaging them before taking quantiles keeps the interval one over items.
    resampled_R = np.mean([resampled_aucs(label_n, rows.logit[mask_n], item_n) for rows in runs], axis=0)
    defined_R = resampled_R[np.isfinite(resampled_R)]
    ends = np.quantile(defined_R, (0.025, 0.975)) if len(defined_R) > RESAMPLES // 2 else (None, None)
    return {"auc": float(np.mean(found)), "low": ends[0], "high": ends[1]}


def _line(name: str, series: int, rows: Sequence[Mapping[str, Any]]) -> Line:
    points = [(place, row["cells"][series]) for place, row in enumerate(rows)]
    shown = [(float(place), cell) for place, cell in points if cell["auc"] is not None]
    return Line(
        name,
        series,
        [place for place, _ in shown],
        [cell["auc"] for _, cell in shown],
        [cell["auc"] if cell["low"] is None else cell["low"] for _, cell in shown],
        [cell["auc"] if cell["high"] is None else cell["high"] for _, cell in shown],
    )


def resampled_aucs(label_n: NDArray, logit_n: NDArray, cluster_n: NDArray, seed: int = SEED) -> NDArray[np.float64]:
    """Return the AUC of each of `RESAMPLES` draws of clusters with replacement, [R]; NaN where a class is missing.

    Rows are sorted once for all draws; a draw is then a weight a row. Ties count half.

    Args:
        label_n: 1 or 0.
        logit_n: Finite.
        cluster_n: What is drawn, with all its rows: here the item.
        seed: Makes the draws repeatable, and the same for predictions of the same rows.
    """
    random = np.random.default_rng(seed)
    clusters, place_n = np.unique(cluster_n, return_inverse=True)
    order = np.argsort(logit_n, kind="stable")
    positive_n, place_n = label_n[order] == 1, place_n[order]
    tie_starts = np.flatnonzero(np.concatenate(([True], np.diff(logit_n[order]) != 0)))
    auc_R = np.full(RESAMPLES, np.nan)
    for resample in range(RESAMPLES):
        drawn = np.bincount(random.integers(0, len(clusters), len(clusters)), minlength=len(clusters))
        weight_n = drawn[place_n].astype(np.float64)
        ones = np.add.reduceat(weight_n * positive_n, tie_starts)
        zeros = np.add.reduceat(weight_n * ~positive_n, tie_starts)
        pairs = ones.sum() * zeros.sum()
        if pairs:
            auc_R[resample] = (ones * (np.cumsum(zeros) - 0.5 * zeros)).sum() / pairs
    return auc_R
