"""Each ranker trains through the command line, ID-only and with content."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.components.test_rankers import BUILTIN
from torchrec_em3.cli import run
from torchrec_em3.datasets.prepared import PreparedData


@pytest.mark.parametrize("content", ["none", "fusion_qformer"])
@pytest.mark.parametrize("ranker", sorted(BUILTIN))
def test_two_epochs_lower_the_loss(ranker: str, content: str, tiny_data: Path, tmp_path: Path) -> None:
    options = {"data": str(tiny_data), "run": str(tmp_path / "run"), "seed": "3"}
    options |= {"model.ranker": ranker, "model.content": content, "model.embedding_dim": "8"}
    # Two thousand rows teach something within two epochs if the tables learn fast.
    options |= {"train.learning_rate": "0.003", "embeddings.learning_rate": "0.3"}
    options |= {"loader.batch_size": "32", "train.epochs": "2", "train.log_every": "15"}
    assert run(["train", *(word for name, value in options.items() for word in (f"--{name}", value))]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["rank_loss"] for line in lines if line["phase"] == "train"]
    click_rate = PreparedData.open(tiny_data).split_rows("train")["label"].mean()
    knowing_the_rate = -click_rate * np.log(click_rate) - (1 - click_rate) * np.log1p(-click_rate)
    assert losses[-1] < min(losses[0], knowing_the_rate - 0.005)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["model"]["ranker"], summary["model"]["content"]) == (ranker, content)
    assert summary["test"]["n"] == 300
