"""The content path: from distinct items to the content of targets and of histories.

Shape letters: B rows, N history positions, U distinct target items, F of them encoded with gradient in this step, G of
them without, V distinct history items, D width, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.content_bank import NEVER, ContentBank
from torchrec_em3.components.gradient_stop import stop_gradient
from torchrec_em3.components.histories.shared import any_token
from torchrec_em3.components.interest import target_attention
from torchrec_em3.components.interfaces import HistoryItems, output_width
from torchrec_em3.components.similarity import ContentSimilarity
from torchrec_em3.config import NONE, ModelConfig
from torchrec_em3.encoder_suffixes import EncoderSuffixes
from torchrec_em3.errors import ConfigError
from torchrec_em3.item_tokens import CodeSource, ItemTokens, TokenSource
from torchrec_em3.parts import build_part
from torchrec_em3.registry import HISTORIES, TOWERS
from torchrec_em3.schema import FeatureSchema

__all__ = ["ITEMS_AT_A_TIME", "Content", "ContentPath", "DistinctItems"]

ITEMS_AT_A_TIME = 512
"""Items that are encoded together where no gradient is wanted."""


@dataclass(frozen=True)
class DistinctItems:
    """Distinct items of a batch, and where each row and each history position finds its own.

    Attributes:
        target_U: Distinct target items, catalogue rows.
        row_B: Place of each row's target in `target_U`.
        history_V: Distinct history items, catalogue rows.
        row_N: Place of each history position's item in `history_V`.
        lengths_B: History positions of each row.
    """

    target_U: Tensor
    row_B: Tensor
    history_V: Tensor
    row_N: Tensor
    lengths_B: Tensor


class Content(NamedTuple):
    """What the content path yields.

    Attributes:
        blocks: Blocks [B, D] for the ranker, by name; `content_similarity` is as wide as its class says.
        target_UD: Content of the distinct targets.
        encoded_U: Which of them have content and were encoded in this step, so that a loss on it reaches the tower.
        metrics: Coverage of the bank (share of the history rows read that were ever written) and its staleness
            (cosine of cached and fresh rows of the targets just encoded).
    """

    blocks: dict[str, Tensor]
    target_UD: Tensor
    encoded_U: Tensor
    metrics: dict[str, Tensor]


class _BankRows(NamedTuple):
    """Bank rows of the history items and of the targets, and which were ever written."""

    history_VD: Tensor
    written_V: Tensor
    target_UD: Tensor
    written_U: Tensor


class _HistorySource:
    """The V distinct history items as a history adapter sees them (`components.interfaces.ItemSource`)."""

    def __init__(self, item_V: Tensor, bank: _BankRows | None, tokens: nn.Module) -> None:
        self._item_V, self._bank, self._tokens = item_V, bank, tokens

    def bank_rows(self) -> tuple[Tensor, Tensor]:
        assert self._bank is not None, "a history content that reads the bank must say uses_bank = True"
        return self._bank.history_VD, self._bank.written_V

    def tokens(self) -> Mapping[str, ModalityTokens]:
        tokens: Mapping[str, ModalityTokens] = self._tokens(self._item_V)
        return tokens


class ContentPath(nn.Module):
    """Content of target and history items: tower, projection, bank, history adapter and their attention.

    With `encode_fraction` below 1 a training step encodes only that share of the distinct targets, drawn at random,
    and takes the bank's rows for the others: LEMUR encodes a fifth and loses next to nothing [follow-up]. Evaluation
    takes all from the bank, as serving does. What the bank does not hold yet is encoded without gradient and some items
    at a time, so that a step takes no more memory at the start of training than later.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        config: ModelConfig,
        store: TokenSource,
        device: torch.device,
        codes: CodeSource | None = None,
        encoders: EncoderSuffixes | None = None,
    ) -> None:
        """Build the path over the modalities of `schema`; the bank is created on `device`.

        Raises:
            ConfigError: If targets shall come from the bank, and the history content keeps none; or if targets shall be
                compared with the history, and there is no history content.
        """
        super().__init__()
        width = config.embedding_dim
        specs = schema.codes if config.codes == "content" else ()
        tokens = ItemTokens(schema.modalities, specs, store, codes, width, encoders)
        self.tokens: nn.Module = tokens
        self._encode_fraction = config.encode_fraction
        self._stop_gradient = config.stop_gradient
        self.tower = build_part(
            TOWERS,
            config.content,
            config.content_options,
            tokens.dims,
            tokens.counts,
            width,
        )
        tower_width = output_width(self.tower, width)
        self.projection = nn.Linear(tower_width, width)
        self.history: Any = None
        self.attention: Any = None
        self.bank: ContentBank | None = None
        if config.history != NONE:
            self.history = build_part(HISTORIES, config.history, config.history_options, self.tower, width)
            self.attention = target_attention(width, config.content_attention_hidden)
            if self.history.uses_bank:
                self.bank = ContentBank(schema.item_rows, tower_width, device)
        if self.bank is None and config.encode_fraction < 1:
            raise ConfigError(
                f"--model.encode_fraction {config.encode_fraction} reads the other items from the content bank, which "
                f"--model.history {config.history} does not keep; use 1 or --model.history cache"
            )
        self.similarity: Any = None
        if config.similarity != "none":
            if self.history is None:
                raise ConfigError(
                    f"--model.similarity {config.similarity} compares targets with the content of the history, which "
                    "--model.history none leaves out; use --model.history cache"
                )
            self.similarity = ContentSimilarity(config.similarity)

    def encode(self, item_U: Tensor, store: TokenSource | None = None) -> tuple[Tensor, Tensor]:
        """Return the tower's output [U, D] and which items have any content, present_U.

        Args:
            item_U: Rows of the store.
            store: Where the tokens are of items that are not of the catalogue; None for the catalogue's own.
        """
        tokens = self.tokens(item_U, store)
        return self.tower(tokens), any_token(tokens)

    def as_history(self, item_V: Tensor, tower_VD: Tensor, present_V: Tensor) -> HistoryItems:
        """Return items as histories read them where the bank holds what `encode` returned of them."""
        bank = _BankRows(tower_VD, present_V, tower_VD[:0], present_V[:0])
        items: HistoryItems = self.history(_HistorySource(item_V, bank, self.tokens), self.tower, self.projection)
        return items

    def forward(self, items: DistinctItems, step: int) -> Content:
        """Return the content of a batch's items; while training, also write the bank as of `step`. Collective."""
        bank = self._read_bank(items)
        raw_UD, encoded_U, metrics = self._encode_targets(items, bank, step)
        target_UD = self.projection(raw_UD)
        content_BD = self._for_ranker(target_UD)[items.row_B]
        blocks = {"content": content_BD}
        if self.history is not None:
            source = _HistorySource(items.history_V, bank, self.tokens)
            history = self.history(source, self.tower, self.projection)
            blocks["content_interest"] = self.attention(content_BD, history, items.row_N, items.lengths_B)
            if self.similarity is not None:
                raw_BD = self._for_ranker(raw_UD)[items.row_B]
                blocks["content_similarity"] = self.similarity(raw_BD, history, items.row_N, items.lengths_B)
        return Content(blocks, target_UD, encoded_U, metrics)

    def _for_ranker(self, content_UD: Tensor) -> Tensor:
        """Return the content as the ranker gets it: without a way back to the tower under `stop_gradient`."""
        return stop_gradient(content_UD) if self._stop_gradient else content_UD

    def _read_bank(self, items: DistinctItems) -> _BankRows | None:
        """Read the rows of history and target items in one exchange."""
        if self.bank is None:
            return None
        rows_D, step = self.bank.read(torch.cat([items.history_V, items.target_U]))
        written, end = step > NEVER, items.history_V.numel()
        return _BankRows(rows_D[:end], written[:end], rows_D[end:], written[end:])

    def _encode_targets(
        self, items: DistinctItems, bank: _BankRows | None, step: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the targets' content before the projection, which of them were encoded, and the bank's metrics."""
        if bank is None or self.bank is None:
            return *self.encode(items.target_U), {}
        drawn_U = self._draw(bank.written_U)
        fresh_F, missing_G = (mask_U.nonzero().squeeze(1) for mask_U in (drawn_U, ~drawn_U & ~bank.written_U))
        fresh_FD, present_F = self.encode(items.target_U[fresh_F])
        missing_GD, present_G = self._encode_missing(items.target_U[missing_G], bank.target_UD)
        raw_UD = bank.target_UD.index_copy(0, missing_G, missing_GD).index_copy(0, fresh_F, fresh_FD)
        encoded_U = torch.zeros_like(drawn_U).index_copy_(0, fresh_F, present_F)
        if self.training:
            known_K = encoded_U.index_copy(0, missing_G, present_G).nonzero().squeeze(1)
            self.bank.write(items.target_U[known_K], raw_UD[known_K], step)
        return raw_UD, encoded_U, _bank_metrics(bank, fresh_F, fresh_FD)

    def _draw(self, written_U: Tensor) -> Tensor:
        """Choose the targets to encode with gradient; return which."""
        if not self.training:
            return torch.zeros_like(written_U)
        if self._encode_fraction >= 1:
            return torch.ones_like(written_U)
        return torch.rand(written_U.numel(), device=written_U.device) < self._encode_fraction

    @torch.no_grad()
    def _encode_missing(self, item_G: Tensor, like_UD: Tensor) -> tuple[Tensor, Tensor]:
        """Encode items that the bank does not hold, `ITEMS_AT_A_TIME`; see `encode`."""
        if not item_G.numel():
            return like_UD[:0], torch.zeros_like(item_G, dtype=torch.bool)
        parts = [self.encode(part_G) for part_G in torch.split(item_G, ITEMS_AT_A_TIME)]
        return torch.cat([part_GD for part_GD, _ in parts]), torch.cat([present_G for _, present_G in parts])


@torch.no_grad()
def _bank_metrics(bank: _BankRows, fresh_F: Tensor, fresh_FD: Tensor) -> dict[str, Tensor]:
    written_F = bank.written_U[fresh_F]
    similarity_F = functional.cosine_similarity(bank.target_UD[fresh_F], fresh_FD, dim=1)
    return {
        "bank_coverage": bank.written_V.float().sum() / max(bank.written_V.numel(), 1),
        "bank_similarity": (similarity_F * written_F).sum() / written_F.sum().clamp_min(1),
    }
