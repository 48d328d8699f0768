"""The contrastive loss over the items of all ranks: what travels, and how often a shared item counts.

Shape letters: U items of this rank, P places in a shard padded to the size of the largest, M items of all ranks,
V distinct items, D width, W ranks.

Each rank owns its rows and computes them against the columns of all ranks, so every pair is computed once; content
stays where it is. Every rank knows the items of all (all-gather; about 50 bytes an item with what is counted from
them). The ID side, D numbers an item, travels in one of two ways:

    gather   all-gather of the vectors, reduce-scatter of the columns' sums and of the gradient; one large grid
    ring     the vectors of one rank at a time visit all ranks in turn, followed by what has been added to their
             columns; the next block arrives while this one is computed; a rank holds a few blocks, whatever W is

The vectors travel once in gather and twice in ring, which also takes 2 W hops: ring is for what gather cannot hold.
Shards may differ in size and be empty.

The unit of the loss is a distinct item of the global batch [ours]: where k ranks hold the same item, each copy weighs
1 / k, so that cutting a batch into shards changes neither the loss nor the gradients.
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_em3.components.alignment.backend import BackendName
from torchrec_em3.components.alignment.info_nce import check_shapes, contrast, wants_of
from torchrec_em3.components.alignment.peers import Alone, Index, Visit, Wants

__all__ = ["Gather", "Ring", "TransportName", "global_info_nce", "peers_of"]

TransportName = Literal["auto", "gather", "ring"]
GATHER_LIMIT_BYTES = 2 * 2**30  # vectors and float32 gradients of all ranks, on every rank; beyond that auto takes ring
VECTORS, SUMS = 0, 1  # tags of what is under way between two ranks at the same time


class _Census(NamedTuple):
    """Size of every rank's shard, and the gradients that any rank needs."""

    sizes: list[int]
    wants: Wants

    @classmethod
    def take(cls, num_items: int, wants: Wants, group: dist.ProcessGroup, device: torch.device) -> "_Census":
        """Ask all ranks; an empty shard may look as if it needed no gradient."""
        mine_4 = torch.tensor([num_items, *wants], dtype=torch.int64, device=device)
        flat = mine_4.new_empty(dist.get_world_size(group) * len(mine_4))
        dist.all_gather_single(flat, mine_4, group=group)
        all_W4 = flat.view(-1, len(mine_4))
        return cls(all_W4[:, 0].tolist(), Wants(*all_W4[:, 1:].any(0).tolist()))


class _Ranks(Alone):
    """The shards of all ranks of a process group, as columns in the order of the ranks, ascending by item in each."""

    def __init__(self, item_U: Tensor, census: _Census, group: dist.ProcessGroup) -> None:
        """Learn the items of all shards; collective.

        Args:
            item_U: This rank's items, int64, ascending, on the device that the group communicates from.
            census: Of all ranks.
            group: Ranks that take part.
        """
        self._group, self._rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)
        self.wants, self._num_items = census.wants, len(item_U)
        self._places = max(census.sizes)
        sizes_W = torch.tensor(census.sizes, device=item_U.device)
        place_P = torch.arange(self._places, device=item_U.device)
        self._place_M = (place_P < sizes_W[:, None]).flatten().nonzero().squeeze(1)
        ends = sizes_W.cumsum(0).tolist()
        self._shards = [slice(end - size, end) for size, end in zip(census.sizes, ends, strict=True)]
        self.item_M = self.gather(item_U)
        self.own: Index = self._shards[self._rank]

    def gather(self, own_N: Tensor) -> Tensor:
        """Return the rows of all ranks in column order; any trailing shape."""
        placed = own_N.new_empty(self.world_size * self._places, *own_N.shape[1:])
        if self._places:
            dist.all_gather_single(placed, self._padded(own_N), group=self._group)
        return placed[self._place_M]

    def _padded(self, own_N: Tensor) -> Tensor:
        padded_P = own_N.new_zeros(self._places, *own_N.shape[1:])
        padded_P[: len(own_N)] = own_N
        return padded_P


class Gather(_Ranks):
    """Columns of all ranks, held by every rank and ascending by item."""

    def __init__(self, item_U: Tensor, census: _Census, group: dist.ProcessGroup) -> None:
        """Learn the items of all shards and sort them; collective."""
        super().__init__(item_U, census, group)
        order_M = torch.argsort(self.item_M, stable=True)
        self.item_M, self._place_M = self.item_M[order_M], self._place_M[order_M]
        self.own = torch.argsort(order_M)[self.own]

    def share(self, vector_ND: Tensor) -> None:
        """Gather the vectors of all ranks; collective."""
        self._vector_ND = self.gather(vector_ND)

    def collect(self, visit: Visit) -> Tensor | None:
        """Show all columns at once, then sum what all ranks add to them; collective."""
        part_M = visit(slice(None), self._vector_ND)
        if part_M is None:
            return None
        placed = part_M.new_zeros(self.world_size * self._places, *part_M.shape[1:])
        placed[self._place_M] = part_M
        own_P = part_M.new_empty(self._places, *part_M.shape[1:])
        if self._places:
            dist.reduce_scatter_single(own_P, placed, group=self._group)
        return own_P[: self._num_items]


