"""Writes results/amazon_topk.md: our runs, mean and deviation over seeds, beside the rows of the authors' logs."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.amazon_topk.runs import read_results
from torchrec_em3.errors import DataError

__all__ = ["table"]

METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
LABELS = {
    "none": "IDs only",
    "linear": "frozen features, linear map",
    "qformer": "EM3 without CIC",
    "em3": "EM3",
}
PUBLISHED = {
    "Baby": {
        "VBPR": (0.0423, 0.0663, 0.0223, 0.0285),
        "LATTICE": (0.0551, 0.0852, 0.0292, 0.0369),
        "FREEDOM": (0.0624, 0.0985, 0.0324, 0.0416),
        "EM3": (0.0646, 0.1032, 0.0336, 0.0435),
        "EM3, picked on validation": (0.0637, 0.1003, 0.0332, 0.0426),
    },
    "Sports": {
        "VBPR": (0.0560, 0.0854, 0.0307, 0.0383),
        "LATTICE": (0.0621, 0.0957, 0.0335, 0.0422),
        "FREEDOM": (0.0713, 0.1075, 0.0384, 0.0477),
        "EM3": (0.0726, 0.1099, 0.0391, 0.0488),
        "EM3, picked on validation": (0.0726, 0.1099, 0.0391, 0.0488),
    },
}
"""The authors' logs: another random split, features of 4096 (image) and 384 (full text), one seed, picked on test."""
HEADING = """# Amazon 2014 5-core: full ranking of the catalogue

The protocol of the authors' public experiment: a random split of each user's interactions, every item of the
catalogue ranked but those the user had in train, recall and NDCG on test. Epoch chosen on **validation** Recall@20 (the
authors chose settings on test). Mean and standard deviation over seeds of the training; the split is one.
How it works, and how to run it with the authors' feature files:
[benchmarks/amazon_topk/README.md](../amazon_topk/README.md).

**Where the chosen epoch is the last one, training was cut short**: the row says how far the model came in so many
epochs, not how good it is. One seed says nothing about differences of a few thousandths.

The rows in italics are the **authors' logs, with other features**: 4096-d image vectors and 384-d vectors of title,
brand, category and description; on another draw of the random split and from one seed. Those features are not used
here, so the levels cannot be compared with ours.
"""


def table(work: str = "runs/amazon_topk", out: str = "benchmarks/results/amazon_topk.md") -> None:
    """Write the table of the finished runs.

    Args:
        work: Folder with results.jsonl.
        out: Markdown file to write.

    Raises:
        DataError: If there are no runs, or runs that may not stand in one table.
    """
    rows = read_results(Path(work))
    if not rows:
        raise DataError(f"no results.jsonl in {work}; start python -m benchmarks.amazon_topk run first")
    sections = [_section(name, list(group)) for name, group in groupby(sorted(rows, key=_dataset), key=_dataset)]
    commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
    text = f"{HEADING}\nPrinted by\n\n```\n{commands}\npython -m benchmarks.amazon_topk table\n```\n\n" + "\n".join(
        sections
    )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(text, encoding="utf-8")
    print(text)


def _dataset(row: dict[str, Any]) -> str:
    name: str = row["dataset"]
    return name


def _section(name: str, rows: list[dict[str, Any]]) -> str:
    """Return the table of one data set."""
    for field in ("code", "split", "features"):
        values = {str(row[field]) for row in rows}
        if len(values) > 1:
            raise DataError(
                f"runs on {name} differ in {field}: {', '.join(sorted(values))}; keep one of them in a folder"
            )
    first = rows[0]
    features = "; ".join(f"{key}: {value}" for key, value in first["features"].items())
    lines = [
        f"## {name}\n",
        ", ".join(f"{count:,} {key}" for key, count in first["counts"].items())
        + f"; split {first['split']}. Features: {features}. "
        f"Sources {first['code']}. Epoch: chosen/last. CPU s: training with its looks at validation.\n",
        "| backbone | model | seeds | "
        + " | ".join(map(_heading, METRICS))
        + " | validation R@20 | epoch | CPU s | peak MiB |",
        "|---|---|" + "---|" * (len(METRICS) + 5),
        *_own_rows(name, rows),
    ]
    for model, published in PUBLISHED.get(name, {}).items():
        figures = " | ".join(f"*{value:.4f}*" for value in published)
        lines.append(f"| *authors' logs, other features* | *{model}* | *1* | {figures} | | | | |")
    lines += ["", "Settings, seeds aside:\n", *_settings(rows), ""]
    return "\n".join(lines)


def _own_rows(name: str, rows: list[dict[str, Any]]) -> list[str]:
    models = dict.fromkeys((row["model"]["backbone"], row["model"]["content"]) for row in rows)
    lines = []
    for backbone, content in models:
        runs = [row for row in rows if (row["model"]["backbone"], row["model"]["content"]) == (backbone, content)]
        if len({run["config"] for run in runs}) > 1:
            raise DataError(
                f"{backbone} with content {content} was run on {name} with two configs; keep one in a folder"
            )
        figures = " | ".join(_mean_and_deviation([run["test"][metric] for run in runs]) for metric in METRICS)
        validation = _mean_and_deviation([run["validation"]["recall@20"] for run in runs])
        epochs = ", ".join(f"{run['epoch']}/{run['last_epoch']}" for run in runs)
        cost = np.mean([run["train_cpu_seconds"] for run in runs])
        memory = max(run["peak_mib"] for run in runs)
        label = f"{backbone} | {LABELS[content]} | {len(runs)}"
        lines.append(f"| {label} | {figures} | {validation} | {epochs} | {cost:.0f} | {memory:.0f} |")
    return lines


def _settings(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each distinct setting, backbone and content left out."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        settings = {**row["model"], **row["training"]}
        backbone = settings.pop("backbone")
        del settings["content"]
        text = ", ".join(f"{key} {value}" for key, value in settings.items())
        lines.setdefault(text, [])
        if backbone not in lines[text]:
            lines[text].append(backbone)
    return [f"- {', '.join(backbones)}: {text}" for text, backbones in lines.items()]


def _heading(metric: str) -> str:
    return metric.replace("recall", "R").replace("ndcg", "N")


def _mean_and_deviation(values: list[float]) -> str:
    """Return the mean, and the deviation where there are two values or more."""
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"
