"""The recommenders: one of three backbones, one of four ways to use content.

Shape letters: V users, U items, N users then items, B interactions of a batch, C distinct items of a batch, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from benchmarks.amazon_topk.features import as_tokens
from benchmarks.amazon_topk.graphs import bipartite_graph, propagate, similarity_graph
from benchmarks.amazon_topk.interactions import Interactions
from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.alignment.contrast import (
    ContentIdContrast,
    ContrastOptions,
    SampledContrast,
    SampledOptions,
)
from torchrec_em3.components.towers.qformer import FusionQFormer, FusionQFormerOptions
from torchrec_em3.components.towers.tokens import masked_mean
from torchrec_em3.errors import ConfigError

__all__ = ["BACKBONES", "CONTENTS", "ModelOptions", "Recommender", "Vectors"]

Backbone = Literal["bpr", "lightgcn", "lightgcn_knn"]
Content = Literal["none", "linear", "qformer", "em3"]
BACKBONES: tuple[Backbone, ...] = get_args(Backbone)
CONTENTS: tuple[Content, ...] = get_args(Content)
L2: Mapping[Backbone, float] = {"bpr": 0.05, "lightgcn": 0.01, "lightgcn_knn": 0.01}
"""Best weight of L2 for each backbone with IDs alone, on validation of Sports (README.md)."""
EMBEDDING_STD = 0.1
"""Deviation of the embeddings at the start."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is trained."""

    backbone: Backbone = "bpr"
    """bpr: user times item; lightgcn: after layers over the training graph; lightgcn_knn: and similar items."""
    content: Content = "none"
    """none: IDs only; linear: projected frozen features; qformer: Fusion-Q-Former; em3: the same with alignment."""
    width: int = 64
    """D of all embeddings."""
    layers: int = 2
    """Layers over the training graph; their outputs and the input are averaged."""
    neighbours: int = 10
    """Similar items that each item is joined with (lightgcn_knn)."""
    image_share: float = 0.1
    """Weight of the images' graph where there are texts too (lightgcn_knn)."""
    preset: Literal["em3_public", "full"] = "em3_public"
    """Form of the Fusion-Q-Former; em3_public is the authors'."""
    queries: int = 1
    """Trainable queries; the authors chose among 1 and 2."""
    dropout: float = 0.5
    """Dropout rate in the Fusion-Q-Former; the authors chose among 0.5 and 0.8."""
    alignment: Literal["sampled16", "global"] = "sampled16"
    """Form of the content-ID contrast; sampled16 is the authors'."""
    temperature: float = 0.5
    """Temperature of the contrast; the authors chose among 0.5 and 0.1."""
    alignment_weight: float = 1e-3
    """Weight of the contrast in the loss [authors' code]."""
    l2: float | None = None
    """Weight of half the mean squared norm of a batch's users and items before the backbone, content included; none
    takes that of the backbone in `L2`."""

    def __post_init__(self) -> None:
        """Refuse names that there are not."""
        if self.backbone not in BACKBONES:
            raise ConfigError(f"backbone is '{self.backbone}'; choose from {', '.join(BACKBONES)}")
        if self.content not in CONTENTS:
            raise ConfigError(f"content is '{self.content}'; choose from {', '.join(CONTENTS)}")

    @property
    def l2_weight(self) -> float:
        """The weight of L2 that is trained with."""
        return L2[self.backbone] if self.l2 is None else self.l2


class Vectors(NamedTuple):
    """Vectors of all users and items.

    Attributes:
        users_VD: Users, to score with.
        scored_UD: Items, to score.
        entering_ND: Users, then items, as they enter the backbone: ID embedding plus content.
        content_UD: Content of the items, if the model has any.
    """

    users_VD: Tensor
    scored_UD: Tensor
    entering_ND: Tensor
    content_UD: Tensor | None


