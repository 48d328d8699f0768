"""`em3 parts`: what can be plugged in, with the options of each part."""

import dataclasses
from collections.abc import Sequence

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
            print(f"  {part.name:<18}{(part.build.__doc__ or '').strip().splitlines()[0]}")
            defaults = part.options()
            for field in dataclasses.fields(part.options):
                print(f"      {field.name} = {getattr(defaults, field.name)!r}")
