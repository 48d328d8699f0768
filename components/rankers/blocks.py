"""The blocks that a ranker was built for."""

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from torchrec_em3.errors import ConfigError

__all__ = ["Blocks"]


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
        counts = Counter(self.dims.values())
        return min(counts, key=lambda width: (-counts[width], width))

    def in_order(self, blocks: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the tensors of a call in the order of the inputs."""
        return [blocks[name] for name in self.dims]
