"""The two alignment losses as modules: contract, options, temperature, popularity, parity with the authors' form."""

import math
from typing import Any

import pytest
import torch

from tests.components.alignment_contract import check_alignment, example
from torchrec_em3.components.alignment import backend
from torchrec_em3.components.alignment.contrast import (
    ContentIdContrast,
    ContrastOptions,
    SampledContrast,
    SampledOptions,
    sampled_info_nce,
)
from torchrec_em3.components.alignment.info_nce import FLOAT32_SCALE, ROUNDING, info_nce
from torchrec_em3.errors import ConfigError, NumericError
from torchrec_em3.registry import ALIGNMENTS

WIDTH = 16


@pytest.mark.parametrize(
    "options",
    [
        ContrastOptions(),
        ContrastOptions(learn_temperature=False, head_dim=5, popularity_correction=True),
        ContrastOptions(stop_gradient="content", temperature=0.02, min_temperature=0.01),
        ContrastOptions(stop_gradient="id"),
    ],
)
def test_global_keeps_the_contract(options: ContrastOptions) -> None:
    torch.manual_seed(0)
    check_alignment(ContentIdContrast(options, WIDTH), WIDTH)


@pytest.mark.parametrize("options", [SampledOptions(), SampledOptions(temperature=0.5, negatives=3, head_dim=5)])
def test_sampled16_keeps_the_contract(options: SampledOptions) -> None:
    torch.manual_seed(0)
    check_alignment(SampledContrast(options, WIDTH), WIDTH)


def test_both_are_registered() -> None:
    assert ALIGNMENTS.get("global").build is ContentIdContrast
    assert ALIGNMENTS.get("global").options is ContrastOptions
    assert ALIGNMENTS.get("sampled16").build is SampledContrast
    assert ALIGNMENTS.get("sampled16").options is SampledOptions


@pytest.mark.parametrize("side", ["content", "id"])
def test_stop_gradient_holds_one_side_but_trains_both_heads(side: str) -> None:
    loss = ContentIdContrast(ContrastOptions(stop_gradient=side), WIDTH)  # type: ignore[arg-type]
    inputs = example(9, WIDTH)
    loss(*inputs).backward()
    held, moved = (inputs.content_UD, inputs.id_UD) if side == "content" else (inputs.id_UD, inputs.content_UD)
    assert held.grad is None
    assert moved.grad is not None
    assert moved.grad.any()
    for head in (loss.heads.content, loss.heads.id):
        assert head.weight.grad is not None
        assert head.weight.grad.any()


def test_learnt_temperature_returns_from_beyond_its_limits() -> None:
    loss = ContentIdContrast(ContrastOptions(), WIDTH)
    assert loss.temperature == pytest.approx(0.1)
    for value, limit in ((9.0, 0.025), (-9.0, 1.0)):
        with torch.no_grad():
            loss.log_scale.fill_(value)
        loss.zero_grad()
        loss(*example(9, WIDTH)).backward()
        assert loss.temperature == pytest.approx(limit)
        assert 1 / loss.temperature <= FLOAT32_SCALE * ROUNDING, "rounding must not push the default limit into float64"
        assert loss.log_scale.grad is not None
        assert loss.log_scale.grad != 0, "at the limit the gradient must still be able to lead back"
    with torch.no_grad():
        loss.log_scale.fill_(math.nan)
    with pytest.raises(NumericError, match="temperature has diverged"):
        loss(*example(9, WIDTH))


def test_vectors_shorter_than_eps_are_not_blown_up() -> None:
    heads = ContentIdContrast(ContrastOptions(eps=1e-3), WIDTH).heads
    with torch.no_grad():
        heads.content.weight.copy_(torch.eye(WIDTH))
        heads.content.bias.zero_()
    vectors = torch.tensor([1.0, 1e-4, 0.0])[:, None] * torch.eye(WIDTH)[:3]
    content_UE, _ = heads(vectors, vectors)
    torch.testing.assert_close(content_UE.norm(dim=1), torch.tensor([1.0, 0.1, 0.0]))


