"""Low-rank adapters in the layers of an encoder above its cut."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from torchrec_em3.errors import ConfigError

__all__ = ["adapt_layers"]


def adapt_layers(suffix: nn.Module, layers: Sequence[nn.Module], rank: int, alpha: int) -> nn.Module:
    """Give adapters to the linear maps and the 1 x 1 convolutions of some layers, and freeze all else.

    In a transformer these are attention and MLP, in EfficientNet-lite0 what widens and narrows a block; a convolution
    that filters each channel by itself has next to no weights. The second matrix of an adapter starts at zero, so that
    the tokens start out as the frozen encoder's. Source: low-rank adaptation [abstract]; where is [ours].

    Args:
        suffix: The layers above the cut; changed.
        layers: Those of them that get adapters.
        rank: Rank of every adapter.
        alpha: Weight of the adapters: each is multiplied by alpha / rank.

    Raises:
        ConfigError: If there is nothing to adapt.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes a second to import: only who uses it pays

    inside = {id(module) for layer in layers for module in layer.modules()}
    targets = [name for name, module in suffix.named_modules() if id(module) in inside and _adaptable(module)]
    if not targets:
        raise ConfigError(
            f"lora found no linear map to adapt in {type(suffix).__name__}; use --model.encoders training last_n"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    adapted: nn.Module = inject_adapter_in_model(config, suffix)
    return adapted


def _adaptable(module: Any) -> bool:
    pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or pointwise
