"""The content path: from distinct items to the content of targets and of histories.

Shape letters: B rows, N history positions, U distinct target items of this rank, R items that it provides the content
of, F of them encoded with gradient in this step, G of them without, V distinct history items, D width, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.content_bank import NEVER, ContentBank
from torchrec_em3.components.gradient_stop import stop_gradient
from torchrec_em3.components.histories.shared import any_token
from torchrec_em3.components.interest import target_attention
from torchrec_em3.components.interfaces import HistoryItems, output_width
from torchrec_em3.components.item_draw import draw_items
from torchrec_em3.components.item_routing import Route
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
    """Bank rows of the history items and of those to provide, and which were ever written."""

    history_VD: Tensor
    written_V: Tensor
    provided_RD: Tensor
    written_R: Tensor


class _Targets(NamedTuple):
    """Content of target items before the projection, and what became of each.

    Attributes:
        raw_UD: The tower's output, of this step or as the bank holds it.
        encoded_U: As in `Content`.
        compared_U: Which were encoded with gradient and are in the bank.
        similarity_U: Cosine of the bank's row and the fresh one, where `compared_U`.
    """

    raw_UD: Tensor
    encoded_U: Tensor
    compared_U: Tensor
    similarity_U: Tensor

    def home(self, route: Route) -> "_Targets":
        """Return those that this rank asked their owners for. Collective."""
        notes_R3 = torch.stack([self.encoded_U, self.compared_U, self.similarity_U], 1).to(self.raw_UD.dtype)
        home_UE = route.home(torch.cat([self.raw_UD, notes_R3.detach()], 1))
        raw_UD, notes_U3 = home_UE[:, :-3], home_UE[:, -3:].detach()
        return _Targets(raw_UD, notes_U3[:, 0] > 0, notes_U3[:, 1] > 0, notes_U3[:, 2])


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

    With `routing` owner all this happens on the rank that owns the item, once for all ranks: it alone reads the item's
    tokens, decides whether to encode it, and writes its row of the bank, which is its own. Losses, gradients and bank
    are those of each rank encoding its own targets [ours].
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
            ConfigError: If targets shall come from the bank, and the history content keeps none; if targets shall be
                compared with the history, and there is no history content; or if items shall be encoded by their
                owners only, and the history content encodes them itself.
        """
        super().__init__()
        width = config.embedding_dim
        specs = schema.codes if config.codes == "content" else ()
        tokens = ItemTokens(schema.modalities, specs, store, codes, width, encoders)
        self.tokens: nn.Module = tokens
        self._encode_fraction = config.encode_fraction
        self._stop_gradient = config.stop_gradient
        self._item_rows, self._routed = schema.item_rows, config.routing == "owner"
        # The run's seed, the same on all ranks: tables are what ranks draw from seeds of their own.
        self._draw_seed = torch.initial_seed()
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
        if self._routed and self.history is not None and self.bank is None:
            raise ConfigError(
                f"--model.routing owner encodes items on the ranks that own them, and --model.history {config.history} "
                "encodes those of histories on any rank; use --model.history cache or --model.routing local"
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

    def ask(self, items: DistinctItems) -> Route | None:
        """Begin to ask the owners of a batch's targets for them; None if each rank encodes its own. Collective."""
        if not self._routed:
            return None
        several = dist.is_initialized() and dist.get_world_size() > 1
        return Route(items.target_U, self._item_rows, dist.group.WORLD if several else None)

    def forward(self, items: DistinctItems, step: int, route: Route | None = None) -> Content:
        """Return the content of a batch's items; while training, also write the bank as of `step`. Collective.

        Args:
            items: The batch's items.
            step: Number of the training step, from 1.
            route: What `ask` returned for the same items.
        """
        assert (route is not None) == self._routed, "the way of the targets is what ask() returned for them"
        provided_R = items.target_U if route is None else route.items()
        bank = self._read_bank(items.history_V, provided_R)
        targets = self._encode_targets(provided_R, bank, step)
        if route is not None:
            targets = targets.home(route)
        raw_UD = targets.raw_UD
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
        return Content(blocks, target_UD, targets.encoded_U, {} if bank is None else _bank_metrics(bank, targets))

    def _for_ranker(self, content_UD: Tensor) -> Tensor:
        """Return the content as the ranker gets it: without a way back to the tower under `stop_gradient`."""
        return stop_gradient(content_UD) if self._stop_gradient else content_UD

    def _read_bank(self, history_V: Tensor, provided_R: Tensor) -> _BankRows | None:
        """Read the rows of history items and of those to provide in one exchange."""
        if self.bank is None:
            return None
        rows_D, step = self.bank.read(torch.cat([history_V, provided_R]))
        written, end = step > NEVER, history_V.numel()
        return _BankRows(rows_D[:end], written[:end], rows_D[end:], written[end:])

    def _encode_targets(self, item_R: Tensor, bank: _BankRows | None, step: int) -> _Targets:
        """Return the content of the items that this rank provides; while training, also write it to the bank."""
        if bank is None or self.bank is None:
            raw_RD, present_R = self.encode(item_R)
            return _Targets(raw_RD, present_R, torch.zeros_like(present_R), torch.zeros_like(raw_RD[:, 0]).detach())
        drawn_R = self._draw(item_R, step)
        fresh_F, missing_G = (mask_R.nonzero().squeeze(1) for mask_R in (drawn_R, ~drawn_R & ~bank.written_R))
        fresh_FD, present_F = self.encode(item_R[fresh_F])
        missing_GD, present_G = self._encode_missing(item_R[missing_G], bank.provided_RD)
        raw_RD = bank.provided_RD.index_copy(0, missing_G, missing_GD).index_copy(0, fresh_F, fresh_FD)
        encoded_R = torch.zeros_like(drawn_R).index_copy_(0, fresh_F, present_F)
        if self.training:
            known_K = encoded_R.index_copy(0, missing_G, present_G).nonzero().squeeze(1)
            self.bank.write(item_R[known_K], raw_RD[known_K], step)
        similarity_F = functional.cosine_similarity(bank.provided_RD[fresh_F], fresh_FD.detach(), dim=1)
        similarity_R = torch.zeros_like(bank.provided_RD[:, 0]).index_copy_(0, fresh_F, similarity_F)
        return _Targets(raw_RD, encoded_R, drawn_R & bank.written_R, similarity_R)

    def _draw(self, item_R: Tensor, step: int) -> Tensor:
        """Choose the items to encode with gradient; return which."""
        everything_R = torch.ones_like(item_R, dtype=torch.bool)
        if not self.training:
            return ~everything_R
        if self._encode_fraction >= 1:
            return everything_R
        if self._routed:
            return draw_items(item_R, self._encode_fraction, step, self._draw_seed)
        return torch.rand(item_R.numel(), device=item_R.device) < self._encode_fraction

    @torch.no_grad()
    def _encode_missing(self, item_G: Tensor, like_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Encode items that the bank does not hold, `ITEMS_AT_A_TIME`; see `encode`."""
        if not item_G.numel():
            return like_RD[:0], torch.zeros_like(item_G, dtype=torch.bool)
        parts = [self.encode(part_G) for part_G in torch.split(item_G, ITEMS_AT_A_TIME)]
        return torch.cat([part_GD for part_GD, _ in parts]), torch.cat([present_G for _, present_G in parts])


@torch.no_grad()
def _bank_metrics(bank: _BankRows, targets: _Targets) -> dict[str, Tensor]:
    compared_U = targets.compared_U
    return {
        "bank_coverage": bank.written_V.float().sum() / max(bank.written_V.numel(), 1),
        "bank_similarity": (targets.similarity_U * compared_U).sum() / compared_U.sum().clamp_min(1),
    }