class Recommender(nn.Module):
    """Scores an item for a user by an inner product; trained on pairs of an item had and an item not had.

    An item enters the backbone as its ID embedding plus its content, so a graph backbone passes content on to users.
    The factor of content starts at 0, so that training starts from IDs alone.
    Tables are plain nn.Embedding weights: in one process all rows take part in each step of a graph backbone, and
    there is nothing to shard. Backbones after BPR-MF, LightGCN and the item graph of FREEDOM, without FREEDOM's
    sampling of edges and its losses on single modalities [ours]; content parts [authors' code], see the classes.

    Args:
        options: See `ModelOptions`.
        data: Its training part makes the graph.
        features: Frozen vectors [U, I] by modality; not used where `content` is none, but for lightgcn_knn.

    Raises:
        ConfigError: If the options need features and there are none.
    """

    def __init__(self, options: ModelOptions, data: Interactions, features: Mapping[str, Tensor]) -> None:
        super().__init__()
        if not features and (options.content != "none" or options.backbone == "lightgcn_knn"):
            raise ConfigError(
                f"{options.backbone} with content '{options.content}' needs features; give a feature file"
            )
        self.options = options
        self.num_users = data.num_users
        self.rows = nn.Embedding(data.num_users + data.num_items, options.width)
        nn.init.normal_(self.rows.weight, std=EMBEDDING_STD)
        self.content = _content_part(options, features) if options.content != "none" else None
        self.alignment = _alignment(options) if options.content == "em3" else None
        self.graph = self.similar = None
        if options.backbone != "bpr":
            self.graph = bipartite_graph(*data.pairs("train"), data.num_users, data.num_items)
        if options.backbone == "lightgcn_knn":
            self.similar = similarity_graph(features, _modality_weights(options, features), options.neighbours)

    def forward(self) -> Vectors:
        """Return the vectors of all users and items."""
        entering_ND, content_UD = self.rows.weight, None
        if self.content is not None:
            content_UD = self.content()
            entering_ND = torch.cat([entering_ND[: self.num_users], entering_ND[self.num_users :] + content_UD])
        rows_ND = entering_ND
        if self.graph is not None:
            layers = [rows_ND]
            for _ in range(self.options.layers):
                layers.append(propagate(self.graph, layers[-1]))
            rows_ND = torch.stack(layers).mean(0)
        users_VD, scored_UD = rows_ND[: self.num_users], rows_ND[self.num_users :]
        if self.similar is not None:
            scored_UD = scored_UD + propagate(self.similar, entering_ND[self.num_users :])
        return Vectors(users_VD, scored_UD, entering_ND, content_UD)

    def loss(self, user_B: Tensor, item_B: Tensor, other_B: Tensor) -> Tensor:
        """Return the loss of a batch: an item of each user's should score above another item."""
        users_VD, scored_UD, entering_ND, content_UD = self()
        margin_B = (users_VD[user_B] * (scored_UD[item_B] - scored_UD[other_B])).sum(1)
        loss = -nn.functional.logsigmoid(margin_B).mean()
        # Content too: what L2 leaves out grows in place of the ID embeddings, and validation falls.
        drawn = [entering_ND[rows] for rows in (user_B, item_B + self.num_users, other_B + self.num_users)]
        loss = loss + 0.5 * self.options.l2_weight * sum(rows_BD.square().sum(1).mean() for rows_BD in drawn)
        if self.alignment is not None and content_UD is not None:
            item_C, count_C = item_B.unique(return_counts=True)
            aligned = self.alignment(content_UD[item_C], self.rows(item_C + self.num_users), item_C, count_C)
            loss = loss + self.options.alignment_weight * aligned
        return loss


class _LinearContent(nn.Module):
    """Frozen vectors of all modalities side by side through one linear map."""

    def __init__(self, tokens: Mapping[str, ModalityTokens], width: int) -> None:
        super().__init__()
        pooled_UI = torch.cat([masked_mean(group) for group in tokens.values()], dim=1)
        self.register_buffer("pooled_UI", pooled_UI, persistent=False)
        self.project = nn.Linear(pooled_UI.shape[1], width)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self.scale = nn.Parameter(torch.tensor(0.0))

    def forward(self) -> Tensor:
        """Return the content of all items [U, D]."""
        return self.scale * self.project(self.pooled_UI)


class _FusedContent(nn.Module):
    """The Fusion-Q-Former over one token a modality, trained by the loss of the ranking."""

    def __init__(self, tokens: Mapping[str, ModalityTokens], options: ModelOptions) -> None:
        super().__init__()
        self.tokens = dict(tokens)
        tower = FusionQFormerOptions(preset=options.preset, num_queries=options.queries, dropout=options.dropout)
        dims = {name: group.tokens_UTD.shape[2] for name, group in tokens.items()}
        self.tower = FusionQFormer(tower, dims, dict.fromkeys(tokens, 1), options.width)
        self.scale = nn.Parameter(torch.tensor(0.0))

    def forward(self) -> Tensor:
        """Return the content of all items [U, D]."""
        return self.scale * self.tower(self.tokens)


def _content_part(options: ModelOptions, features: Mapping[str, Tensor]) -> nn.Module:
    tokens = as_tokens(features)
    return _LinearContent(tokens, options.width) if options.content == "linear" else _FusedContent(tokens, options)


def _alignment(options: ModelOptions) -> nn.Module:
    """Return the contrast with the temperature held fixed, as the authors have it."""
    if options.alignment == "sampled16":
        return SampledContrast(SampledOptions(temperature=options.temperature), options.width)
    held = ContrastOptions(temperature=options.temperature, learn_temperature=False)
    return ContentIdContrast(held, options.width)


def _modality_weights(options: ModelOptions, features: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the weight of each modality's item graph; they sum to 1."""
    if len(features) == 1:
        return dict.fromkeys(features, 1.0)
    return {name: options.image_share if name == "image" else 1.0 - options.image_share for name in features}
