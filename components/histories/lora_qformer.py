"""History content through the whole tower, of which only low-rank adapters are trained.

Shape letters: V distinct history items, D width of the model.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.histories.shared import any_token
from torchrec_em3.components.interfaces import HistoryItems, ItemSource
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import HISTORIES

__all__ = ["LoraTowerHistory", "LoraTowerHistoryOptions"]


@dataclass(frozen=True, kw_only=True)
class LoraTowerHistoryOptions:
    """Options of the history content `lora_qformer`."""

    rank: int = 8
    """Rank of every adapter."""
    alpha: int = 16
    """Weight of the adapters: each is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout rate on what enters an adapter, in [0, 1)."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        if self.rank < 1:
            raise ConfigError(f"rank of the lora_qformer history is {self.rank}, must be >= 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of the lora_qformer history is {self.dropout}, must be in [0, 1)")


@HISTORIES.register("lora_qformer", options=LoraTowerHistoryOptions)
class LoraTowerHistory(nn.Module):
    """Content of history items by a copy of the target's tower: its weights frozen and kept equal, adapters trained.

    Adapters go to the linear maps that the tower names in `lora_targets`, or to all of them if it names none. They
    start at zero, so that a history item starts out as the target branch would see it. Costs a forward pass of the
    tower for every distinct history item, and a backward pass through its activations.

    Source: low-rank adaptation of content interest modelling [abstract]; which maps are adapted is not public: [ours].

    Args:
        options: See `LoraTowerHistoryOptions`.
        tower: The target branch's tower; copied, not kept.
        width: D.

    Raises:
        ConfigError: If the tower has no linear map to adapt.
    """

    uses_bank: ClassVar[bool] = False

    def __init__(self, options: LoraTowerHistoryOptions, tower: nn.Module, width: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # takes a second to import: only who uses it pays

        super().__init__()
        linear = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear)]
        targets = list(getattr(tower, "lora_targets", linear))
        if not targets:
            raise ConfigError(
                f"history lora_qformer found no linear map to adapt in {type(tower).__name__}; take cache"
            )
        config = LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=targets
        )
        self.tower = inject_adapter_in_model(config, copy.deepcopy(tower))
        _check_adapted(self.tower, targets)

    def forward(self, source: ItemSource, tower: Any, projection: nn.Linear) -> HistoryItems:
        """Return the copy's output under the projection; valid are the items that have a token of any modality.

        Args:
            source: The V distinct history items.
            tower: The target branch's tower, whose weights the copy takes over; not trained from here.
            projection: The target branch's map from the tower's output; only read.
        """
        self._synchronise(tower)
        # Embeddings of codes and trained encoders are weights of the target branch, which is not trained from here.
        with torch.no_grad():
            tokens = {name: ModalityTokens(rows.detach(), valid) for name, (rows, valid) in source.tokens().items()}
        bias_D = None if projection.bias is None else projection.bias.detach()
        return HistoryItems(self.tower(tokens), any_token(tokens), projection.weight.detach(), bias_D)

    @torch.no_grad()
    def _synchronise(self, tower: nn.Module) -> None:
        """Give the copy the target tower's current weights and buffers."""
        current = dict(_state(tower))
        for name, mine in _state(self.tower):
            if "lora_" not in name:
                mine.copy_(current[name.replace(".base_layer", "")])


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _check_adapted(tower: nn.Module, targets: list[str]) -> None:
    """Raise ConfigError for a target that got no adapter."""
    adapted = {name.split(".lora_")[0] for name, _ in tower.named_parameters() if ".lora_" in name}
    missing = sorted(set(targets) - adapted)
    if missing:
        raise ConfigError(f"history lora_qformer could not adapt {missing[0]} of the content tower: not a linear map")
