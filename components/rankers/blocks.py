"""The blocks that a ranker was built for, and the input that DIN and MMoE make of them.

Shape letters: B rows, C width of the input, G blocks of one width, W that width, P pairs of blocks.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from torchrec_em3.errors import ConfigError

__all__ = ["Blocks", "CrossedBlocks"]

_NUMBERS = "context"
"""The block of the dense features: numbers side by side and no embedding, even if there are as many as that is wide."""


class Blocks:
    """Names and widths of a ranker's blocks; their order is the order of the inputs, whatever the order at a call."""

    def __init__(self, ranker: str, dims: Mapping[str, int]) -> None:
        """Note the blocks.

        Args:
            ranker: Name of the ranker, for messages.
            dims: Width of each block.

        Raises:
            ConfigError: If there is no block or one has no width.
        """
        if not dims or min(dims.values()) < 1:
            raise ConfigError(f"the {ranker} ranker needs blocks of width >= 1, not {dict(dims)}")
        self.dims = dict(dims)
        self.total_width = sum(self.dims.values())

    @property
    def common_width(self) -> int:
        """The width that most blocks have, the smallest of several such: that of the embeddings."""
        counts = Counter(width for name, width in self.dims.items() if name != _NUMBERS) or Counter(self.dims.values())
        return min(counts, key=lambda width: (-counts[width], width))

    @property
    def embeddings(self) -> list[str]:
        """Names of the blocks that are embeddings of the common width."""
        common = self.common_width
        return [name for name, width in self.dims.items() if width == common and name != _NUMBERS]

    def in_order(self, blocks: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the tensors of a call in the order of the inputs."""
        return [blocks[name] for name in self.dims]


class CrossedBlocks(Blocks):
    """Blocks concatenated, followed by the dot product of every two embeddings of equal width [ours, as in DLRM]."""

    def __init__(self, ranker: str, dims: Mapping[str, int], interactions: bool) -> None:
        """Note the blocks.

        Args:
            ranker: Name of the ranker, for messages.
            dims: Width of each block.
            interactions: Whether there are dot products at all.

        Raises:
            ConfigError: As `Blocks`.
        """
        super().__init__(ranker, dims)
        by_width: dict[int, list[str]] = {}
        for name, width in dims.items():
            if name == _NUMBERS:
                continue
            by_width.setdefault(width, []).append(name)
        self.groups = [group for group in by_width.values() if interactions and len(group) > 1]
        self.input_width = self.total_width + sum(len(group) * (len(group) - 1) // 2 for group in self.groups)

    def as_input(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return the tensors of a call as one input_BC."""
        inputs = self.in_order(blocks)
        inputs += [_dot_products(torch.stack([blocks[name] for name in group], dim=1)) for group in self.groups]
        return torch.cat(inputs, dim=1)


def _dot_products(blocks_BGW: Tensor) -> Tensor:
    """Return the dot product of every two different blocks, scaled to the size of their values, [B, P]."""
    groups, width = blocks_BGW.shape[1:]
    products_BGG = torch.bmm(blocks_BGW, blocks_BGW.transpose(1, 2)) * width**-0.5
    first_P, second_P = torch.triu_indices(groups, groups, offset=1, device=blocks_BGW.device)
    return products_BGG[:, first_P, second_P]
