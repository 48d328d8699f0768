"""Items on their way to the ranks that own them, and what is made of them there on its way back.

Shape letters: U distinct items that this rank asks for, N items that all ranks ask this one for, R distinct ones among
these, W ranks; `*` is any trailing shape.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.streamable import Multistreamable

from torchrec_em3.components.distinct import distinct

__all__ = ["Route", "owned_rows"]


def owned_rows(item_rows: int, rank: int, world_size: int) -> range:
    """Return the catalogue rows that a rank owns: those of its shard of the content bank.

    TorchRec's `TensorPool` gives each rank a block of ceil(item_rows / world_size) rows, the last one what is left.
    """
    block = _block(item_rows, world_size)
    return range(min(rank * block, item_rows), min((rank + 1) * block, item_rows))


def _block(item_rows: int, world_size: int) -> int:
    return -(-item_rows // world_size)


class Route(Multistreamable):
    """The way of this rank's items to their owners and back [ours].

    As in a `Lookup`, ranks tell each other how many items will come, then send them; both may happen while another
    batch is computed. Every owner then works on the distinct items that any rank asked it for, each once, and `home`
    returns the results. It is differentiable: an owner gets the sum of the gradients of all ranks. Averaged over ranks,
    as DDP does, the gradients of what the owners computed are those of each rank computing all of its own items.
    """

    def __init__(self, item_U: Tensor, item_rows: int, group: dist.ProcessGroup | None) -> None:
        """Begin to tell the other ranks how many items each will be asked for. Collective.

        Args:
            item_U: Catalogue rows, int64, distinct and ascending.
            item_rows: Rows of the catalogue.
            group: Ranks that take part; None for a process that works alone.
        """
        self._item_U, self._group = item_U, group
        self._rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._owned = owned_rows(item_rows, self._rank, world_size)
        edges = torch.arange(world_size + 1, device=item_U.device) * _block(item_rows, world_size)
        self._leaving_W = torch.searchsorted(item_U, edges).diff()
        self._arriving_W = torch.empty_like(self._leaving_W)
        self._leaving: list[int] = []
        self._arriving: list[int] = []
        self._ids_N: Tensor | None = None
        self._item_R: Tensor | None = None
        self._place_N: Tensor | None = None
        self._work: Any = None
        if group is not None:
            self._work = dist.all_to_all_single(self._arriving_W, self._leaving_W, group=group, async_op=True)

    def send(self) -> None:
        """Begin to send the items. Collective."""
        if self._group is None or self._ids_N is not None:
            return
        self._work.wait()
        self._leaving, self._arriving = self._leaving_W.tolist(), self._arriving_W.tolist()
        self._ids_N = self._item_U.new_empty(sum(self._arriving))
        self._work = dist.all_to_all_single(
            self._ids_N, self._item_U, self._arriving, self._leaving, group=self._group, async_op=True
        )

    def receive(self) -> None:
        """Wait for the items that the other ranks sent; `send` comes first where it has not been called."""
        if self._item_R is not None:
            return
        if self._group is None:
            self._item_R = self._item_U
            return
        self.send()
        self._work.wait()
        assert self._ids_N is not None
        owned_R, self._place_N = distinct(self._ids_N - self._owned.start, len(self._owned))
        self._item_R = owned_R + self._owned.start

    def items(self) -> Tensor:
        """Return the distinct items that this rank owns and any rank asked for, item_R, ascending."""
        self.receive()
        assert self._item_R is not None
        return self._item_R

    def home(self, value_R: Tensor) -> Tensor:
        """Return what the owners made of this rank's items, value_U. Collective, and so is its backward pass.

        Args:
            value_R: What this rank made of `items()`, [R, *]; of the same type and trailing shape on all ranks.
        """
        if self._group is None:
            return value_R
        assert self._place_N is not None, "home() comes after items()"
        value_N = value_R.index_select(0, self._place_N)
        value_U: Tensor = _Exchange.apply(value_N, self._arriving, self._leaving, self._group)  # type: ignore[no-untyped-call]
        return value_U

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of received items alive until `stream` has used it."""
        for part in (self._item_U, self._item_R, self._place_N):
            if part is not None:
                part.record_stream(stream)


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, row_N: Tensor, leaving: list[int], arriving: list[int], group: dist.ProcessGroup) -> Tensor:
        """Send `leaving[w]` rows to rank w, in order; return the `arriving[w]` rows of each."""
        ctx.way_back = arriving, leaving, group
        return _exchange(row_N, leaving, arriving, group)

    @staticmethod
    def backward(ctx: Any, gradient_U: Tensor) -> tuple[Tensor, None, None, None]:
        """Send each row's gradient to where the row came from."""
        return _exchange(gradient_U, *ctx.way_back), None, None, None


def _exchange(row_N: Tensor, leaving: list[int], arriving: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = row_N.new_empty(sum(arriving), *row_N.shape[1:])
    dist.all_to_all_single(arrived, row_N.contiguous(), arriving, leaving, group=group)
    return arrived
