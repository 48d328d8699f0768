"""What a backend computes: sums over the grid of exp(s) between rows and columns, and their gradients.

Shape letters: N rows, M columns, D width.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["Grid", "Side"]


class Side(NamedTuple):
    """Rows or columns of the grid, ascending by item; `weight_N` is p, the weight as a negative."""

    vector_ND: Tensor
    item_N: Tensor
    weight_N: Tensor


class Grid(Protocol):
    """exp(s_ij), s_ij = scale * <row_i, column_j>, but 0 where both items are the same; never held whole.

    What it returns has the type of the weights. Where that is float64, |s| may reach 300, else 40.
    """

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the sum of each row over its columns and of each column over its rows, weighted by the others' p."""
        ...

    def gradients(
        self, u_N: Tensor, v_M: Tensor, wants_rows: bool, wants_columns: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the negatives' share of the gradients of the row and the column vectors; None where not wanted.

        Args:
            u_N: What the slope of a pair takes from its row, see `info_nce.py`.
            v_M: What it takes from its column.
            wants_rows: Whether the gradient of the rows is wanted.
            wants_columns: Whether the gradient of the columns is wanted.
        """
        ...
