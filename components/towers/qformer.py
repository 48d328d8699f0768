"""The Fusion-Q-Former: trainable queries read any number of modalities into one vector of fixed width.

Shape letters: U items, Q queries, T tokens of a modality, K queries and all tokens, R rows updated or read, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.attention import Attention, Keys
from torchrec_em3.components.towers.tokens import TokenProjection, masked_mean, mean_of_valid
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import TOWERS

__all__ = ["FusionQFormer", "FusionQFormerOptions"]

PUBLIC_EPSILON = 1e-5
"""The authors' constant, both under the root that scales the scores and in LayerNorm."""


@dataclass(frozen=True, kw_only=True)
class FusionQFormerOptions:
    """Options of the content tower `fusion_qformer`."""

    preset: Literal["full", "em3_public"] = "full"
    """full reads all tokens; em3_public is the authors' published form on one pooled vector a modality."""
    num_queries: int = 4
    """Trainable queries Q; the output is read from all of them (full: and from the mean of each modality)."""
    num_layers: int = 1
    """Transformer layers; the last one computes the query rows only."""
    num_heads: int = 4
    """Attention heads; must divide the width of the model."""
    ffn_multiple: int = 2
    """Width of the feed-forward layer in widths of the model (full only; em3_public has none)."""
    dropout: float = 0.0
    """Dropout rate on what attention and feed-forward layers add, in [0, 1)."""
    bfloat16: bool = False
    """Project tokens in bfloat16 (full only); saves a third of the tower's time on a CPU with bfloat16 instructions."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        if self.preset not in ("full", "em3_public"):
            raise ConfigError(f"preset of fusion_qformer is '{self.preset}', must be 'full' or 'em3_public'")
        for name in ("num_queries", "num_layers", "num_heads", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of fusion_qformer is {getattr(self, name)}, must be >= 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout of fusion_qformer is {self.dropout}, must be in [0, 1)")


@TOWERS.register("fusion_qformer", options=FusionQFormerOptions)
class FusionQFormer(nn.Module):
    """Content of an item from its modalities, fused by transformer layers over [queries ; tokens].

    A modality that an item lacks is a set of masked tokens; an item without any still has its queries, and so a finite
    result. The item ID is never a token: content would then hold the very ID that the alignment loss aligns it with.

    Source: trainable queries over transformers, any number of modalities, fixed-length result [abstract]. Preset
    `em3_public`: one token a modality (its pooled vector, through a linear map), plain multi-head self-attention over
    [queries ; tokens], LayerNorm after the residual, no feed-forward layer, no position or modality embedding, the
    query rows flattened into a linear map, Xavier initialisation [authors' code]; pooling by the mean of the valid
    tokens instead of stored pooled vectors, and the mask, are [ours]. Preset `full`: all tokens, with embeddings of
    modality and position, LayerNorm before each part, a feed-forward layer, query rows only in the last layer, and the
    mean of each modality's projected tokens read beside the queries [ours]: what the encoders say already reaches the
    ranker by a path without attention, which learns sooner.

    Args:
        options: See `FusionQFormerOptions`.
        token_dims: Width of a token by modality.
        token_counts: Largest number of tokens of an item by modality.
        width: D.

    Raises:
        ConfigError: If there is no modality or `num_heads` does not divide `width`.
    """

    def __init__(
        self,
        options: FusionQFormerOptions,
        token_dims: Mapping[str, int],
        token_counts: Mapping[str, int],
        width: int,
    ) -> None:
        super().__init__()
        if not token_dims:
            raise ConfigError("fusion_qformer needs at least one modality, and the data has none")
        full = options.preset == "full"
        self.queries_QD = nn.Parameter(torch.empty(options.num_queries, width))
        self.inputs = nn.ModuleDict(
            {
                name: TokenProjection(dim, token_counts[name], width, options.bfloat16) if full else _Pooled(dim, width)
                for name, dim in token_dims.items()
            }
        )
        block = _PreNormBlock if full else _PublicBlock
        # Projected tokens have a known scale, so the first layer takes them as keys without a LayerNorm.
        self.blocks = nn.ModuleList(block(options, width, depth == 0) for depth in range(options.num_layers))
        self.norm = nn.LayerNorm(width) if full else nn.Identity()
        self.reads_means = full
        rows = options.num_queries + (len(token_dims) if full else 0)
        self.readout = nn.Linear(rows * width, width)
        nn.init.xavier_uniform_(self.queries_QD)
        self.apply(_initialise)

    @property
    def lora_targets(self) -> list[str]:
        """Names of the linear maps that low-rank adapters go to: those of attention and those from tokens."""
        suffixes = ("query", "key", "value", "output", "project")
        return [name for name, _ in self.named_modules() if name.rsplit(".", 1)[-1] in suffixes]

    def forward(self, tokens: Mapping[str, ModalityTokens]) -> Tensor:
        """Return content_UD.

        Args:
            tokens: Tokens of the same U items by modality; all modalities the tower was built for.
        """
        projected = self._project(tokens)
        rows_URD = self.blocks[-1](*self._below_last(projected))
        if self.reads_means:
            means = [mean_of_valid(*group)[:, None] for group in projected]
            rows_URD = torch.cat([rows_URD, *means], dim=1)
        return self.readout(self.norm(rows_URD).flatten(1))

    @torch.no_grad()
    def token_attention(self, tokens: Mapping[str, ModalityTokens]) -> dict[str, Tensor]:
        """Return how much each query attends to each token in the last layer, [U, Q, T] by modality, mean over heads.

        What is missing to a sum of 1 goes to the queries themselves. Behind more than one layer a token's row has taken
        up others', so its weight is no longer about that token alone. With `em3_public` T is 1.

        Args:
            tokens: As in `forward`.
        """
        projected = self._project(tokens)
        counts = [group.rows_UTD.shape[1] for group in projected]
        last: Any = self.blocks[-1]
        weight_UHQK = last.weights(*self._below_last(projected))
        weight_UQK = weight_UHQK.mean(1)[:, :, self.queries_QD.shape[0] :]
        return dict(zip(self.inputs, torch.split(weight_UQK, counts, dim=2), strict=True))

    def _project(self, tokens: Mapping[str, ModalityTokens]) -> list[Any]:
        """Return the tokens of each modality as keys, with their mask."""
        return [project(tokens[name]) for name, project in self.inputs.items()]

    def _below_last(self, keys: list[Any]) -> tuple[Keys, list[Keys]]:
        """Return query rows and other keys as the last layer gets them."""
        queries = self.queries_QD.shape[0]
        rows_UQD = self.queries_QD[None]
        if len(self.blocks) > 1:
            sizes = keys[0].rows_UTD.shape[0]
            shown_UQ = torch.ones(sizes, queries, dtype=torch.bool, device=rows_UQD.device)
            rows_UKD = torch.cat([rows_UQD.expand(sizes, -1, -1), *(group.rows_UTD for group in keys)], dim=1)
            valid_UK = torch.cat([shown_UQ, *(group.valid_UT for group in keys)], dim=1)
            for block in self.blocks[:-1]:
                rows_UKD = block(Keys(rows_UKD, valid_UK), [])
            rows_UQD = rows_UKD[:, :queries]
            keys = [Keys(rows_UKD[:, queries:], valid_UK[:, queries:])]
        return Keys(rows_UQD), keys


class _Pooled(nn.Module):
    """One token a modality: the mean of its tokens through a linear map."""

    def __init__(self, token_dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(token_dim, width)

    def forward(self, tokens: ModalityTokens) -> Keys:
        """Return the token [U, 1, D], masked where the item lacks the modality."""
        return Keys(self.project(masked_mean(tokens))[:, None], tokens.valid_UT.any(1, keepdim=True))


class _PreNormBlock(nn.Module):
    """Attention and feed-forward layer, each behind a LayerNorm and added to its input."""

    def __init__(self, options: FusionQFormerOptions, width: int, first: bool) -> None:
        super().__init__()
        inner = options.ffn_multiple * width
        self.norm_rows = nn.LayerNorm(width)
        self.first = first
        self.norm_ffn = nn.LayerNorm(width)
        self.attention = Attention(width, options.num_heads)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, rows: Keys, others: list[Keys]) -> Tensor:
        """Return the rows [U, R, D] after the layer; they attend to themselves and to the others."""
        rows_URD = rows.rows_UTD + self.dropout(self.attention(*self._inputs(rows, others)))
        return rows_URD + self.dropout(self.ffn(self.norm_ffn(rows_URD)))

    def weights(self, rows: Keys, others: list[Keys]) -> Tensor:
        """Return what the rows attend to (see `Attention.weights`)."""
        return self.attention.weights(*self._inputs(rows, others))

    def _inputs(self, rows: Keys, others: list[Keys]) -> tuple[Tensor, list[Keys]]:
        """Return queries and keys of the attention."""
        normed = Keys(self.norm_rows(rows.rows_UTD), rows.valid_UT)
        if not self.first:
            others = [Keys(self.norm_rows(other), valid) for other, valid in others]
        return normed.rows_UTD, [_shared_by_all(normed, others), *others]


class _PublicBlock(nn.Module):
    """Attention added to its input, then LayerNorm [authors' code]."""

    def __init__(self, options: FusionQFormerOptions, width: int, first: bool) -> None:
        super().__init__()
        self.attention = Attention(width, options.num_heads, PUBLIC_EPSILON)
        self.dropout = nn.Dropout(options.dropout)
        self.norm = nn.LayerNorm(width, eps=PUBLIC_EPSILON)

    def forward(self, rows: Keys, others: list[Keys]) -> Tensor:
        """Return the rows [U, R, D] after the layer; they attend to themselves and to the others."""
        attended_URD = self.attention(rows.rows_UTD, [_shared_by_all(rows, others), *others])
        return self.norm(rows.rows_UTD + self.dropout(attended_URD))

    def weights(self, rows: Keys, others: list[Keys]) -> Tensor:
        """Return what the rows attend to (see `Attention.weights`)."""
        return self.attention.weights(rows.rows_UTD, [_shared_by_all(rows, others), *others])


def _shared_by_all(rows: Keys, others: list[Keys]) -> Keys:
    """Return the rows as keys of every item, where the items share them."""
    sizes = others[0].rows_UTD.shape[0] if others else rows.rows_UTD.shape[0]
    return Keys(rows.rows_UTD.expand(sizes, -1, -1), rows.valid_UT)


def _initialise(module: nn.Module) -> None:
    """Xavier weights and no bias in every linear map."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
