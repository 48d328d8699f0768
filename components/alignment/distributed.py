"""The contrastive loss over the items of all ranks: what travels, and how often a shared item counts.

Shape letters: U items of this rank, P places in a shard padded to the size of the largest, M items of all ranks,
V distinct items, D width, W ranks.

Each rank owns its rows and computes them against the columns of all ranks, so every pair is computed once. What
travels: the ID side and the items (all-gather), two numbers an item (all-reduce) and the gradient of the ID side
(reduce-scatter); content stays where it is. Shards may differ in size and be empty.

The unit of the loss is a distinct item of the global batch [ours]: where k ranks hold the same item, each copy weighs
1 / k, so that cutting a batch into shards changes neither the loss nor the gradients.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_em3.components.alignment.tiled import Alone, Wants, check_shapes, contrast, wants_of

__all__ = ["Ranks", "global_info_nce"]


class Ranks(Alone):
    """The shards of all ranks of a process group, as columns ascending by item."""

    def __init__(self, item_U: Tensor, wants: Wants, group: dist.ProcessGroup) -> None:
        """Learn the sizes and the items of all shards; collective.

        Args:
            item_U: This rank's items, int64, ascending, on the device that the group communicates from.
            wants: Gradients that this rank needs; what any rank needs is computed on all.
            group: Ranks that take part.
        """
        self._group, self._num_items = group, len(item_U)
        self.world_size = dist.get_world_size(group)
        sizes_W, self.wants = self._agree(wants, item_U.device)
        self._places = int(sizes_W.max())
        place_P = torch.arange(self._places, device=item_U.device)
        self._place_M = (place_P < sizes_W[:, None]).flatten().nonzero().squeeze(1)
        item_M = self.gather(item_U)
        order_M = torch.argsort(item_M, stable=True)
        self.item_M, self._place_M = item_M[order_M], self._place_M[order_M]
        start = int(sizes_W[: dist.get_rank(group)].sum())
        self.own = torch.argsort(order_M)[start : start + len(item_U)]

    def _agree(self, wants: Wants, device: torch.device) -> tuple[Tensor, Wants]:
        """Return every rank's size and what any rank wants: an empty shard may look as if it needed no gradient."""
        mine_4 = torch.tensor([self._num_items, *wants], dtype=torch.int64, device=device)
        flat = mine_4.new_empty(self.world_size * len(mine_4))
        dist.all_gather_single(flat, mine_4, group=self._group)
        all_W4 = flat.view(self.world_size, len(mine_4))
        return all_W4[:, 0], Wants(*all_W4[:, 1:].any(0).tolist())

    def gather(self, own_N: Tensor) -> Tensor:
        """Return the rows of all ranks in column order; any trailing shape."""
        padded_P = own_N.new_zeros(self._places, *own_N.shape[1:])
        padded_P[: self._num_items] = own_N
        placed = own_N.new_empty(self.world_size * self._places, *own_N.shape[1:])
        if self._places:
            dist.all_gather_single(placed, padded_P, group=self._group)
        return placed[self._place_M]

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of a tensor of equal shape over all ranks."""
        part = part.contiguous()
        if self._places:
            dist.all_reduce(part, group=self._group)
        return part

    def own_sum(self, part_M: Tensor) -> Tensor:
        """Return this rank's rows of the sum over all ranks; any trailing shape."""
        placed = part_M.new_zeros(self.world_size * self._places, *part_M.shape[1:])
        placed[self._place_M] = part_M
        own_P = part_M.new_empty(self._places, *part_M.shape[1:])
        if self._places:
            dist.reduce_scatter_single(own_P, placed, group=self._group)
        return own_P[: self._num_items]


def global_info_nce(
    content_UD: Tensor,
    id_UD: Tensor,
    item_U: Tensor,
    count_U: Tensor,
    scale: Tensor,
    *,
    popularity_correction: bool = False,
    group: dist.ProcessGroup | None = None,
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
        tile: Rows and columns of a tile; 0 picks for the device.

    Returns:
        Scalar whose mean over the ranks is the loss of the global batch, in nats. Gradients follow the same rule:
        averaged over ranks, as DDP and TorchRec's embedding collectives do, they are those of the global loss.

    Raises:
        ValueError: If the shapes disagree or the items are not int64.
        NumericError: If the scale is not finite.
        ConfigError: If the scale is not positive or above 300.
    """
    check_shapes(content_UD, id_UD, item_U)
    order_U = torch.argsort(item_U, stable=True)
    wants = wants_of(content_UD, id_UD, scale)
    if group is None or dist.get_world_size(group) == 1:
        peers = Alone(item_U[order_U], wants)
    else:
        peers = Ranks(item_U[order_U], wants, group)
    _, distinct_M, copies_V = torch.unique_consecutive(peers.item_M, return_inverse=True, return_counts=True)
    dtype = torch.promote_types(content_UD.dtype, torch.float32)
    weight_M = copies_V.to(dtype).reciprocal()[distinct_M]
    q_M = torch.ones_like(weight_M)
    if popularity_correction:
        count_M = peers.gather(count_U[order_U])
        total_V = torch.zeros_like(copies_V).scatter_add_(0, distinct_M, count_M).to(dtype)
        q_M = (total_V / total_V.mean())[distinct_M]
    return contrast(content_UD[order_U], id_UD[order_U], scale, peers, weight_M, q_M, tile)
