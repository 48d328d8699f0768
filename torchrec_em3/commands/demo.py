"""`em3 demo`: the whole chain on a simulated catalogue, ID-only beside EM3."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchrec_em3.errors import EM3Error
from torchrec_em3.parsing import CommandParser, preset

DESCRIPTION = "Simulate a catalogue, train an ID-only model and EM3 on it, and compare them in a report."
RUNS = {"id_only": ["--model.content", "none"], "em3": []}


def main(arguments: Sequence[str]) -> None:
    """Run `em3 demo`."""
    parser = CommandParser("demo", DESCRIPTION)
    parser.add_argument("--out", type=str, default="runs/demo", help="Folder for data, runs and report.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the catalogue and of the training.")
    values = parser.parse(arguments)
    out, seed = Path(values.out), str(values.seed)
    started = time.monotonic()
    data = out / "data"
    _em3(
        "prepare",
        "simulated",
        "--out",
        str(data),
        "--seed",
        seed,
        "--catalogue.seed",
        seed,
        "--overwrite",
    )
    for name, overrides in RUNS.items():
        print(f"\n--- {name} ---", flush=True)
        common = [
            "--config",
            str(preset("demo")),
            "--data",
            str(data),
            "--run",
            str(out / name),
            "--seed",
            seed,
            "--overwrite",
        ]
        _em3("train", *common, *overrides)
    report = out / "report.html"
    _em3("report", *(str(out / name) for name in RUNS), "--out", str(report))
    summaries = {name: json.loads((out / name / "summary.json").read_text(encoding="utf-8")) for name in RUNS}
    print(_table(summaries))
    print(f"\nopen {report}   ({time.monotonic() - started:.0f} s in all)")


def _em3(*arguments: str) -> None:
    """Run another command in a process of its own, so that each run's time and memory are its own."""
    done = subprocess.run([sys.executable, "-m", "torchrec_em3", *arguments], check=False)
    if done.returncode:
        error = EM3Error(f"`em3 {' '.join(arguments)}` ended with exit code {done.returncode}")
        error.exit_code = done.returncode
        raise error


def _table(summaries: dict[str, dict[str, Any]]) -> str:
    """Return the runs side by side, best attainable AUC and share of the gap closed included."""
    lines = [f"\n{'test AUC':<28}{'all':>9}{'unseen items':>15}{'1-5':>9}{'6-20':>9}{'21+':>9}{'CPU s / 1k':>13}"]
    slices = ("0", "1-5", "6-20", "21+")
    for name, summary in summaries.items():
        by_slice = summary["test"]["slices"]["item_frequency"]
        values = [summary["test"]["auc"], *(by_slice[key]["auc"] for key in slices)]
        lines.append(_row(name, values, f"{summary['cpu_seconds_per_1k']:>13.3f}"))
    test = summaries["em3"]["test"]
    best = [test["attainable_auc"], *(test["slices"]["item_frequency"][key]["attainable_auc"] for key in slices)]
    lines.append(_row("attainable (true chances)", best, ""))
    before, after = (summaries[name]["test"]["slices"]["item_frequency"]["0"]["auc"] for name in RUNS)
    lines.append(
        f"EM3 closes {(after - before) / (best[1] - before):.0%} of the gap that ID-only leaves on unseen items"
    )
    return "\n".join(lines)


def _row(name: str, values: list[float | None], end: str) -> str:
    widths = (9, 15, 9, 9, 9)
    cells = [f"{'-' if v is None else format(v, '.4f'):>{w}}" for v, w in zip(values, widths, strict=True)]
    return f"{name:<28}{''.join(cells)}{end}"
