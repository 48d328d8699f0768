"""What each pluggable kind must offer. An implementation is any class with these methods, registered under a name.

Shape letters: B rows, U unique target items, V unique history items, N history positions, T tokens, D width of the
model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from PIL.Image import Image
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens

__all__ = ["AlignmentLoss", "ContentTower", "HistoryContent", "ItemSource", "Ranker", "TokenEncoder"]


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


class ContentTower(Protocol):
    """Fuses the tokens of any number of modalities into one vector an item; an `nn.Module`.

    Constructor `(options, token_dims, token_counts, width)`: token width and largest token count by modality name,
    and D.
    """

    def __call__(self, tokens: Mapping[str, ModalityTokens]) -> Tensor:
        """Return content_UD, finite also for an item without any modality, and blind to invalid tokens."""
        ...


class ItemSource(Protocol):
    """What the model lends to a history adapter: the V distinct items of the batch's histories, read when asked for."""

    def bank_rows(self) -> tuple[Tensor, Tensor]:
        """Return cached content_VD (no gradient) and written_V (bool). Collective over ranks."""
        ...

    def tokens(self) -> Mapping[str, ModalityTokens]:
        """Return the tokens of the V items, all modalities."""
        ...


class HistoryContent(Protocol):
    """Content of history items; an `nn.Module`. Constructor `(options, tower, width)`.

    `uses_bank` tells the model whether the target branch must write the content bank for this adapter.
    """

    uses_bank: ClassVar[bool]

    def __call__(self, source: ItemSource, tower: Any, projection: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return content_VD in the space of `projection(tower(...))`, and valid_V (bool, False: leave the item out)."""
        ...


class Ranker(Protocol):
    """Head from named blocks to logits; an `nn.Module`. Constructor `(options, block_dims)`: width by block name."""

    def __call__(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """Return logits_B from blocks of shape [B, block_dims[name]]."""
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
