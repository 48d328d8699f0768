"""Full ranking on Amazon 2014: the split, the masking, the metrics against plain ones, and tiny runs end to end."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall

from benchmarks.amazon_topk.features import as_tokens, read_features
from benchmarks.amazon_topk.graphs import bipartite_graph, propagate, similarity_graph
from benchmarks.amazon_topk.interactions import PARTS, Interactions, read_inter, read_sequences, split_at_random
from benchmarks.amazon_topk.models import BACKBONES, CONTENTS, ModelOptions, Recommender
from benchmarks.amazon_topk.ranking import best_items, measure, rank_metrics
from benchmarks.amazon_topk.runs import read_results, run
from benchmarks.amazon_topk.table import table
from benchmarks.amazon_topk.training import TrainOptions, _batches
from torchrec_em3.errors import ConfigError, DataError

NUM_USERS, NUM_ITEMS = 30, 60


@given(lengths=st.lists(st.integers(3, 60), min_size=1, max_size=20), seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_each_user_gives_the_parts_their_share(lengths: list[int], seed: int) -> None:
    parts = split_at_random(np.array(lengths), seed)
    for length, part in zip(lengths, np.split(parts, np.cumsum(lengths)[:-1]), strict=True):
        held_out = 1 if length < 10 else length // 10
        assert np.bincount(part, minlength=3).tolist() == [length - 2 * held_out, held_out, held_out]
    assert (parts == split_at_random(np.array(lengths), seed)).all()


def test_users_too_short_for_a_split_are_refused() -> None:
    with pytest.raises(DataError, match="user 1 has 2 interactions"):
        split_at_random(np.array([5, 2]), 0)


def world(seed: int = 0) -> Interactions:
    """Users who keep to one of two halves of the catalogue."""
    generator = np.random.default_rng(seed)
    half = NUM_ITEMS // 2
    lengths = generator.integers(5, 15, NUM_USERS)
    item = np.concatenate([generator.choice(half, n, replace=False) + half * (u % 2) for u, n in enumerate(lengths)])
    user = np.repeat(np.arange(NUM_USERS), lengths)
    part = split_at_random(lengths, seed)
    return Interactions(user=user, item=item, part=part, num_users=NUM_USERS, num_items=NUM_ITEMS)


def half_features() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    side = torch.arange(NUM_ITEMS) >= NUM_ITEMS // 2
    return {"text": torch.randn(NUM_ITEMS, 6) * 0.3 + torch.where(side, 1.0, -1.0)[:, None]}


def write_inter(path: Path, data: Interactions) -> Path:
    rows = zip(data.user, data.item, data.part, strict=True)
    lines = ["userID\titemID\trating\ttimestamp\tx_label", *(f"{u}\t{i}\t5.0\t0\t{x}" for u, i, x in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_sequences(folder: Path) -> Path:
    """Two users whose items are named as in Beauty."""
    folder.mkdir()
    (folder / "user_sequence.txt").write_text("AX B1 B2 B3\nAY B3 B1 B4 B5\n", encoding="utf-8")
    phrases = "".join(f"B{n} phrase number {n}\n" for n in (5, 4, 3, 2, 1))
    (folder / "item_generative_indexing_phase_0.txt").write_text(phrases, encoding="utf-8")
    return folder


def test_sequences_keep_items_and_phrases_together(tmp_path: Path) -> None:
    data = read_sequences(write_sequences(tmp_path / "set"), seed=0)
    assert (data.num_users, data.num_items, len(data.user)) == (2, 5, 7)
    names = {(int(u), data.texts[i]) for u, i in zip(data.user, data.item, strict=True)}
    assert names == {(0, f"phrase number {n}") for n in (1, 2, 3)} | {(1, f"phrase number {n}") for n in (1, 3, 4, 5)}


def test_an_inter_table_keeps_its_own_split(tmp_path: Path) -> None:
    data = world()
    again = read_inter(write_inter(tmp_path / "set.inter", data))
    assert again.fingerprint() == data.fingerprint()
    for part in PARTS:
        assert set(zip(*again.pairs(part), strict=True)) == set(zip(*data.pairs(part), strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("userID\titemID\n0\t0\n", "lacks column x_label"),
        ("userID\titemID\tx_label\n0\t0\t3\n", "x_label 0, 1 or 2"),
        ("userID\titemID\tx_label\n0\tB1\t0\n", "cannot read"),
        ("userID\titemID\tx_label\n0\t1\t0\n0\t1\t2\n", "same item twice"),
        ("userID\titemID\tx_label\n0\t0\t0\n0\t1\t2\n", "has all 2 items"),
    ],
)
def test_a_wrong_inter_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "set.inter"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_inter(path)


def test_features_of_other_items_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "text_feat.npy", np.ones((5, 3)))
    assert read_features(tmp_path / "text_feat.npy", 5).dtype == torch.float32
    with pytest.raises(DataError, match="must be floats of 6 items"):
        read_features(tmp_path / "text_feat.npy", 6)


def test_an_item_without_features_is_a_masked_token() -> None:
    tokens = as_tokens({"text": torch.tensor([[3.0, 4.0], [0.0, 0.0]])})["text"]
    assert tokens.valid_UT.tolist() == [[True], [False]]
    torch.testing.assert_close(tokens.tokens_UTD.square().mean(2), torch.tensor([[1.0], [0.0]]))


def test_items_of_the_training_part_are_not_ranked() -> None:
    torch.manual_seed(0)
    data = world()
    user, item = data.pairs("train")
    train = csr_array((np.ones(len(user)), (user, item)), shape=(NUM_USERS, NUM_ITEMS))
    users_VD, items_UD = torch.randn(NUM_USERS, 4), torch.randn(NUM_ITEMS, 4)
    best_ER = best_items(users_VD, items_UD, torch.arange(NUM_USERS), train, 20)
    for who in range(NUM_USERS):
        mine = set(item[user == who].tolist())
        scores = (users_VD[who] @ items_UD.T).tolist()
        expected = sorted(set(range(NUM_ITEMS)) - mine, key=lambda one: -scores[one])[:20]
        assert best_ER[who].tolist() == expected


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_metrics_equal_torchmetrics_and_a_plain_reference(seed: int) -> None:
    generator = np.random.default_rng(seed)
    best_ER = np.stack([generator.permutation(40)[:20] for _ in range(6)])
    relevant = [set(generator.choice(40, generator.integers(1, 30), replace=False).tolist()) for _ in range(6)]
    dense = np.array([[item in mine for item in range(40)] for mine in relevant]).astype(np.int8)
    metrics = rank_metrics(best_ER, csr_array(dense))
    for cutoff in (10, 20):
        recalls, gains, other_recalls, other_gains = [], [], [], []
        for listed, mine, row in zip(best_ER.tolist(), relevant, dense, strict=True):
            hits = [item in mine for item in listed[:cutoff]]
            ideal = sum(1 / math.log2(rank + 2) for rank in range(min(cutoff, len(mine))))
            recalls.append(sum(hits) / len(mine))
            gains.append(sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits)) / ideal)
            score = torch.zeros(40)
            score[listed] = torch.arange(20, 0, -1).float()
            other_recalls.append(retrieval_recall(score, torch.from_numpy(row).bool(), cutoff).item())
            other_gains.append(retrieval_normalized_dcg(score, torch.from_numpy(row).bool(), cutoff).item())
        assert metrics[f"recall@{cutoff}"] == pytest.approx(np.mean(recalls))
        assert metrics[f"ndcg@{cutoff}"] == pytest.approx(np.mean(gains))
        assert metrics[f"recall@{cutoff}"] == pytest.approx(np.mean(other_recalls), abs=1e-5)
        assert metrics[f"ndcg@{cutoff}"] == pytest.approx(np.mean(other_gains), abs=1e-5)


def test_vectors_that_know_the_answer_score_one() -> None:
    data = world()
    answers = torch.zeros(NUM_USERS, NUM_ITEMS)
    answers[data.pairs("test")] = 1.0
    metrics = measure((answers, torch.eye(NUM_ITEMS)), data, "test")
    assert metrics == pytest.approx(dict.fromkeys(("recall@10", "recall@20", "ndcg@10", "ndcg@20"), 1.0))


def test_the_graph_product_and_its_gradient_equal_the_dense_ones() -> None:
    torch.manual_seed(0)
    data = world()
    user, item = data.pairs("train")
    adjacency = torch.zeros(NUM_USERS + NUM_ITEMS, NUM_USERS + NUM_ITEMS)
    adjacency[user, item + NUM_USERS] = adjacency[item + NUM_USERS, user] = 1.0
    degree = adjacency.sum(1).clamp_min(1)
    dense = adjacency / (degree[:, None] * degree[None]).sqrt()
    graph = bipartite_graph(user, item, NUM_USERS, NUM_ITEMS)
    rows = torch.randn(len(dense), 4, requires_grad=True)
    weight = torch.randn(len(dense), 4)
    (slope,) = torch.autograd.grad((propagate(graph, rows) * weight).sum(), rows)
    (expected,) = torch.autograd.grad(((dense @ rows) * weight).sum(), rows)
    torch.testing.assert_close(propagate(graph, rows), dense @ rows)
    torch.testing.assert_close(slope, expected)


def test_similar_items_are_joined_in_both_directions_and_never_with_themselves() -> None:
    graph = similarity_graph(half_features(), {"text": 1.0}, 3).to_dense()
    half = NUM_ITEMS // 2
    torch.testing.assert_close(graph, graph.T)
    assert (graph.diagonal() == 0).all()
    assert ((graph > 0).sum(1) >= 3).all()
    assert (graph[:half, half:] == 0).all()


def test_sampled_items_are_those_the_user_never_had_in_train() -> None:
    torch.manual_seed(0)
    data = world()
    had = set(zip(*(ids.tolist() for ids in data.pairs("train")), strict=True))
    seen = set()
    for user_B, item_B, other_B in _batches(data, 16):
        seen |= set(zip(user_B.tolist(), item_B.tolist(), strict=True))
        assert not had & set(zip(user_B.tolist(), other_B.tolist(), strict=True))
    assert seen == had


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("content", CONTENTS)
def test_every_weight_is_trained(backbone: Any, content: Any) -> None:
    torch.manual_seed(0)
    model = Recommender(ModelOptions(backbone=backbone, content=content, width=8), world(), half_features())
    model.loss(*next(_batches(world(), 256))).backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is None} == set()


def test_l2_is_of_embeddings_with_their_content() -> None:
    torch.manual_seed(0)
    model = Recommender(ModelOptions(content="linear", l2=0.5, width=8), world(), half_features()).eval()
    torch.nn.init.ones_(model.content.scale)
    user_B, item_B, other_B = next(_batches(world(), 256))
    users_VD, items_UD = model.rows.weight[:NUM_USERS], model.rows.weight[NUM_USERS:] + model.content()
    ranking = -((users_VD[user_B] * (items_UD[item_B] - items_UD[other_B])).sum(1)).sigmoid().log().mean()
    squares = [rows_BD.square().sum(1).mean() for rows_BD in (users_VD[user_B], items_UD[item_B], items_UD[other_B])]
    torch.testing.assert_close(model.loss(user_B, item_B, other_B), ranking + 0.25 * sum(squares))


@pytest.mark.parametrize(
    ("backbone", "given", "weight"), [("bpr", None, 0.05), ("lightgcn", None, 0.01), ("bpr", 0.0, 0.0)]
)
def test_l2_is_that_of_the_backbone_unless_given(backbone: Any, given: float | None, weight: float) -> None:
    assert ModelOptions(backbone=backbone, l2=given).l2_weight == weight


def test_content_without_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs features"):
        Recommender(ModelOptions(content="em3"), world(), {})


def test_runs_are_not_repeated_and_make_a_table(tmp_path: Path) -> None:
    np.save(tmp_path / "text_feat.npy", half_features()["text"].numpy())
    inputs: dict[str, Any] = {
        "inter": str(write_inter(tmp_path / "set.inter", world())),
        "text_feat": str(tmp_path / "text_feat.npy"),
        "work": str(tmp_path / "work"),
        "model": ModelOptions(width=8, layers=1),
        "training": TrainOptions(epochs=2, batch_size=64, evaluate_every=1, validation_users=10),
    }
    for seeds in ((0,), (0, 1)):
        run(**inputs, backbones=("lightgcn",), contents=("em3",), seeds=seeds)
    rows = read_results(tmp_path / "work")
    assert [row["seed"] for row in rows] == [0, 1]
    assert all(0 < row["test"]["recall@20"] <= 1 and row["last_epoch"] == 2 for row in rows)
    table(str(tmp_path / "work"), str(tmp_path / "table.md"))
    mean = np.mean([row["test"]["recall@20"] for row in rows])
    assert f"{mean:.4f} ±" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "authors' logs, other features" in (tmp_path / "table.md").read_text(encoding="utf-8")


def finished(**changes: Any) -> str:
    """A line of results.jsonl."""
    metrics = dict.fromkeys(("recall@10", "recall@20", "ndcg@10", "ndcg@20"), 0.5)
    costs = {"epoch": 1, "last_epoch": 1, "train_cpu_seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 1.0}
    origin = {"dataset": "Sports", "split": "s", "counts": {"users": 1}, "features": {}, "code": "c", "commit": "c"}
    settings = {"model": {"backbone": "bpr", "content": "none"}, "training": {}, "config": "c", "command": "run"}
    return (
        json.dumps({**origin, **settings, **costs, "seed": 0, "validation": metrics, "test": metrics, **changes}) + "\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": "d"}, "differ in code"),
        ({"split": "t"}, "differ in split"),
        ({"features": {"text": "other"}}, "differ in features"),
        ({"config": "d"}, "with two configs"),
    ],
)
def test_runs_that_differ_do_not_share_a_table(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(finished() + finished(**changes), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        table(str(tmp_path), str(tmp_path / "table.md"))


def test_another_commit_with_the_same_sources_shares_the_table(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(finished() + finished(commit="d", seed=1), encoding="utf-8")
    table(str(tmp_path), str(tmp_path / "table.md"))
    assert "| bpr | IDs only | 2 | 0.5000 ± 0.0000" in (tmp_path / "table.md").read_text(encoding="utf-8")
