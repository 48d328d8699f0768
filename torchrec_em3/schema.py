"""What the model needs to know about a data set: its features, its catalogue and its modalities."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CodeSpec", "FeatureSchema", "ModalitySpec", "SparseFeature"]


@dataclass(frozen=True)
class SparseFeature:
    """A categorical feature of a user: one table of `rows` rows, row 0 for unknown values."""

    name: str
    rows: int


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
class FeatureSchema:
    """Shapes of everything a batch refers to.

    Attributes:
        user_features: Pooled features, in the order of the KeyedJaggedTensor's keys; the first is the user.
        item_rows: Rows of the catalogue, row 0 ("unknown") included.
        known_items: Items with training rows; they are catalogue rows 1..known_items and the only ones with an ID
            embedding.
        modalities: What the token store holds.
        num_dense: Width of `Batch.dense`.
        codes: What the code store holds.
        tasks: Names of the labels, the main one first.
    """

    user_features: tuple[SparseFeature, ...]
    item_rows: int
    known_items: int
    modalities: tuple[ModalitySpec, ...] = ()
    num_dense: int = 0
    codes: tuple[CodeSpec, ...] = ()
    tasks: tuple[str, ...] = ("label",)

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
            codes=tuple(
                CodeSpec(name, int(spec["levels"]), int(spec["codes_per_level"]))
                for name, spec in sorted(meta.get("codes", {}).items())
            ),
            tasks=tuple(task["name"] for task in meta["tasks"]),
        )
