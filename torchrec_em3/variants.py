"""Runs of one model variant: their configs agree in everything but the seed, the run folder and the sinks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrec_em3.run_record import Place, RunRecord, flatten

__all__ = ["Variant", "closest_baseline", "group_variants"]

MAX_NAMED = 3
"""Differing options in a name, unless it takes more to tell it from others; the table of options has them all."""
ABSENT = object()
NO_OPTIONS = ("seed", "run", "data", "train.sinks")
"""What runs of one variant may differ in."""


@dataclass(frozen=True)
class Variant:
    """One model and everything it was trained with but the seed.

    Attributes:
        name: A few words, unique among the variants that were found together.
        runs: Its runs, at least one, on the same data and split.
        options: Resolved options by dotted name, without those in NO_OPTIONS.
    """

    name: str
    runs: Sequence[RunRecord]
    options: Mapping[str, Any]

    @property
    def uses_content(self) -> bool:
        """Whether the model has a content tower."""
        return self.runs[0].uses_content

    @property
    def place(self) -> Place:
        """Data and split: what runs must share to be compared."""
        return self.runs[0].place


def group_variants(records: Sequence[RunRecord]) -> list[Variant]:
    """Return the variants among evaluated and unevaluated runs, in the order of their first runs.

    Variants of the same kind of model are told apart in their names by the options in which they differ.
    """
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in records:
        options = tuple(sorted((key, str(value)) for key, value in _options(record).items()))
        groups.setdefault((record.place, record.kind, options), []).append(record)
    unnamed = [Variant(runs[0].kind, runs, _options(runs[0])) for runs in groups.values()]
    return [Variant(_name(variant, unnamed), variant.runs, variant.options) for variant in unnamed]


def closest_baseline(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
    """Return what a variant is compared with: the ID-only one of the same place with the fewest other options.

    An ID-only variant is compared with the first of them. Where there is none, the first variant is the baseline. None
    for a baseline itself.
    """
    peers = [other for other in variants if other.place == variant.place]
    id_only = [other for other in peers if not other.uses_content]
    candidates = id_only or peers
    if not variant.uses_content or not id_only:
        return None if variant is candidates[0] else candidates[0]
    return min(candidates, key=lambda other: len(_differences(variant, other)))


def _options(record: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in flatten(record.config).items() if key not in NO_OPTIONS}


def _differences(a: Variant, b: Variant) -> list[str]:
    keys = dict.fromkeys((*a.options, *b.options))
    return [key for key in keys if a.options.get(key, ABSENT) != b.options.get(key, ABSENT)]


def _name(variant: Variant, variants: Sequence[Variant]) -> str:
    twins = [other for other in variants if other.name == variant.name and other.place == variant.place]
    keys = list(dict.fromkeys(key for other in twins for key in _differences(variant, other)))
    if not keys:
        return variant.name
    # "ranker mmoe" says more than the options that only one ranker has.
    keys.sort(key=lambda key: (key.count("."), "_options" in key))
    others = [set(_differences(variant, other)) for other in twins if other is not variant]
    enough = (n for n in range(MAX_NAMED, len(keys)) if all(different & set(keys[:n]) for different in others))
    named = [f"{key.rsplit('.', 1)[-1]} {variant.options.get(key, 'by default')}" for key in keys[: next(enough, None)]]
    return f"{variant.name}, {', '.join(named)}"
