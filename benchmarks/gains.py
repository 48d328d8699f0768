"""Draws what content is worth by how well an item is known: AUC over an item's training rows, for each data set.

    python benchmarks/gains.py [--split cold_items] [--ranker DIN] [--out benchmarks/results/gains.svg]

Reads the lines behind the committed tables; writes one SVG file, mean and deviation over seeds.
"""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jsonargparse import auto_cli
from ledger import ROOT, Ledger
from markupsafe import Markup
from panels import panels
from suite import BASELINE, FROZEN, MODEL
from tables import check_alike

from torchrec_em3.plots import Line, line_chart

Record = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results"
BINS = ("0", "1-5", "6-20", "21+")
SERIES = (BASELINE, FROZEN, MODEL)


def main(
    suites: tuple[str, ...] = ("amazon", "movielens"),
    split: str = "cold_items",
    ranker: str = "DIN",
    out: str = str(RESULTS / "gains.svg"),
) -> None:
    """Draw the chart of each data set that has the rows.

    Args:
        suites: Suites whose committed runs are read.
        split: Split whose runs are drawn.
        ranker: Ranker whose runs are drawn.
        out: SVG file.
    """
    files = [RESULTS / f"suite-{suite}.jsonl" for suite in suites]
    records = [record for file in files for record in Ledger(file).read()]
    wanted = [record for record in records if (record["split"], record["ranker"]) == (split, ranker)]
    check_alike(wanted)
    found: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in wanted:
        if record["row"] in SERIES:
            found[record["dataset"]][record["row"]].append(record)
    charts = {f"{name}, {split}, {ranker}": chart(rows) for name, rows in found.items()}
    Path(out).write_text(panels(charts, columns=3, legend=SERIES), encoding="utf-8")


def chart(rows: dict[str, list[Record]]) -> Markup:
    """Return AUC over the item's training rows, a series for each of `rows` with its deviation over seeds."""
    places = range(len(BINS))
    lines = []
    for name, runs in rows.items():
        slices = [run["test"]["slices"]["item_frequency"] for run in runs]
        seeds = [[found[name]["auc"] for found in slices] for name in BINS]
        middle, spread = [mean(values) for values in seeds], [stdev(values) for values in seeds]
        low = [value - width for value, width in zip(middle, spread, strict=True)]
        high = [value + width for value, width in zip(middle, spread, strict=True)]
        lines.append(Line(name, SERIES.index(name), places, middle, low, high))
    return line_chart(lines, "training rows of the item", "test AUC", list(zip(places, BINS, strict=True)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
