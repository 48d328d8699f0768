"""`em3 embed`: what it writes is what the ranker sees, for the catalogue and for new items, and it is all one needs."""

import csv
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from tests.gang import run_ranks
from torchrec_em3 import item_embeddings
from torchrec_em3.batch import ModalityTokens
from torchrec_em3.cli import run as em3
from torchrec_em3.commands import embed
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate
from torchrec_em3.evaluate import Predictions, predict
from torchrec_em3.item_embeddings import ItemEmbeddings
from torchrec_em3.item_tokens import TokenSource
from torchrec_em3.process_group import process_group
from torchrec_em3.trained_run import open_trained_run

WIDTH = 8
SMALL = ["--loader.batch_size", "128", "--loader.max_history", "10", "--model.embedding_dim", str(WIDTH)]


@dataclass(frozen=True)
class World:
    """A prepared folder with cold items and reduced texts, a run on it, and its items as if they were new."""

    data: PreparedData
    run: Path
    new: Path


def write_as_new(raw: RawDataset, data: PreparedData, folder: Path) -> None:
    """Write the catalogue in its prepared order as a folder of new items, each picture under the item's id."""
    (folder / "images").mkdir(parents=True)
    with (folder / "items.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "title", "text"])
        for item in data.items.to_pylist()[1:]:
            writer.writerow([item["raw_id"], item["title"], item["text"]])
            if item["image"]:
                shutil.copy(raw.image_root / item["image"], folder / "images" / f"{item['raw_id']}.jpg")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("embed")
    raw = simulate(SimulatedOptions(num_items=150, num_users=60, num_interactions=3000, seed=0), folder / "raw")
    options = PrepareOptions(
        split="cold_items", text_encoder="tiny_text", image_encoder="tiny_image", label_threshold=None, token_dim=5
    )
    prepare(raw, folder / "data", options)
    data = PreparedData.open(folder / "data")
    write_as_new(raw, data, folder / "new")
    arguments = ["--data", str(data.folder), "--run", str(folder / "run"), "--train.epochs", "2", *SMALL]
    assert em3(["train", *arguments]) == 0
    before = digest(folder)
    assert em3(["embed", str(folder / "run")]) == 0
    assert em3(["embed", str(folder / "run"), "--new_items", str(folder / "new")]) == 0
    after = digest(folder)
    assert {name: after[name] for name in before} == before
    assert {name.rpartition("/")[0] for name in after.keys() - before.keys()} == {"run/items", "run/new_items"}
    return World(data, folder / "run", folder / "new")


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_embeddings_are_those_of_the_trained_model(world: World) -> None:
    """Against the sample that training kept with its best weights, by the model's own code."""
    kept = np.load(world.run / "embeddings.npz")
    written = load_file(world.run / "items" / "items.safetensors")
    place = kept["item"] - 1
    assert sorted(place) == list(range(world.data.item_rows - 1))
    for name in ("content", "id"):
        assert written[name].dtype == np.float32
        np.testing.assert_allclose(written[name][place], kept[name], atol=1e-5)
    for name in ("known", "present"):
        assert np.array_equal(written[name][place], kept[name])


def test_the_table_tells_what_an_item_has(world: World) -> None:
    table = pq.read_table(world.run / "items" / "items.parquet")
    vectors = load_file(world.run / "items" / "items.safetensors")
    assert table.column_names == ["raw_id", "title", "known", "present", "content", "id"]
    for name in ("raw_id", "title"):
        assert table[name].to_pylist() == world.data.items[name].to_pylist()[1:]
    assert table["known"].to_pylist() == [count > 0 for count in world.data.item_train_count[1:]]
    for space, has in (("content", "present"), ("id", "known")):
        assert table[space].type == pa.list_(pa.float32(), WIDTH)
        for told, own, vector in zip(table[space].to_pylist(), table[has].to_pylist(), vectors[space], strict=True):
            assert told == (vector.tolist() if own else None)
    assert 0 < table["id"].null_count < len(table)


class NoTokens(nn.Module):
    """Tokens that must not be asked for of items that have an embedding."""

    def __init__(self, tokens: nn.Module, embedded: Tensor) -> None:
        super().__init__()
        self.tokens, self.embedded = tokens, embedded

    def forward(self, items_U: Tensor, store: TokenSource | None = None) -> dict[str, ModalityTokens]:
        assert not torch.isin(items_U, self.embedded).any()
        return self.tokens(items_U, store)


def score(world: World, vectors: dict[str, np.ndarray]) -> Predictions:
    """Score the test split with content from `vectors` alone."""
    with process_group() as ranks:
        trained = open_trained_run(world.run, ranks)
        content = trained.sharded.model.content
        assert content is not None
        assert content.bank is not None
        rows = torch.arange(1, world.data.item_rows)[torch.from_numpy(vectors["present"])]
        content.tokens = NoTokens(content.tokens, rows)
        content.bank.write(rows, torch.from_numpy(vectors["tower"][vectors["present"]]), 1)
        predictions = predict(trained.sharded, trained.data, "test", trained.config, ranks)
        assert predictions is not None
        sample = torch.from_numpy(vectors["tower"])
        projected = content.projection(sample).detach().numpy()
    np.testing.assert_allclose(projected, vectors["content"], atol=1e-5)
    return predictions


def test_cold_items_rank_by_written_embeddings_as_they_were_evaluated(world: World) -> None:
    catalogue = load_file(world.run / "items" / "items.safetensors")
    new = load_file(world.run / "new_items" / "items.safetensors")
    cold = ~catalogue["known"]
    # Cold items as a service would meet them: the run's own folder says nothing about them.
    mixed = {name: np.where(cold[:, None], new[name], catalogue[name]) for name in ("tower", "content")}
    evaluated = np.load(world.run / "predictions" / "test.npz")
    summary = json.loads((world.run / "summary.json").read_text())
    for vectors in (catalogue, {**mixed, "present": catalogue["present"]}):
        scored = score(world, vectors)
        np.testing.assert_allclose(scored.logit, evaluated["logit"], atol=1e-5)
        rows = world.data.item_train_count[scored.item] == 0
        assert rows.sum() > 100
        auc = roc_auc_score(scored.label[rows], scored.logit[rows])
        assert auc == pytest.approx(summary["test"]["slices"]["item_frequency"]["0"]["auc"], abs=1e-6)
    shuffled = {name: np.roll(values, 1, axis=0) for name, values in catalogue.items()}
    assert np.abs(score(world, shuffled).logit - evaluated["logit"]).max() > 1e-3


def test_an_item_of_the_catalogue_gets_its_embedding_again_as_a_new_item(world: World) -> None:
    catalogue = load_file(world.run / "items" / "items.safetensors")
    new = load_file(world.run / "new_items" / "items.safetensors")
    assert new.keys() == {"content", "tower", "known", "present"}
    assert not new["known"].any()
    assert np.array_equal(new["present"], catalogue["present"])
    for name in ("content", "tower"):
        np.testing.assert_allclose(new[name], catalogue[name], atol=1e-5)
    table = pq.read_table(world.run / "new_items" / "items.parquet")
    assert table.column_names == ["raw_id", "title", "known", "present", "content"]
    assert table["raw_id"].to_pylist() == world.data.items["raw_id"].to_pylist()[1:]


def test_another_encoder_is_refused_in_one_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.data.folder, tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    meta["modalities"]["text"]["source"] = "tiny_text of last year"
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    arguments = ["embed", str(world.run), "--data", str(tmp_path / "data"), "--new_items", str(world.new)]
    assert em3([*arguments, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "text encoder 'tiny_text' is now tiny_text with up to 6 tokens of width 8" in line
    assert "prepared with tiny_text of last year with up to 6 tokens of width 8" in line
    assert not (tmp_path / "out").exists()


def test_a_run_by_ids_alone_has_ids_and_no_new_items(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    base = ["train", "--data", str(world.data.folder), "--run", run, "--model.content", "none"]
    assert em3([*base, "--train.epochs", "1", *SMALL]) == 0
    assert em3(["embed", run]) == 0
    assert pq.read_table(tmp_path / "run" / "items" / "items.parquet").column_names[2:] == ["known", "present", "id"]
    capsys.readouterr()
    assert em3(["embed", run, "--new_items", str(world.new)]) == 2
    assert "--new_items needs content" in capsys.readouterr().err
    assert em3(["neighbours", run, world.data.items["raw_id"][1].as_py(), "--by", "content"]) == 2
    assert "is in a run without content" in capsys.readouterr().err


def test_embeddings_of_another_checkpoint_or_data_are_not_read(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "items"
    shutil.copytree(world.run / "items", folder)
    origin = json.loads(pq.read_schema(folder / "items.parquet").metadata[b"origin"])
    assert origin["data"] == world.data.meta["content_hash"]
    read = ItemEmbeddings.read(folder, origin)
    assert read is not None
    assert read.write(tmp_path / "again") == [
        tmp_path / "again" / name for name in ("items.parquet", "items.safetensors")
    ]
    assert digest(tmp_path / "again") == digest(folder)
    for key in origin:
        assert ItemEmbeddings.read(folder, origin | {key: "other"}) is None
    assert ItemEmbeddings.read(tmp_path, origin) is None


def embed_in_small_batches(run: Path, out: Path) -> None:
    item_embeddings.ITEMS_AT_A_TIME = 16
    embed.main([str(run), "--out", str(out)])


@pytest.mark.slow
def test_two_processes_write_what_one_does(world: World, tmp_path: Path) -> None:
    """150 items in batches of 16: the last round leaves nothing for the second process."""
    run_ranks(2, embed_in_small_batches, world.run, tmp_path)
    one, two = (load_file(folder / "items.safetensors") for folder in (world.run / "items", tmp_path))
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, atol=1e-5)
    assert pq.read_table(tmp_path / "items.parquet").num_rows == len(one["known"])


@pytest.mark.parametrize("name", ["items.parquet", "items.safetensors"])
def test_damaged_files_are_an_error_of_one_line(
    name: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.run, tmp_path / "run")
    path = tmp_path / "run" / "items" / name
    path.write_bytes(path.read_bytes()[:-100])
    assert em3(["neighbours", str(tmp_path / "run"), world.data.items["raw_id"][1].as_py()]) == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "run em3 embed again" in line


def test_faiss_that_is_not_installed_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert em3(["embed", str(world.run), "--faiss", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "run: pip install torchrec-em3[faiss]" in line
    assert not (tmp_path / "out").exists()


def test_the_index_finds_the_neighbours_by_cosine(world: World, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    assert em3(["embed", str(world.run), "--faiss", "--out", str(tmp_path)]) == 0
    vectors = load_file(tmp_path / "items.safetensors")
    unit = vectors["content"] / np.linalg.norm(vectors["content"], axis=1, keepdims=True)
    index = faiss.read_index(str(tmp_path / "items.faiss"))
    similarity, found = index.search(unit[:10], 5)
    np.testing.assert_allclose(similarity, -np.sort(-(unit[:10] @ unit[vectors["present"]].T))[:, :5], atol=1e-5)
    assert np.array_equal(found[:, 0], np.arange(10))
    assert em3(["embed", str(world.run), "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "items.faiss").exists()
