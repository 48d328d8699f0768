"""The ranking head: named blocks, their dot products, an MLP.

Shape letters: B rows, K tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from torchrec_em3.components.rankers.blocks import CrossedBlocks
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
        num_tasks: Logits of a row.

    Raises:
        ConfigError: If there is no block or one has no width.
    """

    def __init__(self, options: DinRankerOptions, block_dims: Mapping[str, int], num_tasks: int = 1) -> None:
        super().__init__()
        self.blocks = CrossedBlocks("din", block_dims, options.interactions)
        self.mlp = MLP(options, self.blocks.input_width, num_tasks)

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return logits_B, or logits_BK for several tasks.

        Args:
            blocks: [B, block_dims[name]] by name, float.
        """
        logits_BK: Tensor = self.mlp(self.blocks.as_input(blocks))
        return logits_BK.squeeze(1)
