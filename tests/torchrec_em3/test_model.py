"""The model graph on one process, tables unsharded: what is built, what is read, what is written."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_em3.batch import HISTORY, TARGET, Batch, ModalityTokens
from torchrec_em3.config import Config, ModelConfig
from torchrec_em3.errors import ConfigError
from torchrec_em3.model import EM3Model
from torchrec_em3.parts import load_builtin_parts
from torchrec_em3.schema import FeatureSchema, ModalitySpec, SparseFeature

CPU = torch.device("cpu")
SCHEMA = FeatureSchema(
    user_features=(SparseFeature("user", 5), SparseFeature("region", 3)),
    item_rows=12,
    known_items=8,
    modalities=(ModalitySpec("image", 6, 3), ModalitySpec("text", 5, 4)),
)


class Store:
    """Tokens that depend only on the item; item 11 has none. Remembers what was asked for."""

    def __init__(self) -> None:
        self.fetched: list[list[int]] = []

    def fetch(self, items_U: Tensor, device: torch.device | None = None) -> dict[str, ModalityTokens]:
        self.fetched.append(items_U.tolist())
        tokens = {}
        for spec in SCHEMA.modalities:
            values = torch.arange(spec.max_tokens * spec.dim, dtype=torch.float32).view(1, spec.max_tokens, spec.dim)
            tokens_UTD = torch.sin(values * 0.7 + items_U.view(-1, 1, 1).float())
            valid_UT = torch.ones(len(items_U), spec.max_tokens, dtype=torch.bool) & (items_U != 11)[:, None]
            tokens[spec.name] = ModalityTokens(tokens_UTD, valid_UT)
        return tokens


def build(store: Store | None = None, **model: Any) -> EM3Model:
    load_builtin_parts()
    torch.manual_seed(0)
    options = {"embedding_dim": 8, "unknown_id_rate": 0.0, "ranker_options": {"hidden": (8,)}, **model}
    return EM3Model(SCHEMA, Config(model=ModelConfig(**options)), store or Store(), device=CPU)


def batch(targets: list[int], histories: list[list[int]]) -> Batch:
    rows = len(targets)
    values = [1] * rows + [2] * rows + targets + [item for history in histories for item in history]
    lengths = [1] * (3 * rows) + [len(history) for history in histories]
    return Batch(
        sparse=KeyedJaggedTensor(
            keys=["user", "region", TARGET, HISTORY], values=torch.tensor(values), lengths=torch.tensor(lengths)
        ),
        dense=torch.empty(rows, 0),
        label=torch.tensor([float(row % 2) for row in range(rows)]),
        weight=torch.ones(rows),
        user=torch.ones(rows, dtype=torch.int64),
    )


def logits(model: EM3Model, *rows: tuple[int, list[int]]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch([target for target, _ in rows], [history for _, history in rows]))[1].logit


def test_id_only_builds_nothing_for_content() -> None:
    model = build(content="none")
    assert not [name for name, _ in model.named_parameters() if "content" in name or "alignment" in name]
    assert set(model(batch([1, 2], [[3], []]))[1].metrics) == {"rank_loss", "loss"}


def test_weight_zero_builds_no_alignment_and_says_so_in_the_metrics() -> None:
    model = build(alignment_weight=0.0)
    assert model.alignment is None
    assert "alignment_loss" not in model(batch([1, 2], [[3], []]))[1].metrics


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    model = build(alignment_weight=0.25)
    loss, output = model(batch([1, 2, 3], [[3], [], [4, 5]]))
    terms = output.metrics
    assert float(terms["alignment_loss"]) > 0
    assert float(loss.detach()) == pytest.approx(
        float(terms["rank_loss"]) + 0.25 * float(terms["alignment_loss"]), rel=1e-6
    )


def test_rows_of_weight_zero_do_not_count() -> None:
    model = build(content="none")
    whole = batch([1, 2, 3], [[3], [], [4, 5]])
    fewer = dataclasses.replace(whole, weight=torch.tensor([1.0, 1.0, 0.0]))
    changed = dataclasses.replace(fewer, label=torch.tensor([0.0, 1.0, 1.0]))
    assert float(model(fewer)[0]) == float(model(changed)[0])
    assert float(model(fewer)[0]) != float(model(whole)[0])


def test_items_never_trained_on_share_one_id_embedding_but_not_their_content() -> None:
    id_only = build(content="none")
    assert torch.equal(logits(id_only, (9, [1, 2])), logits(id_only, (10, [1, 2])))
    assert not torch.equal(logits(id_only, (1, [1, 2])), logits(id_only, (2, [1, 2])))
    with_content = build()
    assert not torch.equal(logits(with_content, (9, [1, 2])), logits(with_content, (10, [1, 2])))


def test_each_distinct_target_is_encoded_once() -> None:
    store = Store()
    build(store)(batch([3, 1, 3, 3], [[5, 1], [5], [], [1]]))
    assert store.fetched == [[1, 3]]


def test_only_training_writes_the_bank_and_only_items_with_content() -> None:
    model = build()
    assert model.content is not None
    assert model.content.bank is not None
    rows = torch.arange(SCHEMA.item_rows)
    logits(model, (1, [2]))
    assert not model.content.bank.read(rows)[1].any()
    model.train()
    model(batch([1, 3, 11], [[2], [], []]))
    assert model.content.bank.read(rows)[1].nonzero().squeeze(1).tolist() == [1, 3]


def test_history_rows_never_written_are_left_out() -> None:
    model = build()
    plain = logits(model, (1, []))
    assert model.content is not None
    interest = model.content(model._split(batch([1], [[2, 3]]).sparse)[1], 1).blocks["content_interest"]
    assert not interest.any()
    model.train()
    model(batch([2], [[]]))
    model.eval()
    interest = model.content(model._split(batch([1], [[2, 3]]).sparse)[1], 2).blocks["content_interest"]
    assert interest.any()
    assert plain.shape == (1,)


def test_the_bank_reports_coverage_and_similarity() -> None:
    model = build()
    first = model(batch([1, 2], [[1, 3], [2]]))[1].metrics
    second = model(batch([1, 2], [[1, 3], [2]]))[1].metrics
    assert float(first["bank_coverage"]) == 0.0
    assert float(second["bank_coverage"]) == pytest.approx(2 / 3)
    assert float(second["bank_similarity"]) == pytest.approx(1.0, abs=1e-5), "nothing was trained in between"


def test_a_fraction_of_the_targets_is_encoded_and_the_rest_read_from_the_bank() -> None:
    store = Store()
    model = build(store, encode_fraction=1e-9)
    data = batch([1, 2, 3], [[1], [2], []])
    first = model(data)[1].logit
    assert store.fetched == [[], [1, 2, 3]], "what the bank does not hold is encoded, if without gradient"
    second = model(data)[1].logit
    assert store.fetched[2:] == [[]]
    assert torch.allclose(first[2], second[2], atol=1e-6)
    loss, _ = model(data)
    loss.backward()
    assert model.content is not None
    assert model.content.projection.weight.grad is not None
    assert model.content.projection.weight.grad.any(), "the projection learns from bank rows too"


def test_evaluation_encodes_only_what_the_bank_does_not_hold() -> None:
    store = Store()
    model = build(store)
    model(batch([1, 2], [[], []]))
    mixed = logits(model, (1, []), (5, []))
    assert store.fetched[-1] == [5]
    assert model.content is not None
    model.content._draw = lambda item_R, step: torch.ones_like(item_R, dtype=torch.bool)  # as if the bank held nothing
    torch.testing.assert_close(logits(model, (1, []), (5, [])), mixed)


def test_only_targets_encoded_in_the_step_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(encode_fraction=0.5)
    aligned: list[list[int]] = []
    compute = model.alignment.forward

    def record(content_UD: Tensor, id_UD: Tensor, item_U: Tensor, count_U: Tensor) -> Tensor:
        aligned.append(item_U.tolist())
        return compute(content_UD, id_UD, item_U, count_U)

    monkeypatch.setattr(model.alignment, "forward", record)
    assert model.content is not None
    monkeypatch.setattr(model.content, "_draw", lambda item_R, step: torch.arange(len(item_R)) != 1)
    model(batch([1, 2, 3, 3, 11], [[], [], [], [], []]))
    assert aligned == [[1, 3]], "2 was not drawn, 11 has no content"
    rows = torch.arange(SCHEMA.item_rows)
    assert model.content.bank is not None
    assert model.content.bank.read(rows)[1].nonzero().squeeze(1).tolist() == [1, 2, 3], "2 is in the bank all the same"


@pytest.mark.parametrize("history", ["none", "lora_qformer", "shared"])
def test_a_fraction_needs_a_bank(history: str) -> None:
    with pytest.raises(ConfigError, match=r"use 1 or --model\.history cache"):
        build(encode_fraction=0.5, history=history)


def test_similarity_needs_a_history() -> None:
    with pytest.raises(ConfigError, match=r"--model\.similarity both .* use --model\.history cache"):
        build(similarity="both", history="none")


def test_similarity_compares_the_towers_output_with_the_rows_of_the_bank() -> None:
    model = build(similarity="histogram")
    assert model.content is not None
    model(batch([1, 2], [[], []]))
    _, items = model._split(batch([1, 2, 3], [[1, 1, 2], [2, 7], []]).sparse)
    seen: list[Tensor] = []
    model.content.similarity.project.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()
    model.content(items, 2)
    count_BT = seen[0].expm1()
    assert count_BT.sum(1).tolist() == pytest.approx([3.0, 1.0, 0.0]), "7 was never written"
    assert count_BT[0, -1].item() >= 2.0 - 1e-5, "an item is as like itself as can be"
    assert count_BT[1, -1].item() == pytest.approx(1.0)


@pytest.mark.parametrize("similarity", ["statistics", "histogram", "both"])
@pytest.mark.parametrize(("content", "history"), [("frozen_pool", "cache"), ("concat", "cache"), ("concat", "shared")])
def test_similarity_trains_with_every_kind_of_history(similarity: str, content: str, history: str) -> None:
    model = build(similarity=similarity, history=history, content=content)
    model(batch([1, 2], [[1, 2], [2]]))[0].backward()
    model.zero_grad()
    loss, _ = model(batch([1, 2, 11], [[1, 2], [], [9]]))
    loss.backward()
    assert model.content is not None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.content.parameters())
    assert model.content.similarity.project.weight.grad.any()


def test_frozen_pool_without_history_is_pooled_content_and_a_trained_projection() -> None:
    model = build(content="frozen_pool", history="none", alignment_weight=0.0)
    assert model.content is not None
    assert model.content.bank is None
    assert model.alignment is None
    assert {name for name, _ in model.content.named_parameters()} == {"projection.weight", "projection.bias"}
    assert "content_interest" not in model.ranker.blocks.dims
    data = batch([3, 1, 3], [[5, 1], [5], []])
    blocks = model.content(model._split(data.sparse)[1], 1).blocks
    tokens = Store().fetch(torch.tensor([3, 1, 3]))
    means = [tokens[spec.name].tokens_UTD.mean(1) for spec in SCHEMA.modalities]
    parts = [torch.cat([mean / mean.square().mean(1, keepdim=True).sqrt(), torch.ones(3, 1)], dim=1) for mean in means]
    torch.testing.assert_close(blocks, {"content": model.content.projection(torch.cat(parts, dim=1))})
    model(data)[0].backward()
    assert model.content.projection.weight.grad is not None
    assert model.content.projection.weight.grad.any()


def test_a_bank_of_a_wider_tower_holds_its_whole_output() -> None:
    model = build(content="frozen_pool")
    assert model.content is not None
    assert model.content.bank is not None
    model(batch([1, 2], [[1], [2]]))
    rows, _ = model.content.bank.read(torch.tensor([1, 2]))
    torch.testing.assert_close(rows, model.content.encode(torch.tensor([1, 2]))[0])
    assert rows.shape == (2, 6 + 5 + 2)


@pytest.mark.parametrize("history", ["cache", "lora_qformer", "shared", "none"])
def test_every_history_content_trains(history: str) -> None:
    model = build(history=history)
    model(batch([1, 2], [[1, 2], [2]]))[0].backward()
    loss, _ = model(batch([1, 2, 11], [[1, 2], [], [9]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_ids_are_hidden_only_while_training() -> None:
    model = build(content="none", unknown_id_rate=0.999999)
    target_BD, unknown_D = torch.ones(4, 8), torch.zeros(8)
    assert not model._hide_ids(target_BD, unknown_D).any()
    model.eval()
    assert torch.equal(model._hide_ids(target_BD, unknown_D), target_BD)


def test_the_ranking_loss_trains_the_tower_end_to_end() -> None:
    model = build(alignment_weight=0.0)
    model(batch([1, 2], [[1], [2]]))[0].backward()
    assert model.content is not None
    gradients = {name: p.grad for name, p in model.content.tower.named_parameters()}
    assert all(grad is not None for grad in gradients.values())
    assert sum(bool(grad.any()) for grad in gradients.values() if grad is not None) > len(gradients) // 2
