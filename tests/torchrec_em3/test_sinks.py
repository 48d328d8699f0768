"""W&B and MLflow get what metrics.jsonl gets, from the first rank, under one id however often a run is resumed."""

import importlib.machinery
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from torchrec_em3 import sinks as sinks_module
from torchrec_em3.config import Config, TrainConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.runlog import RunLog
from torchrec_em3.sinks import check_sinks, open_sinks


def config_with(*names: Any) -> Config:
    return Config(train=TrainConfig(sinks=names))


def write(run: Path, config: Config, step: int) -> None:
    """One start of a run: two phases of a step, an undefined number among them."""
    run.mkdir(exist_ok=True)
    log = RunLog(run, config, first_rank=True)
    log.scalars("train", step=step, epoch=0, values={"rank_loss": 0.5 / step, "samples": 10 * step})
    log.scalars("validation", step=step, epoch=0, values={"auc": 0.75, "auc_unseen_items": None})
    log.close()


class Recorder:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.got.append((step, dict(values)))

    def close(self) -> None:
        self.closed += 1


def test_every_sink_gets_the_lines_by_phase_without_undefined_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Recorder(), Recorder()
    monkeypatch.setattr("torchrec_em3.runlog.open_sinks", lambda run, config: [first, second])
    write(tmp_path / "run", config_with("tensorboard"), step=2)
    assert first.got == [(2, {"train/rank_loss": 0.25, "train/samples": 20}), (2, {"validation/auc": 0.75})]
    assert second.got == first.got
    assert first.closed == second.closed == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_other_ranks_open_no_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_em3.runlog.open_sinks", lambda run, config: pytest.fail("opened"))
    log = RunLog(tmp_path, config_with("tensorboard"), first_rank=False)
    log.scalars("train", step=1, epoch=0, values={"rank_loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        for first_rank in (True, False):
            with pytest.raises(ConfigError, match=f"{name}, whose package is not installed; `pip install {package}`"):
                RunLog(tmp_path, config_with(name), first_rank)
    check_sinks(["tensorboard"])


def test_a_folder_called_wandb_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr(sinks_module.importlib.util, "find_spec", importlib.machinery.PathFinder.find_spec)
    with pytest.raises(ConfigError, match="mlflow"):
        check_sinks(["mlflow"])


def test_an_id_is_made_once_for_a_run(tmp_path: Path) -> None:
    ids = iter("ab")
    assert [sinks_module._run_id(tmp_path, "wandb", lambda: next(ids)) for _ in range(2)] == ["a", "a"]
    assert sinks_module._run_id(tmp_path, "mlflow", lambda: next(ids)) == "b"


def test_tensorboard_is_the_default(tmp_path: Path) -> None:
    (sink,) = open_sinks(tmp_path, Config())
    sink.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_wandb_offline_keeps_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb, in requirements/sinks.txt")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    for step in (1, 2):
        write(run, config_with("wandb"), step)
    run_id = json.loads((run / "wandb.json").read_text())["run_id"]
    written = list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 2
    assert all(path.name == f"run-{run_id}.wandb" for path in written)
    assert all(b"validation/auc" in path.read_bytes() for path in written)


def test_mlflow_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny, in requirements/sinks.txt")
    store = f"file:{tmp_path / 'store'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step in (1, 2):
        write(tmp_path / "run", config_with("mlflow"), step)
    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("torchrec-em3")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    assert found.info.status == "FINISHED"
    assert found.data.params["model.ranker"] == "din"
    points = client.get_metric_history(found.info.run_id, "train/rank_loss")
    assert [(point.step, point.value) for point in points] == [(1, 0.5), (2, 0.25)]
