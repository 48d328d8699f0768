"""Encoders cut in two: what lies below the cut runs once per item, what lies above it can be trained."""

from typing import Any, cast

from torchrec_em3.components.interfaces import CuttableEncoder, TokenEncoder
from torchrec_em3.errors import ConfigError

__all__ = ["check_cut"]


def check_cut(encoder: TokenEncoder, name: str, cut: int) -> CuttableEncoder:
    """Return `encoder` as one that can be cut after layer `cut`.

    Args:
        encoder: Any encoder; one that offers no cut has no attribute `layers`, or 0 there.
        name: Its registered name, for the message.
        cut: Layers below the cut, counted from the inputs.

    Raises:
        ConfigError: If it cannot be cut there.
    """
    layers = getattr(cast(Any, encoder), "layers", 0)
    modality = encoder.modality
    if not layers:
        raise ConfigError(
            f"--{modality}_cut {cut}: encoder '{name}' ({encoder.source}) cannot be cut; leave --{modality}_cut out, "
            "its tokens are then frozen"
        )
    if not 0 <= cut < layers:
        raise ConfigError(
            f"--{modality}_cut is {cut}, must be from 0 (raw inputs) to {layers - 1}: encoder '{name}' has {layers} "
            f"layers; leave --{modality}_cut out to store its output"
        )
    return cast(CuttableEncoder, encoder)
