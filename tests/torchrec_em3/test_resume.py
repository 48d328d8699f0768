"""A run that is interrupted and resumed goes on to the very same losses."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.stopped_training import before_step, interrupt, terminate
from torchrec_em3 import train as train_module
from torchrec_em3.commands.follow import follow
from torchrec_em3.commands.train import main, train
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.errors import ConfigError, DataError, NumericError, Preempted
from torchrec_em3.parsing import dump_config, resolve_parts
from torchrec_em3.process_group import process_group
from torchrec_em3.trained_run import open_trained_run


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


@pytest.mark.parametrize("last", [9, 18])
def test_the_best_of_a_run_is_that_of_its_last_validation_though_it_was_stopped_before(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """The checkpoint of the stop is not written again after the validation, so it says what was best before."""
    measure, aucs = train_module.evaluate_split, iter([0.6, 0.7])

    def better_and_better(*arguments: Any, **options: Any) -> Any:
        return measure(*arguments, **options) | {"auc": next(aucs)}

    monkeypatch.setattr(train_module, "evaluate_split", better_and_better)
    options = TrainConfig(epochs=1, log_every=1, evaluate_every=9, patience=9, keep_checkpoints=9)
    config = dataclasses.replace(config_for(tiny_data, tmp_path / "run"), train=options)
    with before_step(last - 1, terminate), pytest.raises(Preempted, match=f"at step {last}"):
        fit(config)
    fit(config, resume=True)
    with process_group() as ranks:
        trained = open_trained_run(tmp_path / "run", ranks)
    assert trained.progress["step"] == 18
    assert trained.origin["checkpoint"].startswith("step-18 ")


def test_a_run_is_not_used_with_other_data(tiny_data: Path, tmp_path: Path, calm: tuple[Path, dict[str, Any]]) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(calm[0], run)
    shutil.copytree(tiny_data, data)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"content_hash": "another"}))
    before = (run / "summary.json").read_bytes()
    for use in (
        lambda ranks: open_trained_run(run, ranks, str(data)),
        lambda ranks: train(resolve_parts(config_for(data, run)), ranks, resume=True),
        lambda ranks: follow(resolve_parts(config_for(data, tmp_path / "live")), ranks, tmp_path, run),
    ):
        with process_group() as ranks, pytest.raises(DataError, match=r"content_hash is another, but .* trained"):
            use(ranks)
    assert (run / "summary.json").read_bytes() == before
    (run / "data.json").unlink()
    with process_group() as ranks:
        open_trained_run(run, ranks, str(data))  # a run of before it was recorded


def test_an_option_that_does_not_change_what_is_trained_may_change(
    tiny_data: Path, tmp_path: Path, calm: tuple[Path, dict[str, Any]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(calm[0], run)
    config = config_for(tiny_data, run)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=3))
    fit(longer, resume=True)
    assert lines(run)[-1]["samples"] > lines(calm[0])[-1]["samples"]


@pytest.mark.parametrize("left", ["other options", "no checkpoint"])
def test_a_restart_leaves_alone_a_run_that_it_did_not_begin(
    tiny_data: Path,
    tmp_path: Path,
    calm: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    left: str,
) -> None:
    """torchrun starts again after any failure, so also where the first start was refused because of this run."""
    run = tmp_path / "run"
    shutil.copytree(calm[0], run)
    config = config_for(tiny_data, run)
    if left == "other options":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=3))
    else:
        (run / "config.yaml").write_text(dump_config(resolve_parts(config)))
        shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with pytest.raises(ConfigError, match="already holds a run"):
            main(["--config", str(tmp_path / "config.yaml")])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run_is_not_overwritten(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1")
    with process_group() as ranks, pytest.raises(ConfigError, match="so it is no run; choose another folder"):
        train(resolve_parts(config_for(tiny_data, tmp_path)), ranks, overwrite=True)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1"


def test_a_validation_with_one_class_alone_is_still_said(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measure = train_module.evaluate_split

    def of_one_class(*arguments: Any, **options: Any) -> Any:
        return measure(*arguments, **options) | {"auc": None, "gauc": None, "ne": None}

    monkeypatch.setattr(train_module, "evaluate_split", of_one_class)
    caplog.set_level("INFO")
    options = TrainConfig(epochs=1, select_by="logloss")
    fit(dataclasses.replace(config_for(tiny_data, tmp_path / "run"), train=options))
    [said] = [record.getMessage() for record in caplog.records if "validation AUC" in record.msg]
    assert "validation AUC \N{EN DASH}  GAUC \N{EN DASH}  NE \N{EN DASH}  items" in said


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
