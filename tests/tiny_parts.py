"""Encoders without weights, and a user's own tower: small enough for tests, and registered as a plug-in would be."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import ENCODERS, TOWERS, NoOptions


@ENCODERS.register("tiny_text")
class TinyTextEncoder:
    """A fixed pseudo-random vector for each word."""

    modality, dim, max_tokens, source = "text", 8, 6, "tiny_text"

    def __init__(self, options: NoOptions) -> None:
        pass

    def encode(self, inputs: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(len(inputs), self.max_tokens, self.dim)
        lengths = torch.ones(len(inputs), dtype=torch.int64)
        for row, text in enumerate(inputs):
            words = text.lower().split()[: self.max_tokens]
            lengths[row] = max(1, len(words))
            for place, word in enumerate(words):
                digest = hashlib.sha256(word.encode()).digest()[: self.dim]
                tokens[row, place] = torch.from_numpy(np.frombuffer(digest, np.uint8).astype(np.float32) / 128 - 1)
        return tokens, lengths

    def pieces(self, text: str) -> list[str]:
        return text.lower().split()[: self.max_tokens] or [""]


@ENCODERS.register("tiny_image")
class TinyImageEncoder:
    """Mean colours of the four quarters."""

    modality, dim, max_tokens, source = "image", 3, 4, "tiny_image"

    def __init__(self, options: NoOptions) -> None:
        pass

    def encode(self, inputs: Sequence[Image]) -> tuple[Tensor, Tensor]:
        pixels = np.stack([np.asarray(image.convert("RGB").resize((2, 2)), dtype=np.float32) for image in inputs])
        tokens = torch.from_numpy(pixels.reshape(len(inputs), 4, 3) / 128 - 1)
        return tokens, torch.full((len(inputs),), 4)


@dataclass(frozen=True, kw_only=True)
class MeanTowerOptions:
    """Options of the test's own tower."""

    scale: float = 1.0
    """Factor on the output."""

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ConfigError(f"--model.content_options.scale is {self.scale}, must be positive")


@TOWERS.register("test_mean", options=MeanTowerOptions)
class MeanTower(nn.Module):
    """Mean of projected tokens, as a user might write it."""

    def __init__(
        self, options: MeanTowerOptions, token_dims: Mapping[str, int], token_counts: Mapping[str, int], width: int
    ) -> None:
        super().__init__()
        self.scale = options.scale
        self.project = nn.ModuleDict({name: nn.Linear(dim, width) for name, dim in token_dims.items()})

    def forward(self, tokens: Mapping[str, ModalityTokens]) -> Tensor:
        total = 0.0
        for name, (tokens_UTD, valid_UT) in tokens.items():
            weight_UT1 = valid_UT[:, :, None].float()
            mean_UD = (torch.where(valid_UT[:, :, None], tokens_UTD, 0.0)).sum(1) / weight_UT1.sum(1).clamp_min(1)
            total = total + self.project[name](mean_UD)
        return self.scale * total
