"""What finished runs of a suite are worth when items lack a modality at test time; writes a Markdown table.

    python benchmarks/missing.py --suite movielens --only "ml-1m/cold_items" [--work runs/benchmark]

Each share of the items loses one of its modalities, drawn at random and the same for every run (`em3 evaluate
--drop_modality`). What was measured stays in the run folders, so an interrupted table goes on where it was.
"""

import json
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from command import run_em3
from jsonargparse import auto_cli
from ledger import Ledger
from tables import COLUMNS, figure_at, mean_cell
from tqdm import tqdm

SHARES = (0.1, 0.3, 0.5, 0.7)
SHOWN = ("AUC", "AUC, items of 0 training rows")
"""Columns of the suites' tables, for all shares of the first and then of the second."""


def main(suite: str, only: str, work: str = "runs/benchmark", out: str = "") -> None:
    """Measure what is not measured yet, and tabulate.

    Args:
        suite: Suite whose runs are wanted.
        only: Regular expression; takes the runs with content whose "data set/split/ranker, row" it matches.
        work: Folder of benchmarks/run.py.
        out: Markdown file; benchmarks/results/missing-SUITE.md if not given.
    """
    records = [record for record in Ledger(Path(work) / "results.jsonl").read() if record["suite"] == suite]
    wanted = [record for record in records if re.search(only, _name(record)) and _has_content(record)]
    if not wanted:
        raise SystemExit(f"--only {only} matches no finished run with content; run benchmarks/run.py first")
    rows: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in tqdm(wanted, unit="run"):
        rows[_name(record)][0.0].append(record["test"])
        for share in SHARES:
            rows[_name(record)][share].append(_measure(Path(work) / record["run"], share))
    text = "\n".join([_heading(wanted), *(_line(name, cells) for name, cells in rows.items()), ""])
    Path(out or f"benchmarks/results/missing-{suite}.md").write_text(text, encoding="utf-8")
    print(text)


def _name(record: dict[str, Any]) -> str:
    return f"{record['dataset']}/{record['split']}/{record['ranker']}, {record['row']}"


def _has_content(record: dict[str, Any]) -> bool:
    return bool(record["options"].get("model.content") != "none")


def _measure(run: Path, share: float) -> dict[str, Any]:
    """Return the test metrics of a run of whose items this share lacks a modality."""
    path = run / f"robustness-{share:g}-seed-0.json"
    if not path.is_file():
        run_em3(Path(f"{run}.log"), "evaluate", str(run.resolve()), "--drop_modality", str(share))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["test"]
    return found


def _heading(records: list[dict[str, Any]]) -> str:
    commits = ", ".join(sorted({record["commit"] for record in records}))
    shares = [f"{share:.0%}" for share in (0.0, *SHARES)]
    return (
        "# Items that lack a modality at test time\n\n"
        "Test split, mean ± standard deviation over seeds. Above each column the share of the items that lose one of "
        "their modalities; an item that has one loses it. Left the AUC of all rows, right that of the items of 0 "
        f"training rows. Commit {commits}. Printed by\n\n```\npython {shlex.join(sys.argv)}\n```\n\n"
        f"| | seeds | {' | '.join(shares)} | {' | '.join(f'new, {share}' for share in shares)} |\n"
        + "|---" * (2 * len(shares) + 2)
        + "|"
    )


def _line(name: str, cells: dict[float, list[dict[str, Any]]]) -> str:
    figures = [
        mean_cell(np.array([figure_at(metrics, COLUMNS[column]) for metrics in found], dtype=np.float64))
        for column in SHOWN
        for found in cells.values()
    ]
    return f"| {name} | {len(cells[0.0])} | {' | '.join(figures)} |"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
