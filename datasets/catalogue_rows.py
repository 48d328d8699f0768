"""Catalogue rows that a store is asked for.

Shape letters: U rows asked for.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchrec_em3.errors import DataError

__all__ = ["checked_rows"]


def checked_rows(items_U: Tensor, num_rows: int, kind: Literal["token", "code"], folder: Path) -> Tensor:
    """Return catalogue rows on the CPU as int64.

    Args:
        items_U: Catalogue rows, integer, any device.
        num_rows: Rows of the store.
        kind: What it stores, for the message.
        folder: Where it is, for the message.

    Raises:
        DataError: If a row is outside the store.
    """
    rows_U = items_U.to("cpu", torch.int64)
    if len(rows_U):
        low, high = (int(bound) for bound in rows_U.aminmax())
        if low < 0 or high >= num_rows:
            wrong = low if low < 0 else high
            raise DataError(
                f"item row {wrong} is outside the {kind} store {folder} (rows 0 to {num_rows - 1}); "
                f"prepare the data and the {kind}s together"
            )
    return rows_U
