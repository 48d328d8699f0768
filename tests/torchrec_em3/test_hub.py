"""`em3 export --format hub`: what is written loads as the same model, and the card says what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.coded_data import prepare_coded
from tests.tiny_encoders import TinyDeepEncoder
from tests.torchrec_em3.packages import train
from torchrec_em3.cli import run as em3
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate
from torchrec_em3.datasets.tokens import TokenStore
from torchrec_em3.errors import CheckpointError
from torchrec_em3.hub import from_pretrained
from torchrec_em3.model import EM3Model


@pytest.fixture(scope="module")
def run(tiny_cold_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_cold_data, tmp_path_factory.mktemp("hub") / "run")


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    out = run.parent / "model"
    assert em3(["export", str(run), "--format", "hub", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("with_tokens", [True, False])
def test_the_model_scores_as_it_was_evaluated(with_tokens: bool, folder: Path, run: Path, tiny_cold_data: Path) -> None:
    data = PreparedData.open(tiny_cold_data)
    model = from_pretrained(str(folder), TokenStore(data.tokens_folder) if with_tokens else None)
    assert not model.training
    evaluated = np.load(run / "predictions" / "test.npz")
    np.testing.assert_allclose(logits(model, data), evaluated["logit"], atol=1e-5)


@torch.no_grad()
def logits(model: EM3Model, data: PreparedData) -> np.ndarray:
    """Score the test split."""
    batches = BatchStream(data, "test", batch_size=64, max_history=10)
    return torch.cat([model(batch)[1].logit[batch.weight > 0] for batch in batches]).numpy()


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
    assert (tmp_path / "model" / "adapters" / "history").exists() == ("lora_qformer" in options)


@pytest.mark.parametrize("use", ["features", "content"])
def test_codes_travel_with_the_model(use: str, tmp_path: Path) -> None:
    data = prepare_coded(tmp_path / "coded", encoders=False)
    tower = ["--model.content", "none"] if use == "features" else []
    run, out = train(data, tmp_path / "run", "--model.codes", use, *tower), tmp_path / "model"
    assert em3(["export", str(run), "--format", "hub", "--out", str(out)]) == 0
    evaluated = np.load(run / "predictions" / "test.npz")
    np.testing.assert_allclose(logits(from_pretrained(out), PreparedData.open(data)), evaluated["logit"], atol=1e-5)
    (out / "codes.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"codes\.safetensors does not hold the codes"):
        from_pretrained(out)


def test_trained_encoders_are_built_where_their_tokens_are(tmp_path: Path) -> None:
    data = prepare_cut(tmp_path)
    training = ["--model.encoders.text.training", "lora", "--model.encoders.text.rank", "2"]
    run = train(data, tmp_path / "run", "--plugins", "tests.tiny_encoders", *training)
    assert em3(["export", str(run), "--format", "hub", "--out", str(tmp_path / "model")]) == 0
    evaluated, prepared = np.load(run / "predictions" / "test.npz"), PreparedData.open(data)
    for store, encoders in ((None, False), (TokenStore(prepared.tokens_folder), True)):
        model = from_pretrained(tmp_path / "model", store)
        assert any(name.startswith("content.tokens.encoders.") for name in model.state_dict()) == encoders
        np.testing.assert_allclose(logits(model, prepared), evaluated["logit"], atol=1e-5)
    assert model.content is not None
    rows_U = torch.arange(1, 9)
    encoded_UD, _ = model.content.encode(rows_U)
    torch.testing.assert_close(encoded_UD.detach(), model.content.bank.read(rows_U)[0], atol=1e-5, rtol=1e-5)
    trained = model.content.tokens.encoders.suffixes["text"]
    adapted = PeftModel.from_pretrained(TinyDeepEncoder().suffix(1), str(tmp_path / "model" / "adapters" / "text"))
    rows_UPW, valid_UP = torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(adapted(rows_UPW, valid_UP)[0], trained(rows_UPW, valid_UP)[0])
    assert not torch.equal(adapted(rows_UPW, valid_UP)[0], TinyDeepEncoder().suffix(1)(rows_UPW, valid_UP)[0])


def prepare_cut(folder: Path) -> Path:
    """Prepare items whose texts are cut after layer 1 of 3."""
    raw = simulate(SimulatedOptions(num_items=80, num_users=40, num_interactions=2000, seed=0), folder / "raw")
    options = PrepareOptions(
        text_encoder="tiny_deep_text", image_encoder="none", text_cut=1, label_threshold=None, token_dim=2
    )
    prepare(raw, folder / "data", options)
    return folder / "data"


def test_what_is_no_model_is_refused(folder: Path, run: Path, tmp_path: Path) -> None:
    assert em3(["export", str(run), "--format", "hub", "--precision", "int8", "--out", str(tmp_path / "m")]) == 2
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        from_pretrained(tmp_path)
