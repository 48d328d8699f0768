"""`em3 report --attention`: which items are shown, that weights lie on their words and patches, and what is refused."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from torchrec_em3.cli import run as em3
from torchrec_em3.commands.report import _read_attention
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import ConfigError
from torchrec_em3.item_attention import ItemAttention, choose_items, read_attention
from torchrec_em3.process_group import process_group
from torchrec_em3.report_attention import attention_cards
from torchrec_em3.trained_run import open_trained_run

SMALL = ["--loader.batch_size", "256", "--model.embedding_dim", "8", "--train.epochs", "1"]
HOSTILE = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def data(tiny_cold_data: Path) -> PreparedData:
    return PreparedData.open(tiny_cold_data)


@pytest.fixture(scope="module")
def trained(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("attention") / "run"
    assert em3(["train", "--data", str(data.folder), "--run", str(run), *SMALL]) == 0
    return run


def test_items_are_chosen_by_id_or_by_what_training_saw_of_them(data: PreparedData) -> None:
    raw_ids = data.items["raw_id"].to_pylist()
    assert choose_items(data, f"{raw_ids[7]}, {raw_ids[2]}") == [7, 2]
    chosen = choose_items(data, "auto")
    count = data.item_train_count[chosen]
    assert (count > 0).tolist() == [True] * 3 + [False] * 3
    assert set(chosen) <= set(data.split_rows("test")["item"].tolist())
    assert chosen == choose_items(data, "auto")
    with pytest.raises(ConfigError, match="no item has the id 'nothing'"):
        choose_items(data, f"{raw_ids[7]},nothing")


def test_weights_are_the_towers_on_the_tokens_that_the_item_has(trained: Path, data: PreparedData) -> None:
    catalogue = data.items.to_pylist()
    items = [1, next(row for row, item in enumerate(catalogue) if row and not item["image"])]
    with process_group() as ranks:
        run = open_trained_run(trained, ranks)
        found = read_attention(run, items)
    assert "image" not in found[1].weights
    for entry in found:
        words = catalogue[entry.item]["text"].lower().split()[:6]
        assert entry.pieces == words
        assert entry.weights["text"].shape == (4, len(words))
        total = sum(weight.sum(1) for weight in entry.weights.values())
        assert ((total > 0) & (total < 1)).all()


def test_a_run_keeps_what_its_alignment_loss_compares(trained: Path) -> None:
    with process_group() as ranks, np.load(trained / "embeddings.npz") as arrays:
        heads = open_trained_run(trained, ranks).sharded.model.alignment.heads
        sides = [torch.from_numpy(arrays[name]) for name in ("content", "id")]
        for side, name in zip(heads(*sides), ("aligned_content", "aligned_id"), strict=True):
            np.testing.assert_allclose(arrays[name], side.detach().numpy(), atol=1e-5)


def test_the_command_shows_words_and_patches_and_escapes_them(
    trained: Path, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_em3.report_maps.project", lambda vectors, seed: np.zeros((len(vectors), 2)))
    folder = tmp_path / "data"
    shutil.copytree(data.folder, folder)
    items = pq.read_table(folder / "items.parquet")
    for column in ("title", "text"):
        place = items.schema.get_field_index(column)
        items = items.set_column(place, column, [[HOSTILE] * len(items)])
    pq.write_table(items, folder / "items.parquet")
    with process_group() as ranks:
        [entry] = read_attention(open_trained_run(trained, ranks), [1])
    words = len(entry.pieces)
    out = tmp_path / "report.html"
    assert em3(["report", str(trained), "--attention", "auto", "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count('class="attended bare"') == 6
    assert page.count('aria-label="attention by patch"') == 6
    assert page.count('<span style="--w:') >= words
    arguments = ["report", str(trained), "--data", str(folder), "--attention", "auto", "--out", str(out)]
    arguments += ["--images", str(data.folder.parent / "raw")]
    assert em3(arguments) == 0
    page = out.read_text()
    assert page.count('<div class="attended"><img src="data:image/jpeg;base64,') == 6
    assert "<script" not in page


def test_darkness_and_marks_follow_the_weights(data: PreparedData) -> None:
    image, text = np.array([[0.3, 0.1, 0.0, 0.0]]), np.array([[0.1, 0.4]])
    entry = ItemAttention(1, {"image": image, "text": text}, ["a", "b"])
    [card] = attention_cards([entry], data, None)
    assert card["shares"] == [("image", pytest.approx(0.4)), ("text", pytest.approx(0.5))]
    assert card["words"] == [("a", pytest.approx(0.25)), ("b", 1.0)]
    assert [part.split('"')[0] for part in card["overlay"].split('fill-opacity="')[1:]] == [
        "0.00",
        "0.57",
        "0.85",
        "0.85",
    ]
    pooled = ItemAttention(1, {"image": image[:, :1], "text": text[:, :1]}, ["a", "b"])
    [card] = attention_cards([pooled], data, None)
    assert (card["overlay"], card["words"]) == ("", [])


def test_runs_without_queries_are_passed_over_and_refused_in_one_line_if_there_is_no_other(
    trained: Path, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    frozen = ["--model.content", "frozen_pool", "--model.alignment_weight", "0"]
    assert em3(["train", "--data", str(data.folder), "--run", str(run), *frozen, *SMALL]) == 0
    # The figures of the last lines are for people: four decimals.
    assert re.search(r"test  AUC \d\.\d{4}  items never trained on: AUC \d\.\d{4} \(n=\d+\)", capsys.readouterr().err)
    assert em3(["report", str(run), "--attention", "auto"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--attention: --model.content frozen_pool has no queries to show; use a run with fusion_qformer" in line
    assert _read_attention([run, trained], "auto", "").run == trained.name
