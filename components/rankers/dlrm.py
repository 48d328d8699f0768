"""DLRM as a ranker, from the parts of TorchRec's own model.

Shape letters: B rows, G blocks of the common width, W that width, C width of the other blocks together,
K tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionArch, OverArch

from torchrec_em3.components.rankers.blocks import Blocks
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import RANKERS

__all__ = ["DlrmRanker", "DlrmRankerOptions"]


@dataclass(frozen=True, kw_only=True)
class DlrmRankerOptions:
    """Options of the ranker `dlrm`."""

    bottom: tuple[int, ...] = (128,)
    """Widths of the bottom MLP's layers before the one of the common width."""
    top: tuple[int, ...] = (256, 128, 64)
    """Widths of the top MLP's hidden layers, at least one."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        for name, widths in (("bottom", self.bottom), ("top", self.top)):
            if any(width < 1 for width in widths):
                raise ConfigError(f"{name} of the dlrm ranker is {widths}, every width must be >= 1")
        if not self.top:
            raise ConfigError("top of the dlrm ranker is empty, must have at least one width")


@RANKERS.register("dlrm", options=DlrmRankerOptions)
class DlrmRanker(nn.Module):
    """Logit of a row from the dot products of its blocks: bottom MLP, pairwise interactions, top MLP.

    The first block, which is the user's, and whatever is no embedding stand where DLRM has dense features:
    concatenated, they pass the bottom MLP to one vector of the common width. The top MLP sees that vector and the dot
    product of every two vectors, not the vectors themselves. Source: DLRM (arXiv 1906.00091); that the user is among
    the dense features is ours: else nothing of the user reaches the top MLP but by dot products.

    Args:
        options: See `DlrmRankerOptions`.
        block_dims: Width of each block; its order is the order of the inputs, whatever the order at a call.
        num_tasks: Logits of a row.

    Raises:
        ConfigError: If nothing is left to interact with the first block, or a block has no width.
    """

    def __init__(self, options: DlrmRankerOptions, block_dims: Mapping[str, int], num_tasks: int = 1) -> None:
        super().__init__()
        first, *others = Blocks("dlrm", block_dims).dims
        beside = Blocks("dlrm", {name: block_dims[name] for name in others} or block_dims)
        width = beside.common_width
        self.sparse = [name for name in beside.embeddings if name != first]
        self.dense = [name for name in block_dims if name not in self.sparse]
        if not self.sparse:
            raise ConfigError(
                f"the dlrm ranker needs an embedding beside '{first}' to interact, not {dict(block_dims)}"
            )
        dense_width = sum(block_dims[name] for name in self.dense)
        num_vectors = 1 + len(self.sparse)
        self.bottom = DenseArch(dense_width, [*options.bottom, width])
        self.interaction = InteractionArch(len(self.sparse))
        self.top = OverArch(width + num_vectors * (num_vectors - 1) // 2, [*options.top, num_tasks])

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return logits_B, or logits_BK for several tasks.

        Args:
            blocks: [B, block_dims[name]] by name, float.
        """
        dense_BC = torch.cat([blocks[name] for name in self.dense], dim=1)
        sparse_BGW = torch.stack([blocks[name] for name in self.sparse], dim=1)
        logits_BK: Tensor = self.top(self.interaction(self.bottom(dense_BC), sparse_BGW))
        return logits_BK.squeeze(1)
