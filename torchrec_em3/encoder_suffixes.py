"""The encoders' layers above the cut of the token store: run in every step, trained as far as the config says.

Shape letters: U items, K of them that have the modality, P stored rows of an item, W width of such a row, T tokens,
D width of a token.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.encoders.adapters import adapt_layers
from torchrec_em3.config import EncodersConfig, EncoderTraining
from torchrec_em3.datasets.encoder_record import rebuild_encoder
from torchrec_em3.errors import ConfigError
from torchrec_em3.schema import FeatureSchema, ModalitySpec

__all__ = ["EncoderSuffixes", "build_suffixes", "check_bfloat16", "select_trained"]

CHUNK = 16
"""Items that go through a suffix together; larger chunks leave a CPU's cache."""
CUDA_CHUNK = 512
"""As above, where the device needs much work at a time."""


class EncoderSuffixes(nn.Module):
    """What makes tokens for the tower out of the rows at which the encoders were cut; modalities without cut pass.

    Always in evaluation mode: dropout is off and batch norm keeps the statistics of the pretraining, so that content
    is the same function of an item in training, in the bank and in evaluation [ours]. Items that lack the modality
    cost nothing, and neither does what lies beyond the longest text of a chunk.

    Args:
        suffixes: Modules by modality, each a `components.interfaces.EncoderSuffix`.
        outputs: What each of them gives for an item.
        bfloat16: Whether they run under autocast to bfloat16.
    """

    def __init__(self, suffixes: Mapping[str, nn.Module], outputs: Mapping[str, ModalitySpec], bfloat16: bool) -> None:
        super().__init__()
        self.suffixes = nn.ModuleDict(suffixes)
        self.outputs = dict(outputs)
        self.use_bfloat16 = bfloat16
        self.eval()

    def train(self, mode: bool = True) -> "EncoderSuffixes":
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def read_schema(self, stored: FeatureSchema) -> FeatureSchema:
        """Return the schema of a token store with its modalities as the tower reads them."""
        read = tuple(self.outputs.get(modality.name, modality) for modality in stored.modalities)
        return dataclasses.replace(stored, modalities=read)

    def forward(self, stored: Mapping[str, ModalityTokens]) -> dict[str, ModalityTokens]:
        """Return the tokens of the same items as the tower reads them."""
        return {name: self._run(name, tokens) if name in self.suffixes else tokens for name, tokens in stored.items()}

    def _run(self, name: str, stored: ModalityTokens) -> ModalityTokens:
        """Run one suffix over the items that have the modality, those of similar length together."""
        suffix, spec = self.suffixes[name], self.outputs[name]
        rows_UPW, valid_UP = stored
        precision = next(suffix.parameters()).dtype
        if rows_UPW.is_floating_point():
            rows_UPW = rows_UPW.to(precision)
        length_U = valid_UP.sum(1)
        present_K = length_U.argsort(stable=True)[int((length_U == 0).sum()) :]
        if not len(present_K) and not torch.is_grad_enabled():
            shape = (len(length_U), spec.max_tokens)
            shown_UT = torch.zeros(shape, dtype=torch.bool, device=rows_UPW.device)
            return ModalityTokens(rows_UPW.new_zeros(*shape, spec.dim, dtype=precision), shown_UT)
        with torch.autocast(rows_UPW.device.type, torch.bfloat16, enabled=self.use_bfloat16):
            parts = [
                suffix(rows_UPW[part_k], valid_UP[part_k])
                for part_k in torch.split(present_K, CUDA_CHUNK if rows_UPW.is_cuda else CHUNK)
                if len(part_k)
            ] or [_nothing(suffix, rows_UPW)]
        made_KTD, made_KT = (torch.cat(column) for column in zip(*parts, strict=True))
        tokens_UTD = made_KTD.new_zeros(len(length_U), *made_KTD.shape[1:], dtype=precision)
        shown_UT = made_KT.new_zeros(tokens_UTD.shape[:2])
        return ModalityTokens(
            tokens_UTD.index_copy(0, present_K, made_KTD.to(precision)), shown_UT.index_copy(0, present_K, made_KT)
        )


