"""Tables of a suite from results.jsonl: mean, deviation, number of seeds, and paired tests between rows.

    python benchmarks/tables.py --suite movielens [--results FILE] [--out benchmarks/results/suite-movielens.md]

A table holds the rows of one ranker, which are compared with each other, and never runs of several commits or of two
preparations of one data set. Tables of one document may be of different commits, since a matrix takes longer than a
version of the code lives; each says which.
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
COMPARED = (BASELINE, FROZEN, MODEL)
REFERENCES = {"rankers": (BASELINE, FROZEN), "draws": (BASELINE, FROZEN)}
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
    for (dataset, split), there in _by(_in_order(suite, records), "dataset", "split").items():
        parts.append(_about(dataset, split, there[0]))
        for (ranker,), rows in _by(there, "ranker").items():
            cells = _cells(rows)
            parts += [_table(ranker, group, found, cells) for group, found in cells.items()]
    path = Path(out or f"benchmarks/results/suite-{suite}.md")
    path.write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))


def check_alike(records: list[Record]) -> None:
    """Refuse to compare what was not run alike.

    Raises:
        SystemExit: If there are no runs, or those of a data set and split have several numbers of trials or
            preparations of the data, or several commits with one ranker.
    """
    if not records:
        raise SystemExit("no runs of this suite and commit; run benchmarks/run.py first")
    alike: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        table = f"{record['dataset']}, {record['split']}"
        draw = record["data"].get("draw")
        alike[f"{table}, {record['ranker']}", "commits"].add(record["commit"])
        alike[table, "numbers of trials"].add(str(record["trials"]))
        alike[table if draw is None else f"{table}, draw {draw}", "preparations of the data"].add(
            record["data"]["hash"]
        )
    for (table, what), values in alike.items():
        if len(values) > 1:
            raise SystemExit(f"{table}: runs of {len(values)} {what}, {', '.join(sorted(values))}")


def _by(records: Iterable[Record], *names: str) -> dict[tuple[str, ...], list[Record]]:
    """Return the records by what stands under these names, in the order in which each was first seen."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def _in_order(suite: str, records: list[Record]) -> list[Record]:
    """Return the records as the suite orders them, whenever they were run; what it no longer has comes last."""
    cells = [(data.name, split, row.group, row.label) for data, split, row in load_suite(suite, Path()).cells()]
    place = {cell: number for number, cell in enumerate(cells)}

    def key(run: Record) -> int:
        cell = (run["dataset"], run["split"], run["group"], f"{run['ranker']}, {run['row']}")
        return place.get(cell, len(place))

    return sorted(records, key=key)


def _cells(records: Iterable[Record]) -> dict[str, dict[str, Cell]]:
    """Return the runs of one ranker by group, row and seed."""
    found: dict[str, dict[str, Cell]] = {}
    for record in records:
        found.setdefault(record["group"], {}).setdefault(record["row"], {})[record["seed"]] = record
    return found


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


def _about(dataset: str, split: str, first: Record) -> str:
    counts, slices = first["data"]["counts"], first["test"]["slices"]["item_frequency"]
    drawn = " (of the first draw)" if "draw" in first["data"] else ""
    bins = ", ".join(f"{name}: {part['n']}" for name, part in slices.items())
    return (
        f"## {dataset}, `{split}`\n\n{counts['users']} users, {counts['items']} items; train {counts['train']}, "
        f"validation {counts['validation']}, test {counts['test']} rows{drawn}; "
        f"test rows by training rows of the item: {bins}.\n"
    )


def _table(ranker: str, group: str, rows: dict[str, Cell], cells: dict[str, dict[str, Cell]]) -> str:
    """Return the table of one group of rows; `cells` has the others of that ranker, by group."""
    models = {name: cell for found in cells.values() for name, cell in found.items() if name in COMPARED}
    first = next(iter(next(iter(rows.values())).values()))
    title = ranker if group == "rankers" else f"{ranker}: {group}"
    lines = [
        f"### {title}\n",
        f"Commit {first['commit']}.",
        "",
        "| | seeds | " + " | ".join(COLUMNS) + " | CPU s |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    references = REFERENCES.get(group, (MODEL,))
    for name, cell in rows.items():
        lines.append(_line(name, cell))
        # A reference is compared with those before it.
        known = references[: references.index(name)] if name in references else references
        lines += [_difference(cell, models[other], other) for other in known if other in models]
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
