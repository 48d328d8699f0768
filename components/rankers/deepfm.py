"""DeepFM as a ranker: a factorization machine over the blocks beside an MLP.

Shape letters: B rows, G blocks, C their widths together, W width of the factorization machine, K tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.modules.deepfm import FactorizationMachine

from torchrec_em3.components.rankers.blocks import Blocks
from torchrec_em3.components.rankers.mlp import MLP, MLPOptions
from torchrec_em3.registry import RANKERS

__all__ = ["DeepFMRanker", "DeepFMRankerOptions"]


@dataclass(frozen=True, kw_only=True)
class DeepFMRankerOptions(MLPOptions):
    """Options of the ranker `deepfm`."""

    ranker: ClassVar[str] = "deepfm"


@RANKERS.register("deepfm", options=DeepFMRankerOptions)
class DeepFMRanker(nn.Module):
    """Logit of a row from its blocks: first-order term, dot products of every two blocks, and an MLP, summed.

    The dense features, and a block of another width than the common one, enter the dot products through a linear map
    without bias, as a dense field does in a factorization machine; first-order term and MLP read all blocks as they
    are. The dot products are divided by sqrt(W), because content does not start as small as an embedding [ours]. They
    have no weights of their own, so several tasks share them. Source: DeepFM (arXiv 1703.04247).

    Args:
        options: See `DeepFMRankerOptions`.
        block_dims: Width of each block; its order is the order of the inputs, whatever the order at a call.
        num_tasks: Logits of a row.

    Raises:
        ConfigError: If there is no block or one has no width.
    """

    def __init__(self, options: DeepFMRankerOptions, block_dims: Mapping[str, int], num_tasks: int = 1) -> None:
        super().__init__()
        self.blocks = Blocks("deepfm", block_dims)
        self.width = self.blocks.common_width
        embeddings = self.blocks.embeddings
        others = {name: width for name, width in block_dims.items() if name not in embeddings}
        self.embed = nn.ModuleDict({name: nn.Linear(width, self.width, bias=False) for name, width in others.items()})
        # The logit's bias is the MLP's.
        self.first_order = nn.Linear(self.blocks.total_width, num_tasks, bias=False)
        self.second_order = FactorizationMachine()
        self.mlp = MLP(options, self.blocks.total_width, num_tasks)

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return logits_B, or logits_BK for several tasks.

        Args:
            blocks: [B, block_dims[name]] by name, float.
        """
        inputs_BC = torch.cat(self.blocks.in_order(blocks), dim=1)
        logits_BK: Tensor = self.first_order(inputs_BC) + self._dot_products(blocks) + self.mlp(inputs_BC)
        return logits_BK.squeeze(1)

    def _dot_products(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the dot products of every two blocks, scaled to the size of their values, [B, 1]."""
        vectors = [self.embed[name](blocks[name]) if name in self.embed else blocks[name] for name in self.blocks.dims]
        vectors_BWG = torch.stack(vectors, dim=2)
        # TorchRec's module multiplies every two numbers of a row, also two of one block. A dot product multiplies
        # numbers of the same place only, so each place gets a row of its own.
        products = self.second_order([vectors_BWG.flatten(0, 1)])
        return products.view(-1, self.width).sum(1, keepdim=True) * self.width**-0.5
