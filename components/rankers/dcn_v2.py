"""DCN V2 as a ranker: TorchRec's low-rank cross network beside an MLP.

Shape letters: B rows, C width of all blocks together, K tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import LowRankCrossNet

from torchrec_em3.components.rankers.blocks import Blocks
from torchrec_em3.components.rankers.mlp import MLP, MLPOptions
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import RANKERS

__all__ = ["DcnV2Ranker", "DcnV2RankerOptions"]


@dataclass(frozen=True, kw_only=True)
class DcnV2RankerOptions(MLPOptions):
    """Options of the ranker `dcn_v2`."""

    ranker: ClassVar[str] = "dcn_v2"
    cross_layers: int = 3
    """Cross layers; each raises the degree of the products of inputs by one."""
    rank: int = 64
    """Rank of each cross layer's matrix; TorchRec advises a quarter of the blocks' total width."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        super().__post_init__()
        for name in ("cross_layers", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of the dcn_v2 ranker is {getattr(self, name)}, must be >= 1")


@RANKERS.register("dcn_v2", options=DcnV2RankerOptions)
class DcnV2Ranker(nn.Module):
    """Logit of a row from its blocks: a cross network and an MLP side by side, summed.

    Both read all blocks concatenated, so blocks of any width take part in the crosses as they are. The linear map over
    both outputs is split in two: `cross_logit`, and the last layer of the MLP. Source: DCN V2 (arXiv 2008.13535), its
    parallel form with low-rank matrices.

    Args:
        options: See `DcnV2RankerOptions`.
        block_dims: Width of each block; its order is the order of the inputs, whatever the order at a call.
        num_tasks: Logits of a row.

    Raises:
        ConfigError: If there is no block or one has no width.
    """

    def __init__(self, options: DcnV2RankerOptions, block_dims: Mapping[str, int], num_tasks: int = 1) -> None:
        super().__init__()
        self.blocks = Blocks("dcn_v2", block_dims)
        width = self.blocks.total_width
        self.cross = LowRankCrossNet(width, options.cross_layers, options.rank)
        # The logit's bias is the MLP's.
        self.cross_logit = nn.Linear(width, num_tasks, bias=False)
        self.mlp = MLP(options, width, num_tasks)

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return logits_B, or logits_BK for several tasks.

        Args:
            blocks: [B, block_dims[name]] by name, float.
        """
        inputs_BC = torch.cat(self.blocks.in_order(blocks), dim=1)
        logits_BK: Tensor = self.cross_logit(self.cross(inputs_BC)) + self.mlp(inputs_BC)
        return logits_BK.squeeze(1)
