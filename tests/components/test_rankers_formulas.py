"""Each ranker's logits against its formula, written out over the ranker's own weights."""

import itertools

import torch
from torch import Tensor, nn

from tests.components.ranker_contract import BLOCK_DIMS, random_blocks
from torchrec_em3.components.rankers.dcn_v2 import DcnV2Ranker, DcnV2RankerOptions
from torchrec_em3.components.rankers.deepfm import DeepFMRanker, DeepFMRankerOptions
from torchrec_em3.components.rankers.din import DinRanker, DinRankerOptions
from torchrec_em3.components.rankers.dlrm import DlrmRanker, DlrmRankerOptions
from torchrec_em3.components.rankers.mmoe import MmoeRanker, MmoeRankerOptions

BLOCKS = random_blocks(3)
INPUTS = torch.cat(list(BLOCKS.values()), dim=1)


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def through(layers: list[nn.Linear], hidden: Tensor) -> Tensor:
    """Linear layers with a ReLU between them."""
    for layer in layers[:-1]:
        hidden = (hidden @ layer.weight.T + layer.bias).clamp_min(0)
    return hidden @ layers[-1].weight.T + layers[-1].bias


def pairwise(vectors: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum(1) for a, b in itertools.combinations(vectors, 2)], dim=1)


def test_din_reads_the_blocks_and_the_dot_products_of_equal_widths() -> None:
    ranker = DinRanker(DinRankerOptions(hidden=(6,)), BLOCK_DIMS)
    products = pairwise([BLOCKS["target"], BLOCKS["interest"], BLOCKS["content"]]) / 2
    logit = through(linears(ranker.mlp), torch.cat([INPUTS, products], dim=1))
    torch.testing.assert_close(ranker(BLOCKS), logit[:, 0])


def test_din_without_two_blocks_of_equal_width_is_an_mlp() -> None:
    ranker = DinRanker(DinRankerOptions(), {"user": 6})
    torch.testing.assert_close(ranker(BLOCKS), through(linears(ranker.mlp), BLOCKS["user"])[:, 0])


def test_dcn_v2_is_a_cross_network_beside_an_mlp() -> None:
    ranker = DcnV2Ranker(DcnV2RankerOptions(cross_layers=2, rank=3, hidden=(6, 5)), BLOCK_DIMS)
    crossed = INPUTS
    for down, up, bias in zip(ranker.cross.V_kernels, ranker.cross.W_kernels, ranker.cross.bias, strict=True):
        nn.init.normal_(bias)
        crossed = INPUTS * (crossed @ down.T @ up.T + bias) + crossed
    logit = crossed @ ranker.cross_logit.weight.T + through(linears(ranker.mlp), INPUTS)
    torch.testing.assert_close(ranker(BLOCKS), logit[:, 0])


def test_dlrm_reads_the_bottom_vector_and_the_dot_products_with_it() -> None:
    ranker = DlrmRanker(DlrmRankerOptions(bottom=(6,), top=(5,)), BLOCK_DIMS)
    dense = torch.cat([BLOCKS["user"], BLOCKS["context"]], dim=1)
    bottom = through(linears(ranker.bottom), dense).clamp_min(0)
    products = pairwise([bottom, BLOCKS["target"], BLOCKS["interest"], BLOCKS["content"]])
    logit = through(linears(ranker.top), torch.cat([bottom, products], dim=1))
    torch.testing.assert_close(ranker(BLOCKS), logit[:, 0])


def test_dlrm_sends_the_first_block_through_the_bottom() -> None:
    ranker = DlrmRanker(DlrmRankerOptions(), {"target": 4, "interest": 4, "content": 4})
    bottom = through(linears(ranker.bottom), BLOCKS["target"]).clamp_min(0)
    products = pairwise([bottom, BLOCKS["interest"], BLOCKS["content"]])
    logit = through(linears(ranker.top), torch.cat([bottom, products], dim=1))
    torch.testing.assert_close(ranker(BLOCKS), logit[:, 0])


def test_as_many_dense_features_as_an_embedding_is_wide_are_no_embedding() -> None:
    dims = {"user": 4, "target": 4, "interest": 4, "context": 4}
    dlrm = DlrmRanker(DlrmRankerOptions(), dims)
    assert (dlrm.dense, dlrm.sparse) == (["user", "context"], ["target", "interest"])
    assert list(DeepFMRanker(DeepFMRankerOptions(), dims).embed) == ["context"]
    assert DinRanker(DinRankerOptions(), dims).blocks.groups == [["user", "target", "interest"]]


def test_deepfm_is_first_order_dot_products_and_an_mlp() -> None:
    ranker = DeepFMRanker(DeepFMRankerOptions(hidden=(6, 5)), BLOCK_DIMS)
    mapped = {name: BLOCKS[name] @ layer.weight.T for name, layer in ranker.embed.items()}
    assert list(mapped) == ["user", "context"]
    second_order = pairwise(list((BLOCKS | mapped).values())).sum(1, keepdim=True) / 2
    logit = INPUTS @ ranker.first_order.weight.T + second_order + through(linears(ranker.mlp), INPUTS)
    torch.testing.assert_close(ranker(BLOCKS), logit[:, 0])


def test_deepfms_tasks_share_the_dot_products_alone() -> None:
    ranker = DeepFMRanker(DeepFMRankerOptions(hidden=(6, 5)), BLOCK_DIMS, num_tasks=2)
    mapped = {name: BLOCKS[name] @ layer.weight.T for name, layer in ranker.embed.items()}
    second_order = pairwise(list((BLOCKS | mapped).values())).sum(1, keepdim=True) / 2
    logits = INPUTS @ ranker.first_order.weight.T + second_order + through(linears(ranker.mlp), INPUTS)
    torch.testing.assert_close(ranker(BLOCKS), logits)


def test_mmoe_mixes_the_experts_by_each_tasks_gate_under_its_tower() -> None:
    ranker = MmoeRanker(MmoeRankerOptions(num_experts=3, expert=(6, 5), tower=(4,)), BLOCK_DIMS, num_tasks=2)
    products = pairwise([BLOCKS["target"], BLOCKS["interest"], BLOCKS["content"]]) / 2
    inputs = torch.cat([INPUTS, products], dim=1)
    experts = torch.stack([through(linears(expert), inputs).clamp_min(0) for expert in ranker.experts])
    for task, (gate, tower) in enumerate(zip(ranker.gates.weight.view(2, 3, -1), ranker.towers, strict=True)):
        share = torch.softmax(inputs @ gate.T, dim=1)
        mixed = torch.einsum("be,ebh->bh", share, experts)
        torch.testing.assert_close(ranker(BLOCKS)[:, task], through(linears(tower), mixed)[:, 0])
