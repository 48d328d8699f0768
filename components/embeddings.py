"""The ID path: TorchRec collections over the tables of a feature schema.

Shape letters: B rows, D width, U distinct target items, V distinct history items.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_em3.batch import HISTORY, TARGET
from torchrec_em3.components.lookup import Lookup
from torchrec_em3.schema import FeatureSchema

__all__ = ["ItemEmbedding", "Precision", "UserEmbedding"]

Precision = Literal["fp32", "fp16", "bf16"]
"""How the numbers of a table are stored; what comes out of a lookup is float32."""


class UserEmbedding(nn.Module):
    """Pooled embeddings of the user and the side features."""

    def __init__(self, schema: FeatureSchema, dim: int, device: torch.device, precision: Precision = "fp32") -> None:
        """Create one table of width `dim` for each user feature on `device` (meta until the tables are sharded)."""
        super().__init__()
        self.names = [feature.name for feature in schema.user_features]
        self.table_names = [f"{name}_table" for name in self.names]
        self.num_parameters = dim * sum(feature.rows for feature in schema.user_features)
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"{feature.name}_table",
                    feature_names=[feature.name],
                    num_embeddings=feature.rows,
                    embedding_dim=dim,
                    data_type=DataType[precision.upper()],
                    pooling=PoolingType.SUM,
                )
                for feature in schema.user_features
            ],
            device=device,
        )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return the pooled embedding [B, D] of each user feature, by name; the keys must be the schema's."""
        return self.answer(self.ask(features))

    def ask(self, features: KeyedJaggedTensor) -> Lookup:
        """Begin to look up features; `answer` completes it, and the two together are `forward`."""
        return Lookup(self.tables, features)

    def answer(self, lookup: Lookup) -> dict[str, Tensor]:
        """Return what `forward` would have returned for what was asked."""
        # By name: the order in which a sharded collection returns its features depends on the plan.
        pooled = lookup.rows().to_dict()
        return {name: pooled[name] for name in self.names}


class ItemEmbedding(nn.Module):
    """ID embeddings of target and history items, which share one table; each distinct item is looked up once.

    TorchRec's own `use_index_dedup` has no CPU kernel; looking up distinct ids and gathering is the same sum of
    gradients. Items without training rows have no embedding of their own and share row 0, "unknown".
    """

    def __init__(self, schema: FeatureSchema, dim: int, device: torch.device, precision: Precision = "fp32") -> None:
        """Create the item table of width `dim` on `device` (meta until the table is sharded)."""
        super().__init__()
        self.known_items = schema.known_items
        self.table_names = ["item_table"]
        self.num_parameters = dim * (schema.known_items + 1)
        self.tables = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name="item_table",
                    feature_names=[TARGET, HISTORY],
                    num_embeddings=schema.known_items + 1,
                    embedding_dim=dim,
                    data_type=DataType[precision.upper()],
                )
            ],
            device=device,
        )

    def known(self, item: Tensor) -> Tensor:
        """Return which catalogue rows have an ID embedding of their own."""
        return (item > 0) & (item <= self.known_items)

    def forward(self, target_U: Tensor, history_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look up distinct items.

        Args:
            target_U: Distinct target items, catalogue rows.
            history_V: Distinct history items, catalogue rows.

        Returns:
            target_UD, history_VD and the embedding of "unknown", unknown_D.
        """
        return self.answer(self.ask(target_U, history_V))

    def ask(self, target_U: Tensor, history_V: Tensor) -> Lookup:
        """Begin to look up distinct items; `answer` completes it, and the two together are `forward`."""
        unknown = target_U.new_zeros(1)
        values = torch.cat([unknown, self._table_row(target_U), self._table_row(history_V)])
        lengths = torch.tensor([1 + target_U.numel(), history_V.numel()], device=values.device)
        features = KeyedJaggedTensor(keys=[TARGET, HISTORY], values=values, lengths=lengths)
        return Lookup(self.tables, features)

    def answer(self, lookup: Lookup) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `forward` would have returned for what was asked."""
        rows = lookup.rows()
        target, history_VD = rows[TARGET].values(), rows[HISTORY].values()
        return target[1:], history_VD, target[0]

    def _table_row(self, item: Tensor) -> Tensor:
        return torch.where(self.known(item), item, 0)
