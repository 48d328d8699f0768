"""Similarity features over ragged histories against a plain padded form, and their gradients."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.shared_history import SharedHistorySimilarity
from torchrec_em3.components.similarity import STATISTICS, TIERS, ContentSimilarity

WIDTH = 5
Kind = Literal["statistics", "histogram", "both"]
KINDS: tuple[Kind, ...] = ("statistics", "histogram", "both")


class Histories:
    """Random content of targets and items, of which item 0 is not valid where there are several."""

    def __init__(self, lengths: list[int], num_items: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.content_BD = torch.randn(len(lengths), WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        self.rows_VD = torch.randn(num_items, WIDTH, generator=generator, dtype=torch.float64)
        self.row_N = torch.randint(num_items, (sum(lengths),), generator=generator)
        self.lengths_B = torch.tensor(lengths, dtype=torch.int64)
        self.valid_V = torch.arange(num_items) > 0

    def features(self, kind: Kind) -> Tensor:
        history = HistoryItems(self.rows_VD, self.valid_V)
        return ContentSimilarity(kind).features(self.content_BD, history, self.row_N, self.lengths_B)


def padded(ragged: Histories) -> Tensor:
    """Statistics and histogram from cosines that are padded to the longest history [B, L]."""
    rows, longest = len(ragged.lengths_B), max(ragged.lengths_B.tolist(), default=0)
    item_BL = torch.zeros(rows, longest, dtype=torch.int64)
    for row, items in enumerate(ragged.row_N.split(ragged.lengths_B.tolist())):
        item_BL[row, : len(items)] = items
    inside_BL = torch.arange(longest) < ragged.lengths_B[:, None]
    valid_BL = ragged.valid_V[item_BL] & inside_BL
    cosine_BL = functional.cosine_similarity(ragged.content_BD[:, None], ragged.rows_VD[item_BL], dim=2)
    features = []
    for row in range(rows):
        cosine_L = cosine_BL[row][valid_BL[row]]
        statistics = torch.zeros(STATISTICS, dtype=torch.float64)
        if len(cosine_L):
            share = torch.tensor(len(cosine_L) / int(ragged.lengths_B[row]), dtype=torch.float64)
            statistics = torch.stack([cosine_L.mean(), cosine_L.max(), cosine_L[-1], share])
        counts = torch.histc(cosine_L.detach(), bins=TIERS, min=-1.0, max=1.0)
        features.append(torch.cat([statistics, torch.log(1.0 + counts)]))
    return torch.stack(features) if features else torch.zeros(0, STATISTICS + TIERS, dtype=torch.float64)


def gradient(features_BS: Tensor, ragged: Histories) -> Tensor:
    weight_BS = torch.sin(torch.arange(features_BS.numel(), dtype=torch.float64)).view_as(features_BS)
    return torch.autograd.grad((features_BS * weight_BS).sum() + 0.0 * ragged.content_BD.sum(), ragged.content_BD)[0]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), max_size=5),
    num_items=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_equals_the_padded_form(lengths: list[int], num_items: int, seed: int) -> None:
    """Empty histories, items that are not valid and histories of nothing else occur among the examples."""
    ragged = Histories(lengths, num_items, seed)
    for kind, part in zip(KINDS, (slice(STATISTICS), slice(STATISTICS, None), slice(None)), strict=True):
        found_BS, expected_BS = ragged.features(kind), padded(ragged)[:, part]
        torch.testing.assert_close(found_BS, expected_BS)
        torch.testing.assert_close(gradient(found_BS, ragged), gradient(expected_BS, ragged))


def test_gradient_by_finite_differences() -> None:
    ragged = Histories([3, 0, 2, 4], 5, seed=1)
    history = HistoryItems(ragged.rows_VD, ragged.valid_V)
    features = ContentSimilarity("statistics").features
    assert torch.autograd.gradcheck(
        lambda content_BD: features(content_BD, history, ragged.row_N, ragged.lengths_B), ragged.content_BD
    )


def test_an_item_is_in_the_last_tier_of_itself_and_in_the_first_of_its_opposite() -> None:
    content_1D = torch.randn(1, WIDTH)
    history = HistoryItems(torch.cat([3.0 * content_1D, -content_1D]))
    row_N, lengths_B = torch.tensor([0, 0, 1]), torch.tensor([3])
    count_T = ContentSimilarity("histogram").features(content_1D, history, row_N, lengths_B)[0].expm1()
    assert count_T[-1].item() == pytest.approx(2.0)
    assert count_T[0].item() == pytest.approx(1.0)
    assert not count_T[1:-1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_block_is_as_wide_as_it_says_and_gives_gradients_only_where_it_should(kind: Kind) -> None:
    torch.manual_seed(0)
    similarity = ContentSimilarity(kind)
    content_BD, rows_VD = torch.randn(3, WIDTH, requires_grad=True), torch.randn(4, WIDTH, requires_grad=True)
    content_BD.data[0] = 0.0
    block_BW = similarity(content_BD, HistoryItems(rows_VD), torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1]))
    assert block_BW.shape == (3, ContentSimilarity.width)
    block_BW.square().sum().backward()
    assert rows_VD.grad is None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in similarity.parameters())
    if kind == "histogram":
        assert content_BD.grad is None
    else:
        assert content_BD.grad is not None
        assert torch.isfinite(content_BD.grad).all(), "content of zeros has no direction, and still no NaN"
        assert content_BD.grad[2].any()
        assert not content_BD.grad[1].any(), "its history is empty"


def test_what_an_invalid_item_holds_does_not_matter() -> None:
    ragged = Histories([3, 2, 1], 3, seed=4)
    before_BS = ragged.features("both")
    ragged.rows_VD[0] = torch.nan
    assert torch.equal(ragged.features("both"), before_BS)
    ragged.valid_V[:] = False
    assert not ragged.features("both").any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_serving_form_agrees_for_every_candidate(kind: Kind) -> None:
    """Histories without positions, without valid ones, and with some; several candidates for each."""
    torch.manual_seed(0)
    trained, candidates = ContentSimilarity(kind), 3
    rows_VD, valid_V = torch.randn(6, WIDTH), torch.arange(6) > 1
    histories = [[], [0, 1], [2, 3, 0], [0, 5, 4, 2, 2]]
    length_R = torch.tensor([len(history) for history in histories])
    item_RL = torch.tensor([history + [0] * (5 - len(history)) for history in histories])
    content_RKD = torch.randn(len(histories), candidates, WIDTH)
    shown_RL = torch.arange(5) < length_R[:, None]
    block = SharedHistorySimilarity(trained)(content_RKD, rows_VD[item_RL], shown_RL & valid_V[item_RL], length_R)
    for place in range(candidates):
        row_N = torch.tensor([item for history in histories for item in history])
        expected = trained(content_RKD[:, place], HistoryItems(rows_VD, valid_V), row_N, length_R)
        torch.testing.assert_close(block[:, place], expected)
