"""`em3 prepare parquet|movielens|amazon|sequences|simulated`: raw files to a prepared folder."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from torchrec_em3.datasets.amazon import read_amazon
from torchrec_em3.datasets.code_files import find_codes, name_codes, read_codes
from torchrec_em3.datasets.download import download
from torchrec_em3.datasets.movielens import read_movielens
from torchrec_em3.datasets.parquet_folder import read_parquet_folder
from torchrec_em3.datasets.picture_download import PictureLimits
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.remote_folder import is_url, uploaded_folder
from torchrec_em3.datasets.sequences import read_sequences
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import CommandParser
from torchrec_em3.parts import load_builtin_parts, load_plugins
from torchrec_em3.registry import closest
from torchrec_em3.runlog import configure_logging

SEQUENCE_NEGATIVES = 4

SOURCES = {
    "parquet": "Your own data: Parquet tables of events, items and, if there are any, users.",
    "movielens": "MovieLens 100K, 1M, 20M, 25M, 32M or latest, recognised from its files; "
    "posters and plots beside them are used.",
    "amazon": "Amazon Reviews 2014, 2018 or 2023, reviews or ratings, recognised from its files; "
    "metadata and images beside them are used.",
    "sequences": "Items of each user in time order, without times and ratings; negatives are sampled.",
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
    run = {
        "parquet": _parquet,
        "movielens": _movielens,
        "amazon": _amazon,
        "sequences": _sequences,
        "simulated": _simulated,
    }
    run[source](arguments[1:])


def _parse(
    source: str,
    arguments: Sequence[str],
    extend: Callable[[CommandParser], None],
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Namespace, PrepareOptions]:
    """Return all values and the options of `prepare`; `fixed` ones cannot be given, `defaults` are the source's own."""
    fixed = fixed or {}
    parser = CommandParser(f"prepare {source}", SOURCES[source])
    extend(parser)
    parser.add_argument("--out", type=str, required=True, help="Prepared folder to write, or its fsspec URL.")
    parser.add_argument("--plugins", type=str, default="", help="Modules that register your own encoders.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a prepared folder that is there already.")
    parser.add_class_arguments(PrepareOptions, skip={"overwrite", *fixed})
    parser.set_defaults(dict(defaults or {}))
    values = parser.parse(arguments)
    load_builtin_parts()
    load_plugins(values.plugins)
    built = parser.build(values)
    chosen = {name: getattr(built, name) for name in PrepareOptions.__dataclass_fields__ if name not in fixed}
    return built, PrepareOptions(**chosen, **fixed)


def _path(value: str) -> Path | None:
    return Path(value) if value else None


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",")] if value else []


def _add_codes(parser: CommandParser) -> None:
    parser.add_argument("--codes", type=str, default="", help="Semantic codes of the items, NAME=FILE with commas.")


def _with_codes(raw: RawDataset, files: Mapping[str, Path]) -> RawDataset:
    return replace(raw, codes={name: read_codes(path) for name, path in files.items()})


def _parquet(arguments: Sequence[str]) -> None:
    def extend(parser: CommandParser) -> None:
        parser.add_argument("--source", type=str, required=True, help="Folder with events, items and users.")
        parser.add_argument(
            "--tasks", type=str, default="", help="Columns of 0 and 1 to predict, with commas, the main one first."
        )
        parser.add_argument(
            "--dense", type=str, default="", help="Columns of numbers of each event to rank by, with commas."
        )
        parser.add_argument(
            "--sparse", type=str, default="", help="Columns of categories of each event to rank by, with commas."
        )
        parser.add_argument(
            "--images", type=str, default="", help="Folder of pictures; images/ in SOURCE if not given."
        )
        _add_codes(parser)

    values, options = _parse("parquet", arguments, extend)
    source = Path(values.source)
    tasks, dense, sparse = (_names(columns) for columns in (values.tasks, values.dense, values.sparse))
    raw = read_parquet_folder(source, tasks, _path(values.images), dense, sparse)
    raw = _with_codes(raw, name_codes(values.codes, source))
    _say(_write(raw, values.out, options), values.out, "amazon")


def _movielens(arguments: Sequence[str]) -> None:
    def extend(parser: CommandParser) -> None:
        parser.add_argument("--source", type=str, default="", help="Folder with the publisher's files.")
        parser.add_argument("--ratings", type=str, default="", help="Ratings file, where it bears another name.")
        parser.add_argument(
            "--download", type=str, default="", help="Fetch this set from the publisher first, e.g. ml-1m."
        )
        parser.add_argument("--cache", type=str, default="data/raw", help="Where downloads are kept.")
        _add_codes(parser)

    values, options = _parse("movielens", arguments, extend)
    if bool(values.source) == bool(values.download):
        raise ConfigError("give either --source DIR with the publisher's files or --download NAME")
    source = Path(values.source) if values.source else download(values.download, Path(values.cache))
    raw = _with_codes(read_movielens(source, _path(values.ratings)), name_codes(values.codes, source))
    _say(_write(raw, values.out, options), values.out, "movielens")


