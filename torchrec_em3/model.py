"""The EM3 model graph: ID path, content path, ranker and losses in one module.

Shape letters: B rows, K tasks, U distinct target items, E of them in the alignment loss, V distinct history items, D
width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_em3.batch import HISTORY, TARGET, Batch
from torchrec_em3.code_features import CodeFeatures
from torchrec_em3.components.distinct import distinct
from torchrec_em3.components.embeddings import ItemEmbedding, ItemRows, UserEmbedding
from torchrec_em3.components.interest import target_attention
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.similarity import ContentSimilarity
from torchrec_em3.config import Config
from torchrec_em3.content_path import Content, ContentPath, DistinctItems
from torchrec_em3.encoder_suffixes import EncoderSuffixes
from torchrec_em3.id_tables import with_id_tables
from torchrec_em3.item_tokens import CodeSource, TokenSource
from torchrec_em3.parts import build_part
from torchrec_em3.pending_batch import PendingBatch
from torchrec_em3.registry import ALIGNMENTS
from torchrec_em3.schema import FeatureSchema
from torchrec_em3.tasks import build_ranker, task_weights

__all__ = ["EM3Model", "Output"]


@dataclass(frozen=True)
class Output:
    """What one forward pass yields besides the loss.

    Attributes:
        logit: Logits, detached: [B] where there is one task, else [B, K].
        metrics: Scalars of the step by name (each loss term, bank coverage and staleness), detached.
    """

    logit: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class EM3Model(nn.Module):
    """A ranking model whose content tower is trained by the ranking loss, end to end.

    ID-only training is this same module with `model.content = none`: it then has no content path and no alignment
    loss, and pays for neither. Three parts, tower, content history and Content-ID-Contrastive loss, come from EM3
    [abstract]; bank, routing of unknown items to row 0 and hiding IDs at `unknown_id_rate` are ours [ours].
    """

    def __init__(
        self,
        schema: FeatureSchema,
        config: Config,
        store: TokenSource | None,
        device: torch.device | None = None,
        codes: CodeSource | None = None,
        encoders: EncoderSuffixes | None = None,
        raw_item_ids: Tensor | None = None,
    ) -> None:
        """Build the graph.

        Args:
            schema: Tables, catalogue, codes and modalities, these as the tower reads them.
            config: The run's options; only `config.model`, the tables' precision and ids are read.
            store: Tokens of the catalogue; may be None for an ID-only model.
            device: Where tables and bank are created; meta (default) leaves their memory to the sharding.
            codes: Semantic codes of the catalogue; may be None where none are used, or for a model that is never run.
            encoders: What turns the store's rows into tokens; None if the store holds tokens.
            raw_item_ids: Raw id of each catalogue row, where the item table takes those.
        """
        super().__init__()
        device = device if device is not None else torch.device("meta")
        options = config.model
        width = options.embedding_dim
        self.unknown_id_rate = options.unknown_id_rate
        self.alignment_weight = options.alignment_weight
        self.task_weights = task_weights(options.task_weights, schema.tasks)
        self.item_rows = schema.item_rows
        schema = with_id_tables(schema, config.embeddings)
        self.users = UserEmbedding(schema, width, device, config.embeddings.precision)
        self.items = ItemEmbedding(schema, width, device, config.embeddings.precision, raw_item_ids)
        self.attention = target_attention(width, options.attention_hidden)
        self.content: ContentPath | None = None
        self.alignment: Any = None
        # A block for each feature, so that a ranker can multiply it with what it knows of the item.
        self.feature_blocks = _feature_blocks(schema)
        block_dims = dict.fromkeys([*self.feature_blocks.values(), "target", "interest"], width)
        if config.uses_content:
            assert store is not None, "a model with content needs a token store"
            self.content = ContentPath(schema, options, store, device, codes, encoders)
            block_dims["content"] = width
            if self.content.history is not None:
                block_dims["content_interest"] = width
            if self.content.similarity is not None:
                block_dims["content_similarity"] = ContentSimilarity.width
            if self.alignment_weight > 0:
                self.alignment = build_part(ALIGNMENTS, options.alignment, options.alignment_options, width)
        self.codes: CodeFeatures | None = None
        if config.uses_code_features:
            self.codes = CodeFeatures(schema.codes, codes, width, options.content_attention_hidden)
            block_dims |= {"codes": width, "codes_interest": width}
        if schema.dense:
            block_dims["context"] = len(schema.dense)
        self.ranker = build_ranker(options, block_dims, schema.tasks)
        self.step = 0

    def ask(self, batch: Batch) -> PendingBatch:
        """Find a batch's distinct items and ask for the embeddings of its ids; reads no weight. Collective."""
        user_BF, items = self._split(batch.sparse)
        route = None if self.content is None else self.content.ask(items)
        return PendingBatch(
            batch, items, self.users.ask(user_BF), self.items.ask(items.target_U, items.history_V), route
        )

    def forward(self, batch: Batch | PendingBatch) -> tuple[Tensor, Output]:
        """Return the loss (a scalar whose mean over ranks is the global batch's) and the logits with their metrics.

        Args:
            batch: A batch, or what `ask` made of it before; either comes to the same.
        """
        pending = batch if isinstance(batch, PendingBatch) else self.ask(batch)
        batch, items = pending.batch, pending.items
        if self.training:
            self.step += 1
        ids = self.items.answer(pending.item_rows)
        target_BD = self._hide_ids(ids.target_UD[items.row_B], ids.unknown_D)
        blocks = {self.feature_blocks[name]: user_BD for name, user_BD in self.users.answer(pending.user_rows).items()}
        blocks |= {
            "target": target_BD,
            "interest": self.attention(target_BD, HistoryItems(ids.history_VD), items.row_N, items.lengths_B),
        }
        metrics: dict[str, Tensor] = {}
        alignment = None
        if self.content is not None:
            content = self.content(items, self.step, pending.route)
            blocks |= content.blocks
            metrics = content.metrics
            alignment = self._align(content, ids, items, batch.weight > 0)
        if self.codes is not None:
            blocks |= self.codes(items)
        if batch.dense.shape[1]:
            blocks["context"] = batch.dense
        logit = self.ranker(blocks)
        loss = self._rank_loss(logit, batch)
        if len(self.task_weights) > 1:
            terms = dict(zip(self.task_weights, loss.unbind(), strict=True))
            metrics |= {f"rank_loss/{task}": term.detach() for task, term in terms.items()}
            loss = torch.stack([weight * terms[task] for task, weight in self.task_weights.items()]).sum()
        metrics["rank_loss"] = loss.detach()
        if alignment is not None:
            metrics["alignment_loss"] = alignment.detach()
            loss = loss + self.alignment_weight * alignment
        metrics["loss"] = loss.detach()
        return loss, Output(logit.detach(), metrics)

    def _split(self, sparse: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, DistinctItems]:
        """Separate the user features from the items, and find the distinct items."""
        num_users = len(sparse.keys()) - 2
        assert list(sparse.keys()[num_users:]) == [TARGET, HISTORY]
        user_BF, target, history = sparse.split([num_users, 1, 1])
        target_U, row_B = distinct(target.values(), self.item_rows)
        history_V, row_N = distinct(history.values(), self.item_rows)
        return user_BF, DistinctItems(target_U, row_B, history_V, row_N, history.lengths())

    def _hide_ids(self, target_BD: Tensor, unknown_D: Tensor) -> Tensor:
        """Replace a random share of the targets' IDs by "unknown" while training."""
        if not self.training or self.unknown_id_rate == 0:
            return target_BD
        hidden_B = torch.rand(target_BD.shape[0], device=target_BD.device) < self.unknown_id_rate
        return torch.where(hidden_B[:, None], unknown_D, target_BD)

    def _align(self, content: Content, ids: ItemRows, items: DistinctItems, real_B: Tensor) -> Tensor | None:
        """Contrast content and ID of the distinct targets that have both and whose content was encoded in this step."""
        if self.alignment is None or not self.training:
            return None
        count_U = torch.zeros_like(items.target_U).index_add_(0, items.row_B, real_B.to(items.target_U.dtype))
        # Places, not a mask: indexing by a mask makes the host wait for a GPU each time.
        usable_E = (content.encoded_U & ids.known_U & (count_U > 0)).nonzero().squeeze(1)
        loss: Tensor = self.alignment(
            content.target_UD[usable_E], ids.target_UD[usable_E], items.target_U[usable_E], count_U[usable_E]
        )
        return loss

    @staticmethod
    def _rank_loss(logit: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy, weighted mean over the rows: a scalar where there is one task, else [K]."""
        loss = functional.binary_cross_entropy_with_logits(logit, batch.label, reduction="none")
        weight = batch.weight if loss.dim() == 1 else batch.weight[:, None]
        return (loss * weight).mean(0)


def _feature_blocks(schema: FeatureSchema) -> dict[str, str]:
    """Name the block of each pooled feature; none can take the name of another block."""
    names = [feature.name for feature in schema.user_features]
    of_user = {name: name if name == "user" else f"user_{name}" for name in names}
    return of_user | {feature.name: f"context_{feature.name}" for feature in schema.sparse}
