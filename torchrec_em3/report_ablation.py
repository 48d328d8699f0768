"""The report's ablation chart: what each variant adds to the ID-only model, with intervals."""

from collections.abc import Sequence
from typing import Any

from torchrec_em3.plots import Bar, BarGroup, bar_chart
from torchrec_em3.verdict import SLICE_TITLES, UNSEEN, Comparison

__all__ = ["ablations"]

ALL_ROWS = "all test rows"


def ablations(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return a chart for each split, of the differences in AUC to the ID-only model.

    Args:
        comparisons: Those whose baseline has content are left out.

    Returns:
        For each split: `split`, `chart`, `legend`, names with their series. No chart where a single variant makes it
        say no more than the verdict.
    """
    charts = []
    for split in dict.fromkeys(comparison.split for comparison in comparisons):
        shown = [c for c in comparisons if c.split == split and c.against_id_only]
        if len(shown) < 2:
            continue
        groups = [_group(shown, ALL_ROWS, "all rows"), _group(shown, SLICE_TITLES[UNSEEN], "unseen items")]
        chart = bar_chart([group for group in groups if group is not None], "test AUC minus ID-only", 0.0)
        if chart:
            legend = [f"{comparison.second} against {comparison.first}" for comparison in shown]
            charts.append({"split": split, "chart": chart, "legend": legend})
    return charts


def _group(comparisons: Sequence[Comparison], title: str, name: str) -> BarGroup | None:
    bars, sizes = [], []
    # Series 0 is the grey of the ID-only model, which is the base line here.
    for series, comparison in enumerate(comparisons, 1):
        part = next((part for part in comparison.slices if part.title == title), None)
        if part is not None:
            sizes.append(part.n)
            bars.append(Bar(comparison.second, series, part.difference, part.interval))
    return BarGroup(name, f"n = {max(sizes):,}", bars) if bars else None