class Ring(_Ranks):
    """Columns of one rank at a time, passed from rank to rank together with what has been added to them."""

    def share(self, vector_ND: Tensor) -> None:
        """Keep this rank's vectors, in the shape in which blocks travel."""
        self._vector_ND = self._padded(vector_ND)

    def collect(self, visit: Visit) -> Tensor | None:
        """Show every rank's columns in turn, from this one backwards; after W hops each sum is home. Collective."""
        block_PD, sum_P = self._vector_ND, None
        for hop in range(self.world_size):
            shard = self._shards[(self._rank - hop) % self.world_size]
            last = hop == self.world_size - 1
            vectors = None if last else _Passing(block_PD, VECTORS, self._group)  # travel while this block is computed
            part_K = visit(shard, block_PD[: shard.stop - shard.start])
            if part_K is not None:
                sum_P = part_K.new_zeros(self._places, *part_K.shape[1:]) if sum_P is None else sum_P
                sum_P[: len(part_K)] += part_K
                sum_P = _Passing(sum_P, SUMS, self._group).arrived()
            if vectors is not None:
                block_PD = vectors.arrived()
        return None if sum_P is None else sum_P[: self._num_items]


class _Passing:
    """A tensor on its way to the next rank, and the one of equal shape that comes from the rank before."""

    def __init__(self, leaving: Tensor, tag: int, group: dist.ProcessGroup) -> None:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        self._leaving, self._arriving = leaving, torch.empty_like(leaving)
        ends = ((dist.isend, leaving, rank + 1), (dist.irecv, self._arriving, rank - 1))
        self._works = []
        if leaving.numel():
            self._works = dist.batch_isend_irecv(
                [dist.P2POp(op, end, group=group, tag=tag, group_peer=peer % world_size) for op, end, peer in ends]
            )

    def arrived(self) -> Tensor:
        """Wait until both have arrived; return the one that is here."""
        for work in self._works:
            work.wait()
        return self._arriving


def peers_of(
    item_U: Tensor, id_UD: Tensor, wants: Wants, transport: TransportName, group: dist.ProcessGroup | None
) -> Alone:
    """Return the way in which this rank meets the others; the same kind on all ranks."""
    if group is None or dist.get_world_size(group) == 1:
        return Alone(item_U, wants)
    census = _Census.take(len(item_U), wants, group, item_U.device)
    if transport == "auto":
        gathered_bytes = sum(census.sizes) * id_UD.shape[1] * (id_UD.element_size() + 4)
        transport = "gather" if gathered_bytes <= GATHER_LIMIT_BYTES else "ring"
    kind = Gather if transport == "gather" else Ring
    return kind(item_U, census, group)


def global_info_nce(
    content_UD: Tensor,
    id_UD: Tensor,
    item_U: Tensor,
    count_U: Tensor,
    scale: Tensor,
    *,
    popularity_correction: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: BackendName = "auto",
    transport: TransportName = "auto",
    tile: int = 0,
) -> Tensor:
    """Return this rank's share of the symmetric InfoNCE loss over the distinct items of the global batch.

    Collective: every rank of the group must call it, one with no items too.

    Args:
        content_UD: Content of this rank's items, L2-normalised.
        id_UD: ID embeddings of the same items, L2-normalised.
        item_U: Catalogue rows, int64, in any order; other ranks may hold some of them too, with the same two vectors.
        count_U: How many rows of this rank's batch have the item, int64.
        scale: 1 / temperature, scalar, the same on all ranks.
        popularity_correction: Subtract log(count / mean count), both over the global batch, from the logits of an item
            where it is a negative: popular items are negatives in every batch, rare ones in few.
        group: Ranks that take part; None for a process that works alone.
        backend: Who computes, see `choose_backend`.
        transport: How the ID side travels: `gather`, `ring`, or `auto`, which is gather up to GATHER_LIMIT_BYTES.
        tile: Rows and columns of a tile of the backend `tiled`; 0 picks for the device.

    Returns:
        Scalar whose mean over the ranks is the loss of the global batch, in nats. Gradients follow the same rule:
        averaged over ranks, as DDP and TorchRec's embedding collectives do, they are those of the global loss.

    Raises:
        ValueError: If the shapes disagree or the items are not int64.
        NumericError: If the scale is not finite.
        ConfigError: If the scale is not positive or above 300, or the backend cannot do it.
    """
    check_shapes(content_UD, id_UD, item_U)
    order_U = torch.argsort(item_U, stable=True)
    peers = peers_of(item_U[order_U], id_UD, wants_of(content_UD, id_UD, scale), transport, group)
    _, distinct_M, copies_V = torch.unique(peers.item_M, return_inverse=True, return_counts=True)
    dtype = torch.promote_types(content_UD.dtype, torch.float32)
    weight_M = copies_V.to(dtype).reciprocal()[distinct_M]
    q_M = torch.ones_like(weight_M)
    if popularity_correction:
        count_M = peers.gather(count_U[order_U])
        total_V = torch.zeros_like(copies_V).scatter_add_(0, distinct_M, count_M).to(dtype)
        q_M = (total_V / total_V.mean())[distinct_M]
    return contrast(content_UD[order_U], id_UD[order_U], scale, peers, weight_M, q_M, backend, tile)
