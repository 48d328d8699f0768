"""Runs a matrix of trainings, row by row, and writes a line of results.jsonl for each finished one; resumable.

    python benchmarks/run.py --suite movielens --dataset_dir data [--seeds 5] [--only "ml-1m/cold_items/DIN"]
    python benchmarks/tables.py --suite movielens

A row's hyper-parameters are searched on the validation split with seed 0, the same points for every row; its test split
is read once a seed, for the run that validation chose. Runs belong to the last commit that changed the package or its
configs: after such a change they start anew, in a folder of their own, as do those of other options or other data.
Needs benchmarks/requirements.txt.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from command import run_em3
from jsonargparse import auto_cli
from ledger import ROOT, Ledger, commit_of, hash_of
from search import search
from suite import DataSet, Row, Suite, load_suite
from tqdm import tqdm

from torchrec_em3.datasets.prepared import hash_content


def main(
    suite: str,
    dataset_dir: str,
    work: str = "runs/benchmark",
    seeds: int = 3,
    trials: int = 2,
    jobs: int = 1,
    only: str = "",
) -> None:
    """Run what is not there yet.

    Args:
        suite: One of benchmarks/suites/*.yaml.
        dataset_dir: Folder with the raw data sets, a folder each as the suite names them.
        work: Where prepared data, runs and results.jsonl go.
        seeds: Seeds of the training; where the suite says `redrawn`, of the split too.
        trials: Points that the search tries for a row; 1 takes the config's.
        jobs: Rows at a time, one thread each.
        only: Regular expression; runs the rows whose "data set/split/row" it matches.
    """
    chosen, folder = load_suite(suite, Path(dataset_dir).resolve()), Path(work).resolve()
    matrix = _Matrix(chosen, folder, Ledger(folder / "results.jsonl"), commit_of(), seeds, trials)
    cells = [cell for cell in chosen.cells() if re.search(only, _name(*cell))]
    if not cells:
        raise SystemExit(f"--only {only} matches none of {', '.join(_name(*cell) for cell in chosen.cells())}")
    needed = {matrix.preparation(dataset, split, seed) for dataset, split, _ in cells for seed in range(seeds)}
    for data, arguments in sorted(needed):
        if not Path(data).is_dir():
            run_em3(Path(data + ".log"), "prepare", *arguments)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(cells), unit="row") as bar:

        def run_row(cell: tuple[DataSet, str, Row]) -> None:
            matrix.run(*cell)
            bar.update()

        for _ in pool.map(run_row, cells):
            pass


def _name(dataset: DataSet, split: str, row: Row) -> str:
    return f"{dataset.name}/{split}/{row.label}"


def _hash_of_data(folder: Path, meta: dict[str, Any]) -> str:
    """Return a hash of events, split, codes and encoders.

    Tokens are left out: one encoder's differ by rounding from one CPU to another, and a matrix may be run on several.
    """
    contents = [hash_content(folder / name) for name in ("interactions", "history", "vocab", "codes")]
    return hash_of([contents, {name: meta[name] for name in ("dataset", "split", "seed", "counts", "modalities")}])


@cache
def _describe_data(folder: Path) -> dict[str, Any]:
    """Return name, hash and sizes of a prepared folder, which all rows and seeds on it share; it is read once."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return {"name": meta["dataset"], "hash": _hash_of_data(folder, meta), "counts": meta["counts"]}


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", label.lower()).strip("-")


@dataclass(frozen=True)
class _Matrix:
    """One suite at one commit."""

    suite: Suite
    work: Path
    ledger: Ledger
    commit: str
    seeds: int
    trials: int

    def preparation(self, dataset: DataSet, split: str, seed: int) -> tuple[str, tuple[str, ...]]:
        """Return the prepared folder, and the arguments of `em3 prepare` that make it."""
        name = f"{dataset.name}-{split}"
        drawn: tuple[str, ...] = ()
        if dataset.redrawn:
            name, drawn = f"{name}-draw-{seed}", ("--seed", str(seed))
        arguments = (*dataset.arguments, "--split", split, *drawn)
        folder = self.work / "data" / self.commit / f"{_slug(name)}-{hash_of(arguments)[:8]}"
        return str(folder), (*arguments, "--out", str(folder))

    def run(self, dataset: DataSet, split: str, row: Row) -> None:
        """Search, then train and measure every seed of one row."""
        data = [self.preparation(dataset, split, seed)[0] for seed in range(self.seeds)]
        about = [self._about(dataset, split, row, seed) for seed in range(self.seeds)]
        fixed = {**dataset.options, **row.options}
        space = {name: values for name, values in self.suite.search.items() if name not in row.options}
        config = {"file": self._config(), "options": fixed, "search": space}
        keys = [hash_of([about[seed], config, seed]) for seed in range(self.seeds)]
        if all(key in self.ledger for key in keys):
            return
        # By data and options, too: suites share names of rows and data sets, and may change.
        what = f"{_slug(row.label)}-{hash_of([about[0]['data'], config])[:8]}"
        folder = self.work / "runs" / self.commit / _slug(f"{dataset.name}-{split}") / what

        def trial(number: int, options: dict[str, Any]) -> float:
            run = folder / f"trial-{number}"
            self._train(run, data[0], {**fixed, **options, "seed": 0}, "--skip_evaluation")
            return _best_validation(run)

        tried = search(space, self.trials, trial)
        number = max(range(len(tried)), key=lambda index: tried[index]["validation"])
        best = tried[number]["options"]
        for seed, key in enumerate(keys):
            if key in self.ledger:
                continue
            run = folder / (f"trial-{number}" if seed == 0 else f"seed-{seed}")
            if seed == 0:
                run_em3(Path(f"{run}.log"), "evaluate", str(run))
            else:
                self._train(run, data[seed], {**fixed, **best, "seed": seed})
            chosen = {"seed": seed, "config": hash_of(config), "options": {**fixed, **best}, "search": tried}
            place = {"run": str(run.relative_to(self.work))}
            self.ledger.add({"key": key, **about[seed], **chosen, **place, **_measured(run)})

    def _about(self, dataset: DataSet, split: str, row: Row, seed: int) -> dict[str, Any]:
        """Return what is compared, and on which data."""
        data = _describe_data(Path(self.preparation(dataset, split, seed)[0]))
        return {
            "suite": self.suite.name,
            "dataset": dataset.name,
            "split": split,
            "group": row.group,
            "ranker": row.ranker,
            "row": row.name,
            "commit": self.commit,
            "data": data | ({"draw": seed} if dataset.redrawn else {}),
            "trials": self.trials,
        }

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((ROOT / self.suite.config).read_text(encoding="utf-8"))
        return config

    def _train(self, run: Path, data: str, options: dict[str, Any], *more: str) -> None:
        """Train one run, unless it has come to its end already."""
        if (run / "training.json").is_file():
            return
        told = [part for name, value in options.items() for part in (f"--{name}", _text(value))]
        arguments = ["--config", str(ROOT / self.suite.config), "--data", data, "--run", str(run), "--overwrite"]
        run_em3(Path(f"{run}.log"), "train", *arguments, *told, *more)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _best_validation(run: Path) -> float:
    """Return the validation figure by which the run chose its checkpoint."""
    select_by = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]["select_by"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    values = [line[select_by] for line in lines if line["phase"] == "validation"]
    return -min(values) if select_by == "logloss" else max(values)


def _measured(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    names = ("validation", "test", "samples", "best_step", "cpu_seconds_per_1k", "peak_rss_bytes", "parameters")
    return {name: summary[name] for name in names}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
