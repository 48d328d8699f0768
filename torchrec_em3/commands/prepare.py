"""`em3 prepare movielens|simulated`: raw files to a prepared folder."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from torchrec_em3.datasets.download import download
from torchrec_em3.datasets.movielens import read_movielens
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import CommandParser
from torchrec_em3.parts import load_builtin_parts, load_plugins
from torchrec_em3.registry import closest
from torchrec_em3.runlog import configure_logging

SOURCES = {
    "movielens": "MovieLens 100K, 1M, 20M, 25M, 32M or latest, recognised from its files; "
    "posters and plots beside them are used.",
    "simulated": "A catalogue with rendered pictures, written descriptions and known click probabilities.",
}


def main(arguments: Sequence[str]) -> None:
    """Run `em3 prepare`."""
    source = arguments[0] if arguments else ""
    if source in ("", "-h", "--help"):
        lines = [f"  {name:<11}{text}" for name, text in SOURCES.items()]
        print("\n".join(["usage: em3 prepare SOURCE --out DATA [options]      em3 prepare SOURCE --help", "", *lines]))
        if not source:
            raise ConfigError("name a source: " + " or ".join(SOURCES))
        return
    if source not in SOURCES:
        raise ConfigError(f"unknown source '{source}'; sources: {', '.join(SOURCES)}.{closest(source, list(SOURCES))}")
    configure_logging(first_rank=True)
    {"movielens": _movielens, "simulated": _simulated}[source](arguments[1:])


def _parse(
    source: str, arguments: Sequence[str], extend: Callable[[CommandParser], None]
) -> tuple[Namespace, PrepareOptions]:
    parser = CommandParser(f"prepare {source}", SOURCES[source])
    extend(parser)
    parser.add_argument("--out", type=str, required=True, help="Prepared folder to write.")
    parser.add_argument("--plugins", type=str, default="", help="Modules that register your own encoders.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a prepared folder that is there already.")
    # Simulated clicks are labels already; a threshold on them would make every row negative.
    skipped = {"overwrite", "label_threshold"} if source == "simulated" else {"overwrite"}
    parser.add_class_arguments(PrepareOptions, skip=skipped)
    values = parser.parse(arguments)
    load_builtin_parts()
    load_plugins(values.plugins)
    built = parser.build(values)
    chosen: dict[str, Any] = {name: getattr(built, name, None) for name in PrepareOptions.__dataclass_fields__}
    return built, PrepareOptions(**chosen)


def _movielens(arguments: Sequence[str]) -> None:
    def extend(parser: CommandParser) -> None:
        parser.add_argument("--source", type=str, default="", help="Folder with the publisher's files.")
        parser.add_argument("--ratings", type=str, default="", help="Ratings file, where it bears another name.")
        parser.add_argument(
            "--download", type=str, default="", help="Fetch this set from the publisher first, e.g. ml-1m."
        )
        parser.add_argument("--cache", type=str, default="data/raw", help="Where downloads are kept.")

    values, options = _parse("movielens", arguments, extend)
    if bool(values.source) == bool(values.download):
        raise ConfigError("give either --source DIR with the publisher's files or --download NAME")
    source = Path(values.source) if values.source else download(values.download, Path(values.cache))
    raw = read_movielens(source, Path(values.ratings) if values.ratings else None)
    _say(prepare(raw, Path(values.out), options), values.out, "movielens")


def _simulated(arguments: Sequence[str]) -> None:
    def extend(parser: CommandParser) -> None:
        parser.add_class_arguments(SimulatedOptions, "catalogue")

    values, options = _parse("simulated", arguments, extend)
    with tempfile.TemporaryDirectory() as folder:
        raw = simulate(values.catalogue, Path(folder))
        _say(prepare(raw, Path(values.out), options), values.out, "demo")


def _say(meta: dict[str, Any], out: str, preset: str) -> None:
    counts = meta["counts"]
    print(
        f"prepared {out}: {counts['interactions']} events of {counts['users']} users on {counts['items']} items; "
        f"train {counts['train']}, validation {counts['validation']}, test {counts['test']} ({meta['split']})"
    )
    for name, modality in meta["modalities"].items():
        print(
            f"  {name}: {modality['present']} items, {modality['missing']} without, {modality['broken']} unreadable "
            f"({modality['encoder']})"
        )
    print(f"next: em3 train --config configs/{preset}.yaml --data {out} --run runs/em3")
