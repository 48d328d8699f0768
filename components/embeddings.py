"""The ID path: TorchRec collections over the tables of a feature schema.

Shape letters: B rows, N ids, D width, U distinct target items, V distinct history items.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_em3.batch import HISTORY, TARGET
from torchrec_em3.components.lookup import JoinedLookup, Lookup
from torchrec_em3.components.managed_ids import hashed_rows, manage, managed_rows, rows_and_owners
from torchrec_em3.schema import FeatureSchema

__all__ = ["ItemEmbedding", "ItemRows", "Precision", "UserEmbedding", "UserIdEmbedding"]

RAW_ID_BYTES = 8
"""A raw id is int64."""

Precision = Literal["fp32", "fp16", "bf16"]
"""How the numbers of a table are stored; what comes out of a lookup is float32."""


class UserIdEmbedding(nn.Module):
    """Embeddings of users by raw ids, which are given rows while training; those without one share row 0."""

    def __init__(self, schema: FeatureSchema, dim: int, device: torch.device, precision: Precision = "fp32") -> None:
        """Create the user table of width `dim` on `device` (meta until the table is sharded)."""
        super().__init__()
        self.name = schema.user_features[0].name
        self.table_names = [f"{self.name}_table"]
        self.num_parameters = dim * schema.user_ids.rows
        self.tables = manage(
            _sequence_table(self.table_names[0], [self.name], schema.user_ids.rows, dim, device, precision),
            schema.user_ids,
            device,
        )

    def forward(self, user_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings [B, D] of raw ids, and which of them have a row of their own [B]."""
        return self.answer(self.ask(user_B))

    def ask(self, user_B: Tensor) -> Lookup:
        """Begin to look up raw ids of users; `answer` completes it, and the two together are `forward`."""
        id_N = torch.cat([user_B.new_zeros(1), user_B])
        lengths = torch.tensor([id_N.numel()], device=id_N.device)
        return Lookup(self.tables, KeyedJaggedTensor(keys=[self.name], values=id_N, lengths=lengths))

    def answer(self, lookup: Lookup) -> tuple[Tensor, Tensor]:
        """Return what `forward` would have returned for what was asked."""
        row_ND, own_N = rows_and_owners(lookup, self.tables)[self.name]
        return torch.where(own_N[1:, None], row_ND[1:], row_ND[0]), own_N[1:]


