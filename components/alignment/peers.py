"""What the contrastive loss asks of the other processes; here for a process that works alone.

Shape letters: N rows of this process, M columns (the items of all processes), K columns shown at a time, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Alone", "Index", "Visit", "Wants"]

Index = slice | Tensor
"""Places of some columns among all."""
Visit = Callable[[Index, Tensor], Tensor | None]
"""Takes the places and the vectors [K, D] of some columns, returns what this process adds to them: [K, ...] or None."""


class Wants(NamedTuple):
    """Which inputs need a gradient; all ranks must agree, because it decides which collectives run."""

    content: bool
    id: bool
    scale: bool


class Alone:
    """The columns are this process's own rows.

    Attributes:
        world_size: Number of processes.
        item_M: Item of every column, int64; ascending within what `collect` shows at a time.
        own: Places of this process's rows among the columns, in the order of the rows.
        wants: Gradients that any process needs.
    """

    world_size = 1

    def __init__(self, item_N: Tensor, wants: Wants) -> None:
        """Take this process's items, ascending."""
        self.item_M = item_N
        self.own: Index = slice(None)
        self.wants = wants

    def gather(self, own_N: Tensor) -> Tensor:
        """Return a few numbers an item of all processes, in the order of the columns; any trailing shape."""
        return own_N

    def share(self, vector_ND: Tensor) -> None:
        """Offer this process's column vectors to the `collect` of every process."""
        self._vector_ND = vector_ND

    def collect(self, visit: Visit) -> Tensor | None:
        """Show the shared vectors of all processes to `visit`; return what all processes add to this one's own.

        None where `visit` returns None, which it must do on all processes or on none.
        """
        return visit(self.own, self._vector_ND)
