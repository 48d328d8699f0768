"""MMoE as a ranker: experts that all tasks share, and for each task a gate that mixes them and a tower.

Shape letters: B rows, C width of the input, E experts, H width of an expert's output, K tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import OverArch
from torchrec.modules.mlp import MLP

from torchrec_em3.components.rankers.blocks import CrossedBlocks
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import RANKERS

__all__ = ["MmoeRanker", "MmoeRankerOptions"]


@dataclass(frozen=True, kw_only=True)
class MmoeRankerOptions:
    """Options of the ranker `mmoe`."""

    num_experts: int = 4
    """Experts, each an MLP over the whole input."""
    expert: tuple[int, ...] = (128, 64)
    """Widths of an expert's layers, at least one."""
    tower: tuple[int, ...] = (32,)
    """Widths of the hidden layers of a task's tower, at least one."""
    interactions: bool = True
    """Also give experts and gates the dot product of every two blocks of equal width."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        if self.num_experts < 1:
            raise ConfigError(f"num_experts of the mmoe ranker is {self.num_experts}, must be >= 1")
        for name, widths in (("expert", self.expert), ("tower", self.tower)):
            if any(width < 1 for width in widths):
                raise ConfigError(f"{name} of the mmoe ranker is {widths}, every width must be >= 1")
            if not widths:
                raise ConfigError(f"{name} of the mmoe ranker is empty, must have at least one width")


@RANKERS.register("mmoe", options=MmoeRankerOptions)
class MmoeRanker(nn.Module):
    """Logits of a row from its blocks: each task weighs the same experts in its own way and has a tower of its own.

    Experts and gates read what the MLP of the ranker `din` reads, so the two differ only in what tasks share. A gate is
    a linear map and a softmax over the experts; with one task there is one gate. Source: MMoE (KDD 2018,
    doi 10.1145/3219819.3220007), of TorchRec's MLPs.

    Args:
        options: See `MmoeRankerOptions`.
        block_dims: Width of each block; its order is the order of the inputs, whatever the order at a call.
        num_tasks: Logits of a row.

    Raises:
        ConfigError: If there is no block or one has no width.
    """

    def __init__(self, options: MmoeRankerOptions, block_dims: Mapping[str, int], num_tasks: int = 1) -> None:
        super().__init__()
        self.blocks = CrossedBlocks("mmoe", block_dims, options.interactions)
        width = self.blocks.input_width
        self.gate_shape = (num_tasks, options.num_experts)
        self.experts = nn.ModuleList(MLP(width, list(options.expert)) for _ in range(options.num_experts))
        # The gates of all tasks as one linear map.
        self.gates = nn.Linear(width, num_tasks * options.num_experts, bias=False)
        self.towers = nn.ModuleList(OverArch(options.expert[-1], [*options.tower, 1]) for _ in range(num_tasks))

    def forward(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return logits_B, or logits_BK for several tasks.

        Args:
            blocks: [B, block_dims[name]] by name, float.
        """
        input_BC = self.blocks.as_input(blocks)
        expert_BEH = torch.stack([expert(input_BC) for expert in self.experts], dim=1)
        gate_BKE = self.gates(input_BC).unflatten(1, self.gate_shape).softmax(2)
        mixed_BKH = torch.bmm(gate_BKE, expert_BEH)
        logits = [tower(mixed_BH) for tower, mixed_BH in zip(self.towers, mixed_BKH.unbind(1), strict=True)]
        return torch.cat(logits, dim=1).squeeze(1)
