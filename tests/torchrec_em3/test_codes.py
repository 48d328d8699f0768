"""Runs on semantic codes: alone or beside tokens, in the tower or as features, stopped and resumed, embedded."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from tests.coded_data import LEVELS, NAME, prepare_coded
from tests.gang import Gang
from tests.torchrec_em3.test_sharding_parity import train_steps, whole
from torchrec_em3 import train as train_module
from torchrec_em3.batch import ItemCodes, ModalityTokens
from torchrec_em3.build import build_model, open_data
from torchrec_em3.cli import run as em3
from torchrec_em3.commands.train import train
from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import ConfigError, Preempted
from torchrec_em3.item_tokens import ItemTokens
from torchrec_em3.missing_modalities import ReducedTokens
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import process_group
from torchrec_em3.schema import CodeSpec, FeatureSchema, ModalitySpec
from torchrec_em3.trained_run import open_trained_run

IN_TOWER = f"content.tokens.embeddings.{NAME}.weight"
AS_FEATURES = f"codes.embeddings.{NAME}.weight"
FEATURES = {"content": "none", "codes": "features"}


@pytest.fixture(scope="module")
def codes_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_coded(tmp_path_factory.mktemp("codes_only"), encoders=False)


@pytest.fixture(scope="module")
def codes_and_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_coded(tmp_path_factory.mktemp("codes_and_tokens"), encoders=True)


def config_for(data: Path, run: Path, **model: Any) -> Config:
    return Config(
        data=str(data),
        run=str(run),
        loader=LoaderConfig(batch_size=128, max_history=10),
        model=ModelConfig(embedding_dim=8, **{"alignment_weight": 0.01, **model}),
        train=TrainConfig(epochs=1, log_every=1, patience=5),
    )


def fit(config: Config, resume: bool = False) -> dict[str, Any]:
    with process_group() as ranks:
        summary = train(resolve_parts(config), ranks, resume=resume)
    assert summary is not None
    return summary


def parameters(config: Config) -> dict[str, Tensor]:
    return dict(build_model(resolve_parts(config), open_data(config)).named_parameters())


def test_the_option_says_where_codes_go(codes_and_tokens: Path, tmp_path: Path) -> None:
    found = {
        (content, codes): {name for name in parameters(config_for(codes_and_tokens, tmp_path, **model)) if NAME in name}
        for content in ("fusion_qformer", "none")
        for codes in ("content", "features", "none")
        for model in [{"content": content, "codes": codes}]
    }
    of_tower = found["fusion_qformer", "content"]
    assert IN_TOWER in of_tower
    assert AS_FEATURES not in of_tower
    assert found["fusion_qformer", "features"] == found["none", "features"] == {AS_FEATURES}
    assert found["fusion_qformer", "none"] == found["none", "none"] == found["none", "content"] == set()


def test_data_without_codes_gives_the_same_model_as_before(tiny_data: Path, tmp_path: Path) -> None:
    one, other = (parameters(config_for(tiny_data, tmp_path, codes=codes)) for codes in ("content", "none"))
    assert one.keys() == other.keys()
    for name, parameter in one.items():
        assert parameter.is_meta or torch.equal(parameter, other[name]), name


@pytest.mark.parametrize("history", ["cache", "lora_qformer", "shared", "none"])
def test_codes_alone_train_a_tower(codes_only: Path, tmp_path: Path, history: str) -> None:
    config = config_for(codes_only, tmp_path / "run", history=history)
    before = parameters(config)[IN_TOWER].detach().clone()
    summary = fit(config)
    assert summary["samples"] > 0
    with process_group() as ranks:
        trained = open_trained_run(Path(config.run), ranks)
    after = dict(trained.sharded.model.named_parameters())[IN_TOWER]
    used = torch.from_numpy(np.unique(np.load(codes_only / "codes" / NAME / "codes.npy")[1:, 0])).long()
    assert (after[used] != before[used]).any(1).all(), "every category that there is was trained"


def test_a_run_on_codes_resumes_exactly(
    codes_and_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, broken = (config_for(codes_and_tokens, tmp_path / name, codes="content") for name in ("calm", "broken"))
    expected = fit(calm)
    original = train_module.Trainer._train_step

    def step(self: Any, batches: Any) -> bool:
        if self.progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(train_module.Trainer, "_train_step", step)
        with pytest.raises(Preempted, match="at step 8"):
            fit(broken)
    assert fit(broken, resume=True)["test"] == expected["test"]
    lines = [(Path(config.run) / "metrics.jsonl").read_text() for config in (calm, broken)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("content", ["none", "fusion_qformer"])
def test_codes_as_features_train(codes_and_tokens: Path, tmp_path: Path, content: str) -> None:
    summary = fit(config_for(codes_and_tokens, tmp_path / "run", content=content, codes="features"))
    assert 0 < summary["test"]["auc"] < 1
    dims = summary["parameters"]["dense"]
    without = config_for(codes_and_tokens, tmp_path / "other", content=content, codes="none")
    dense = sum(p.numel() for name, p in parameters(without).items() if ".tables." not in name)
    assert dims > dense


def test_what_the_data_lacks_is_one_clear_line(tiny_data: Path, codes_only: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model\.codes features needs semantic codes.*prepare it with --codes"):
        open_data(config_for(tiny_data, tmp_path, **FEATURES))
    for codes in ("none", "features"):
        with pytest.raises(ConfigError, match=r"was prepared without encoders.*or set --model\.content none"):
            open_data(config_for(codes_only, tmp_path, codes=codes))


class Rows:
    """A token store of ones, and a code store, that know the items 0 to 9."""

    def fetch(self, items_U: Tensor, device: torch.device | None = None) -> dict[str, ModalityTokens]:
        return {"text": ModalityTokens(torch.ones(len(items_U), 2, 5), torch.ones(len(items_U), 2, dtype=torch.bool))}


class Codes:
    def fetch(self, items_U: Tensor, device: torch.device | None = None) -> dict[str, ItemCodes]:
        assert int(items_U.max()) < 10
        return {NAME: ItemCodes(items_U[:, None].expand(-1, 2), items_U > 0)}


def test_items_that_are_not_of_the_catalogue_have_no_codes() -> None:
    tokens = ItemTokens([ModalitySpec("text", 5, 2)], [CodeSpec(NAME, 2, 10)], Rows(), Codes(), width=8)
    assert (tokens.dims, tokens.counts) == ({"text": 5, NAME: 8}, {"text": 2, NAME: 2})
    known, new = tokens(torch.tensor([3, 0])), tokens(torch.tensor([3, 40]), Rows())
    assert known[NAME].valid_UT.tolist() == [[True, True], [False, False]]
    assert new[NAME].valid_UT.tolist() == [[False, False], [False, False]]
    assert known[NAME].tokens_UTD.shape == new[NAME].tokens_UTD.shape == (2, 2, 8)
    assert torch.equal(known["text"].tokens_UTD, new["text"].tokens_UTD)


@pytest.fixture(scope="module")
def trained(codes_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    fit(config_for(codes_only, run))
    return run


def test_items_are_embedded_and_compared_by_their_codes(
    trained: Path, codes_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert em3(["embed", str(trained)]) == 0
    present = np.load(codes_only / "codes" / NAME / "present.npy")[1:]
    written = load_file(trained / "items" / "items.safetensors")
    assert np.array_equal(written["present"], present)
    codes = np.load(codes_only / "codes" / NAME / "codes.npy")[1:]
    _, first, row = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    same = present & present[first[row.ravel()]]
    np.testing.assert_allclose(written["content"][same], written["content"][first[row.ravel()]][same], atol=1e-5)
    item = PreparedData.open(codes_only).items["raw_id"].to_pylist()[1:][int(np.flatnonzero(present)[0])]
    assert em3(["neighbours", str(trained), item, "--by", "content", "--top", "3"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) >= 4


def test_new_items_need_more_than_codes(
    trained: Path, codes_and_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "items.csv").write_text("item_id,title,text\nn1,Red lamp,a red lamp\nn2,,\n")
    assert em3(["embed", str(trained), "--new_items", str(new)]) == 2
    assert "prepared without encoders, and new items have no semantic codes" in capsys.readouterr().err
    run = tmp_path / "run"
    fit(config_for(codes_and_tokens, run))
    assert em3(["embed", str(run), "--new_items", str(new)]) == 0
    assert load_file(run / "new_items" / "items.safetensors")["present"].tolist() == [True, False]


def test_an_item_that_loses_a_modality_may_lose_its_codes(trained: Path) -> None:
    with process_group() as ranks:
        opened = open_trained_run(trained, ranks)
        content, rows = opened.sharded.model.content, opened.data.item_rows
        assert content is not None
        assert content.encode(torch.arange(rows))[1].any()
        content.tokens = ReducedTokens(content.tokens, rows, share=1.0, seed=0)
        assert not content.encode(torch.arange(rows))[1].any(), "codes are all they have"


def test_a_store_that_lost_its_codes_is_refused(codes_only: Path, tmp_path: Path) -> None:
    shutil.copytree(codes_only, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "codes")
    assert em3(["train", "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run")]) == 3


def test_a_plan_counts_codes(codes_only: Path, tmp_path: Path) -> None:
    assert em3(["plan", "--data", str(codes_only), "--out", str(tmp_path / "plan.json")]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    rows = FeatureSchema.from_meta(PreparedData.open(codes_only).meta).item_rows
    assert plan["token_bytes"] == rows * (4 * LEVELS + 1)


@pytest.fixture(scope="module")
def gangs() -> Iterator[tuple[Gang, Gang]]:
    with Gang(1, timeout=240) as one, Gang(2, timeout=240) as two:
        yield one, two


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoders", "model"),
    [(False, {}), (True, {}), (False, {"history": "lora_qformer"}), (True, {"codes": "features"}), (False, FEATURES)],
)
def test_two_ranks_equal_one(
    gangs: tuple[Gang, Gang], codes_only: Path, codes_and_tokens: Path, encoders: bool, model: dict[str, Any]
) -> None:
    config = config_for(codes_and_tokens if encoders else codes_only, Path(), **model)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, unknown_id_rate=0.0, alignment_weight=0.5),
        embeddings=EmbeddingConfig(sharding="row_wise"),
    )
    one, two = gangs[0].run(train_steps, config, 1), gangs[1].run(train_steps, config, 2)
    assert np.mean([rank["loss"] for rank in two], axis=0) == pytest.approx(one[0]["loss"], rel=1e-6)
    expected, found = whole(one), whole(two)
    for name, table in expected.items():
        np.testing.assert_allclose(found[name], table, rtol=1e-4, atol=2e-6, err_msg=name)
    assert any(NAME in name for name in one[0]["dense"])
    for name, weight in one[0]["dense"].items():
        np.testing.assert_allclose(two[0]["dense"][name], weight, rtol=1e-4, atol=2e-6, err_msg=name)
