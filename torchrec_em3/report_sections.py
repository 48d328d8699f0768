"""The parts of a report as plain values and charts, ready for the page's template."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.metrics import FREQUENCY_SLICES, USER_SLICES, calibration_bins
from torchrec_em3.plan_measured import measured_table
from torchrec_em3.plots import Bar, BarGroup, Line, bar_chart, line_chart, reliability_chart
from torchrec_em3.run_record import RunRecord, flatten
from torchrec_em3.verdict import small_slice

__all__ = [
    "config_differences",
    "curves",
    "data_summaries",
    "plans",
    "reliability",
    "run_rows",
    "slices",
    "version_rows",
]

MAX_POINTS = 150
CURVES = (
    ("validation", "auc", "Validation AUC", "AUC"),
    ("validation", "auc_unseen_items", "Validation AUC, items never trained on", "AUC"),
    ("validation", "logloss", "Validation log-loss", "log-loss (nats)"),
    ("train", "rank_loss", "Training: ranking loss", "log-loss (nats)"),
    ("train", "alignment_loss", "Training: content-ID contrast (CIC)", "loss (nats)"),
    ("train", "loss", "Training: total loss", "loss"),
    ("train", "bank_coverage", "Content bank: coverage", "share of history rows written"),
    ("train", "bank_similarity", "Content bank: staleness", "cosine of cached and fresh"),
)
BEST = {"auc": max, "gauc": max, "ne": min, "logloss": min}
SLICE_KINDS = (
    ("item_frequency", "By training rows of the item", "training rows of the item", tuple(FREQUENCY_SLICES)),
    ("user", "By whether the user has training rows", "user", USER_SLICES),
    ("user_history", "By events of the user before the row", "events before", tuple(FREQUENCY_SLICES)),
)


def run_rows(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return one row a run; `best` names the metrics in which no run on the same data and split is better."""
    rows = []
    for series, record in enumerate(records):
        summary = record.summary
        peers = [other.test for other in records if _same_test(record, other)]
        best = {
            name
            for name, choose in BEST.items()
            if record.test.get(name) is not None
            and len(values := [peer[name] for peer in peers if peer.get(name) is not None]) > 1
            and record.test[name] == choose(values)
        }
        baseline = next((r for r in records if _same_test(record, r) and not r.uses_content), None)
        rows.append(
            {
                "series": series % 8,
                "name": record.name,
                "record": record,
                "split": summary.get("split"),
                "test": record.test,
                "best": best,
                "samples": summary.get("samples"),
                "cost": summary.get("cpu_seconds_per_1k"),
                "cost_ratio": _ratio(summary, baseline.summary) if baseline and record.uses_content else None,
                "memory": summary.get("peak_rss_bytes"),
                "parameters": summary.get("parameters") or {},
                "attainable": record.test.get("attainable_auc", summary.get("attainable_auc")),
            }
        )
    return rows


def _same_test(a: RunRecord, b: RunRecord) -> bool:
    return a.place == b.place


def _ratio(summary: Mapping[str, Any], baseline: Mapping[str, Any]) -> float | None:
    cost, base = summary.get("cpu_seconds_per_1k"), baseline.get("cpu_seconds_per_1k")
    return cost / base if cost and base else None


