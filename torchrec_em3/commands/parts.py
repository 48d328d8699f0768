"""`em3 parts`: what can be plugged in, with the options of each part."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torchrec_em3.parsing import CommandParser
from torchrec_em3.parts import load_builtin_parts, load_plugins
from torchrec_em3.registry import ALIGNMENTS, ENCODERS, HISTORIES, RANKERS, TOWERS

DESCRIPTION = "List the registered parts; any of them can be named in a config, a plug-in's as well."


def main(arguments: Sequence[str]) -> None:
    """Run `em3 parts`."""
    parser = CommandParser("parts", DESCRIPTION)
    parser.add_argument("--plugins", type=str, default="", help="Modules that register your own parts.")
    values = parser.parse(arguments)
    load_builtin_parts()
    load_plugins(values.plugins)
    for registry in (TOWERS, HISTORIES, ALIGNMENTS, RANKERS, ENCODERS):
        print(f"{registry.kind}")
        for part in registry:
            summary = next(iter((part.build.__doc__ or "").strip().splitlines()), "")
            print(f"  {part.name:<18}{summary}".rstrip())
            for field in dataclasses.fields(part.options):
                print(f"      {field.name}{_default(field)}")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    return f" = {field.default_factory()!r}" if field.default_factory is not dataclasses.MISSING else " (required)"
