"""What every history content must do, built-in or a user's: `check_history` asserts all of it.

from tests.components.history_contract import WIDTH, check_history, small_tower

def test_mine() -> None:
    tower = small_tower()
    check_history(MyHistory(MyOptions(), tower, WIDTH), tower)

Shape letters: V distinct history items, D width of the model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.components.tower_contract import COUNTS, DIMS, WIDTH, random_tokens
from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.towers.qformer import FusionQFormer, FusionQFormerOptions

__all__ = ["WIDTH", "FakeSource", "check_history", "small_tower", "valid_content"]


class FakeSource:
    """V history items whose bank rows are what `tower` makes of their tokens; every third was never written."""

    def __init__(self, tower: nn.Module, num_items: int, bank: bool = True) -> None:
        self._tokens = random_tokens(num_items)
        self._bank = bank
        self.written_V = torch.arange(num_items) % 3 != 1
        self.rows_VD = tower(self._tokens).detach()
        self.rows_VD[~self.written_V] = torch.nan

    def bank_rows(self) -> tuple[Tensor, Tensor]:
        assert self._bank, "the bank is read by a history content that says uses_bank = False"
        return self.rows_VD, self.written_V

    def tokens(self) -> Mapping[str, ModalityTokens]:
        return self._tokens


def small_tower() -> FusionQFormer:
    """Return the tower that the history contents under test are built for."""
    torch.manual_seed(0)
    return FusionQFormer(FusionQFormerOptions(num_heads=2, num_queries=2), DIMS, COUNTS, WIDTH)


def valid_content(items: HistoryItems) -> Tensor:
    """Return the items' vectors [V, D] as an attention sees them: whatever invalid rows hold does not count."""
    assert items.valid_V is not None
    return items._replace(rows_VD=items.rows_VD.masked_fill(~items.valid_V[:, None], 0.0)).content()


def check_history(history: nn.Module, tower: nn.Module) -> None:
    """Assert that `history` keeps the contract of `interfaces.HistoryContent`."""
    assert type(history).uses_bank in (True, False), "uses_bank must be a class attribute"
    projection = nn.Linear(WIDTH, WIDTH)
    for num_items in (0, 1, 10):
        source = FakeSource(tower, num_items, history.uses_bank)
        items = history(source, tower, projection)
        content_VD, valid_V = valid_content(items), items.valid_V
        assert content_VD.shape == (num_items, WIDTH)
        assert valid_V.shape == (num_items,)
        assert valid_V.dtype == torch.bool
        assert torch.isfinite(content_VD).all()
        if history.uses_bank:
            assert torch.equal(valid_V, source.written_V)
        else:
            assert torch.equal(valid_V, torch.arange(num_items) != 2), "an item without any token must not be valid"
    trained = {name: parameter for name, parameter in history.named_parameters() if parameter.requires_grad}
    if not trained:
        return
    content_VD[valid_V].square().sum().backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
