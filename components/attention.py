"""The one attention of this project: four linear maps around softmax(q k) v.

It is our own because LoRA on PyTorch's built-in modules has no effect: fused paths of `nn.TransformerEncoderLayer` skip
it in evaluation, and `nn.MultiheadAttention` never calls its output layer. Here every map is called as a module.

Shape letters: U sequences, R query rows, T keys of one group, K all keys, H heads, E width of a head, D = H * E,
P = H * R.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.errors import ConfigError

__all__ = ["Attention", "Keys"]


class Keys(NamedTuple):
    """One group of rows to attend to.

    Attributes:
        rows_UTD: Finite everywhere, also where masked.
        valid_UT: False leaves a row out; None means that all count.
    """

    rows_UTD: Tensor
    valid_UT: Tensor | None = None


class Attention(nn.Module):
    """Multi-head attention with separate query and key inputs.

    Key and value maps have no bias: in the softmax a key's bias cancels, and a value's is one with the output's.

    Where there are few query rows (H * R < D) the key map is applied to the queries and the value map to the weighted
    sums, not to every key: the same result (the products only associate differently) from fewer operations and without
    K and V in memory. Source of that: [ours].

    Args:
        width: D, of queries, keys and the result.
        num_heads: H; must divide D.
        epsilon: Added to the width of a head under the square root that scales the scores.

    Raises:
        ConfigError: If `num_heads` does not divide `width`.
    """

    def __init__(self, width: int, num_heads: int, epsilon: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ConfigError(f"num_heads is {num_heads}, must divide the width {width} of the model")
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.scale = (self.head_dim + epsilon) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, query_URD: Tensor, keys: Sequence[Keys]) -> Tensor:
        """Return attended_URD.

        Args:
            query_URD: Rows to update, float; [1, R, D] where all sequences share them.
            keys: What they attend to, in groups that are never copied into one. A sequence without any valid key gets
                the bias of the output map.
        """
        query_URHE = self._heads(self.query(query_URD))
        few = self.num_heads * query_URD.shape[1] < query_URD.shape[2]
        attended_URHE = self._absorbed(query_URHE, keys) if few else self._projected(query_URHE, keys)
        return self.output(attended_URHE.flatten(2))

    def weights(self, query_URD: Tensor, keys: Sequence[Keys]) -> Tensor:
        """Return the weight of each key for each query row, [U, H, R, K] over all groups, for a look at few sequences.

        They sum to 1, and are 0 where masked; all are 0 where a sequence has no valid key.

        Args:
            query_URD: As in `forward`.
            keys: As in `forward`.
        """
        query_URHE = self._heads(self.query(query_URD))
        key_UKHE = self._heads(torch.cat([self.key(group.rows_UTD) for group in keys], dim=1))
        score_UKHR = torch.einsum("urhe,ukhe->ukhr", query_URHE.expand(len(key_UKHE), -1, -1, -1), key_UKHE)
        weight_UKP = _masked_softmax(score_UKHR.flatten(2) * self.scale, keys)
        return weight_UKP.view(score_UKHR.shape).permute(0, 2, 3, 1)

    def _projected(self, query_URHE: Tensor, keys: Sequence[Keys]) -> Tensor:
        """Project every key to K and V."""
        key_UKHE = self._heads(torch.cat([self.key(group.rows_UTD) for group in keys], dim=1))
        value_UKHE = self._heads(torch.cat([self.value(group.rows_UTD) for group in keys], dim=1))
        valid_UK = _valid(keys)
        attended_UHRE = functional.scaled_dot_product_attention(
            query_URHE.expand(key_UKHE.shape[0], -1, -1, -1).transpose(1, 2),
            key_UKHE.transpose(1, 2),
            value_UKHE.transpose(1, 2),
            attn_mask=None if valid_UK is None else valid_UK[:, None, None],
            scale=self.scale,
        )
        return attended_UHRE.transpose(1, 2)

    def _absorbed(self, query_URHE: Tensor, keys: Sequence[Keys]) -> Tensor:
        """Score keys by queries mapped back through the key map, and map only the weighted sums of keys to values.

        The maps are read off by calling them on the identity, so that an adapter around them has its share.
        """
        (shared, rows, heads, _), width = query_URHE.shape, self.num_heads * self.head_dim
        identity_DD = torch.eye(width, device=query_URHE.device, dtype=keys[0].rows_UTD.dtype)
        key_DHE = self._heads(self.key(identity_DD))
        value_DHE = self._heads(self.value(identity_DD))
        probe_UPD = torch.einsum("urhe,dhe->uhrd", query_URHE * self.scale, key_DHE).flatten(1, 2)
        if shared == 1:
            score_UKP = torch.cat([functional.linear(group.rows_UTD, probe_UPD[0]) for group in keys], dim=1)
        else:
            score_UKP = torch.cat([torch.bmm(group.rows_UTD, probe_UPD.transpose(1, 2)) for group in keys], dim=1)
        weight_UKP = _masked_softmax(score_UKP, keys)
        parts = torch.split(weight_UKP, [group.rows_UTD.shape[1] for group in keys], dim=1)
        pooled = [torch.bmm(part.transpose(1, 2), group.rows_UTD) for part, group in zip(parts, keys, strict=True)]
        pooled_UPD = functools.reduce(torch.add, pooled)
        pooled_UHRD = pooled_UPD.view(pooled_UPD.shape[0], heads, rows, width)
        return torch.einsum("uhrd,dhe->urhe", pooled_UHRD, value_DHE)

    def _heads(self, projected: Tensor) -> Tensor:
        """Return [..., D] as [..., H, E]."""
        return projected.view(*projected.shape[:-1], self.num_heads, self.head_dim)


def _valid(keys: Sequence[Keys]) -> Tensor | None:
    """Return the mask of all groups together, or None where every key counts."""
    if all(group.valid_UT is None for group in keys):
        return None
    masks = [
        torch.ones(group.rows_UTD.shape[:2], dtype=torch.bool, device=group.rows_UTD.device)
        if group.valid_UT is None
        else group.valid_UT
        for group in keys
    ]
    return torch.cat(masks, dim=1)


def _masked_softmax(score_UKP: Tensor, keys: Sequence[Keys]) -> Tensor:
    """Return the softmax over K; exactly 0 where masked, also where all of a sequence's keys are."""
    valid_UK = _valid(keys)
    if valid_UK is None:
        return score_UKP.softmax(1)
    hidden_UK1 = ~valid_UK[:, :, None]
    weight_UKP = score_UKP.masked_fill(hidden_UK1, torch.finfo(score_UKP.dtype).min).softmax(1)
    some_always_valid = any(group.valid_UT is None for group in keys)
    return weight_UKP if some_always_valid else weight_UKP.masked_fill(hidden_UK1, 0.0)
