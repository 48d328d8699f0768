"""The Fusion-Q-Former: contract, parity with the authors' form, structure, adapters."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tests.components.tower_contract import COUNTS, DIMS, WIDTH, check_tower, fill, random_tokens
from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.attention import Keys
from torchrec_em3.components.towers.qformer import FusionQFormer, FusionQFormerOptions
from torchrec_em3.components.towers.tokens import mean_of_valid
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import TOWERS


def build(width: int = WIDTH, **options: Any) -> FusionQFormer:
    torch.manual_seed(0)
    options = {"num_heads": 2, "num_queries": 2, **options}
    return FusionQFormer(FusionQFormerOptions(**options), DIMS, COUNTS, width)


@pytest.mark.parametrize("preset", ["full", "em3_public"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_keeps_the_contract(preset: str, num_layers: int, num_queries: int) -> None:
    check_tower(build(preset=preset, num_layers=num_layers, num_queries=num_queries, dropout=0.5))


def test_bfloat16_keeps_the_contract_and_stays_close() -> None:
    tower = build(bfloat16=True)
    check_tower(tower)
    tokens = random_tokens(10)
    exact = build()(tokens)
    assert 0 < (tower(tokens) - exact).abs().max() < 0.05 * exact.abs().max()


def restated(
    layers: list[dict[str, Tensor]],
    queries: Tensor,
    projections: list[tuple[Tensor, Tensor]],
    readout: nn.Linear,
    pooled: list[Tensor],
    heads: int,
) -> Tensor:
    """The authors' Fusion-Q-Former from its description, item by item, biases of key and value included."""
    results = []
    for features in zip(*pooled, strict=True):
        tokens = [weight @ feature + bias for feature, (weight, bias) in zip(features, projections, strict=True)]
        rows = torch.cat([queries, torch.stack(tokens)])
        for layer in layers:
            query, key, value = (rows @ layer[f"{name}.w"].T + layer[f"{name}.b"] for name in ("query", "key", "value"))
            size = rows.shape[1] // heads
            context = torch.zeros_like(rows)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = query[:, part] @ key[:, part].T / (size + 1e-5) ** 0.5
                context[:, part] = scores.softmax(1) @ value[:, part]
            total = rows + context @ layer["output.w"].T + layer["output.b"]
            centred = total - total.mean(1, keepdim=True)
            rows = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer["norm.w"] + layer["norm.b"]
        results.append(readout.weight @ rows[: len(queries)].flatten() + readout.bias)
    return torch.stack(results)


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("num_queries", [1, 2])
def test_em3_public_equals_an_independent_restatement(num_layers: int, num_queries: int) -> None:
    tower = build(preset="em3_public", num_layers=num_layers, num_queries=num_queries, num_heads=4).double()
    randomise(tower)
    layers = []
    for block in tower.blocks:
        attention, bias = block.attention, torch.randn(2, WIDTH, dtype=torch.float64)
        layer = {f"{name}.w": getattr(attention, name).weight.detach() for name in ("query", "key", "value", "output")}
        layer |= {"query.b": attention.query.bias, "key.b": bias[0], "value.b": bias[1]}
        # A value's bias passes through the softmax unchanged, and so belongs to the output map's.
        layer["output.b"] = attention.output.bias - attention.output.weight @ bias[1]
        layer |= {"norm.w": block.norm.weight, "norm.b": block.norm.bias}
        layers.append(layer)
    tokens = {
        name: ModalityTokens(torch.randn(6, 1, dim, dtype=torch.float64), torch.ones(6, 1, dtype=torch.bool))
        for name, dim in DIMS.items()
    }
    projections = [(tower.inputs[name].project.weight, tower.inputs[name].project.bias) for name in DIMS]
    pooled = [tokens[name].tokens_UTD[:, 0] for name in DIMS]
    expected = restated(layers, tower.queries_QD, projections, tower.readout, pooled, heads=4)
    torch.testing.assert_close(tower(tokens), expected)


