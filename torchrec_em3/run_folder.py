"""The run folder: what `em3 train` writes and every other command takes."""

import shutil
from pathlib import Path
from typing import Any

from torchrec_em3.config import Config
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import CheckpointError, ConfigError
from torchrec_em3.model import EM3Model
from torchrec_em3.parsing import dump_config, read_config
from torchrec_em3.plan_report import PlanReport
from torchrec_em3.process_group import Ranks
from torchrec_em3.rank_measurements import resident_peak_bytes
from torchrec_em3.runlog import versions, write_json

__all__ = ["create_run", "peak_rss_bytes", "read_run", "write_summary"]

CONFIG_FILE = "config.yaml"


def create_run(config: Config, ranks: Ranks, plan: PlanReport, *, resume: bool, overwrite: bool) -> Path:
    """Make the run folder, or find the one to resume, and record config, plan and versions. Collective.

    Raises:
        ConfigError: If there is no --run, the folder holds a run already, or the run to resume had other options.
    """
    if not config.run:
        raise ConfigError("no run folder: give --run DIR")
    run = Path(config.run)
    exists = ranks.broadcast((run / CONFIG_FILE).is_file())
    if resume:
        if not exists:
            raise ConfigError(f"--resume: {run} holds no run; start it without --resume")
        _check_same(read_config(run / CONFIG_FILE), config, run)
    elif exists and not overwrite:
        raise ConfigError(f"--run {run} already holds a run; choose another folder, or add --resume or --overwrite")
    if ranks.is_first:
        if exists and not resume:
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        (run / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
        write_json(run / "versions.json", versions())
        write_json(run / "plan.json", plan.as_dict())
        (run / "plan.txt").write_text(plan.as_text(), encoding="utf-8")
    ranks.barrier()
    return run


def _check_same(before: Config, now: Config, run: Path) -> None:
    """Refuse to resume with options that change the model, the order of rows or the optimizer of the tables."""
    old, new = (_flatten(config.as_dict()) for config in (before, now))
    for key in sorted(old.keys() | new.keys()):
        if key.split(".")[0] in ("loader", "model", "embeddings", "seed") and old.get(key) != new.get(key):
            raise ConfigError(
                f"--resume: {key} is {new.get(key)}, but {old.get(key)} in {run / CONFIG_FILE}; use the run's own"
            )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_run(run: Path) -> Config:
    """Return the resolved config of a run.

    Raises:
        CheckpointError: If the folder is not a run folder.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{run} is not a run folder: it has no {CONFIG_FILE}; give the --run folder of `em3 train`"
        )
    return read_config(path)


def write_summary(
    run: Path,
    config: Config,
    data: PreparedData,
    model: EM3Model,
    ranks: Ranks,
    training: dict[str, Any],
    metrics: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Write `summary.json`, which scripts rely on, and return it. Collective.

    Args:
        run: Run folder.
        config: Its options.
        data: The prepared folder.
        model: The trained model, for its size.
        ranks: This process among its peers.
        training: `samples`, `cpu_seconds`, `best_step`, `peak_rss_bytes` of the training.
        metrics: Metrics by split, "validation" and "test".
    """
    samples = int(training["samples"])
    summary = {
        "split": data.meta["split"],
        "seed": config.seed,
        "samples": samples,
        "best_step": training["best_step"],
        "model": {name: getattr(config.model, name) for name in ("ranker", "content", "history", "alignment")},
        **metrics,
        "cpu_seconds_per_1k": 1000.0 * training["cpu_seconds"] / samples if samples else None,
        "peak_rss_bytes": training["peak_rss_bytes"],
        "parameters": _count_parameters(model),
        "world_size": ranks.world_size,
        "versions": versions(),
    }
    if data.meta.get("simulated"):
        summary["attainable_auc"] = metrics["test"]["attainable_auc"]
    if ranks.is_first:
        write_json(run / "summary.json", summary)
    ranks.barrier()
    return summary


def peak_rss_bytes(ranks: Ranks) -> int:
    """Return the largest resident memory that any rank has had so far. Collective."""
    peaks = ranks.gather(resident_peak_bytes())
    peak: int = ranks.broadcast(max(peaks) if peaks is not None else 0)
    return peak


def _count_parameters(model: EM3Model) -> dict[str, int]:
    tables = model.users.num_parameters + model.items.num_parameters
    dense = sum(parameter.numel() for name, parameter in model.named_parameters() if ".tables." not in name)
    return {"tables": tables, "dense": dense, "total": tables + dense}
