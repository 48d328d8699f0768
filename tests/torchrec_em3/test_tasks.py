"""Two tasks through model, training, resume, evaluation and report, in one process; on two ranks as on one."""

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import tests.tiny_parts  # noqa: F401
from tests.gang import Gang
from tests.torchrec_em3.test_sharding_parity import config_for as parity_config
from tests.torchrec_em3.test_sharding_parity import train_steps, whole
from tests.torchrec_em3.test_two_ranks import config_for as two_ranks_config
from tests.torchrec_em3.test_two_ranks import fit as fit_or_stop
from torchrec_em3 import train as train_module
from torchrec_em3.build import build_sharded, open_data
from torchrec_em3.commands import evaluate, profile
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.errors import ConfigError, Preempted
from torchrec_em3.metrics import ranking_metrics
from torchrec_em3.parsing import parse_config, resolve_parts
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import process_group
from torchrec_em3.report import write_report
from torchrec_em3.tasks import task_weights

TASKS = ["click", "like"]
RANKERS = ["dcn_v2", "deepfm", "din", "dlrm", "mmoe"]


def config_for(data: Path, run: Path, **model: Any) -> Config:
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(embedding_dim=8, **{"ranker": "mmoe", **model}),
        train=TrainConfig(epochs=2, log_every=1, checkpoint_every=5, patience=5),
    )


def fit(config: Config, resume: bool = False) -> dict[str, Any]:
    with process_group() as ranks:
        summary = train(resolve_parts(config), ranks, resume=resume)
    assert summary is not None
    return summary


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tiny_tasks_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    fit(config_for(tiny_tasks_data, folder, task_weights={"like": 0.5}))
    return folder


@pytest.mark.parametrize("ranker", RANKERS)
def test_the_loss_is_the_weighted_sum_of_the_tasks_cross_entropies(tiny_tasks_data: Path, ranker: str) -> None:
    weights = {"click": 2.0, "like": 0.25}
    config = resolve_parts(
        config_for(tiny_tasks_data, Path(), ranker=ranker, content="none", task_weights=weights, unknown_id_rate=0.0)
    )
    data = open_data(config)
    with process_group() as ranks:
        model = build_sharded(config, data, ranks).model
        batch = next(iter(BatchStream(data, "train", batch_size=64, max_history=10)))
        batch = dataclasses.replace(batch, weight=torch.arange(64) % 3 / 2)
        loss, output = model(batch)
    assert output.logit.shape == batch.label.shape == (64, 2)
    for task, name in enumerate(TASKS):
        rows = functional.binary_cross_entropy_with_logits(
            output.logit[:, task], batch.label[:, task], batch.weight, reduction="sum"
        )
        torch.testing.assert_close(output.metrics[f"rank_loss/{name}"], rows / 64)
    terms = [float(output.metrics[f"rank_loss/{name}"]) for name in TASKS]
    assert float(loss.detach()) == pytest.approx(2.0 * terms[0] + 0.25 * terms[1], rel=1e-6)
    assert float(output.metrics["rank_loss"]) == float(loss.detach())


def test_training_logs_each_task_and_lowers_its_loss(run: Path) -> None:
    steps = [line for line in lines(run) if line["phase"] == "train"]
    for line in steps:
        parts = line["rank_loss/click"] + 0.5 * line["rank_loss/like"]
        assert line["rank_loss"] == pytest.approx(parts, rel=1e-6)
    for name in TASKS:
        losses = [line[f"rank_loss/{name}"] for line in steps]
        assert np.mean(losses[-5:]) < np.mean(losses[:5])
    validations = [line for line in lines(run) if line["phase"] == "validation"]
    assert len(validations) == 2
    for line in validations:
        assert line["auc/click"] == line["auc"] != line["auc/like"]


def test_summary_and_predictions_keep_the_main_task_in_its_place(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for split in ("validation", "test"):
        metrics = summary[split]
        assert list(metrics["tasks"]) == TASKS
        assert {key: value for key, value in metrics.items() if key != "tasks"} == metrics["tasks"]["click"]
        with np.load(run / "predictions" / f"{split}.npz") as saved:
            for name, ending in (("click", ""), ("like", "_like")):
                want = ranking_metrics(saved[f"label{ending}"], saved[f"logit{ending}"], user=saved["user"])
                found = metrics["tasks"][name]
                assert {key: found[key] for key in want} == want
                assert set(found["slices"]) >= {"item_frequency", "user"}
    assert summary["attainable_auc"] == summary["test"]["attainable_auc"]
    assert "attainable_auc" not in summary["test"]["tasks"]["like"], "only the click's true probability is known"


def test_evaluate_measures_the_same_again(run: Path) -> None:
    before = json.loads((run / "summary.json").read_text())
    evaluate.main([str(run)])
    after = json.loads((run / "summary.json").read_text())
    assert after["test"] == before["test"]
    assert after["validation"] == before["validation"]


def test_resume_goes_on_to_the_same_losses(
    run: Path, tiny_tasks_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_tasks_data, tmp_path / "run", task_weights={"like": 0.5})
    original = train_module.Trainer._train_step

    def step(self: Any, batches: Any) -> bool:
        if self.progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(train_module.Trainer, "_train_step", step)
        with pytest.raises(Preempted):
            fit(config)
    fit(config, resume=True)
    assert lines(tmp_path / "run") == lines(run)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, task_weights={"like": 1.0}))
    with pytest.raises(ConfigError, match=r"model.task_weights.like is 1.0, but 0.5 in"):
        fit(other, resume=True)


