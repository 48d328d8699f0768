"""What the ranks of a trained run took, beside what was planned for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrec_em3.plan_tables import Table
from torchrec_em3.plan_text import measured_rows

__all__ = ["MEASURED_NOTE", "measured_table", "read_measured"]

MEASURED_NOTE = (
    "Tables: weights and optimizer state of a rank's shards, as planned and as held. Memory: planned are tables with "
    "their inputs and outputs, and what a rank holds besides them; the peak of host memory is that of the whole "
    "process, with Python, its libraries and data. Times: planned are those of the tables alone; measured are medians "
    "of the steps since the last start, waiting for data and the rest apart, and the processor time of a step."
)


def measured_table(plan: Mapping[str, Any], name: str) -> Table | None:
    """Return a row for each rank of a run, or for the slowest of many.

    Args:
        plan: A run's `plan.json`.
        name: What the run is called.

    Returns:
        None if the run has not ended yet, or had no tables to plan.
    """
    if not plan.get("measured") or not plan.get("budget"):
        return None
    head, *rows = measured_rows(plan)
    padded = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return Table(f"Planned and measured in {name}", head, padded)


def read_measured(run: Path) -> Table | None:
    """Return the table of a run folder; None if there is no run in it, or one that has not ended."""
    try:
        plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return measured_table(plan, run.name) if isinstance(plan, dict) else None