def test_em3_public_has_no_feed_forward_layer_and_no_embeddings() -> None:
    names = {name for name, _ in build(preset="em3_public").named_parameters()}
    assert not [name for name in names if "ffn" in name or "position" in name or "modality" in name]


@pytest.mark.parametrize("preset", ["full", "em3_public"])
def test_last_layer_computes_query_rows_only_and_as_the_full_layer_would(preset: str) -> None:
    tower = build(preset=preset, num_layers=2).double().eval()
    tokens = {n: ModalityTokens(x.double(), valid) for n, (x, valid) in random_tokens(6).items()}
    groups = [project(tokens[name]) for name, project in tower.inputs.items()]
    rows_UKD = torch.cat([tower.queries_QD.expand(6, -1, -1), *(group.rows_UTD for group in groups)], dim=1)
    valid_UK = torch.cat([torch.ones(6, 2, dtype=torch.bool), *(group.valid_UT for group in groups)], dim=1)
    for block in tower.blocks:
        rows_UKD = block(Keys(rows_UKD, valid_UK), [])
    means = [mean_of_valid(*group)[:, None] for group in groups] if preset == "full" else []
    expected = tower.readout(tower.norm(torch.cat([rows_UKD[:, :2], *means], dim=1)).flatten(1))
    seen = []
    tower.blocks[1].attention.output.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    torch.testing.assert_close(tower(tokens), expected)
    assert seen == [2]


def test_modalities_in_another_order_give_the_same_content() -> None:
    tower = build(preset="em3_public")
    tokens = random_tokens(5)
    torch.testing.assert_close(tower(dict(reversed(tokens.items()))), tower(tokens))
    flipped = copy.deepcopy(tower)
    flipped.inputs = nn.ModuleDict(reversed(list(tower.inputs.items())))
    torch.testing.assert_close(flipped(tokens), tower(tokens))


def test_full_knows_position_and_is_blind_to_the_scale_of_the_encoder() -> None:
    tower = build()
    nn.init.normal_(tower.inputs["text"].position_TD)
    tokens = {n: ModalityTokens(x, torch.ones_like(valid)) for n, (x, valid) in random_tokens(5).items()}
    text = tokens["text"]
    turned = tokens | {"text": ModalityTokens(text.tokens_UTD.flip(1), text.valid_UT)}
    assert (tower(turned) - tower(tokens)).abs().max() > 1e-3
    louder = tokens | {"text": ModalityTokens(50 * text.tokens_UTD, text.valid_UT)}
    torch.testing.assert_close(tower(louder), tower(tokens))


def test_full_reads_the_mean_of_each_modality_beside_the_queries() -> None:
    """With nothing of the queries read, what is left is linear in the normed mean of the valid tokens."""
    tower = build()
    with torch.no_grad():
        tower.readout.weight[:, : 2 * WIDTH] = 0
    tokens = random_tokens(6)
    means = []
    for name, project in tower.inputs.items():
        rows_UTD, valid_UT = project(tokens[name])
        rows = [
            rows_TD[valid_T].mean(0) if valid_T.any() else torch.zeros(WIDTH)
            for rows_TD, valid_T in zip(rows_UTD, valid_UT, strict=True)
        ]
        means.append(tower.norm(torch.stack(rows)))
    weight = tower.readout.weight[:, 2 * WIDTH :]
    torch.testing.assert_close(tower(tokens), torch.cat(means, dim=1) @ weight.T + tower.readout.bias)


@pytest.mark.parametrize("preset", ["full", "em3_public"])
def test_missing_is_not_a_token_of_zeros(preset: str) -> None:
    tower = build(preset=preset)
    missing = fill(random_tokens(3), torch.zeros_like)
    zeros = {n: ModalityTokens(x, torch.ones_like(valid)) for n, (x, valid) in missing.items()}
    changed_U = (tower(missing) - tower(zeros)).abs().amax(1)
    assert bool((changed_U > 1e-3).all())