def _amazon(arguments: Sequence[str]) -> None:
    def extend(parser: CommandParser) -> None:
        parser.add_argument("--source", type=str, required=True, help="Folder with the publisher's files.")
        parser.add_argument("--reviews", type=str, default="", help="Reviews or ratings file, where there are several.")
        parser.add_argument("--metadata", type=str, default="", help="Metadata file, where there are several.")
        parser.add_argument(
            "--images", type=str, default="", help="Folder of <asin>.jpg; images/ in SOURCE if not given."
        )
        _add_codes(parser)
        parser.add_argument("--download_images", action="store_true", help="Fetch the pictures that the folder lacks.")
        parser.add_class_arguments(PictureLimits, "download")

    values, options = _parse("amazon", arguments, extend)
    raw = read_amazon(
        Path(values.source),
        _path(values.reviews),
        _path(values.metadata),
        _path(values.images),
        values.download if values.download_images else None,
    )
    raw = _with_codes(raw, name_codes(values.codes, Path(values.source)))
    _say(_write(raw, values.out, options), values.out, "amazon")


def _sequences(arguments: Sequence[str]) -> None:
    def extend(parser: CommandParser) -> None:
        parser.add_argument("--source", type=str, required=True, help="Folder with the sequence file.")
        parser.add_argument("--metadata", type=str, default="", help="Amazon metadata of items called by their ASIN.")
        parser.add_argument("--images", type=str, default="", help="Folder of <item id>.jpg.")
        _add_codes(parser)

    # What a sequence holds is positive, and nobody knows when it happened.
    defaults = {"split": "leave_last", "negatives": SEQUENCE_NEGATIVES}
    values, options = _parse(
        "sequences", arguments, extend, fixed={"label_threshold": None, "labels": {}}, defaults=defaults
    )
    if options.negatives == 0:
        raise ConfigError("sequences hold positives only; --negatives is 0, must be at least 1")
    source = Path(values.source)
    raw = read_sequences(source, _path(values.metadata), _path(values.images))
    raw = _with_codes(raw, name_codes(values.codes, source) or find_codes(source))
    _say(_write(raw, values.out, options), values.out, "amazon")


def _simulated(arguments: Sequence[str]) -> None:
    def extend(parser: CommandParser) -> None:
        parser.add_class_arguments(SimulatedOptions, "catalogue")

    # Simulated clicks are labels already; a threshold on them would make every row negative.
    fixed: dict[str, Any] = {"label_threshold": None, "labels": {}, "negatives": 0, "negative_sampling": "popularity"}
    values, options = _parse("simulated", arguments, extend, fixed=fixed)
    with tempfile.TemporaryDirectory() as folder:
        raw = simulate(values.catalogue, Path(folder))
        _say(_write(raw, values.out, options), values.out, "demo")


def _write(raw: RawDataset, out: str, options: PrepareOptions) -> dict[str, Any]:
    if not is_url(out):
        return prepare(raw, Path(out), options)
    with uploaded_folder(out, overwrite=options.overwrite) as folder:
        return prepare(raw, folder, options)


def _say(meta: dict[str, Any], out: str, preset: str) -> None:
    counts, negatives = meta["counts"], meta["negatives"]["rows"]
    print(
        f"prepared {out}: {counts['interactions'] - negatives} events of {counts['users']} users on {counts['items']} "
        f"items{f' and {negatives} sampled negatives' if negatives else ''}; "
        f"train {counts['train']}, validation {counts['validation']}, test {counts['test']} ({meta['split']})"
    )
    for kind in ("dense", "sparse"):
        if meta[kind]:
            print(f"  {kind} features of events: {', '.join(feature['name'] for feature in meta[kind])}")
    for name, modality in meta["modalities"].items():
        print(
            f"  {name}: {modality['present']} items, {modality['missing']} without, {modality['broken']} unreadable "
            f"({modality['encoder']})"
        )
    for name, codes in meta["codes"].items():
        print(
            f"  {name}: codes of {codes['present']} items, {codes['missing']} without "
            f"({codes['levels']} levels of {codes['codes_per_level']}, {codes['source']})"
        )
    print(f"next: em3 train --config configs/{preset}.yaml --data {out} --run runs/em3")
