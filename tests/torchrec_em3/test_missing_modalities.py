"""Items that lose a modality at test time: who loses what, and that nothing of the run changes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.gang import run_ranks
from torchrec_em3.batch import ModalityTokens
from torchrec_em3.cli import run as em3
from torchrec_em3.commands import evaluate
from torchrec_em3.item_tokens import TokenSource
from torchrec_em3.missing_modalities import ReducedTokens, measure_without_modalities
from torchrec_em3.process_group import process_group
from torchrec_em3.trained_run import open_trained_run

ROWS = 400
SMALL = ["--loader.batch_size", "256", "--model.embedding_dim", "8", "--train.epochs", "1"]


class Source(nn.Module):
    """Three modalities: item i has modality m unless i is a multiple of m + 2."""

    def forward(self, items_U: Tensor, store: TokenSource | None = None) -> dict[str, ModalityTokens]:
        return {
            name: ModalityTokens(torch.ones(len(items_U), 2, 3), (items_U % (place + 2) > 0)[:, None].expand(-1, 2))
            for place, name in enumerate(("audio", "image", "text"))
        }


def presence(source: nn.Module, items_U: Tensor) -> Tensor:
    return torch.stack([modality.valid_UT.any(1) for modality in source(items_U).values()], dim=1)


@settings(max_examples=30, deadline=None)
@given(share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 100))
def test_a_drawn_item_loses_one_modality_of_those_it_has(share: float, seed: int) -> None:
    items_U = torch.arange(ROWS)
    reduced = ReducedTokens(Source(), ROWS, share, seed)
    before_UM, after_UM = presence(Source(), items_U), presence(reduced, items_U)
    lost_UM = before_UM & ~after_UM
    assert not (after_UM & ~before_UM).any()
    has_any_U = before_UM.any(1)
    assert int(lost_UM.sum(1).max()) <= 1
    assert lost_UM[has_any_U].any(1).float().mean().item() == pytest.approx(share, abs=0.1)
    some_U = items_U.flip(0)[::7]
    assert torch.equal(presence(reduced, some_U), after_UM[some_U]), "who else is asked for does not matter"


def test_each_modality_is_lost_as_often_as_another_and_the_seed_tells_which() -> None:
    whole_U = torch.arange(1, 24_000, 12)  # has all three
    losses = [~presence(ReducedTokens(Source(), 24_000, 1.0, seed), whole_U) for seed in (0, 0, 1)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert losses[0].float().mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("missing") / "run"
    assert em3(["train", "--data", str(tiny_data), "--run", str(folder), *SMALL, "--model.similarity", "both"]) == 0
    return folder


def test_the_result_has_a_file_of_its_own_and_nothing_else_changes(trained: Path) -> None:
    before = digest(trained)
    assert em3(["evaluate", str(trained), "--drop_modality", "0.5", "--drop_seed", "3"]) == 0
    after = digest(trained)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"robustness-0.5-seed-3.json"}
    found = json.loads((trained / "robustness-0.5-seed-3.json").read_text())
    assert (found["drop_modality"], found["drop_seed"]) == (0.5, 3)
    summary = json.loads((trained / "summary.json").read_text())
    for split in ("validation", "test"):
        assert found[split].keys() == summary[split].keys()
        assert found[split]["n"] == summary[split]["n"]
        assert found[split]["auc"] != summary[split]["auc"]
    (trained / "robustness-0.5-seed-3.json").unlink()


def test_an_item_that_lost_its_only_modality_is_forgotten_by_the_bank(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's bank still has its row; histories must not see it."""
    read = ReducedTokens.forward

    def text_alone(self: ReducedTokens, *arguments: Any) -> dict[str, ModalityTokens]:
        tokens = read(self, *arguments)
        image, text = tokens["image"], tokens["text"]
        return {"image": ModalityTokens(image.tokens_UTD, torch.zeros_like(image.valid_UT)), "text": text}

    monkeypatch.setattr(ReducedTokens, "forward", text_alone)
    with process_group() as ranks:
        opened = open_trained_run(trained, ranks)
        content = opened.sharded.model.content
        assert content is not None
        assert content.bank is not None
        rows = torch.arange(1, opened.sharded.model.item_rows)
        assert content.bank.read(rows)[1].all()
        measure_without_modalities(trained, opened, ranks, 0.5, 0)
        present_N = content.encode(rows)[1]
        held_N = content.bank.read(rows)[1] > 0
    assert 0 < int(present_N.sum()) < len(rows)
    assert torch.equal(held_N, present_N)
    (trained / "robustness-0.5-seed-0.json").unlink()


@pytest.mark.parametrize("share", ["-0.1", "1.5"])
def test_shares_out_of_range_are_refused(trained: Path, share: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert em3(["evaluate", str(trained), f"--drop_modality={share}"]) == 2
    assert "must be in (0, 1]" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_by_ids_alone_has_nothing_to_lose(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "id_only"
    assert em3(["train", "--data", str(tiny_data), "--run", str(run), *SMALL, "--model.content", "none"]) == 0
    assert em3(["evaluate", str(run), "--drop_modality", "0.5"]) == 2
    assert "no modality to drop" in capsys.readouterr().err.strip().splitlines()[-1]


def evaluate_here(run: str) -> None:
    evaluate.main([run, "--drop_modality", "0.4"])


@pytest.mark.slow
def test_two_processes_measure_what_one_does(trained: Path) -> None:
    path = trained / "robustness-0.4-seed-0.json"
    results = []
    for ranks in (1, 2):
        run_ranks(ranks, evaluate_here, str(trained))
        results.append(json.loads(path.read_text()))
        path.unlink()
    for split in ("validation", "test"):
        for name in ("auc", "gauc", "ne", "logloss"):
            assert results[1][split][name] == pytest.approx(results[0][split][name], rel=1e-6)
