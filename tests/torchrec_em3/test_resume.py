"""A run that is interrupted and resumed goes on to the very same losses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.stopped_training import before_step, interrupt, terminate
from torchrec_em3 import train as train_module
from torchrec_em3.commands.train import main, train
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import ConfigError, NumericError, Preempted
from torchrec_em3.parsing import dump_config, resolve_parts
from torchrec_em3.process_group import process_group


def config_for(data: Path, run: Path) -> Config:
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(embedding_dim=8, **WHOLE_EM3, unknown_id_rate=0.2),
        train=TrainConfig(epochs=2, log_every=1, checkpoint_every=5, patience=5, keep_checkpoints=50),
    )


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fit(config: Config, resume: bool = False) -> dict[str, Any]:
    with process_group() as ranks:
        return train(resolve_parts(config), ranks, resume=resume)


@pytest.fixture(scope="module")
def calm(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("calm") / "run"
    return run, fit(config_for(tiny_data, run))


@pytest.mark.parametrize("stop_at", [3, 8, 21])
def test_sigterm_saves_and_resume_continues_exactly(
    tiny_data: Path, tmp_path: Path, calm: tuple[Path, dict[str, Any]], stop_at: int
) -> None:
    run = tmp_path / "run"
    config = config_for(tiny_data, run)
    steps_per_epoch = 2400 // 128
    assert stop_at != steps_per_epoch
    stopped = f"stopped by SIGTERM at step {stop_at}; continue with --resume"
    with before_step(stop_at - 1, terminate), pytest.raises(Preempted, match=stopped):
        fit(config)
    summary = fit(config, resume=True)
    run_calm, summary_calm = calm
    assert lines(run) == lines(run_calm)
    assert summary["test"] == summary_calm["test"]
    assert summary["samples"] == summary_calm["samples"]


def test_a_stop_where_a_validation_is_due_does_not_lose_it(tiny_data: Path, tmp_path: Path) -> None:
    """A validation also fills the bank, so that losses after it would change."""
    options = TrainConfig(epochs=1, log_every=1, evaluate_every=4, checkpoint_every=2, patience=9)
    calm, broken = (
        dataclasses.replace(config_for(tiny_data, tmp_path / name), train=options) for name in ("calm", "broken")
    )
    fit(calm)
    with before_step(7, terminate), pytest.raises(Preempted, match="at step 8"):
        fit(broken)
    fit(broken, resume=True)
    assert lines(tmp_path / "broken") == lines(tmp_path / "calm")


def test_a_killed_run_resumes_from_its_last_checkpoint(
    tiny_data: Path, tmp_path: Path, calm: tuple[Path, dict[str, Any]]
) -> None:
    config = config_for(tiny_data, tmp_path / "run")
    with before_step(12, interrupt), pytest.raises(KeyboardInterrupt):
        fit(config)
    fit(config, resume=True)
    assert lines(tmp_path / "run") == lines(calm[0]), "lines after step 10 are written once"


def test_a_bad_loss_updates_nothing(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec_em3.model import EM3Model

    seen: dict[str, Any] = {}

    def poisoned(logit_B: Any, batch: Any) -> Any:
        return original(logit_B, batch) * (float("nan") if seen["model"].step == 4 else 1.0)

    original = EM3Model._rank_loss
    fit_step = train_module.Trainer._train_step

    def step(self: Any, batches: Any) -> bool:
        seen["model"] = self._sharded.model
        seen["before"] = {k: v.detach().clone() for k, v in self._sharded.model.named_parameters()}
        return fit_step(self, batches)

    monkeypatch.setattr(EM3Model, "_rank_loss", staticmethod(poisoned))
    monkeypatch.setattr(train_module.Trainer, "_train_step", step)
    with pytest.raises(NumericError, match=r"loss is nan on rank 0 at step 4; the step was not applied"):
        fit(config_for(tiny_data, tmp_path / "run"))
    for name, value in seen["model"].named_parameters():
        assert value.equal(seen["before"][name]), name


def test_resume_refuses_other_options_and_missing_runs(
    tiny_data: Path, tmp_path: Path, calm: tuple[Path, dict[str, Any]]
) -> None:
    config = config_for(tiny_data, calm[0])
    with pytest.raises(ConfigError, match="already holds a run; choose another folder, or add --resume or --overwrite"):
        fit(config)
    with pytest.raises(ConfigError, match=r"seed is 1, but 0 in .*config.yaml"):
        fit(dataclasses.replace(config, seed=1), resume=True)
    with pytest.raises(ConfigError, match="holds no run"):
        fit(dataclasses.replace(config, run=str(tmp_path / "nowhere")), resume=True)


@pytest.mark.slow
def test_a_restartable_run_starts_anew_or_goes_on(
    tiny_data: Path, tmp_path: Path, calm: tuple[Path, dict[str, Any]]
) -> None:
    """A scheduler starts the same command again: killed before a checkpoint, after one, and at the end."""
    config = config_for(tiny_data, tmp_path / "run")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--restartable"]
    for last in (3, 12):
        with before_step(last, interrupt), pytest.raises(KeyboardInterrupt):
            main(arguments)
    for _ in range(2):
        main(arguments)
        assert lines(tmp_path / "run") == lines(calm[0])
