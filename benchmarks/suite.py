"""What a suite of `benchmarks/run.py` runs: data sets, their splits, and rows of options, read from suites/*.yaml."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["BASELINE", "FROZEN", "MODEL", "SUITES", "DataSet", "Row", "Suite", "load_suite"]

SUITES = Path(__file__).parent / "suites"
BASELINE, FROZEN, MODEL = "ID-only", "frozen content", "EM3"
"""Rows of rows.yaml that others with their ranker are compared with."""

Options = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """Raw files and how to prepare them.

    Attributes:
        name: What tables call it.
        arguments: Arguments of `em3 prepare` besides --out and --split; paths are below the folder of data sets.
        splits: Splits to prepare.
        groups: Groups of rows to run on it.
        without: Names of rows to leave out.
        options: Options of `em3 train` for every row on it.
        redrawn: Whether the data is split anew for each seed, and not once for all of them.
    """

    name: str
    arguments: tuple[str, ...]
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    without: tuple[str, ...]
    options: Options
    redrawn: bool


@dataclass(frozen=True)
class Row:
    """One line of a table: options of `em3 train` above the suite's own.

    Attributes:
        group: Table that it belongs to.
        ranker: Name of its ranker; it is compared with rows of that ranker.
        name: The rest of its name.
        options: The options.
    """

    group: str
    ranker: str
    name: str
    options: Options

    @property
    def label(self) -> str:
        """What tables and --only call it."""
        return f"{self.ranker}, {self.name}"


@dataclass(frozen=True)
class Suite:
    """A matrix of runs.

    Attributes:
        name: File name of its table.
        config: Config of every run, a path from the root of the repository.
        search: Values to choose from by option, the same for every row.
        datasets: Data sets.
        rows: Rows of all groups.
    """

    name: str
    config: str
    search: dict[str, list[Any]]
    datasets: tuple[DataSet, ...]
    rows: tuple[Row, ...]

    def cells(self) -> Iterator[tuple[DataSet, str, Row]]:
        """Yield data set, split and row of everything that is to be run, row by row within a split."""
        for dataset in self.datasets:
            for split in dataset.splits:
                for row in self.rows:
                    if row.group in dataset.groups and row.name not in dataset.without:
                        yield dataset, split, row


def load_suite(name: str, dataset_dir: Path) -> Suite:
    """Read suites/NAME.yaml and the rows that all suites share.

    Raises:
        ValueError: If there is no such suite.
    """
    known = sorted(path.stem for path in SUITES.glob("*.yaml") if path.stem != "rows")
    if name not in known:
        raise ValueError(f"no suite '{name}'; suites: {', '.join(known)}")
    read = yaml.safe_load((SUITES / f"{name}.yaml").read_text(encoding="utf-8"))
    datasets = tuple(_dataset(key, value, dataset_dir) for key, value in read["datasets"].items())
    return Suite(name, read["config"], read["search"], datasets, tuple(_rows()))


def _dataset(name: str, read: dict[str, Any], folder: Path) -> DataSet:
    source = folder / read["folder"]
    arguments = [read["reader"], "--source", str(source), *map(str, read.get("arguments", []))]
    for option, names in read.get("first_found", {}).items():
        # The publisher's file where it is there, else the part of it that may be shared.
        found = [candidate for candidate in names if (source / candidate).is_file()]
        arguments += [f"--{option}", found[0]] if found else []
    splits, groups, without = (tuple(read.get(key, ())) for key in ("splits", "groups", "without"))
    return DataSet(name, tuple(arguments), splits, groups, without, read.get("options", {}), read.get("redrawn", False))


def _rows() -> Iterator[Row]:
    read = yaml.safe_load((SUITES / "rows.yaml").read_text(encoding="utf-8"))
    for ranker, registered in read["rankers"].items():
        for model, options in read["models"].items():
            yield Row("rankers", ranker, model, {"model.ranker": registered, **options})
    ranker, registered = next(iter(read["rankers"].items()))
    for group, parts in read["parts"].items():
        for part, options in parts.items():
            yield Row(group, ranker, part, {"model.ranker": registered, **options})
