"""Named, pluggable parts: one registry per kind, each part with its own typed options.

A user's part is a class in the user's own package:

    from torchrec_em3.registry import TOWERS

    @dataclass(frozen=True, kw_only=True)
    class MeanOptions:
        dropout: float = 0.0

    @TOWERS.register("mean", options=MeanOptions)
    class MeanTower(nn.Module): ...

`em3 train --plugins my_package.my_module --model.content mean --model.content_options.dropout 0.1` then finds it by
name.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from torchrec_em3.errors import ConfigError

__all__ = ["ALIGNMENTS", "ENCODERS", "HISTORIES", "RANKERS", "TOWERS", "NoOptions", "Part", "Registry", "closest"]

PartClass = TypeVar("PartClass", bound=type)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of a part that has none."""


@dataclass(frozen=True)
class Part:
    """A registered class and the frozen dataclass that types its options."""

    name: str
    build: type[Any]
    options: type[Any]


def closest(name: str, known: list[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


class Registry:
    """All parts of one kind, by name."""

    def __init__(self, kind: str) -> None:
        """Create an empty registry; `kind` is the word that error messages use."""
        self.kind = kind
        self._parts: dict[str, Part] = {}

    def register(self, name: str, *, options: type[Any] = NoOptions) -> Callable[[PartClass], PartClass]:
        """Return a class decorator that makes the class selectable as `name`.

        Args:
            name: What the config says; must be new in this registry.
            options: Frozen dataclass whose fields are the part's options; an instance is the class's first argument.

        Raises:
            ConfigError: If the name is taken by another class or `options` is not a dataclass.
        """
        if not is_dataclass(options):
            raise ConfigError(f"options of {self.kind} '{name}' must be a dataclass, not {options!r}")

        def add(part: PartClass) -> PartClass:
            known = self._parts.get(name)
            if known is not None and known.build.__qualname__ != part.__qualname__:
                raise ConfigError(
                    f"{self.kind} '{name}' is already registered by {known.build.__module__}; pick another name"
                )
            self._parts[name] = Part(name, part, options)
            return part

        return add

    def get(self, name: str) -> Part:
        """Return the part called `name`; raise ConfigError with the nearest name if there is none."""
        if name not in self._parts:
            known = sorted(self._parts)
            raise ConfigError(f"unknown {self.kind} '{name}'; known: {', '.join(known)}.{closest(name, known)}")
        return self._parts[name]

    def __iter__(self) -> Iterator[Part]:
        """Iterate over the parts in name order."""
        return iter(self._parts[name] for name in sorted(self._parts))


ENCODERS = Registry("encoder")
TOWERS = Registry("content tower")
HISTORIES = Registry("history content")
RANKERS = Registry("ranker")
ALIGNMENTS = Registry("alignment loss")
