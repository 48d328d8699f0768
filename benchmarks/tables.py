"""Tables of a suite from results.jsonl: mean, deviation, number of seeds, and paired tests between rows.

    python benchmarks/tables.py --suite movielens [--results FILE] [--out benchmarks/results/suite-movielens.md]

Runs of several commits are never put into one table; nor are two preparations of one data set. Tables of one
document may be of different commits, since a matrix takes longer than a version of the code lives; each says which.
"""

import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from ledger import Ledger
from scipy.stats import ttest_rel
from suite import BASELINE, FROZEN, MODEL, load_suite

Record = dict[str, Any]
Cell = dict[int, Record]
"""Runs of one row by seed."""

COLUMNS = {
    "AUC": ("auc",),
    "GAUC": ("gauc",),
    "NE": ("ne",),
    "AUC, items of 0 training rows": ("slices", "item_frequency", "0", "auc"),
    "1-5": ("slices", "item_frequency", "1-5", "auc"),
    "6-20": ("slices", "item_frequency", "6-20", "auc"),
    "21+": ("slices", "item_frequency", "21+", "auc"),
    "AUC, new users": ("slices", "user", "new", "auc"),
}
TESTED = ("AUC", "AUC, items of 0 training rows", "21+")
"""Columns that are compared, seed by seed."""
REFERENCES = {"rankers": (BASELINE, FROZEN)}
"""Rows that the others of a group are compared with; those of a group that is not named here, with the whole model."""


def main(suite: str, results: str = "runs/benchmark/results.jsonl", commit: str = "", out: str = "") -> None:
    """Write the tables.

    Args:
        suite: Suite whose runs are wanted.
        results: File of finished runs.
        commit: Runs of this commit; needed where a table has several.
        out: Markdown file; benchmarks/results/suite-SUITE.md if not given.
    """
    records = [record for record in Ledger(Path(results)).read() if record["suite"] == suite]
    records = [record for record in records if record["commit"].startswith(commit)]
    check_alike(records)
    parts = [_heading(suite, records)]
    order = {(row.group, row.ranker, row.name): place for place, row in enumerate(load_suite(suite, Path()).rows)}
    for (dataset, split, group), found in _grouped(records).items():
        rows = dict(sorted(found.items(), key=lambda cell: order.get((group, *cell[0]), len(order))))
        parts.append(_section(dataset, split, group, rows, _models(records, dataset, split)))
    path = Path(out or f"benchmarks/results/suite-{suite}.md")
    path.write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))


def check_alike(records: list[Record]) -> None:
    """Refuse to compare what was not run alike.

    Raises:
        SystemExit: If there are no runs, or those of a data set and split have several commits, numbers of trials or
            preparations of the data.
    """
    if not records:
        raise SystemExit("no runs of this suite and commit; run benchmarks/run.py first")
    alike: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        found = alike[f"{record['dataset']}, {record['split']}"]
        found["commits"].add(record["commit"])
        found["numbers of trials"].add(str(record["trials"]))
        found["preparations of the data"].add(record["data"]["hash"])
    for table, found in alike.items():
        for what, values in found.items():
            if len(values) > 1:
                raise SystemExit(f"{table}: runs of {len(values)} {what}, {', '.join(sorted(values))}")


def _grouped(records: Iterable[Record]) -> dict[tuple[str, str, str], dict[tuple[str, str], Cell]]:
    """Return runs by table, row and seed, in the order in which they were run."""
    found: dict[tuple[str, str, str], dict[tuple[str, str], Cell]] = {}
    for record in records:
        table = found.setdefault((record["dataset"], record["split"], record["group"]), {})
        table.setdefault((record["ranker"], record["row"]), {})[record["seed"]] = record
    return found


def _models(records: Iterable[Record], dataset: str, split: str) -> dict[tuple[str, str], Cell]:
    """Return the runs of a data set that others may be compared with, by ranker and row."""
    tables = _grouped(record for record in records if (record["dataset"], record["split"]) == (dataset, split))
    cells = [pair for table in tables.values() for pair in table.items()]
    return {key: cell for key, cell in cells if key[1] in (BASELINE, FROZEN, MODEL)}


