"""Distinct ids of a batch, the unit that lookups and content towers work on.

Shape letters: N ids, V distinct ids.
"""

import torch
from torch import Tensor

__all__ = ["distinct"]

BITMAP_ROWS_PER_ID = 64
"""Up to this many table rows for each id a bitmap over the table is used, beyond it sorting; chosen, not tuned."""


def distinct(id_N: Tensor, table_rows: int) -> tuple[Tensor, Tensor]:
    """Return the distinct ids in increasing order and, for each id, its place among them.

    Args:
        id_N: Ids in [0, table_rows), int64.
        table_rows: Rows of the table that the ids refer to.

    Returns:
        distinct_V and place_N, int64, with `distinct_V[place_N] == id_N`.
    """
    if table_rows > BITMAP_ROWS_PER_ID * max(id_N.numel(), 1):
        distinct_V, place_N = torch.unique(id_N, return_inverse=True)
        return distinct_V, place_N
    seen = torch.zeros(table_rows, dtype=torch.bool, device=id_N.device)
    seen[id_N] = True
    place = torch.cumsum(seen, 0) - 1
    return seen.nonzero().squeeze(1), place[id_N]
