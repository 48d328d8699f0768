"""Low-rank adapters of a trained model in peft's own format, a folder each, so that peft puts them on other models."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from torchrec_em3.item_tokens import ItemTokens
from torchrec_em3.model import EM3Model
from torchrec_em3.tensor_files import make_readable

__all__ = ["ADAPTERS_FOLDER", "save_adapter", "save_adapters"]

ADAPTERS_FOLDER = "adapters"
WEIGHTS_FILE = "adapter_model.safetensors"
"""The name that peft looks for."""
_PREFIX = "base_model.model."
"""What stands before the names of the adapted model's modules in a file of peft's."""


def save_adapters(folder: Path, model: EM3Model) -> None:
    """Write each set of adapters that the model has, into `adapters/text`, `adapters/image` and `adapters/history`.

    Those of the history belong to the tower.

    Args:
        folder: Where `adapters` goes; nothing is made without adapters.
        model: The model, on the CPU.
    """
    for name, adapted in _adapted(model):
        save_adapter(folder / ADAPTERS_FOLDER / name, adapted)


def save_adapter(folder: Path, adapted: nn.Module) -> None:
    """Write the adapters of one module.

    They are named by the modules of the whole encoder, where `adapted` is the part above a cut and knows these names
    (`name_in_encoder`), else by its own.
    """
    from peft import get_peft_model_state_dict  # takes a second to import: only who has adapters pays

    rename = getattr(adapted, "name_in_encoder", str)
    configs: Any = adapted.peft_config
    config = copy.copy(configs["default"])
    config.target_modules = {rename(target) for target in config.target_modules}
    config.inference_mode = True
    config.save_pretrained(str(folder))
    weights = {_PREFIX + rename(name): value for name, value in get_peft_model_state_dict(adapted).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    make_readable(folder / WEIGHTS_FILE)


def _adapted(model: EM3Model) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that peft has put adapters in."""
    if model.content is None:
        return
    found: dict[str, nn.Module] = {}
    if isinstance(model.content.tokens, ItemTokens) and model.content.tokens.encoders is not None:
        found |= dict(model.content.tokens.encoders.suffixes.items())
    if isinstance(model.content.history, nn.Module):
        found |= {"history": getattr(model.content.history, "tower", nn.Identity())}
    yield from ((name, module) for name, module in found.items() if hasattr(module, "peft_config"))
