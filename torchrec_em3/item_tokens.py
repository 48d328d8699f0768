"""All tokens of items, as content towers read them: what encoders gave, and embeddings of semantic codes.

Shape letters: U items.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ItemCodes, ModalityTokens
from torchrec_em3.components.code_embedding import CodeEmbedding
from torchrec_em3.encoder_suffixes import EncoderSuffixes
from torchrec_em3.schema import CodeSpec, ModalitySpec

__all__ = ["CodeSource", "ItemTokens", "TokenSource"]


class TokenSource(Protocol):
    """Where the model gets the encoder outputs of items from (see `torchrec_em3.datasets.tokens.TokenStore`)."""

    def fetch(self, items_U: Tensor, device: torch.device | None = None) -> dict[str, ModalityTokens]:
        """Return the tokens of `items_U` by modality, on `device`."""
        ...


class CodeSource(Protocol):
    """Where the model gets the semantic codes of items from (see `torchrec_em3.datasets.codes.CodeStore`)."""

    def fetch(self, items_U: Tensor, device: torch.device | None = None) -> dict[str, ItemCodes]:
        """Return the codes of `items_U` by name, on `device`."""
        ...


class ItemTokens(nn.Module):
    """Tokens of the catalogue's items by modality; codes are one more modality each, a token a level, trained here.

    Attributes:
        dims: Width of a token by modality.
        counts: Largest number of tokens of an item by modality.
    """

    def __init__(
        self,
        modalities: Sequence[ModalitySpec],
        specs: Sequence[CodeSpec],
        store: TokenSource,
        codes: CodeSource | None,
        width: int,
        encoders: EncoderSuffixes | None = None,
    ) -> None:
        """Create the embeddings of the codes.

        Args:
            modalities: What `store` holds, or what `encoders` make of it.
            specs: The codes to use, all of them in `codes`; none leaves codes alone.
            store: Encoder outputs of the catalogue.
            codes: Codes of the catalogue; may be None where there are none to use, or nothing is ever read.
            width: Width of an embedding.
            encoders: The encoders' layers above the cuts of `store`; None if it holds tokens.
        """
        super().__init__()
        self.encoders = encoders
        self._store, self._codes, self._specs = store, codes, tuple(specs)
        self.embeddings = nn.ModuleDict(
            {spec.name: CodeEmbedding(spec.levels, spec.codes_per_level, width) for spec in specs}
        )
        self.dims = {modality.name: modality.dim for modality in modalities} | {spec.name: width for spec in specs}
        self.counts = {modality.name: modality.max_tokens for modality in modalities}
        self.counts |= {spec.name: spec.levels for spec in specs}

    def forward(self, item_U: Tensor, store: TokenSource | None = None) -> dict[str, ModalityTokens]:
        """Return the tokens of all modalities.

        Args:
            item_U: Rows of the store.
            store: Encoder outputs of items that are not of the catalogue, which have no codes; None for the catalogue.
        """
        tokens = (self._store if store is None else store).fetch(item_U, item_U.device)
        if self.encoders is not None:
            tokens = self.encoders(tokens)
        if self._specs:
            codes = self._fetch(item_U) if store is None else self._absent(item_U)
            tokens |= {name: embedding(codes[name]) for name, embedding in self.embeddings.items()}
        return tokens

    def _fetch(self, item_U: Tensor) -> dict[str, ItemCodes]:
        assert self._codes is not None, "a model with codes needs a code store"
        return self._codes.fetch(item_U, item_U.device)

    def _absent(self, item_U: Tensor) -> dict[str, ItemCodes]:
        nothing_U = torch.zeros_like(item_U, dtype=torch.bool)
        return {spec.name: ItemCodes(item_U.new_zeros(len(item_U), spec.levels), nothing_U) for spec in self._specs}
