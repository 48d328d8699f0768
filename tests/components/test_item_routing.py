from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.distributed.sharding.rw_tensor_pool_sharding import TensorPoolRwSharding
from torchrec.distributed.types import ShardingEnv

from tests.gang import Gang
from torchrec_em3.components.item_draw import draw_items
from torchrec_em3.components.item_routing import Route, owned_rows

ROWS = 11
ASKED = [[0, 3, 4, 7, 10], [], [4, 5, 10]]
"""By rank; rows 0 to 3, 4 to 7 and 8 to 10 belong to one rank each, and the second rank asks for nothing."""
NOTHING_OF_THE_LAST = [[1, 2], [2, 6], [0]]


@pytest.fixture(scope="module")
def three() -> Iterator[Gang]:
    with Gang(3) as gang:
        yield gang


@given(st.integers(1, 300), st.integers(1, 9))
def test_every_row_has_one_owner(item_rows: int, world_size: int) -> None:
    owned = [row for rank in range(world_size) for row in owned_rows(item_rows, rank, world_size)]
    assert owned == list(range(item_rows))


def shard_sizes(item_rows: list[int]) -> list[tuple[int, int]]:
    """Return the rows of this rank's shard of a bank, and those that it owns, for banks of several sizes."""
    group, rank, world_size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    env = ShardingEnv.from_process_group(group)
    return [
        (
            TensorPoolRwSharding(rows, 2, env, torch.device("cpu")).local_pool_size,
            len(owned_rows(rows, rank, world_size)),
        )
        for rows in item_rows
    ]


def test_owners_are_those_of_the_content_bank(three: Gang) -> None:
    for sizes in three.run(shard_sizes, [9, 10, 11, 3883]):
        for held, owned in sizes:
            assert held == owned


def ask_and_return(asked: list[list[int]]) -> dict[str, Any]:
    """Send this rank's items to their owners, double them there, and weigh what comes back by rank."""
    rank = dist.get_rank()
    route = Route(torch.tensor(asked[rank], dtype=torch.int64), ROWS, dist.group.WORLD)
    item_R = route.items()
    value_RD = torch.stack([item_R.float(), torch.ones(len(item_R))], 1).requires_grad_()
    home_UD = route.home(2 * value_RD)
    (home_UD * (rank + 1)).sum().backward()  # type: ignore[no-untyped-call]
    assert value_RD.grad is not None
    return {"items": item_R.tolist(), "home": home_UD[:, 0].tolist(), "gradient": value_RD.grad[:, 0].tolist()}


@pytest.mark.parametrize("asked", [ASKED, NOTHING_OF_THE_LAST])
def test_owners_answer_each_item_once_and_get_the_sum_of_the_gradients(three: Gang, asked: list[list[int]]) -> None:
    found = three.run(ask_and_return, asked)
    for rank, result in enumerate(found):
        wanted = sorted({item for items in asked for item in items} & set(owned_rows(ROWS, rank, 3)))
        assert result["items"] == wanted
        assert result["home"] == [2.0 * item for item in asked[rank]]
        assert result["gradient"] == [
            sum(2.0 * (other + 1) for other, items in enumerate(asked) if item in items) for item in wanted
        ]


def test_a_process_that_works_alone_keeps_its_items() -> None:
    item_U, value_UD = torch.tensor([2, 5]), torch.rand(2, 3)
    route = Route(item_U, ROWS, None)
    assert route.items() is item_U
    assert route.home(value_UD) is value_UD


@settings(max_examples=20)
@given(st.floats(0.05, 0.95), st.integers(1, 2**24), st.integers(0, 2**63))
def test_a_draw_takes_its_share_whatever_the_others_are(share: float, step: int, seed: int) -> None:
    item_U = torch.arange(20_000)
    drawn_U = draw_items(item_U, share, step, seed)
    assert float(drawn_U.float().mean()) == pytest.approx(share, abs=0.02)
    assert torch.equal(draw_items(item_U[5::7], share, step, seed), drawn_U[5::7])


def test_a_draw_depends_on_step_and_seed() -> None:
    item_U = torch.arange(20_000)
    first_U = draw_items(item_U, 0.5, 1, 0)
    for step, seed in ((2, 0), (1, 1)):
        same = float((draw_items(item_U, 0.5, step, seed) == first_U).float().mean())
        assert same == pytest.approx(0.5, abs=0.02)
    assert draw_items(item_U, 1.0, 1, 0).all()
    assert not draw_items(item_U, 0.0, 1, 0).any()