def curves(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return a chart for each quantity that any run logged, over training rows seen."""
    charts = []
    for phase, key, title, unit in CURVES:
        lines = [_line(record, series, phase, key) for series, record in enumerate(records)]
        chart = line_chart(lines, "training rows seen", unit)
        if chart:
            averaged = any(line.label.endswith("means)") for line in lines)
            charts.append({"title": title, "chart": chart, "averaged": averaged})
    return charts


def _line(record: RunRecord, series: int, phase: str, key: str) -> Line:
    points = [
        (float(entry.get("samples", entry.get("step", 0))), float(entry[key]))
        for entry in record.log
        if entry.get("phase") == phase
        and _finite(entry.get(key))
        and _finite(entry.get("samples", entry.get("step", 0)))
    ]
    if len(points) <= MAX_POINTS:
        return Line(record.name, series, [x for x, _ in points], [y for _, y in points])
    blocks = np.array_split(np.array(points), MAX_POINTS)
    means = np.array([block.mean(axis=0) for block in blocks])
    return Line(f"{record.name} (block means)", series, means[:, 0].tolist(), means[:, 1].tolist())


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def slices(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return a chart and a table of AUC by slice, with the number of rows in each."""
    kinds = []
    for kind, title, column, keys in SLICE_KINDS:
        rows = [_slice_row(records, kind, key) for key in keys]
        if all(cell["auc"] is None for row in rows for cell in row["cells"]):
            continue
        groups = [
            BarGroup(
                row["name"] + (" *" if row["small"] else ""),
                f"n = {row['n']:,}",
                [Bar(r.name, i, cell["auc"]) for i, (r, cell) in enumerate(zip(records, row["cells"], strict=True))],
                faint=row["small"],
                mark=row["attainable"],
            )
            for row in rows
        ]
        kinds.append({"title": title, "column": column, "chart": bar_chart(groups, "test AUC", 0.5), "rows": rows})
    return kinds


def _slice_row(records: Sequence[RunRecord], kind: str, key: str) -> dict[str, Any]:
    parts = [((record.test.get("slices") or {}).get(kind) or {}).get(key) or {} for record in records]
    counts = [part["n"] for part in parts if _finite(part.get("n"))]
    attainable = [part["attainable_auc"] for part in parts if _finite(part.get("attainable_auc"))]
    return {
        "name": key,
        "cells": [
            {"auc": part.get("auc"), "n": part.get("n"), "small": small_slice(part.get("n") or 0)} for part in parts
        ],
        "n": max(counts, default=0),
        "same_n": len(set(counts)) <= 1,
        "small": small_slice(max(counts, default=0)),
        "attainable": attainable[0] if attainable and len(set(attainable)) == 1 else None,
    }


def reliability(records: Sequence[RunRecord]) -> Any:
    """Return the reliability chart of the test predictions, or an empty text if no run has any."""
    lines = []
    for series, record in enumerate(records):
        if record.test_rows is None:
            continue
        bins = calibration_bins(record.test_rows.label, record.test_rows.logit)
        columns: Iterable[tuple[float, ...]] = zip(*(bin_[:4] for bin_ in bins), strict=True)
        if bins:
            prediction, label, low, high = columns
            lines.append(Line(record.name, series, prediction, label, low, high))
    return reliability_chart(lines)


def plans(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the sharding plan of each run that has one; runs with the same plan share it."""
    found: list[dict[str, Any]] = []
    for record in records:
        plan = record.plan
        if plan is None or not isinstance(plan.get("tables"), list):
            continue
        key = [(t.get("fqn"), t.get("sharding_type"), t.get("shards")) for t in plan["tables"]]
        entry = next((entry for entry in found if entry["key"] == key), None)
        if entry is None:
            loads = _rank_charts(plan) if plan.get("world_size", 1) > 1 else []
            entry = {"names": [], "plan": plan, "text": record.plan_text, "charts": loads, "key": key, "measured": []}
            found.append(entry)
        entry["names"].append(record.name)
        measured = measured_table(plan, record.name)
        if measured is not None:
            entry["measured"].append(measured)
    return found


def _rank_charts(plan: Mapping[str, Any]) -> list[Any]:
    """Return charts of memory and time by rank; ranks beyond 16 are drawn in equal groups, by their largest."""
    ranks = plan.get("ranks") or []
    charts = []
    for load, title, scale in (
        ("hbm_bytes", "device memory for tables (MiB)", 2**20),
        ("ddr_bytes", "host memory for tables (MiB)", 2**20),
        ("perf_ms", "estimated time of a step (ms)", 1),
    ):
        values = [rank.get(load) or 0 for rank in ranks]
        if not any(values):
            continue
        blocks = np.array_split(np.arange(len(values)), min(len(values), 16))
        groups = [
            BarGroup(
                str(block[0]),
                "",
                [Bar(f"ranks {block[0]} to {block[-1]}", 1, max(values[i] for i in block) / scale)],
            )
            for block in blocks
        ]
        charts.append({"title": title, "chart": bar_chart(groups, title, 0.0, "rank", digits=3)})
    return charts


def data_summaries(data: Mapping[str, PreparedData]) -> list[dict[str, Any]]:
    """Return what each prepared folder holds; runs on the same folder share an entry. `data` is by name of the run."""
    found: dict[str, dict[str, Any]] = {}
    for name, prepared in data.items():
        entry = found.setdefault(
            str(prepared.folder), {"names": [], "folder": prepared.folder.name, "meta": prepared.meta}
        )
        entry["names"].append(name)
    return list(found.values())


def config_differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the options in which the runs differ, with each run's value; the run folder itself is not one."""
    flat = [flatten(record.config) for record in records]
    keys = sorted({key for options in flat for key in options} - {"run"})
    rows = [(key, [str(options.get(key, "\N{EN DASH}")) for options in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def version_rows(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the version of each package in each run, or once where all runs agree."""
    packages = list(dict.fromkeys(package for record in records for package in record.versions))
    rows = [(package, [str(r.versions.get(package, "\N{EN DASH}")) for r in records]) for package in packages]
    if all(len(set(values)) == 1 for _, values in rows):
        return [(package, values[:1]) for package, values in rows]
    return rows
