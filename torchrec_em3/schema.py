"""What the model needs to know about a data set: its features, its catalogue and its modalities.

Shape letters: E events.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["CodeSpec", "DenseFeature", "FeatureSchema", "IdSpec", "ModalitySpec", "SparseFeature"]


@dataclass(frozen=True)
class SparseFeature:
    """A categorical feature of a user or an event: one table of `rows` rows, row 0 for unknown values."""

    name: str
    rows: int


@dataclass(frozen=True)
class DenseFeature:
    """A number that comes with each event; the model reads it in standard deviations from the mean.

    Attributes:
        name: Name of the feature.
        mean: Mean of the training events in which it is known.
        std: Their standard deviation, or 1 where they are all alike.
    """

    name: str
    mean: float
    std: float

    def standardise(self, value_E: np.ndarray) -> np.ndarray:
        """Return what the model reads, float32 [E]: an unknown value, NaN, becomes 0, which is the mean."""
        scaled_E = (value_E.astype(np.float64) - self.mean) / self.std
        return np.where(np.isnan(scaled_E), 0.0, scaled_E).astype(np.float32)


@dataclass(frozen=True)
class ModalitySpec:
    """Tokens of one modality: at most `max_tokens` an item, each `dim` wide."""

    name: str
    dim: int
    max_tokens: int


@dataclass(frozen=True)
class CodeSpec:
    """Semantic codes of items by one quantiser: `levels` numbers an item, each below `codes_per_level`."""

    name: str
    levels: int
    codes_per_level: int


@dataclass(frozen=True)
class IdSpec:
    """Which ids a table is looked up by, and how they find their rows.

    Attributes:
        kind: fixed: rows of the prepared vocabulary. The others take raw 64-bit ids: hashed ones share rows, managed
            ones are given a row of their own while training and lose it to others where there are more ids than rows.
        rows: Rows of the table, row 0 included; 0 where they are fixed.
        eviction: Which ids lose their rows, where they are managed.
    """

    kind: Literal["fixed", "hashed", "managed"] = "fixed"
    rows: int = 0
    eviction: Literal["lfu", "lru", "distance_lfu"] = "lfu"


@dataclass(frozen=True)
class FeatureSchema:
    """Shapes of everything a batch refers to.

    Attributes:
        user_features: Pooled features of the user, in the order of the KeyedJaggedTensor's keys; the first is the user.
        item_rows: Rows of the catalogue, row 0 ("unknown") included.
        known_items: Items with training rows; they are catalogue rows 1..known_items and the only ones with an ID
            embedding.
        modalities: What the token store holds.
        sparse: Pooled features of the event; their keys follow.
        dense: Dense features of the event, in the order of the columns of `Batch.dense`.
        codes: What the code store holds.
        tasks: Names of the labels, the main one first.
        user_ids: Ids of the user table.
        item_ids: Ids of the item table.
    """

    user_features: tuple[SparseFeature, ...]
    item_rows: int
    known_items: int
    modalities: tuple[ModalitySpec, ...] = ()
    sparse: tuple[SparseFeature, ...] = ()
    dense: tuple[DenseFeature, ...] = ()
    codes: tuple[CodeSpec, ...] = ()
    tasks: tuple[str, ...] = ("label",)
    user_ids: IdSpec = IdSpec()
    item_ids: IdSpec = IdSpec()

    @property
    def pooled_features(self) -> tuple[SparseFeature, ...]:
        """All features that are one row of a table each, in the order of the KeyedJaggedTensor's keys."""
        return self.user_features + self.sparse

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "FeatureSchema":
        """Read the schema out of a prepared folder's `meta.json`."""
        return cls(
            user_features=tuple(SparseFeature(f["name"], int(f["rows"])) for f in meta["user_features"]),
            item_rows=int(meta["counts"]["items"]) + 1,
            known_items=int(meta["counts"]["known_items"]),
            modalities=tuple(
                ModalitySpec(name, int(spec["dim"]), int(spec["max_tokens"]))
                for name, spec in sorted(meta["modalities"].items())
            ),
            sparse=tuple(SparseFeature(f["name"], int(f["rows"])) for f in meta.get("sparse", ())),
            dense=tuple(DenseFeature(**feature) for feature in meta.get("dense", ())),
            codes=tuple(
                CodeSpec(name, int(spec["levels"]), int(spec["codes_per_level"]))
                for name, spec in sorted(meta.get("codes", {}).items())
            ),
            tasks=tuple(task["name"] for task in meta["tasks"]),
        )