class UserEmbedding(nn.Module):
    """Pooled embeddings of the user, the side features and the sparse features of the event."""

    def __init__(self, schema: FeatureSchema, dim: int, device: torch.device, precision: Precision = "fp32") -> None:
        """Create one table of width `dim` for each feature on `device` (meta until the tables are sharded)."""
        super().__init__()
        self.names = [feature.name for feature in schema.pooled_features]
        self._ids = schema.user_ids
        rows = {feature.name: feature.rows for feature in schema.pooled_features}
        self.by_id: UserIdEmbedding | None = None
        if self._ids.kind == "managed":
            self.by_id = UserIdEmbedding(schema, dim, device, precision)
            del rows[self.names[0]]
        elif self._ids.kind == "hashed":
            rows[self.names[0]] = self._ids.rows
        self._pooled = list(rows)
        self.table_names = [f"{name}_table" for name in rows]
        self.num_parameters = dim * sum(rows.values()) + (self.by_id.num_parameters if self.by_id is not None else 0)
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"{name}_table",
                    feature_names=[name],
                    num_embeddings=count,
                    embedding_dim=dim,
                    data_type=DataType[precision.upper()],
                    pooling=PoolingType.SUM,
                )
                for name, count in rows.items()
            ],
            device=device,
        )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return the embedding [B, D] of each feature, by name; the keys must be the schema's."""
        return self.answer(self.ask(features))

    def ask(self, features: KeyedJaggedTensor) -> Lookup | JoinedLookup:
        """Begin to look up features; `answer` completes it, and the two together are `forward`."""
        if self._ids.kind == "hashed":
            features = self._hash_users(features)
        if self.by_id is None:
            return Lookup(self.tables, features)
        user, rest = features.split([1, len(self._pooled)])
        by_id = self.by_id.ask(user.values())
        return JoinedLookup(by_id, Lookup(self.tables, rest)) if self._pooled else JoinedLookup(by_id)

    def answer(self, lookup: Lookup | JoinedLookup) -> dict[str, Tensor]:
        """Return what `forward` would have returned for what was asked."""
        found: dict[str, Tensor] = {}
        parts = lookup.parts if isinstance(lookup, JoinedLookup) else (lookup,)
        if self.by_id is not None:
            found[self.names[0]], _ = self.by_id.answer(parts[0])
        if self._pooled:
            # By name: the order in which a sharded collection returns its features depends on the plan.
            pooled = parts[-1].rows().to_dict()
            found |= {name: pooled[name] for name in self._pooled}
        return found

    def table_rows(self, user_N: Tensor) -> Tensor:
        """Return the row of the user table that each user has; all rows must be held by this process.

        Args:
            user_N: Users as `forward` takes them: rows of the vocabulary, or raw ids.
        """
        if self._ids.kind == "hashed":
            return hashed_rows(user_N, self._ids.rows)
        return user_N if self.by_id is None else managed_rows(user_N, self.by_id.tables)

    def _hash_users(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        user, rest = features.split([1, len(self.names) - 1])
        row_B = hashed_rows(user.values(), self._ids.rows)
        return KeyedJaggedTensor(
            keys=features.keys(), values=torch.cat([row_B, rest.values()]), lengths=features.lengths()
        )


class ItemRows(NamedTuple):
    """ID embeddings of distinct items.

    Attributes:
        target_UD: Those of the targets.
        history_VD: Those of the history items.
        unknown_D: That of "unknown", row 0.
        known_U: Which targets have another one than that.
    """

    target_UD: Tensor
    history_VD: Tensor
    unknown_D: Tensor
    known_U: Tensor


class ItemEmbedding(nn.Module):
    """ID embeddings of target and history items, which share one table; each distinct item is looked up once.

    TorchRec's own `use_index_dedup` has no CPU kernel; looking up distinct ids and gathering is the same sum of
    gradients. Items without training rows have no embedding of their own and share row 0, "unknown"; in a managed table
    so do those that have no row yet or any more, while in a hashed one each has a row, which others may have as well.
    """

    _raw_ids: Tensor

    def __init__(
        self,
        schema: FeatureSchema,
        dim: int,
        device: torch.device,
        precision: Precision = "fp32",
        raw_ids: Tensor | None = None,
    ) -> None:
        """Create the item table of width `dim` on `device` (meta until the table is sharded).

        Args:
            schema: Says how many rows, and by which ids.
            dim: Width.
            device: Where the table is created.
            precision: How it is stored.
            raw_ids: Raw id of each catalogue row, 0 for row 0; None where the ids are fixed, or for a model that is
                never run.
        """
        super().__init__()
        self._known_items, self._ids = schema.known_items, schema.item_ids
        rows = schema.known_items + 1 if self._ids.kind == "fixed" else self._ids.rows
        self.table_names = ["item_table"]
        self.num_parameters = dim * rows
        # Of every catalogue row, here or, in a model that is never run, when it will run.
        self.raw_id_bytes = 0 if self._ids.kind == "fixed" else RAW_ID_BYTES * schema.item_rows
        self.register_buffer("_raw_ids", raw_ids, persistent=False)
        tables = _sequence_table("item_table", [TARGET, HISTORY], rows, dim, device, precision)
        self.tables = manage(tables, self._ids, device) if self._ids.kind == "managed" else tables

    def forward(self, target_U: Tensor, history_V: Tensor) -> ItemRows:
        """Look up distinct items.

        Args:
            target_U: Distinct target items, catalogue rows.
            history_V: Distinct history items, catalogue rows.
        """
        return self.answer(self.ask(target_U, history_V))

    def ask(self, target_U: Tensor, history_V: Tensor) -> Lookup:
        """Begin to look up distinct items; `answer` completes it, and the two together are `forward`."""
        unknown = target_U.new_zeros(1)
        values = torch.cat([unknown, self._table_id(target_U), self._table_id(history_V)])
        lengths = torch.tensor([1 + target_U.numel(), history_V.numel()], device=values.device)
        features = KeyedJaggedTensor(keys=[TARGET, HISTORY], values=values, lengths=lengths)
        return Lookup(self.tables, features)

    def answer(self, lookup: Lookup) -> ItemRows:
        """Return what `forward` would have returned for what was asked."""
        found = rows_and_owners(lookup, self.tables)
        (target, known), (history_VD, known_V) = found[TARGET], found[HISTORY]
        target_UD, unknown_D, known_U = target[1:], target[0], known[1:]
        if self._ids.kind == "managed":
            # Ids without a row share the first row of their shard, which is not row 0 on every rank.
            target_UD = torch.where(known_U[:, None], target_UD, unknown_D)
            history_VD = torch.where(known_V[:, None], history_VD, unknown_D)
        return ItemRows(target_UD, history_VD, unknown_D, known_U)

    def table_rows(self, item_N: Tensor) -> Tensor:
        """Return the row of the item table that each catalogue row has; all rows must be held by this process."""
        id_N = self._table_id(item_N)
        return managed_rows(id_N, self.tables) if self._ids.kind == "managed" else id_N

    def save_raw_ids(self) -> None:
        """Make the raw ids part of the state, for a model that is saved without the data that they come from."""
        self.register_buffer("_raw_ids", self._raw_ids, persistent=True)

    def _table_id(self, item: Tensor) -> Tensor:
        """Return what the table takes for catalogue rows: rows of its own, or raw ids where they are managed."""
        if self._ids.kind == "fixed":
            return torch.where((item > 0) & (item <= self._known_items), item, 0)
        raw_id = self._raw_ids[item]
        return raw_id if self._ids.kind == "managed" else hashed_rows(raw_id, self._ids.rows)


def _sequence_table(
    name: str, features: list[str], rows: int, dim: int, device: torch.device, precision: Precision
) -> EmbeddingCollection:
    table = EmbeddingConfig(
        name=name,
        feature_names=features,
        num_embeddings=rows,
        embedding_dim=dim,
        data_type=DataType[precision.upper()],
    )
    return EmbeddingCollection(tables=[table], device=device)
