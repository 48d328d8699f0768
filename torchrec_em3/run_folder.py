"""The run folder: what `em3 train` writes and every other command takes."""

import json
import shutil
from pathlib import Path
from typing import Any

from torchrec_em3.config import Config
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import CheckpointError, ConfigError, DataError
from torchrec_em3.model import EM3Model
from torchrec_em3.parsing import dump_config, read_config
from torchrec_em3.plan_report import PlanReport
from torchrec_em3.process_group import Ranks
from torchrec_em3.rank_measurements import resident_peak_bytes
from torchrec_em3.runlog import versions, write_json

__all__ = [
    "check_data",
    "create_run",
    "holds_run_of",
    "is_run",
    "peak_rss_bytes",
    "read_run",
    "read_training",
    "write_summary",
]

CONFIG_FILE, DATA_FILE, VERSIONS_FILE, TRAINING_FILE = "config.yaml", "data.json", "versions.json", "training.json"


def create_run(
    config: Config, data: PreparedData, ranks: Ranks, plan: PlanReport, *, resume: bool, overwrite: bool
) -> Path:
    """Make the run folder, or find the one to resume, and record config, data, plan and versions. Collective.

    Raises:
        ConfigError: If there is no --run, the folder holds a run already or something else, or the run to resume had
            other options.
        DataError: If the run to resume had other data.
    """
    if not config.run:
        raise ConfigError("no run folder: give --run DIR")
    run = Path(config.run)
    exists = ranks.broadcast(is_run(run))
    if resume:
        if not exists:
            raise ConfigError(f"--resume: {run} holds no run; start it without --resume")
        _check_same(read_config(run / CONFIG_FILE), config, run)
        check_data(run, data)
    elif exists and not overwrite:
        raise ConfigError(f"--run {run} already holds a run; choose another folder, or add --resume or --overwrite")
    elif exists and not ranks.broadcast((run / VERSIONS_FILE).is_file()):
        raise ConfigError(
            f"--run {run} has a {CONFIG_FILE} but no {VERSIONS_FILE}, so it is no run; choose another folder"
        )
    ranks.barrier()  # what the checks read is not removed before all ranks have read it
    if ranks.is_first:
        if exists and not resume:
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        # It is of a training that ended, which this one has yet to do.
        (run / TRAINING_FILE).unlink(missing_ok=True)
        write_json(run / VERSIONS_FILE, versions())
        write_json(run / DATA_FILE, {"folder": str(data.folder), "content_hash": data.meta["content_hash"]})
        write_json(run / "plan.json", plan.as_dict())
        (run / "plan.txt").write_text(plan.as_text(), encoding="utf-8")
        # Last: it makes the folder a run.
        (run / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    ranks.barrier()
    return run


def _check_same(before: Config, now: Config, run: Path) -> None:
    """Refuse to resume with options that change the model, the order of rows or the optimizer of the tables."""
    for key, (old, new) in _differences(before, now).items():
        if key.split(".")[0] in ("loader", "model", "embeddings", "seed"):
            raise ConfigError(f"--resume: {key} is {new}, but {old} in {run / CONFIG_FILE}; use the run's own")


def is_run(run: Path) -> bool:
    """Return whether a run was begun in the folder."""
    return (run / CONFIG_FILE).is_file()


def holds_run_of(run: Path, config: Config) -> bool:
    """Return whether the folder holds a run with the very options of `config`, as if the same command had begun it."""
    return is_run(run) and not _differences(read_config(run / CONFIG_FILE), config)


def check_data(run: Path, data: PreparedData) -> None:
    """Refuse data that a run was not trained on: the rows of its tables would be other items and users.

    Raises:
        DataError: If the contents are not those that the run recorded; runs of earlier versions recorded none.
    """
    path = run / DATA_FILE
    if not path.is_file():
        return
    trained, found = json.loads(path.read_text(encoding="utf-8"))["content_hash"], data.meta["content_hash"]
    if found != trained:
        raise DataError(
            f"{data.folder}: content_hash is {found[:12]}, but {run} was trained on {trained[:12]}, where rows may be "
            "other users and items; give that data, or train again"
        )


def read_training(run: Path) -> dict[str, Any] | None:
    """Return what training wrote of itself (`training.json`), or None if it has not come to its end."""
    path = run / TRAINING_FILE
    recorded: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return recorded


def _differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ, by name in order, each with both values."""
    old, new = (_flatten(config.as_dict()) for config in (before, now))
    pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


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