@pytest.mark.parametrize("preset", ["full", "em3_public"])
def test_adapters_leave_the_start_alone_and_act_in_evaluation(preset: str) -> None:
    tower, tokens = build(preset=preset).eval(), random_tokens(8)
    assert {name.rsplit(".", 1)[-1] for name in tower.lora_targets} == {"query", "key", "value", "output", "project"}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=tower.lora_targets)
    adapted = inject_adapter_in_model(config, copy.deepcopy(tower))
    torch.testing.assert_close(adapted(tokens), tower(tokens), rtol=0, atol=1e-6)
    for name in tower.lora_targets:
        changed = copy.deepcopy(adapted)
        nn.init.normal_(changed.get_submodule(name).lora_B["default"].weight)
        for training in (True, False):
            difference = (changed.train(training)(tokens) - tower(tokens)).abs().max()
            assert difference > 1e-4, f"the adapter of {name} does nothing with training={training}"


@pytest.mark.parametrize(("preset", "silent"), [("full", "attention.output"), ("full", "ffn.2"), ("em3_public", None)])
def test_dropout_acts_on_each_part_in_training_only(preset: str, silent: str | None) -> None:
    tower, tokens = build(preset=preset, dropout=0.5), random_tokens(8)
    if silent is not None:  # what is dropped must come from the other part
        nn.init.zeros_(tower.blocks[0].get_submodule(silent).weight)
    nn.init.normal_(tower.readout.weight)
    assert not torch.equal(tower(tokens), tower(tokens))
    assert torch.equal(tower.eval()(tokens), tower(tokens))


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "other"},
        {"num_queries": 0},
        {"num_layers": 0},
        {"ffn_multiple": 0},
        {"dropout": 1.0},
        {"num_heads": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_refuses_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(**options)


def test_is_registered_and_needs_a_modality() -> None:
    part = TOWERS.get("fusion_qformer")
    with pytest.raises(ConfigError, match="at least one modality"):
        part.build(part.options(), {}, {}, WIDTH)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_token_attention_is_blind_to_what_is_missing_and_leaves_the_rest_to_the_queries(num_layers: int) -> None:
    tower, tokens = build(num_layers=num_layers).eval(), random_tokens(6)
    found = tower.token_attention(tokens)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == {"text": (6, 2, 5), "image": (6, 2, 3)}
    for name, weight_UQT in found.items():
        valid_UQT = tokens[name].valid_UT[:, None].expand_as(weight_UQT)
        assert (weight_UQT[valid_UQT] > 0).all()
        assert not weight_UQT[~valid_UQT].any()
    total_UQ = sum(weight_UQT.sum(2) for weight_UQT in found.values())
    assert (total_UQ < 1).all()
    assert not total_UQ[2].any()


def test_a_token_that_the_queries_are_made_to_seek_gets_the_attention() -> None:
    tower, tokens = build(num_heads=1).eval(), random_tokens(4, share=1.0)
    with torch.no_grad():
        rows_TD = torch.cat([project(tokens[name]).rows_UTD[3] for name, project in tower.inputs.items()])
        sought_D = torch.linalg.lstsq(rows_TD, torch.eye(8)[6]).solution
        attention = tower.blocks[0].attention
        attention.key.weight.copy_(torch.eye(WIDTH))
        attention.query.weight.zero_()
        attention.query.bias.copy_(50 * sought_D)
    text_QT, image_QT = (weight_UQT[3] for weight_UQT in tower.token_attention(tokens).values())
    # Of the text's five tokens and the image's three the seventh is sought.
    assert image_QT[:, 1].min() > 100 * max(text_QT.max(), image_QT[:, [0, 2]].max())


def test_em3_public_attends_to_one_token_a_modality() -> None:
    found = build(preset="em3_public").eval().token_attention(random_tokens(4))
    assert {tuple(weight.shape) for weight in found.values()} == {(4, 2, 1)}