def test_the_report_shows_every_task(run: Path, tmp_path: Path) -> None:
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "<h2>Tasks</h2>" in page
    test = json.loads((run / "summary.json").read_text())["test"]["tasks"]
    for name in TASKS:
        assert f'<td class="word">{name}</td><td>{test[name]["auc"]:.4f}</td>' in page
    assert "click: as given; like: as given" in page


def test_profile_runs(tiny_tasks_data: Path, tmp_path: Path) -> None:
    options = {"data": tiny_tasks_data, "run": tmp_path, "loader.batch_size": 64, "model.embedding_dim": 8}
    options |= {"model.ranker": "mmoe", "steps": 2, "warm_up": 1}
    profile.main([str(word) for name, value in options.items() for word in (f"--{name}", value)])
    assert "| ranker |" in (tmp_path / "profile" / "profile.md").read_text()


def test_weights_on_the_command_line_are_by_name() -> None:
    config, _ = parse_config("train", "", ["--model.task_weights.like", "0.5"])
    assert config.model.task_weights == {"like": 0.5}
    assert task_weights(config.model.task_weights, TASKS) == {"click": 1.0, "like": 0.5}


@pytest.mark.parametrize(
    ("weights", "tasks", "message"),
    [
        (
            {"likes": 1.0},
            TASKS,
            r"names 'likes', which is no task of the data; tasks: click, like\. Did you mean 'like'",
        ),
        ({"label": 2.0}, ["label"], "the data has one; leave it out"),
        ({"click": 0.0, "like": 0.0}, TASKS, "task_weights is 0 for every task"),
    ],
)
def test_wrong_weights_are_refused(weights: dict[str, float], tasks: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_weights(weights, tasks)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_finite_and_not_negative(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"--model.task_weights.like is .*, must be a finite number >= 0"):
        ModelConfig(task_weights={"like": weight})


@pytest.fixture(scope="module")
def gangs() -> Iterator[tuple[Gang, Gang]]:
    with Gang(1, timeout=240) as one, Gang(2, timeout=240) as two:
        yield one, two


@pytest.mark.slow
@pytest.mark.parametrize("ranker", ["din", "mmoe"])
def test_two_ranks_equal_one(gangs: tuple[Gang, Gang], tiny_tasks_data: Path, ranker: str) -> None:
    config = parity_config(tiny_tasks_data, "row_wise", ranker=ranker, task_weights={"like": 0.5})
    one = gangs[0].run(train_steps, config, 1)
    two = gangs[1].run(train_steps, config, 2)
    assert np.mean([rank["loss"] for rank in two], axis=0) == pytest.approx(one[0]["loss"], rel=1e-6)
    expected, found = whole(one), whole(two)
    assert expected.keys() == found.keys()
    for name, table in expected.items():
        np.testing.assert_allclose(found[name], table, rtol=1e-4, atol=2e-6, err_msg=name)
    for name, weight in one[0]["dense"].items():
        np.testing.assert_allclose(two[0]["dense"][name], weight, rtol=1e-4, atol=2e-6, err_msg=name)
    assert any("ranker" in name for name in one[0]["dense"])


@pytest.mark.slow
def test_a_stopped_run_of_two_ranks_resumes_exactly_and_is_evaluated_on_one(
    gangs: tuple[Gang, Gang], tiny_tasks_data: Path, tmp_path: Path
) -> None:
    calm, broken = (two_ranks_config(tiny_tasks_data, tmp_path / name) for name in ("calm", "broken"))
    expected = gangs[1].run(fit_or_stop, calm, False)[0]["test"]
    assert all("stopped by SIGTERM at step 6" in str(line) for line in gangs[1].run(fit_or_stop, broken, False, 6))
    assert gangs[1].run(fit_or_stop, broken, True)[0]["test"] == expected
    assert lines(tmp_path / "calm") == lines(tmp_path / "broken")
    evaluate.main([str(tmp_path / "calm")])
    found = json.loads((tmp_path / "calm" / "summary.json").read_text())["test"]
    for name in TASKS:
        for key in ("auc", "gauc", "ne", "logloss"):
            assert found["tasks"][name][key] == pytest.approx(expected["tasks"][name][key], rel=1e-6)


@pytest.mark.parametrize("content", ["none", "fusion_qformer"])
def test_every_dense_parameter_gets_a_gradient(tiny_tasks_data: Path, content: str) -> None:
    """DDP stops where a parameter has none; a weight of 0 must not take them away."""
    config = resolve_parts(config_for(tiny_tasks_data, Path(), content=content, task_weights={"like": 0.0}))
    data = open_data(config)
    with process_group() as ranks:
        sharded = build_sharded(config, data, ranks)
        CheckedPipeline(sharded, ranks).progress(iter(BatchStream(data, "train", batch_size=128, max_history=10)))
        model = sharded.model
        missing = [name for name, p in model.ranker.named_parameters() if p.grad is None]
    assert not missing