def _nothing(suffix: nn.Module, rows_UPW: Tensor) -> ModalityTokens:
    """Return the tokens of no items, such that every parameter gets a gradient of zero: DDP waits for it."""
    rows_1PW = rows_UPW.new_zeros(1, *rows_UPW.shape[1:])
    tokens_1TD, valid_1T = suffix(rows_1PW, torch.arange(rows_1PW.shape[1], device=rows_1PW.device)[None] == 0)
    return ModalityTokens(tokens_1TD[:0], valid_1T[:0])


def build_suffixes(
    config: EncodersConfig, modalities: Mapping[str, Mapping[str, Any]], data: str
) -> EncoderSuffixes | None:
    """Return the layers above the cuts of a prepared folder, with the weights that wrote it; None if it has no cut.

    Args:
        config: What is trained of them.
        modalities: What the folder's meta.json says of each modality.
        data: The folder, for messages.

    Raises:
        ConfigError: If what shall be trained is not above the cut, or the weights are not those of the folder.
    """
    for name in ("text", "image"):
        _check(name, getattr(config, name), modalities.get(name, {}), data)
    suffixes, outputs = {}, {}
    for name, recorded in sorted(modalities.items()):
        if "cut" in recorded:
            encoder: Any = rebuild_encoder(name, recorded)
            suffixes[name] = select_trained(encoder.suffix(recorded["cut"]), getattr(config, name))
            outputs[name] = ModalitySpec(name, encoder.dim, encoder.max_tokens)
    return EncoderSuffixes(suffixes, outputs, config.bfloat16) if suffixes else None


def _check(name: str, wanted: EncoderTraining, recorded: Mapping[str, Any], data: str) -> None:
    """Refuse a training that the token store leaves no room for."""
    if wanted.training == "frozen":
        return
    asked = f"--model.encoders.{name}.training {wanted.training}"
    if not recorded:
        raise ConfigError(f"{asked}: {data} has no {name}; prepare it with a {name} encoder")
    if "cut" not in recorded:
        raise ConfigError(
            f"{asked}: {data} holds what the whole {name} encoder '{recorded['encoder']}' gave, so none of its layers "
            f"is left to train; prepare the data again with --{name}_cut"
        )
    cut, layers = recorded["cut"], recorded["layers"]
    if wanted.training == "full" and cut:
        raise ConfigError(
            f"{asked} needs raw inputs, but {data} is cut after layer {cut} of {layers}; prepare the data again with "
            f"--{name}_cut 0, or use last_n"
        )
    if wanted.layers > layers - cut:
        raise ConfigError(
            f"--model.encoders.{name}.layers is {wanted.layers}, but {data} is cut after layer {cut} of {layers}, so "
            f"{layers - cut} are left; lower it, or prepare the data again with --{name}_cut "
            f"{max(layers - wanted.layers, 0)}"
        )


def select_trained(suffix: nn.Module, wanted: EncoderTraining) -> nn.Module:
    """Return the suffix with gradients where `wanted` says, and with low-rank adapters if it says so."""
    suffix.requires_grad_(wanted.training == "full")
    layers: Any = suffix.layers
    top = list(layers)[-wanted.layers :]
    if wanted.training == "lora":
        return adapt_layers(suffix, top, wanted.rank, wanted.alpha)
    if wanted.training == "last_n":
        for layer in top:
            layer.requires_grad_(True)
    return suffix


def check_bfloat16(config: EncodersConfig, device: torch.device) -> None:
    """Raise ConfigError if bfloat16 is wanted and the device has no instructions for it."""
    cpu: Any = torch.cpu  # those with AMX have AVX512_BF16, too
    cuda = device.type == "cuda"
    has = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu._is_avx512_bf16_supported()
    if config.bfloat16 and not has:
        raise ConfigError(
            f"--model.encoders.bfloat16 needs CUDA from sm_80, or a CPU with AVX512_BF16 or AMX, which this "
            f"{device.type} is not; leave it off"
        )
