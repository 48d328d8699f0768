"""EfficientNet-lite0 cut after a block: pixels, lower blocks and upper blocks.

Shape letters: n pictures, U items, C channels, S side of a picture or a feature map, P stored rows of an item, W width
of a stored row, T tokens, D width of a token.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from PIL.Image import Image
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.encoders.efficientnet import EfficientNetLite0

__all__ = ["ImageSuffix", "Pixels", "lower_blocks", "normalise"]


def normalise(pixels_nHWC: Tensor) -> Tensor:
    """Return RGB bytes as EfficientNet-lite reads them, [n, 3, H, W]."""
    return (pixels_nHWC.permute(0, 3, 1, 2).float() - 127.0) / 128.0


def lower_blocks(model: EfficientNetLite0, cut: int) -> EfficientNetLite0:
    """Return a copy of the model that ends after block `cut`; its tokens are the places of that feature map."""
    part = copy.deepcopy(model)
    part.blocks = nn.Sequential(*list(part.blocks)[:cut])
    return part


class Pixels:
    """What an image encoder reads: the bytes of a resized picture, one line of it a row."""

    modality, dtype = "image", torch.uint8

    def __init__(self, resize: Callable[[Sequence[Image]], Tensor], size: int) -> None:
        """Store the pictures that `resize` returns, bytes [n, size, size, 3]."""
        self.max_tokens, self.dim, self.source = size, 3 * size, ""
        self._resize = resize

    def encode(self, inputs: Sequence[str] | Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Return the pictures [n, size, 3 * size] and the numbers of their lines [n]."""
        pixels_nSSC = self._resize(cast("Sequence[Image]", inputs))
        return pixels_nSSC.flatten(2), torch.full((len(inputs),), self.max_tokens, dtype=torch.int64)


class ImageSuffix(nn.Module):
    """The blocks above a cut.

    Args:
        model: The whole model; copied, not kept.
        cut: Blocks below; 0 takes the stem in as well, and reads pixels.
    """

    def __init__(self, model: EfficientNetLite0, cut: int) -> None:
        super().__init__()
        self.stem = None if cut else copy.deepcopy(model.stem)
        self.layers = nn.ModuleList(copy.deepcopy(list(model.blocks)[cut:]))
        self._cut = cut

    def name_in_encoder(self, name: str) -> str:
        """Return what a module of a block here, or a weight of it, is called in the whole encoder."""
        number, rest = name.removeprefix("layers.").split(".", 1)
        return f"blocks.{int(number) + self._cut}.{rest}"

    def forward(self, rows_UPW: Tensor, valid_UP: Tensor) -> ModalityTokens:
        """Return the tokens [U, T, D] of the last block."""
        if self.stem is None:
            side = math.isqrt(rows_UPW.shape[1])
            features_UCSS = rows_UPW.transpose(1, 2).reshape(len(rows_UPW), -1, side, side)
        else:
            # The stem's own precision, so that it can be checked in double.
            pixels_UCSS = normalise(rows_UPW.reshape(*rows_UPW.shape[:2], -1, 3))
            features_UCSS = self.stem(pixels_UCSS.to(self.stem.conv.weight.dtype))
        for block in self.layers:
            features_UCSS = block(features_UCSS)
        tokens_UTD = features_UCSS.flatten(2).transpose(1, 2)
        return ModalityTokens(tokens_UTD, valid_UP[:, :1].expand(-1, tokens_UTD.shape[1]))
