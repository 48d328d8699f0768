"""The matrix of runs: what is searched, trained and measured, how often, and what a table refuses."""

import itertools
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.benchmarks.scripts import load

SPACE = {"train.learning_rate": [0.001, 0.0005], "embeddings.learning_rate": [0.05, 0.1]}
SUITE = """
config: configs/movielens.yaml
search: {train.learning_rate: [0.001, 0.0005], embeddings.learning_rate: [0.05, 0.1]}
datasets:
  tiny:
    reader: movielens
    folder: tiny-1m
    first_found: {ratings: [all.dat, part.dat]}
    splits: [temporal, cold_items]
    groups: [rankers]
    options: {loader.batch_size: 64}
"""


class Program:
    """Stands for `em3`: keeps what was asked, and writes what the real one would."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, log: Path, *arguments: str) -> None:
        self.asked.append(arguments)
        values = dict(itertools.pairwise(arguments))
        if arguments[0] == "prepare":
            folder = Path(values["--out"])
            folder.mkdir(parents=True)
            counts = {"users": 3, "items": 4, "train": 5, "validation": 6, "test": 7}
            seed = int(values.get("--seed", 0))
            meta = {"dataset": "tiny", "split": values["--split"], "seed": seed, "counts": counts, "modalities": {}}
            for part in ("interactions", "tokens"):
                (folder / part).mkdir()
                np.save(folder / part / "0.npy", np.arange(3))
            (folder / "meta.json").write_text(json.dumps(meta))
        elif arguments[0] == "train":
            self._train(Path(values["--run"]), values, evaluated="--skip_evaluation" not in arguments)
        else:
            self._evaluate(Path(arguments[1]), json.loads((Path(arguments[1]) / "told.json").read_text()))

    def _train(self, run: Path, values: dict[str, str], evaluated: bool) -> None:
        run.mkdir(parents=True)
        (run / "training.json").write_text("{}")
        (run / "told.json").write_text(json.dumps(values))
        (run / "config.yaml").write_text("train: {select_by: auc}")
        auc = 0.7 + 0.1 * (values["--train.learning_rate"] == "0.0005")
        (run / "metrics.jsonl").write_text(json.dumps({"phase": "validation", "auc": auc}) + "\n")
        if evaluated:
            self._evaluate(run, values)

    @staticmethod
    def _evaluate(run: Path, values: dict[str, str]) -> None:
        part = {
            "auc": 0.6 + 0.01 * float(values["--seed"]) ** 2 + 0.1 * (values.get("--model.content") != "none"),
            "n": 9,
        }
        slices = {"item_frequency": dict.fromkeys(("0", "1-5", "6-20", "21+"), part), "user": {"new": part}}
        test = {"auc": part["auc"], "gauc": None, "ne": 0.9, "slices": slices}
        summary = {"validation": {}, "test": test, "samples": 10, "best_step": 2, "cpu_seconds_per_1k": 0.1}
        (run / "summary.json").write_text(json.dumps(summary | {"peak_rss_bytes": 5, "parameters": {}}))

    def count(self, command: str) -> int:
        return sum(arguments[0] == command for arguments in self.asked)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    suite = load(monkeypatch, "suite")
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "small.yaml").write_text(SUITE)
    (tmp_path / "suites" / "rows.yaml").write_text((suite.SUITES / "rows.yaml").read_text())
    monkeypatch.setattr(suite, "SUITES", tmp_path / "suites")
    run = load(monkeypatch, "run")
    monkeypatch.setattr(run, "run_em3", Program())
    monkeypatch.setattr(run, "commit_of", lambda: "c0ffee")
    return run


def results(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]


def test_a_row_is_searched_once_and_its_test_split_read_once_a_seed(script: ModuleType, tmp_path: Path) -> None:
    program = script.run_em3
    options = {"suite": "small", "dataset_dir": str(tmp_path), "work": str(tmp_path / "work"), "trials": 3}
    script.main(**options, seeds=2, only="tiny/temporal/DIN, (ID-only|EM3)$")
    assert [program.count(name) for name in ("prepare", "train", "evaluate")] == [1, 2 * (3 + 1), 2]
    found = results(tmp_path / "work")
    assert [(record["row"], record["seed"]) for record in found] == [
        ("ID-only", 0), ("ID-only", 1), ("EM3", 0), ("EM3", 1)
    ]  # fmt: skip
    for record in found:
        tried = record["search"]
        assert tried[0]["options"] == {"train.learning_rate": 0.001, "embeddings.learning_rate": 0.05}
        assert record["options"].items() >= max(tried, key=lambda trial: trial["validation"])["options"].items()
        assert record["options"]["loader.batch_size"] == 64
        assert tried == found[0]["search"], "all rows try the same points"
    script.main(**options, seeds=2, only="tiny/temporal/DIN, (ID-only|EM3)$")
    assert program.count("train") == 8, "what is there is not run again"
    script.main(**options, seeds=3, only="tiny/temporal/DIN, EM3$")
    assert [program.count(name) for name in ("prepare", "train", "evaluate")] == [1, 9, 2]


def test_runs_with_other_options_start_anew(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"suite": "small", "dataset_dir": str(tmp_path), "work": str(tmp_path / "work"), "trials": 1, "seeds": 1}
    suite, only = tmp_path / "suites" / "small.yaml", "tiny/temporal/DIN, EM3$"
    script.main(**options, only=only)
    suite.write_text(SUITE.replace("loader.batch_size: 64", "loader.batch_size: 32"))
    script.main(**options, only=only)
    suite.write_text(SUITE.replace("folder: tiny-1m", "folder: tiny-1m\n    arguments: [--negatives, 2]"))
    script.main(**options, only=only)
    asked = [arguments for arguments in script.run_em3.asked if arguments[0] == "train"]
    sizes = [dict(itertools.pairwise(arguments))["--loader.batch_size"] for arguments in asked]
    assert sizes[:2] == ["64", "32"]
    assert [record["options"]["loader.batch_size"] for record in results(tmp_path / "work")][:2] == [64, 32]
    prepared = [arguments for arguments in script.run_em3.asked if arguments[0] == "prepare"]
    assert len(prepared) == 2, "other arguments, other data"


def test_runs_of_another_commit_start_anew(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"suite": "small", "dataset_dir": str(tmp_path), "work": str(tmp_path / "work"), "trials": 1, "seeds": 1}
    script.main(**options, only="tiny/temporal/DIN, EM3$")
    monkeypatch.setattr(script, "commit_of", lambda: "beef")
    script.main(**options, only="tiny/temporal/DIN, EM3$")
    assert script.run_em3.count("train") == 2
    with pytest.raises(SystemExit, match="matches none of tiny/temporal/DIN, ID-only"):
        script.main(**options, only="nothing")
    tables = load(monkeypatch, "tables")
    with pytest.raises(SystemExit, match="tiny, temporal, DIN: runs of 2 commits, beef, c0ffee"):
        tables.main("small", str(tmp_path / "work" / "results.jsonl"), out=str(tmp_path / "out.md"))
    assert not (tmp_path / "out.md").exists()


def test_a_commit_that_leaves_what_trains_alone_is_no_other_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = load(monkeypatch, "ledger")

    def commit(name: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        for command in ("init --quiet", "add .", "-c user.name=a -c user.email=a@b commit --quiet -m a"):
            subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
        return str(ledger.commit_of(tmp_path))

    first = commit("components/tower.py")
    assert commit("docs/tower.md") == first
    second = commit("configs/tower.yaml")
    assert second != first
    (tmp_path / "docs" / "tower.md").write_text("changed")
    with pytest.raises(SystemExit, match="1 tracked files differ"):
        ledger.commit_of(tmp_path)


def test_a_redrawn_split_belongs_to_its_seed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = tmp_path / "suites"
    (suites / "small.yaml").write_text((suites / "small.yaml").read_text() + "    redrawn: true\n")
    work = tmp_path / "work"
    script.main("small", str(tmp_path), str(work), trials=1, seeds=2, only="tiny/cold_items/DIN, (ID-only|EM3)$")
    prepared = [dict(itertools.pairwise(asked)) for asked in script.run_em3.asked if asked[0] == "prepare"]
    folders = {values["--seed"]: values["--out"] for values in prepared}
    assert sorted(folders) == ["0", "1"]
    trained = [dict(itertools.pairwise(asked)) for asked in script.run_em3.asked if asked[0] == "train"]
    assert [values["--data"] for values in trained] == [folders[values["--seed"]] for values in trained]
    records = results(work)
    assert [record["data"]["draw"] for record in records] == [0, 1, 0, 1]
    assert len({record["data"]["hash"] for record in records}) == 2
    tables = load(monkeypatch, "tables")
    tables.main("small", str(work / "results.jsonl"), out=str(tmp_path / "out.md"))
    assert "| *minus ID-only* | 2 | +0.1000, p " in (tmp_path / "out.md").read_text()
    with pytest.raises(SystemExit, match="tiny, cold_items, draw 0: runs of 2 preparations of the data"):
        tables.check_alike([*records, records[0] | {"data": records[1]["data"] | {"draw": 0}}])


def test_the_data_are_known_by_their_events_and_not_by_the_rounding_of_tokens(
    script: ModuleType, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    script.run_em3(tmp_path / "log", "prepare", "--split", "temporal", "--out", str(data))
    meta = json.loads((data / "meta.json").read_text())
    before = script._hash_of_data(data, meta)
    np.save(data / "tokens" / "0.npy", np.arange(4))
    assert script._hash_of_data(data, meta) == before
    assert script._hash_of_data(data, meta | {"modalities": {"text": "another encoder"}}) != before
    np.save(data / "interactions" / "0.npy", np.arange(4))
    assert script._hash_of_data(data, meta) != before


def test_a_table_compares_seed_by_seed(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"suite": "small", "dataset_dir": str(tmp_path), "work": str(tmp_path / "work"), "trials": 1}
    script.main(**options, seeds=3, only="tiny/temporal/DLRM")
    tables = load(monkeypatch, "tables")
    lines = (tmp_path / "work" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mixed.jsonl").write_text("".join(reversed(lines)))
    tables.main("small", str(tmp_path / "mixed.jsonl"), out=str(tmp_path / "out.md"))
    text = (tmp_path / "out.md").read_text()
    assert text.index("| ID-only |") < text.index("| frozen") < text.index("| EM3 |"), "whenever they ended"
    assert "### DLRM\n\nCommit c0ffee.\n" in text
    assert "| ID-only | 3 | 0.6167 ± 0.0208 | undefined | 0.9000 ± 0.0000 |" in text
    assert "| EM3 | 3 | 0.7167 ± 0.0208 |" in text
    assert text.count("| *minus ID-only* | 3 | +0.1000, p ") == 2
    assert text.count("| *minus frozen content* | 3 | +0.0000, p ") == 1, "EM3 alone is compared with it"
    records = results(tmp_path / "work")
    for change, message in (
        ({"trials": 2}, "runs of 2 numbers of trials, 1, 2"),
        ({"data": records[0]["data"] | {"hash": "b"}}, "2 preparations of the data"),
    ):
        with pytest.raises(SystemExit, match=message):
            tables.check_alike([*records, records[0] | change])
    tables.check_alike([*records, records[0] | {"split": "cold_items", "commit": "beef"}])
    tables.check_alike([*records, records[0] | {"ranker": "DIN", "commit": "beef"}])
    with pytest.raises(SystemExit, match="no runs"):
        tables.check_alike([])


def test_the_paired_test_is_over_differences(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = load(monkeypatch, "tables")
    part = {"auc": 0.5}

    def cell(aucs: list[float]) -> dict[int, Any]:
        slices = {"item_frequency": dict.fromkeys(("0", "1-5", "6-20", "21+"), part), "user": {"new": part}}
        return {seed: {"test": {"auc": auc, "gauc": 0.5, "ne": 1.0, "slices": slices}} for seed, auc in enumerate(aucs)}

    line = tables._difference(cell([0.61, 0.72, 0.68]), cell([0.60, 0.70, 0.66, 0.1]), "ID-only")
    gain = np.array([0.01, 0.02, 0.02])
    t = gain.mean() / (gain.std(ddof=1) / np.sqrt(3))
    # Student's t with two degrees of freedom in closed form.
    p = 1 - t / np.sqrt(2 + t * t)
    assert line.startswith(f"| *minus ID-only* | 3 | +{gain.mean():.4f}, p {p:.2g} |")


def test_missing_modalities_are_measured_once_for_runs_with_content(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "out.md"
    script.main("small", str(tmp_path), str(work), trials=1, seeds=2, only="tiny/temporal/DLRM")
    missing = load(monkeypatch, "missing")
    asked: list[tuple[str, ...]] = []

    def evaluate(log: Path, *arguments: str) -> None:
        asked.append(arguments)
        run, share = Path(arguments[1]), float(arguments[-1])
        metrics = json.loads((run / "summary.json").read_text())["test"]
        metrics = metrics | {"auc": metrics["auc"] - 0.1 * share}
        (run / f"robustness-{share:g}-seed-0.json").write_text(json.dumps({"test": metrics}))

    monkeypatch.setattr(missing, "run_em3", evaluate)
    for _ in range(2):
        missing.main("small", "temporal", str(work), str(out))
    assert len(asked) == len(set(asked)) == 2 * 2 * len(missing.SHARES)
    text = out.read_text()
    assert "ID-only" not in text
    assert "| tiny/temporal/DLRM, EM3 | 2 | 0.7050 ± 0.0071 | 0.6950 ± 0.0071 | 0.6750" in text
    with pytest.raises(SystemExit, match="matches no finished run with content"):
        missing.main("small", "ID-only", str(work), str(out))


def test_a_line_that_a_kill_cut_short_is_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ledger = load(monkeypatch, "ledger")
    path = tmp_path / "results.jsonl"
    ledger.Ledger(path).add({"key": "a"})
    path.write_text(path.read_text() + '{"key": "b"')
    again = ledger.Ledger(path)
    assert "a" in again
    assert "b" not in again
    again.add({"key": "b"})
    assert "b" in ledger.Ledger(path)


def test_the_publishers_file_stands_above_a_part_of_it(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tiny-1m").mkdir()
    for name, expected in (("part.dat", ["--ratings", "part.dat"]), ("all.dat", ["--ratings", "all.dat"])):
        (tmp_path / "tiny-1m" / name).touch()
        dataset = script.load_suite("small", tmp_path).datasets[0]
        assert list(dataset.arguments) == ["movielens", "--source", str(tmp_path / "tiny-1m"), *expected]
    with pytest.raises(ValueError, match="no suite 'large'; suites: small"):
        script.load_suite("large", tmp_path)


def test_all_suites_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = load(monkeypatch, "suite")
    for name in ("movielens", "amazon", "encoders", "draws"):
        cells = list(suite.load_suite(name, tmp_path).cells())
        assert all(row.name not in dataset.without for dataset, _, row in cells)
        assert len({(dataset.name, split, row.group, row.label) for dataset, split, row in cells}) == len(cells) >= 6
