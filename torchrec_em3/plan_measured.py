"""What a trained run took, beside what was planned for it."""

import json
from pathlib import Path
from typing import Any

from torchrec_em3.number_format import three_digits
from torchrec_em3.plan_tables import Table
from torchrec_em3.plan_text import format_bytes

__all__ = ["measured_table"]


def measured_table(run: Path) -> Table | None:
    """Compare the plan that a run was trained by with what its summary recorded.

    Args:
        run: Run folder of `em3 train`.

    Returns:
        Memory and time of a rank; None if the folder holds no finished run with a plan, or the run used CUDA, where a
        summary says nothing of the memory of the device.
    """
    plan, summary = _load(run / "plan.json"), _load(run / "summary.json")
    peak, cost = summary.get("peak_rss_bytes"), summary.get("cpu_seconds_per_1k")
    budget = plan.get("budget")
    if not budget or not plan["ranks"] or plan["device"] != "cpu" or not peak or not cost:
        return None
    planned = max(rank["ddr_bytes"] for rank in plan["ranks"]) + budget["bank_bytes"] + budget["dense_bytes"]
    tables_ms = max(rank["perf_ms"] for rank in plan["ranks"])
    # Seconds for 1,000 rows times the rows of a step are milliseconds a step.
    step_ms = cost * plan["batch_size"]
    rows = [
        ["memory of a rank, planned", "tables, content bank and dense parts of the fullest", format_bytes(planned)],
        [
            "memory of a rank, measured",
            "peak of the largest process: Python, libraries and data too",
            format_bytes(peak),
        ],
        ["time of a step, planned", "lookups and exchanges of the slowest", f"{three_digits(tables_ms)} ms"],
        [
            "time of a step, measured",
            "processor time, mean: dense layers and loading too",
            f"{three_digits(step_ms)} ms",
        ],
    ]
    return Table(f"Planned and measured in {run.name}", ["of a rank", "what it covers", "amount"], rows, words=2)


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
