"""Embeddings of codes against a loop over items and levels, and what towers make of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_em3.batch import ItemCodes, ModalityTokens
from torchrec_em3.components.code_embedding import CodeEmbedding
from torchrec_em3.parts import build_part, load_builtin_parts
from torchrec_em3.registry import TOWERS

WIDTH = 8


def random_codes(items: int, levels: int, size: int, seed: int) -> ItemCodes:
    """Return codes of which about a third of the items has none."""
    generator = torch.Generator().manual_seed(seed)
    present_U = torch.rand(items, generator=generator) < 0.7
    codes_UL = torch.randint(0, size, (items, levels), generator=generator)
    return ItemCodes(torch.where(present_U[:, None], codes_UL, 0), present_U)


def plain_rows(embedding: CodeEmbedding, codes: ItemCodes, size: int) -> list[list[Tensor]]:
    """Return the row of each item and level, from one table a level."""
    tables = embedding.weight.detach().split(size)
    return [[tables[level][code] for level, code in enumerate(item)] for item in codes.codes_UL.tolist()]


@settings(max_examples=25, deadline=None)
@given(items=st.integers(0, 9), levels=st.integers(1, 4), size=st.integers(1, 5), seed=st.integers(0, 99))
def test_tokens_and_sums_equal_a_plain_look_up(items: int, levels: int, size: int, seed: int) -> None:
    embedding, codes = CodeEmbedding(levels, size, WIDTH), random_codes(items, levels, size, seed)
    tokens_ULD, valid_UL = embedding(codes)
    sum_UD = embedding.pooled(codes)
    assert tokens_ULD.shape == (items, levels, WIDTH)
    assert sum_UD.shape == (items, WIDTH)
    for item, rows in enumerate(plain_rows(embedding, codes, size)):
        assert valid_UL[item].tolist() == [bool(codes.present_U[item])] * levels
        assert torch.equal(tokens_ULD[item], torch.stack(rows))
        expected_D = torch.stack(rows).sum(0) * codes.present_U[item]
        torch.testing.assert_close(sum_UD[item], expected_D, rtol=1e-5, atol=1e-7)


def test_only_codes_that_are_there_get_a_gradient_and_no_step_leaves_the_table_out() -> None:
    codes = ItemCodes(torch.tensor([[1, 2], [0, 0]]), torch.tensor([True, False]))
    embedding = CodeEmbedding(2, 3, WIDTH)
    embedding.pooled(codes).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 5]
    for read in (embedding.pooled, lambda none: embedding(none).tokens_UTD):
        embedding.weight.grad = None
        read(ItemCodes(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))).sum().backward()
        assert embedding.weight.grad is not None, "DistributedDataParallel waits for every gradient"


@pytest.mark.parametrize("tower", ["fusion_qformer", "concat"])
def test_towers_read_codes_as_any_modality(tower: str) -> None:
    """An item without codes is seen by its other tokens alone; with them, by its codes and in their order."""
    load_builtin_parts()
    torch.manual_seed(0)
    built = build_part(TOWERS, tower, {}, {"text": 5, "quant": WIDTH}, {"text": 2, "quant": 3}, WIDTH)
    embedding = CodeEmbedding(3, 4, WIDTH)
    text = ModalityTokens(torch.ones(3, 2, 5), torch.ones(3, 2, dtype=torch.bool))
    codes = ItemCodes(torch.tensor([[1, 2, 3], [3, 2, 1], [0, 0, 0]]), torch.tensor([True, True, False]))

    def content() -> Tensor:
        with torch.no_grad():
            found: Tensor = built({"text": text, "quant": embedding(codes)})
        return found

    before_UD = content()
    assert not torch.allclose(before_UD[0], before_UD[1])
    with torch.no_grad():
        embedding.weight.add_(torch.randn_like(embedding.weight))
    changed_U = ~torch.isclose(content(), before_UD).all(1)
    assert changed_U.tolist() == [True, True, False]
