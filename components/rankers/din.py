"""The ranking head: named blocks, their dot products, an MLP.

Shape letters: B rows, G blocks of one width, W that width, P pairs of blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchrec_em3.components.rankers.blocks import Blocks
from torchrec_em3.components.rankers.mlp import MLP, MLPOptions
from torchrec_em3.registry import RANKERS

__all__ = ["DinRanker", "DinRankerOptions"]


@dataclass(frozen=True, kw_only=True)
class DinRankerOptions(MLPOptions):
    """Options of the ranker `din`."""

    ranker: ClassVar[str] = "din"
    interactions: bool = True
    """Also give the MLP the dot product of every two blocks of equal width."""


@RANKERS.register("din", options=DinRankerOptions)
class DinRanker(nn.Module):
    """Logit of a row from its blocks: concatenated, with pairwise dot products, through an MLP.

    Whatever blocks the model has are taken, so ID-only and EM3 share this head. The name says where it is used: behind
    the target attention of DIN, whose result comes in as a block. Source: [ours], the dot products as in DLRM.

    Args:
        options: See `DinRankerOptions`.
        block_dims: Width of each block; its order is the order of the inputs, whatever the order at a call.

    Raises:
        ConfigError: If there is no block or one has no width.
    """

    def __init__(self, options: DinRankerOptions, block_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.blocks = Blocks("din", block_dims)
        by_width: dict[int, list[str]] = {}
        for name, width in block_dims.items():
            by_width.setdefault(width, []).append(name)
        self.groups = [group for group in by_width.values() if options.interactions and len(group) > 1]
        num_products = sum(len(group) * (len(group) - 1) // 2 for group in self.groups)
        self.mlp = MLP(options, self.blocks.total_width + num_products)

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return logits_B.

        Args:
            blocks: [B, block_dims[name]] by name, float.
        """
        inputs = self.blocks.in_order(blocks)
        inputs += [_dot_products(torch.stack([blocks[name] for name in group], dim=1)) for group in self.groups]
        return self.mlp(torch.cat(inputs, dim=1))


def _dot_products(blocks_BGW: Tensor) -> Tensor:
    """Return the dot product of every two different blocks, scaled to the size of their values, [B, P]."""
    groups, width = blocks_BGW.shape[1:]
    products_BGG = torch.bmm(blocks_BGW, blocks_BGW.transpose(1, 2)) * width**-0.5
    first_P, second_P = torch.triu_indices(groups, groups, offset=1, device=blocks_BGW.device)
    return products_BGG[:, first_P, second_P]
