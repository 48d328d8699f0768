"""ID-only DIN beside EM3 on MovieLens, several seeds, splits `temporal` and `cold_items`; writes results/movielens.md.

    python benchmarks/movielens.py --source ml-1m --ratings ratings.dat --work runs/benchmark

Runs that are there already are not repeated. Hyper-parameters are those of configs/movielens.yaml, which were chosen on
the validation split; the test split of each run is read once, after its checkpoint was selected on validation.
"""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import auto_cli

MODELS = {
    "ID-only DIN": ["--model.content", "none"],
    "EM3": ["--model.history_options.rank", "8", "--model.alignment_weight", "0.01"],
}
SPLITS = ("temporal", "cold_items")
FREQUENCIES = ("0", "1-5", "6-20", "21+")


def main(
    source: str,
    work: str = "runs/benchmark",
    ratings: str = "",
    config: str = "configs/movielens.yaml",
    seeds: tuple[int, ...] = (0, 1, 2),
    jobs: int = 1,
    out: str = "benchmarks/results/movielens.md",
    name: str = "MovieLens",
) -> None:
    """Prepare, train and tabulate.

    Args:
        source: Folder with the publisher's files.
        work: Where prepared data and runs go.
        ratings: Ratings file, where it bears another name.
        config: Config of every run.
        seeds: Seeds of the training; the data is split once.
        jobs: Runs at a time, one thread each.
        out: Markdown file to write.
        name: What to call the data set.
    """
    folder = Path(work)
    commands = []
    for split in SPLITS:
        data = folder / split / "data"
        if not data.is_dir():
            extra = ["--ratings", ratings] if ratings else []
            _em3("prepare", "movielens", "--source", source, "--out", str(data), "--split", split, *extra)
        for model, overrides in MODELS.items():
            for seed in seeds:
                run = _run(folder, split, model, seed)
                if not (run / "summary.json").is_file():
                    arguments = ["--config", config, "--data", str(data), "--run", str(run), "--seed", str(seed)]
                    commands.append(["train", *arguments, "--overwrite", *overrides])
    _in_parallel(commands, jobs)
    text = "\n".join(_section(folder, split, seeds) for split in SPLITS)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(_heading(name, seeds) + text, encoding="utf-8")
    print(text)


def _run(folder: Path, split: str, model: str, seed: int) -> Path:
    return folder / split / f"{model.lower().replace(' ', '-')}-{seed}"


def _em3(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "torchrec_em3", *arguments], check=True)


def _in_parallel(commands: list[list[str]], jobs: int) -> None:
    """Run the commands, `jobs` at a time; raise if one failed."""
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda arguments: _em3(*arguments), commands):
            pass


def _summaries(folder: Path, split: str, model: str, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    paths = [_run(folder, split, model, seed) / "summary.json" for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _heading(name: str, seeds: tuple[int, ...]) -> str:
    return (
        f"# {name}: ID-only DIN and EM3\n\n"
        f"Test split, mean and standard deviation over {len(seeds)} seeds; "
        "AUC by the number of training rows of the item. Same config, same number of epochs at most, "
        "early stopping on validation AUC. The validation columns are of the chosen checkpoints, so a little "
        "flattered; in split cold_items their new items are others than the test split's. Printed by\n\n"
        f"```\npython {shlex.join(sys.argv)}\n```\n\n"
    )


def _section(folder: Path, split: str, seeds: tuple[int, ...]) -> str:
    """Return the table of one split."""
    results = {model: _summaries(folder, split, model, seeds) for model in MODELS}
    slices = results["EM3"][0]["test"]["slices"]["item_frequency"]
    meta = json.loads((folder / split / "data" / "meta.json").read_text(encoding="utf-8"))
    counts = meta["counts"]
    names = list(_columns(results["EM3"][0]))
    lines = [
        f"## Split `{split}`\n",
        f"{counts['users']} users, {counts['items']} items; "
        f"train {counts['train']}, validation {counts['validation']}, test {counts['test']} rows; test rows by slice: "
        + ", ".join(f"{key}: {slices[key]['n']}" for key in slices),
        "",
        "| | " + " | ".join(names) + " | CPU s per 1,000 |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    values: dict[str, list[np.ndarray]] = {}
    for model, summaries in results.items():
        columns = [_columns(summary) for summary in summaries]
        values[model] = [np.array([row[name] for row in columns], dtype=np.float64) for name in columns[0]]
        cost = np.mean([summary["cpu_seconds_per_1k"] for summary in summaries])
        lines.append(f"| {model} | " + " | ".join(map(_mean_and_deviation, values[model])) + f" | {cost:.3f} |")
    pairs = zip(values["ID-only DIN"], values["EM3"], strict=True)
    differences = [_mean_and_deviation(after - before, "+") for before, after in pairs]
    lines.append("| difference, seed by seed | " + " | ".join(differences) + " | |")
    return "\n".join([*lines, ""])


def _columns(summary: dict[str, Any]) -> dict[str, float | None]:
    """Return the figures of one run by column: the test split, then what selected the checkpoint."""
    test, validation = summary["test"], summary["validation"]
    return {
        "AUC, all": test["auc"],
        "GAUC": test["gauc"],
        "NE": test["ne"],
        **{f"AUC, {key} training rows": test["slices"]["item_frequency"][key]["auc"] for key in FREQUENCIES},
        "validation AUC, all": validation["auc"],
        "validation AUC, 0 training rows": validation["slices"]["item_frequency"]["0"]["auc"],
    }


def _mean_and_deviation(values: np.ndarray, sign: str = "") -> str:
    if np.isnan(values).any():
        return "undefined"
    return f"{values.mean():{sign}.4f} ± {values.std(ddof=1):.4f}"


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
