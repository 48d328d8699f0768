"""Whole runs with an encoder that is trained above a cut: prepared, trained, resumed, evaluated, embedded."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tests.tiny_encoders
import tests.tiny_parts  # noqa: F401
from benchmarks.whole_em3 import WHOLE_EM3
from tests.torchrec_em3.test_embed import write_as_new
from torchrec_em3 import train as train_module
from torchrec_em3.build import build_model, build_sharded, open_data
from torchrec_em3.cli import run as em3
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config, EncodersConfig, EncoderTraining, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate
from torchrec_em3.errors import ConfigError, Preempted
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.pipeline import CheckedPipeline
from torchrec_em3.process_group import process_group

ENCODERS = "content.tokens.encoders."


@pytest.fixture(scope="module")
def cut_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts cut after layer 1 of 3, pictures not cut; the items as if they were new are in `../new`."""
    folder = tmp_path_factory.mktemp("cut")
    raw = simulate(SimulatedOptions(num_items=80, num_users=40, num_interactions=2000, seed=0), folder / "raw")
    options = PrepareOptions(
        text_encoder="tiny_deep_text", image_encoder="tiny_image", text_cut=1, label_threshold=None, token_dim=2
    )
    meta = prepare(raw, folder / "data", options)
    assert (meta["modalities"]["text"]["dim"], meta["modalities"]["image"]["dim"]) == (6, 2), "no reduction at a cut"
    write_as_new(raw, PreparedData.open(folder / "data"), folder / "new")
    return folder / "data"


def config_for(data: Path, run: Path, training: str = "lora", **model: Any) -> Config:
    encoders = EncodersConfig(text=EncoderTraining(training=training, rank=2))  # type: ignore[arg-type]
    return Config(
        data=str(data),
        run=str(run),
        plugins="tests.tiny_encoders",
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(**{**WHOLE_EM3, "embedding_dim": 8, "encode_fraction": 0.5, "encoders": encoders, **model}),
        train=TrainConfig(
            epochs=2, log_every=1, checkpoint_every=3, patience=5, keep_checkpoints=50, encoder_learning_rate=0.01
        ),
    )


def fit(config: Config, resume: bool = False) -> dict[str, Any]:
    with process_group() as ranks:
        return train(resolve_parts(config), ranks, resume=resume)


