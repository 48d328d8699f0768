"""What each pluggable kind must offer. An implementation is any class with these methods, registered under a name.

Shape letters: B rows, U unique target items, V unique history items, N history positions, K tasks, T tokens, D width
of the model, P stored rows of an item at a cut, W width of such a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.batch import ModalityTokens

__all__ = [
    "AlignmentLoss",
    "ContentTower",
    "CuttableEncoder",
    "EncoderPrefix",
    "EncoderSuffix",
    "HistoryContent",
    "HistoryItems",
    "ItemSource",
    "Ranker",
    "TokenEncoder",
    "output_width",
]


class TokenEncoder(Protocol):
    """Frozen encoder of one modality; constructor `(options)`.

    Attributes:
        modality: "text" or "image".
        dim: Width of a token.
        max_tokens: Largest number of tokens an item gets.
        source: Name of the weights and their revision, for the records.
    """

    modality: str
    dim: int
    max_tokens: int
    source: str

    def encode(self, inputs: Sequence[str] | Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Return tokens [n, max_tokens, dim] (float32, CPU, zero beyond the length) and lengths [n] (int64, >= 1)."""
        ...


class EncoderPrefix(TokenEncoder, Protocol):
    """Layers of an encoder below a cut, frozen: `encode` returns what the layers above read, P rows [W] an item.

    Attributes:
        dtype: What the rows are and are stored as: float16 for hidden states (`encode` may return float32), an integer
            type for raw inputs.
    """

    dtype: torch.dtype


class EncoderSuffix(Protocol):
    """Layers of an encoder above a cut; an `nn.Module` with weights of its own, always used in evaluation mode.

    Attributes:
        layers: These layers, the lowest first. Low-rank adapters go to their linear maps and 1 x 1 convolutions.
    """

    layers: nn.ModuleList

    def __call__(self, rows_UPW: Tensor, valid_UP: Tensor) -> ModalityTokens:
        """Return what `TokenEncoder.encode` would, max_tokens and dim alike, with gradients.

        Args:
            rows_UPW: What the prefix returned for U items, float32 or the prefix's integers; U >= 1.
            valid_UP: False beyond an item's length; each item has a valid row.
        """
        ...


class CuttableEncoder(TokenEncoder, Protocol):
    """An encoder that may be cut after any of its layers, so that those above are trained; to offer this is optional.

    Attributes:
        layers: Number of layers, >= 1. At cut 0 raw inputs are stored, and what lies below the first layer belongs to
            the suffix.
    """

    layers: int

    def prefix(self, cut: int) -> EncoderPrefix:
        """Return the first `cut` layers, 0 <= cut < layers."""
        ...

    def suffix(self, cut: int) -> EncoderSuffix:
        """Return the other layers, as a copy."""
        ...


class ContentTower(Protocol):
    """Fuses the tokens of any number of modalities into one vector an item; an `nn.Module`.

    Constructor `(options, token_dims, token_counts, width)`: token width and largest token count by modality name,
    and D. A tower whose output is not D wide says so in an attribute `output_width`. One with a method
    `token_attention(tokens)`, see `FusionQFormer`, is shown at work by `em3 report --attention`.
    """

    def __call__(self, tokens: Mapping[str, ModalityTokens]) -> Tensor:
        """Return content_UD, finite also for an item without any modality, and blind to invalid tokens."""
        ...


def output_width(tower: Any, width: int) -> int:
    """Return how wide a tower's output and so a row of the content bank is: D, unless the tower says otherwise."""
    return int(getattr(tower, "output_width", width))


class ItemSource(Protocol):
    """What the model lends to a history adapter: the V distinct items of the batch's histories, read when asked for."""

    def bank_rows(self) -> tuple[Tensor, Tensor]:
        """Return cached content_VD (no gradient) and written_V (bool). Collective over ranks."""
        ...

    def tokens(self) -> Mapping[str, ModalityTokens]:
        """Return the tokens of the V items, all modalities."""
        ...


class HistoryItems(NamedTuple):
    """The V distinct items of the batch's histories as rows and the linear map that makes vectors of them.

    Keeping the two apart lets an attention that is linear in its keys apply the map after pooling.

    Attributes:
        rows_VD: One row an item, float, in the space of the tower's output and as wide (see `output_width`).
        valid_V: False for items to leave out, whatever their row holds; None means that all are valid.
        weight_DD: An item's vector is `weight_DD @ row + bias_D`; None means that the rows are the vectors.
        bias_D: See `weight_DD`.
    """

    rows_VD: Tensor
    valid_V: Tensor | None = None
    weight_DD: Tensor | None = None
    bias_D: Tensor | None = None

    def content(self) -> Tensor:
        """Return the items' vectors [V, D]."""
        if self.weight_DD is None:
            return self.rows_VD
        return functional.linear(self.rows_VD, self.weight_DD, self.bias_D)


class HistoryContent(Protocol):
    """Content of history items; an `nn.Module`. Constructor `(options, tower, width)`.

    `uses_bank` tells the model whether the target branch must write the content bank for this adapter.
    """

    uses_bank: ClassVar[bool]

    def __call__(self, source: ItemSource, tower: Any, projection: nn.Linear) -> HistoryItems:
        """Return the items' content, in the space of `projection(tower(...))`, and which of them have any."""
        ...


class Ranker(Protocol):
    """Head from named blocks to logits; an `nn.Module`.

    Constructor `(options, block_dims, num_tasks=1)`: width by block name, and K. A constructor `(options, block_dims)`
    makes a ranker for one task, which data with several is refused for.
    """

    def __call__(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return logits from blocks of shape [B, block_dims[name]]: logits_B where K is 1, else logits_BK."""
        ...


class AlignmentLoss(Protocol):
    """Content-ID alignment; an `nn.Module`. Constructor `(options, width)`: both inputs have that width."""

    def __call__(self, content_UD: Tensor, id_UD: Tensor, item_U: Tensor, count_U: Tensor) -> Tensor:
        """Return this rank's share of the global loss, a scalar whose mean over ranks is the loss of the global batch.

        Args:
            content_UD: Content of this rank's distinct target items.
            id_UD: ID embeddings of the same items.
            item_U: Their catalogue rows, int64, distinct on this rank; another rank may hold some of them too.
            count_U: How many rows of this rank's batch have the item, int64, >= 1.
        """
        ...
