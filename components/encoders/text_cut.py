"""Transformers of the BERT family cut after a layer: token ids, lower layers and upper layers.

Shape letters: n texts, U items, T tokens, D width of a token, W width of a stored row.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.batch import ModalityTokens

__all__ = ["TextSuffix", "TokenIds", "count_layers", "keep_layers"]

FAMILY = frozenset({"bert", "roberta", "xlm-roberta"})
"""Model types whose layers read nothing but the output of the layer before and the mask."""


def count_layers(model: Any) -> int:
    """Return the number of layers of a transformer of the family, 0 for any other model."""
    return len(model.encoder.layer) if getattr(model.config, "model_type", "") in FAMILY else 0


def keep_layers(model: Any, kept: slice) -> Any:
    """Return a copy of `model` that has the layers `kept` only; one without the first layer reads hidden states."""
    part = copy.deepcopy(model)
    part.encoder.layer = part.encoder.layer[kept]
    if kept.start:
        part.embeddings = _Given()
    return part


class _Given(nn.Module):
    """Stands where the embeddings were, and hands on the hidden states."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """Return `inputs_embeds`."""
        return inputs_embeds


class TokenIds:
    """What a text encoder reads: the ids of its wordpieces, one a row."""

    modality, dim, dtype = "text", 1, torch.int32

    def __init__(self, tokenise: Callable[[Sequence[str]], list[list[int]]], filler: int, max_tokens: int) -> None:
        """Store the ids that `tokenise` returns.

        Args:
            tokenise: From texts to ids, 1 to `max_tokens` a text.
            filler: Id that stands beyond the end of a text.
            max_tokens: Most ids of a text.
        """
        self.max_tokens, self.source = max_tokens, ""
        self._tokenise, self._filler = tokenise, filler

    def encode(self, inputs: Sequence[str] | Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Return the ids [n, max_tokens, 1] and their numbers [n]."""
        rows = self._tokenise([str(text) for text in inputs])
        ids_nT = torch.full((len(rows), self.max_tokens), self._filler, dtype=self.dtype)
        for row, ids in enumerate(rows):
            ids_nT[row, : len(ids)] = torch.tensor(ids)
        return ids_nT[..., None], torch.tensor([len(ids) for ids in rows], dtype=torch.int64)


class TextSuffix(nn.Module):
    """The layers of a transformer above a cut.

    Args:
        model: The whole model; copied, not kept.
        cut: Layers below; 0 takes the embeddings in as well, and reads ids.
    """

    def __init__(self, model: Any, cut: int) -> None:
        super().__init__()
        self.model = keep_layers(model, slice(cut, None))
        self._cut = cut
        self._reads = "inputs_embeds" if cut else "input_ids"

    @property
    def layers(self) -> nn.ModuleList:
        """The layers above the cut, the lowest first."""
        layers: nn.ModuleList = self.model.encoder.layer
        return layers

    def name_in_encoder(self, name: str) -> str:
        """Return what a module of a layer here, or a weight of it, is called in the whole transformer."""
        number, rest = name.removeprefix("model.encoder.layer.").split(".", 1)
        return f"encoder.layer.{int(number) + self._cut}.{rest}"

    def forward(self, rows_UTW: Tensor, valid_UT: Tensor) -> ModalityTokens:
        """Return the tokens [U, T, D] of the last layer, zero where a text has ended; each text has a token."""
        longest = int(valid_UT.sum(1).amax())
        given = rows_UTW[:, :longest]
        if self._reads == "input_ids":
            given = given.squeeze(2).long()
        shown_UT = valid_UT[:, :longest]
        hidden_UTD = self.model(**{self._reads: given}, attention_mask=shown_UT.long()).last_hidden_state
        hidden_UTD = hidden_UTD.masked_fill(~shown_UT[..., None], 0.0)
        return ModalityTokens(functional.pad(hidden_UTD, (0, 0, 0, valid_UT.shape[1] - longest)), valid_UT)
