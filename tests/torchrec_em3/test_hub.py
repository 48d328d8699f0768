"""`em3 export --format hub`: what is written loads as the same model, and the card says what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.torchrec_em3.packages import train
from torchrec_em3.cli import run as em3
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.tokens import TokenStore
from torchrec_em3.errors import CheckpointError
from torchrec_em3.hub import from_pretrained


@pytest.fixture(scope="module")
def run(tiny_cold_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_cold_data, tmp_path_factory.mktemp("hub") / "run")


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    out = run.parent / "model"
    assert em3(["export", str(run), "--format", "hub", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("with_tokens", [True, False])
@torch.no_grad()
def test_the_model_scores_as_it_was_evaluated(with_tokens: bool, folder: Path, run: Path, tiny_cold_data: Path) -> None:
    data = PreparedData.open(tiny_cold_data)
    model = from_pretrained(str(folder), TokenStore(data.tokens_folder) if with_tokens else None)
    assert not model.training
    batches = BatchStream(data, "test", batch_size=64, max_history=10)
    logit = torch.cat([model(batch)[1].logit[batch.weight > 0] for batch in batches])
    evaluated = np.load(run / "predictions" / "test.npz")
    np.testing.assert_allclose(logit.numpy(), evaluated["logit"], atol=1e-5)


def test_the_card_says_what_was_measured_and_nothing_of_this_machine(folder: Path, run: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card, summary = (folder / "README.md").read_text(), json.loads((run / "summary.json").read_text())
    unseen = summary["test"]["slices"]["item_frequency"]["0"]
    for values in (summary["validation"], summary["test"], unseen):
        assert f"| {values['n']:,} | {values['auc']:.4f} |" in card
    assert str(run.parent) not in card + (folder / "config.json").read_text()


@pytest.mark.parametrize("options", [["--model.content", "none"], ["--model.history", "lora_qformer"]], ids=" ".join)
def test_other_models_are_compared_too(options: list[str], tiny_cold_data: Path, tmp_path: Path) -> None:
    run = train(tiny_cold_data, tmp_path / "run", *options)
    assert em3(["export", str(run), "--format", "hub", "--out", str(tmp_path / "model")]) == 0


def test_what_is_no_model_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    assert em3(["export", str(run), "--format", "hub", "--precision", "int8", "--out", str(tmp_path / "m")]) == 2
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        from_pretrained(tmp_path)
