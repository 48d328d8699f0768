"""What continuous training gains: each shard of the test split by the model as it was trained, and as it went on.

    python benchmarks/continuous.py runs/em3 runs/live

runs/em3 is a run of `em3 train`, runs/live one of `em3 follow` that started from it (docs/continuous-training.md).
Prints one row a shard. Both models are measured before the second one is trained on the shard.
"""

import json
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli

from torchrec_em3.metrics import ranking_metrics
from torchrec_em3.number_format import decimals

METRICS = ("auc", "gauc", "ne", "calibration")


def main(trained: Path, followed: Path) -> None:
    """Print the table.

    Args:
        trained: Run of `em3 train`, evaluated.
        followed: Run of `em3 follow` that started from it, on shards that begin where the test split does.
    """
    lines = [json.loads(line) for line in (followed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    print("| rows |" + "".join(f" {name.upper()}, trained once | followed |" for name in METRICS))
    print("|---:|" + "---:|---:|" * len(METRICS))
    start = 0
    with np.load(trained / "predictions" / "test.npz") as found:
        label, logit, user = (found[name] for name in ("label", "logit", "user"))
    for line in lines:
        if line["phase"] != "progressive":
            continue
        rows = slice(start, start + line["n"])
        fixed = ranking_metrics(label[rows], logit[rows], user=user[rows])
        cells = [f" {decimals(fixed[name])} | {decimals(line[name])} |" for name in METRICS]
        print(f"| {line['n']} |" + "".join(cells))
        start = rows.stop


if __name__ == "__main__":
    auto_cli(main)
