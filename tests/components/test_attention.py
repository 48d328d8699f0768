"""The attention: both of its forms against plain arithmetic, masks, adapters, broken options."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from torchrec_em3.components.attention import Attention, Keys
from torchrec_em3.errors import ConfigError

WIDTH, HEADS = 12, 3


def plain(attention: Attention, query_URD: Tensor, rows_UKD: Tensor, valid_UK: Tensor) -> Tensor:
    """Textbook attention, one sequence and head at a time, with the weights of `attention`."""
    size = WIDTH // HEADS
    results = []
    for query_RD, rows_KD, valid_K in zip(query_URD, rows_UKD, valid_UK, strict=True):
        query, key, value = (
            attention.query(query_RD),
            attention.key(rows_KD[valid_K]),
            attention.value(rows_KD[valid_K]),
        )
        heads = []
        for start in range(0, WIDTH, size):
            part = slice(start, start + size)
            weights = torch.softmax(query[:, part] @ key[:, part].T * attention.scale, dim=-1)
            heads.append(weights @ value[:, part])
        results.append(attention.output(torch.cat(heads, dim=-1)))
    return torch.stack(results)


def example(rows: int, num_items: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    query_URD = torch.randn(num_items, rows, WIDTH, dtype=torch.float64)
    rows_UKD = torch.randn(num_items, 7, WIDTH, dtype=torch.float64)
    valid_UK = torch.rand(num_items, 7) < 0.6
    valid_UK[:, 0] = True
    return query_URD, rows_UKD, valid_UK


def grouped(rows_UKD: Tensor, valid_UK: Tensor) -> list[Keys]:
    return [Keys(rows_UKD[:, :3], valid_UK[:, :3]), Keys(rows_UKD[:, 3:], valid_UK[:, 3:])]


@pytest.mark.parametrize("rows", [1, 3, 4, 9], ids=lambda rows: "absorbed" if rows * HEADS < WIDTH else "projected")
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_equals_plain_attention(rows: int, epsilon: float) -> None:
    attention = Attention(WIDTH, HEADS, epsilon).double()
    query_URD, rows_UKD, valid_UK = example(rows)
    found = attention(query_URD, grouped(rows_UKD, valid_UK))
    torch.testing.assert_close(found, plain(attention, query_URD, rows_UKD, valid_UK))
    assert attention.scale == (WIDTH / HEADS + epsilon) ** -0.5


@pytest.mark.parametrize("rows", [2, 9])
def test_shared_queries_and_groups_without_mask(rows: int) -> None:
    attention = Attention(WIDTH, HEADS).double()
    query_URD, rows_UKD, valid_UK = example(rows)
    keys = [Keys(rows_UKD[:, :2]), Keys(rows_UKD[:, 2:], valid_UK[:, 2:])]
    seen_UK = valid_UK.clone()
    seen_UK[:, :2] = True
    expected = plain(attention, query_URD[:1].expand(5, -1, -1), rows_UKD, seen_UK)
    torch.testing.assert_close(attention(query_URD[:1], keys), expected)
    everything = plain(attention, query_URD, rows_UKD, torch.ones_like(valid_UK))
    torch.testing.assert_close(attention(query_URD, [Keys(rows_UKD)]), everything)


@pytest.mark.parametrize("rows", [2, 9])
def test_sequence_without_valid_keys_is_finite_and_reads_nothing(rows: int) -> None:
    attention = Attention(WIDTH, HEADS)
    query_URD, rows_UKD, valid_UK = (x.float() if x.is_floating_point() else x for x in example(rows))
    valid_UK[1] = False
    rows_UKD.requires_grad_()
    attended_URD = attention(query_URD, grouped(rows_UKD, valid_UK))
    torch.testing.assert_close(attended_URD[1], attention.output.bias.expand(rows, -1))
    attended_URD.sum().backward()
    assert torch.isfinite(rows_UKD.grad).all()
    assert torch.equal(rows_UKD.grad.abs().sum(2) > 0, valid_UK)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("name", ["query", "key", "value", "output"])
def test_adapter_acts_in_training_and_evaluation(rows: int, name: str) -> None:
    attention = Attention(WIDTH, HEADS).double()
    query_URD, rows_UKD, valid_UK = example(rows)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[name])
    adapted = inject_adapter_in_model(config, copy.deepcopy(attention)).double()
    keys = grouped(rows_UKD, valid_UK)
    torch.testing.assert_close(adapted(query_URD, keys), attention(query_URD, keys))
    layer = getattr(adapted, name)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    merged = copy.deepcopy(attention)
    with torch.no_grad():
        getattr(merged, name).weight += layer.get_delta_weight("default")
    for training in (True, False):
        changed = adapted.train(training)(query_URD, keys)
        torch.testing.assert_close(changed, merged(query_URD, keys))
        assert (changed - attention(query_URD, keys)).abs().max() > 1e-3


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_must_divide_the_width(heads: int) -> None:
    with pytest.raises(ConfigError, match="num_heads"):
        Attention(WIDTH, heads)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_weights_are_what_the_values_are_summed_by(epsilon: float) -> None:
    attention = Attention(WIDTH, HEADS, epsilon).double()
    query_URD, rows_UKD, valid_UK = example(4)
    keys = grouped(rows_UKD, valid_UK)
    weight_UHRK = attention.weights(query_URD, keys)
    assert not weight_UHRK.masked_select(~valid_UK[:, None, None]).any()
    torch.testing.assert_close(weight_UHRK.sum(-1), torch.ones_like(weight_UHRK[..., 0]))
    value_UHKE = attention.value(rows_UKD).unflatten(2, (HEADS, -1)).transpose(1, 2)
    summed_URD = (weight_UHRK @ value_UHKE).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.output(summed_URD), attention(query_URD, keys))
    shared_UHRK = attention.weights(query_URD[:1], keys)
    torch.testing.assert_close(shared_UHRK[0], weight_UHRK[0])
    assert len(shared_UHRK) == len(rows_UKD)