def test_fixed_temperature_is_no_parameter() -> None:
    loss = ContentIdContrast(ContrastOptions(learn_temperature=False, temperature=0.5), WIDTH)
    assert {name for name, _ in loss.named_parameters()} == {
        f"heads.{side}.{kind}" for side in ("content", "id") for kind in ("weight", "bias")
    }
    assert loss.temperature == pytest.approx(0.5)


def test_popularity_correction_is_relative_to_the_mean_count() -> None:
    plain, corrected = (ContentIdContrast(ContrastOptions(popularity_correction=on), WIDTH) for on in (False, True))
    corrected.load_state_dict(plain.state_dict())
    inputs = example(9, WIDTH)
    even = inputs._replace(count_U=torch.full((9,), 3))
    torch.testing.assert_close(corrected(*even), plain(*even))
    log_q = (inputs.count_U / inputs.count_U.double().mean()).log()
    content_UE, id_UE = plain.heads(inputs.content_UD, inputs.id_UD)
    expected = info_nce(content_UE, id_UE, inputs.item_U, 10.0, log_q_N=log_q)
    torch.testing.assert_close(corrected(*inputs), expected)
    assert abs(plain(*inputs) - expected) > 1e-3


def test_sampled16_equals_a_plain_restatement() -> None:
    loss = SampledContrast(SampledOptions(temperature=0.5), WIDTH).double()
    inputs = example(11, WIDTH)
    doubled = inputs._replace(content_UD=inputs.content_UD.double(), id_UD=inputs.id_UD.double())
    torch.manual_seed(3)
    value = loss(*doubled)
    value.backward()
    torch.manual_seed(3)
    drawn = torch.randint(11, (11, 16))
    content, id_ = inputs.content_UD.detach().double(), inputs.id_UD.detach().double()
    content.requires_grad_()
    id_.requires_grad_()
    heads = loss.heads
    projected = [content @ heads.content.weight.T + heads.content.bias, id_ @ heads.id.weight.T + heads.id.bias]
    left, right = [side / side.norm(dim=1, keepdim=True).clamp_min(1e-5) for side in projected]
    total = torch.zeros((), dtype=torch.float64)
    for row in range(11):
        for query, key in ((left, right), (right, left)):
            own = torch.exp(query[row] @ key[row] / 0.5)
            others = sum(torch.exp(query[row] @ key[int(other)] / 0.5) for other in drawn[row])
            total = total - torch.log(own / (own + others)) / 11
    expected = 0.5 * total
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(inputs.content_UD.grad, content.grad.float())  # type: ignore[union-attr]
    torch.testing.assert_close(inputs.id_UD.grad, id_.grad.float())  # type: ignore[union-attr]


def test_the_positive_may_be_drawn_as_a_negative() -> None:
    vectors = torch.eye(2)
    always_itself = torch.tensor([[0], [1]])
    assert sampled_info_nce(vectors, vectors, always_itself, 1.0) == pytest.approx(math.log(2))


def test_triton_is_only_needed_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    for name in ("auto", "tiled"):
        assert ContentIdContrast(ContrastOptions(backend=name), WIDTH)(*example(9, WIDTH)) > 0  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="triton is not installed; set backend to auto or tiled"):
        ContentIdContrast(ContrastOptions(backend="triton"), WIDTH)(*example(9, WIDTH))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"temperature": 2.0}, ContrastOptions, "temperature 2.0 is outside"),
        ({"min_temperature": 0.001}, ContrastOptions, "min_temperature"),
        ({"max_temperature": 0.01}, ContrastOptions, "max_temperature"),
        ({"stop_gradient": "both"}, ContrastOptions, "stop_gradient"),
        ({"head_dim": -1}, ContrastOptions, "head_dim"),
        ({"eps": 0.0}, ContrastOptions, "eps"),
        ({"backend": "cuda"}, ContrastOptions, "backend is 'cuda'; choose from auto, tiled, triton"),
        ({"transport": "mail"}, ContrastOptions, "transport is 'mail'; choose from auto, gather, ring"),
        ({"temperature": 0.0}, SampledOptions, "temperature"),
        ({"negatives": 0}, SampledOptions, "negatives"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], kind: type[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)
