"""EM3 with all parts of the paper by name, so that benchmarks and tests go through them whatever the defaults are."""

from typing import Any

__all__ = ["WHOLE_EM3"]

WHOLE_EM3: dict[str, Any] = {"history_options": {"rank": 8}, "alignment_weight": 0.01}
"""Fields of ModelConfig; the rows of suites/rows.yaml have them as options."""
