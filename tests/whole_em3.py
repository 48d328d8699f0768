"""All parts of EM3 by name, so that tests go through them whatever the defaults are."""

from typing import Any

__all__ = ["WHOLE_EM3"]

WHOLE_EM3: dict[str, Any] = {"history_options": {"rank": 8}, "alignment_weight": 0.01}
"""Fields of ModelConfig."""