def weights_after(config: Config, steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Train some steps; return the dense weights before and after, and the losses."""
    config = resolve_parts(config)
    with process_group() as ranks:
        data = open_data(config)
        sharded = build_sharded(config, data, ranks)
        weights = {name: weight for name, weight in sharded.model.named_parameters() if ".tables." not in name}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        batches = iter(BatchStream(data, "train", batch_size=128, max_history=10, rank=0, world_size=1))
        pipeline = CheckedPipeline(sharded, ranks)
        losses = [float(pipeline.progress(batches).metrics["loss"]) for _ in range(steps)]
        return before, {name: weight.detach().clone() for name, weight in weights.items()}, losses


def test_a_run_is_resumed_exactly_with_its_adapters(
    cut_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, broken = (config_for(cut_data, tmp_path / name) for name in ("calm", "broken"))
    expected = fit(calm)
    original = train_module.Trainer._train_step

    def step(self: Any, batches: Any) -> bool:
        if self.progress.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(train_module.Trainer, "_train_step", step)
        with pytest.raises(Preempted, match="at step 5"):
            fit(broken)
    resumed = fit(broken, resume=True)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("calm", "broken")]
    assert logs[0] == logs[1]
    assert resumed["test"] == expected["test"]
    assert em3(["embed", str(tmp_path / "calm")]) == 0
    kept = np.load(tmp_path / "calm" / "embeddings.npz")
    written = load_file(tmp_path / "calm" / "items" / "items.safetensors")
    np.testing.assert_allclose(written["content"][kept["item"] - 1], kept["content"], atol=1e-5)
    assert em3(["embed", str(tmp_path / "calm"), "--new_items", str(cut_data.parent / "new")]) == 0
    as_new = load_file(tmp_path / "calm" / "new_items" / "items.safetensors")
    np.testing.assert_allclose(as_new["content"], written["content"], atol=1e-5)


@pytest.mark.parametrize("training", ["lora", "last_n"])
def test_only_what_shall_be_trained_moves_and_by_its_own_rate(cut_data: Path, tmp_path: Path, training: str) -> None:
    config = config_for(cut_data, tmp_path, training)
    before, after, _ = weights_after(config, 2)
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    encoder = {name for name in before if name.startswith(ENCODERS)}
    assert moved & encoder == {name for name in encoder if training == "last_n" or ".lora_" in name}
    assert any(name.startswith("content.tower.") for name in moved)
    still = dataclasses.replace(config, train=dataclasses.replace(config.train, encoder_learning_rate=0.0))
    before, after, _ = weights_after(still, 2)
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert not moved & encoder
    assert any(name.startswith("content.tower.") for name in moved)


def test_the_rest_of_the_model_starts_the_same_whatever_is_trained(cut_data: Path, tmp_path: Path) -> None:
    starts = [weights_after(config_for(cut_data, tmp_path, training), 0)[0] for training in ("frozen", "lora")]
    for name, weight in starts[0].items():
        if not name.startswith(ENCODERS):
            assert torch.equal(starts[1][name], weight), name
    losses = [weights_after(config_for(cut_data, tmp_path, training), 1)[2] for training in ("frozen", "lora")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "adapters start at zero"


def test_training_helps_to_fit(cut_data: Path, tmp_path: Path) -> None:
    """With everything else held, the encoder alone lowers the loss of the batches that it sees again and again."""
    config = config_for(cut_data, tmp_path, "last_n")
    held = dataclasses.replace(config.embeddings, learning_rate=0.0)
    config = dataclasses.replace(
        config,
        embeddings=held,
        model=dataclasses.replace(config.model, encode_fraction=1.0, alignment_weight=0.0, unknown_id_rate=0.0),
        train=dataclasses.replace(config.train, learning_rate=0.0, encoder_learning_rate=0.03),
    )
    _, _, losses = weights_after(config, 7)
    frozen = dataclasses.replace(config, train=dataclasses.replace(config.train, encoder_learning_rate=0.0))
    _, _, before = weights_after(frozen, 7)
    assert losses[0] == pytest.approx(before[0])
    assert losses[-1] < before[-1]


def gradients(config: Config) -> dict[str, torch.Tensor]:
    """Return the dense gradients of one batch."""
    config = resolve_parts(config)
    data = open_data(config)
    with process_group() as ranks:
        sharded = build_sharded(config, data, ranks)
        batch = next(iter(BatchStream(data, "train", batch_size=128, max_history=10, rank=0, world_size=1)))
        sharded.module(batch)[0].backward()
        return {
            name: weight.grad.clone()
            for name, weight in sharded.model.named_parameters()
            if ".tables." not in name and weight.requires_grad and weight.grad is not None
        }


def test_stop_gradient_leaves_the_tower_to_the_alignment_loss(cut_data: Path, tmp_path: Path) -> None:
    """Twice the weight of the alignment loss is then twice the gradient of tower and encoder."""
    found = [
        gradients(config_for(cut_data, tmp_path, "last_n", stop_gradient=stop, alignment_weight=weight))
        for stop, weight in ((True, 0.5), (True, 1.0), (False, 0.5))
    ]
    content = [name for name in found[0] if name.startswith((ENCODERS, "content.tower.", "content.projection."))]
    assert any(name.startswith(ENCODERS) for name in content)
    for name in content:
        torch.testing.assert_close(2 * found[0][name], found[1][name], rtol=1e-4, atol=1e-7)
    assert any(not torch.allclose(found[0][name], found[2][name]) for name in content)
    assert found[0].keys() == found[2].keys(), "every parameter still gets a gradient"
    for name in (name for name in found[0] if name.startswith("ranker.")):
        torch.testing.assert_close(found[0][name], found[2][name])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alignment_weight": 0.0}, "leaves the tower untrained"), ({"history": "shared"}, "use cache")],
)
def test_stop_gradient_refuses_what_contradicts_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"--model\.stop_gradient with .*{message}"):
        ModelConfig(stop_gradient=True, **options)


@pytest.mark.parametrize("history", ["lora_qformer", "shared", "none"])
def test_every_history_content_trains_with_an_encoder(cut_data: Path, tmp_path: Path, history: str) -> None:
    config = config_for(cut_data, tmp_path, history=history, history_options={})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, encode_fraction=1.0))
    before, after, losses = weights_after(config, 2)
    assert np.isfinite(losses).all()
    assert any(".lora_B" in name and weight.any() for name, weight in after.items() if name.startswith(ENCODERS))
    assert before.keys() == after.keys()


def test_the_command_line_says_what_does_not_fit(
    cut_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--data", str(cut_data), "--run", str(tmp_path / "run"), "--plugins", "tests.tiny_encoders"]
    assert em3([*arguments, "--model.encoders.text.training", "last_n", "--model.encoders.text.layers", "3"]) == 2
    assert "cut after layer 1 of 3, so 2 are left" in capsys.readouterr().err
    assert em3([*arguments, "--model.encoders.image.training", "lora"]) == 2
    assert "prepare the data again with --image_cut" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert json.loads((cut_data / "tokens" / "text" / "meta.json").read_text())["cut"] == 1


def test_an_id_only_model_needs_no_encoder(cut_data: Path, tmp_path: Path) -> None:
    config = resolve_parts(config_for(cut_data, tmp_path, content="none"))
    assert build_model(config, open_data(config)).content is None
