"""The table of a report that shows every task of runs on data with several labels."""

from collections.abc import Sequence
from typing import Any

from torchrec_em3.run_record import RunRecord

__all__ = ["task_rows"]


def task_rows(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return a row for each task of each run, the main task first; none for runs with one task.

    Returns:
        `series` and `name` of the run, `task`, and `test`, the metrics of that task.
    """
    return [
        {"series": series % 8, "name": record.name, "task": task, "test": metrics}
        for series, record in enumerate(records)
        for task, metrics in (record.test.get("tasks") or {}).items()
    ]
