"""What a prepared folder keeps of an encoder: the form in which its tokens are stored, and enough to build it again."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from torchrec_em3.components.encoders import image as _image  # noqa: F401  (registers its encoders)
from torchrec_em3.components.encoders import text as _text  # noqa: F401
from torchrec_em3.components.encoders.cut import check_cut
from torchrec_em3.components.interfaces import TokenEncoder
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import ENCODERS

__all__ = ["StoredForm", "rebuild_encoder", "stored_form"]


class StoredForm(NamedTuple):
    """How the tokens of a modality are stored.

    Attributes:
        encoder: What runs once per item: the whole encoder, or its layers below a cut.
        dtype: Type of a stored number.
        record: `dim` and `max_tokens` of the stored rows; at a cut also `cut`, `layers`, `dtype`, and what the whole
            encoder gives: `encoder_dim`, `encoder_tokens`.
    """

    encoder: TokenEncoder
    dtype: torch.dtype
    record: dict[str, Any]


def stored_form(encoder: TokenEncoder, name: str, cut: int | None) -> StoredForm:
    """Return the form in which tokens of `encoder` are stored when it is cut after layer `cut`; None stores its output.

    Raises:
        ConfigError: If the encoder cannot be cut there.
    """
    if cut is None:
        return StoredForm(encoder, torch.float16, {"dim": encoder.dim, "max_tokens": encoder.max_tokens})
    whole = check_cut(encoder, name, cut)
    prefix = whole.prefix(cut)
    record = {
        "dim": prefix.dim,
        "max_tokens": prefix.max_tokens,
        "dtype": str(prefix.dtype).removeprefix("torch."),
        "cut": cut,
        "layers": whole.layers,
        "encoder_dim": whole.dim,
        "encoder_tokens": whole.max_tokens,
    }
    return StoredForm(prefix, prefix.dtype, record)


def rebuild_encoder(modality: str, recorded: Mapping[str, Any]) -> TokenEncoder:
    """Return the encoder that made a folder's tokens.

    Args:
        modality: Its modality, for the message.
        recorded: What the folder's meta.json says of the modality.

    Raises:
        ConfigError: If an encoder is not to be had, or is not the one that made the folder's tokens.
    """
    name, part = recorded["encoder"], ENCODERS.get(recorded["encoder"])
    # Folders of before the options were recorded: a wrong guess shows below.
    options = dict(recorded.get("options", {}))
    source, _, commit = recorded["source"].rpartition("@")
    if source and "revision" in part.options.__dataclass_fields__:
        options["revision"] = commit
    encoder: TokenEncoder = part.build(part.options(**options))
    dim, tokens = recorded.get("encoder_dim", recorded["dim"]), recorded.get("encoder_tokens", recorded["max_tokens"])
    wanted, found = (recorded["source"], dim, tokens), (encoder.source, encoder.dim, encoder.max_tokens)
    if found != wanted:
        says = "{0} with up to {2} tokens of width {1}".format
        raise ConfigError(
            f"{modality} encoder '{name}' is now {says(*found)}, but the data was prepared with {says(*wanted)}; "
            "bring back those weights and options, or prepare the data and train again"
        )
    return encoder