def _heading(suite: str, records: list[Record]) -> str:
    trials = records[0]["trials"]
    searched = ", ".join(records[0]["search"][0]["options"])
    return (
        f"# Benchmark suite `{suite}`\n\n"
        f"Test split, mean ± standard deviation over seeds. Each row searched {trials} points of {searched} on the "
        "validation split with seed 0, the same points for every row, and then read the test split once a seed. "
        "Lines in italics: the difference to another row with the same ranker, seed by seed, with the p-value of a "
        "paired t-test. CPU s is of training, per 1,000 rows, on machines of several speeds and with other work: a "
        "guide only. "
        f"Printed by\n\n```\npython {shlex.join(sys.argv)}\n```\n"
    )


def _section(
    dataset: str, split: str, group: str, rows: dict[tuple[str, str], Cell], models: dict[tuple[str, str], Cell]
) -> str:
    first = next(iter(next(iter(rows.values())).values()))
    counts, slices = first["data"]["counts"], first["test"]["slices"]["item_frequency"]
    lines = [
        f"## {dataset}, `{split}`: {group}\n",
        f"{counts['users']} users, {counts['items']} items; train {counts['train']}, "
        f"validation {counts['validation']}, test {counts['test']} rows; test rows by training rows of the item: "
        + ", ".join(f"{key}: {part['n']}" for key, part in slices.items())
        + f". Commit {first['commit']}.",
        "",
        "| | seeds | " + " | ".join(COLUMNS) + " | CPU s |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    references = REFERENCES.get(group, (MODEL,))
    for (ranker, name), cell in rows.items():
        lines.append(_line(f"{ranker}, {name}", cell))
        # A reference is compared with those before it.
        known = references[: references.index(name)] if name in references else references
        lines += [_difference(cell, models[ranker, other], other) for other in known if (ranker, other) in models]
    return "\n".join([*lines, ""])


def _line(label: str, cell: Cell) -> str:
    figures = [mean_cell(column) for column in _columns(cell.values())]
    cost = np.mean([record["cpu_seconds_per_1k"] for record in cell.values()])
    return f"| {label} | {len(cell)} | {' | '.join(figures)} | {cost:.3f} |"


def _difference(cell: Cell, other: Cell, name: str) -> str:
    """Return the line of differences to the row of that name over the seeds that both have."""
    seeds = sorted(cell.keys() & other.keys())
    before, after = (list(_columns(which[seed] for seed in seeds)) for which in (other, cell))
    figures = []
    for column, theirs, ours in zip(COLUMNS, before, after, strict=True):
        if column not in TESTED or np.isnan(theirs).any() or np.isnan(ours).any():
            figures.append("")
            continue
        tested = f", p {ttest_rel(ours, theirs).pvalue:.2g}" if len(seeds) > 1 else ""
        figures.append(f"{np.mean(ours - theirs):+.4f}{tested}")
    return f"| *minus {name}* | {len(seeds)} | {' | '.join(figures)} | |"


def _columns(records: Iterable[Record]) -> Iterator[np.ndarray]:
    kept = list(records)
    for path in COLUMNS.values():
        yield np.array([figure_at(record["test"], path) for record in kept], dtype=np.float64)


def figure_at(values: Any, path: tuple[str, ...]) -> float | None:
    """Return what stands in metrics under these names, one within the other; None is undefined."""
    for name in path:
        values = values[name]
    found: float | None = values
    return found


def mean_cell(column: np.ndarray) -> str:
    """Return mean and standard deviation of the seeds' values, as a cell of a table."""
    if np.isnan(column).any():
        return "undefined"
    deviation = f" ± {column.std(ddof=1):.4f}" if len(column) > 1 else ""
    return f"{column.mean():.4f}{deviation}"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
