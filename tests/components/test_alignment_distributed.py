"""The contrastive loss cut over ranks: the same loss and the same gradients after averaging as one process has."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.components.alignment_contract import check_alignment
from tests.components.test_alignment import Recorder
from tests.gang import Gang
from torchrec_em3.components.alignment import distributed
from torchrec_em3.components.alignment.contrast import (
    ContentIdContrast,
    ContrastOptions,
    SampledContrast,
    SampledOptions,
)
from torchrec_em3.components.alignment.distributed import TransportName, global_info_nce
from torchrec_em3.components.alignment.peers import Wants

NUM_ITEMS, TOKEN_DIM, WIDTH = 60, 6, 8
FIRST_ITEM = 2**24  # ids that float32 merges

Shard = dict[int, int]  # count by item


class Case(NamedTuple):
    shards: list[Shard]
    options: ContrastOptions
    dtype: torch.dtype = torch.float64


class Result(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    temperature: float


class Model(nn.Module):
    """Linear encoders of both sides, the ID side behind a table, and the loss under test."""

    def __init__(self, options: ContrastOptions, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(NUM_ITEMS, TOKEN_DIM).requires_grad_(False)
        self.table = nn.Embedding(NUM_ITEMS, TOKEN_DIM)
        self.content, self.id = nn.Linear(TOKEN_DIM, WIDTH), nn.Linear(TOKEN_DIM, WIDTH)
        self.contrast = ContentIdContrast(options, WIDTH, group)

    def forward(self, row_U: Tensor, count_U: Tensor) -> Tensor:
        content_UD, id_UD = self.content(self.tokens(row_U)), self.id(self.table(row_U))
        loss: Tensor = self.contrast(content_UD, id_UD, row_U + FIRST_ITEM, count_U)
        return loss


def build(case: Case, group: dist.ProcessGroup | None) -> Model:
    torch.manual_seed(0)
    return Model(case.options, group).to(case.dtype)


def step(model: nn.Module, shard: Shard) -> Tensor:
    loss: Tensor = model(
        torch.tensor(list(shard), dtype=torch.int64), torch.tensor(list(shard.values()), dtype=torch.int64)
    )
    loss.backward()
    return loss.detach()


def result_of(model: Model, loss: Tensor) -> Result:
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return Result(float(loss), gradients, model.contrast.temperature)


def train_shard(case: Case) -> Result | None:
    """One step on this rank's shard; ranks beyond the shards take no part."""
    group = dist.new_group(list(range(len(case.shards))))
    if dist.get_rank() >= len(case.shards):
        return None
    assert isinstance(group, dist.ProcessGroup)
    model = build(case, group)
    loss = step(model, case.shards[dist.get_rank()])
    for value in (loss, *(parameter.grad for parameter in model.parameters())):
        if value is not None:
            dist.all_reduce(value, group=group)
            value /= len(case.shards)  # DDP's averaging, and that of TorchRec's embedding collectives
    return result_of(model, loss)


def train_whole(case: Case) -> Result:
    """The same step in one process: the items of all shards, each once, with its counts added up."""
    whole: Shard = {}
    for shard in case.shards:
        for row, count in shard.items():
            whole[row] = whole.get(row, 0) + count
    model = build(case, None)
    return result_of(model, step(model, whole))


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    with Gang(4) as gang:  # four processes may take a minute to start on a busy machine
        yield gang


def shard(*rows: int, seed: int = 0) -> Shard:
    return {row: 1 + (row * 7 + seed) % 5 for row in rows}


HALVES = [shard(*range(0, 40, 2)), shard(*range(1, 40, 2))]
SHARED = [shard(*range(25)), shard(*range(15, 45), seed=1)]
UNEVEN = [shard(*range(30, 0, -1)), shard(), shard(3, 50, 41, seed=2)]
FOUR = [shard(3, 7, 50), shard(*range(40)), shard(), shard(*range(30, 57), 3, seed=1)]
OPTIONS = ContrastOptions()

CASES = {
    "halves": Case(HALVES, OPTIONS),
    "items on both ranks": Case(SHARED, OPTIONS),
    "items on both ranks, popularity": Case(SHARED, ContrastOptions(popularity_correction=True)),
    "uneven, one empty": Case(UNEVEN, OPTIONS),
    "four ranks, one empty, shared items": Case(FOUR, ContrastOptions(popularity_correction=True)),
    "first rank empty": Case([shard(), shard(*range(9))], OPTIONS),
    "the same item everywhere": Case([shard(5), shard(5), shard(5)], OPTIONS),
    "one item each": Case([shard(5), shard(6)], OPTIONS),
    "nothing anywhere": Case([shard(), shard()], OPTIONS),
    "stop content": Case(SHARED, ContrastOptions(stop_gradient="content")),
    "stop id": Case(SHARED, ContrastOptions(stop_gradient="id", learn_temperature=False)),
    "above the float32 scale": Case(UNEVEN, ContrastOptions(temperature=0.02, min_temperature=0.01)),
    "float32": Case(UNEVEN, OPTIONS, torch.float32),
    "float32 above the float32 scale": Case(
        SHARED, ContrastOptions(temperature=0.02, min_temperature=0.01), torch.float32
    ),
}


@pytest.mark.parametrize("transport", ["gather", "ring"])
@pytest.mark.parametrize("name", CASES)
def test_shards_equal_the_whole(gang: Gang, name: str, transport: TransportName) -> None:
    case = CASES[name]
    case = case._replace(options=dataclasses.replace(case.options, transport=transport))
    expected, results = train_whole(case), gang.run(train_shard, case)
    assert len(expected.gradients) >= 6, "parameters without a gradient are compared to nothing"
    tolerance = 1e-10 if case.dtype == torch.float64 else 2e-5
    for result in results[: len(case.shards)]:
        assert result.loss == pytest.approx(expected.loss, rel=tolerance)
        assert result.gradients.keys() == expected.gradients.keys()
        largest = max(float(value.abs().max()) for value in expected.gradients.values())
        for key, value in expected.gradients.items():
            torch.testing.assert_close(result.gradients[key], value, rtol=tolerance, atol=tolerance * largest, msg=key)


def test_the_cases_have_something_to_get_wrong() -> None:
    """Losses and gradients are neither zero nor alike where they should not be."""
    losses = {name: train_whole(case).loss for name, case in CASES.items()}
    zero = {"the same item everywhere", "nothing anywhere"}
    assert {name for name, loss in losses.items() if loss == 0} == zero
    assert losses["items on both ranks"] != pytest.approx(losses["items on both ranks, popularity"], rel=1e-3)


class Setting(NamedTuple):
    """How the same 37 rows are computed; only a side that wants a gradient asks for one."""

    tile: int = 64
    transport: TransportName = "gather"
    empty_wants: bool = True
    wants: Wants = Wants(content=True, id=True, scale=True)


def run_rows(setting: Setting) -> list[Any]:
    """Ranks 1 and 3 have no rows and, unless `empty_wants`, tensors that ask for no gradient."""
    rank = dist.get_rank()
    count = [21, 0, 16, 0][rank]
    generator = torch.Generator().manual_seed(0)
    sides = nn.functional.normalize(torch.randn(2, 37, WIDTH, dtype=torch.float64, generator=generator), dim=2)
    start = [0, 21, 21, 37][rank]
    asks = setting.empty_wants or count > 0
    wants = Wants(*(asks and want for want in setting.wants))
    content_UD = sides[0, start : start + count].clone().requires_grad_(wants.content)
    id_UD = sides[1, start : start + count].clone().requires_grad_(wants.id)
    item_U = (torch.arange(start, start + count) * 7) % 30
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=wants.scale)
    loss = global_info_nce(
        content_UD,
        id_UD,
        item_U,
        torch.ones_like(item_U),
        scale,
        group=dist.group.WORLD,
        tile=setting.tile,
        transport=setting.transport,
    )
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), content_UD.grad, id_UD.grad, scale.grad]


@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_tile_size_and_indifferent_empty_ranks_change_nothing(gang: Gang, transport: TransportName) -> None:
    whole = gang.run(run_rows, Setting())
    for setting in (Setting(transport=transport), Setting(5, transport), Setting(5, transport, empty_wants=False)):
        results = gang.run(run_rows, setting)
        for rank in (0, 2):
            for value, expected in zip(results[rank], whole[rank], strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("transport", ["gather", "ring"])
@pytest.mark.parametrize("wanted", [(), ("content",), ("id",), ("scale",)])
def test_gradients_come_where_they_are_wanted(gang: Gang, transport: TransportName, wanted: tuple[str, ...]) -> None:
    whole = gang.run(run_rows, Setting())
    wants = Wants(*(name in wanted for name in Wants._fields))
    results = gang.run(run_rows, Setting(transport=transport, wants=wants))
    for rank in (0, 2):
        loss, *gradients = results[rank]
        torch.testing.assert_close(loss, whole[rank][0], rtol=1e-11, atol=1e-14)
        for want, value, expected in zip(wants, gradients, whole[rank][1:], strict=True):
            assert (value is None) == (not want)
            if want:
                torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-14)


def largest_bytes(transport: TransportName) -> int:
    """Largest tensor that a rank makes when every rank has 64 rows of width 256."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    sides = nn.functional.normalize(torch.randn(2, 64, 256, generator=generator), dim=2)
    content_UD, id_UD = (side.clone().requires_grad_() for side in sides)
    item_U = torch.arange(64) + 64 * dist.get_rank()
    scale = torch.tensor(9.0)
    with Recorder() as recorder:
        loss = global_info_nce(
            content_UD, id_UD, item_U, torch.ones_like(item_U), scale, group=dist.group.WORLD, transport=transport
        )
        loss.backward()  # type: ignore[no-untyped-call]
    return recorder.largest_bytes


def test_the_ring_holds_the_vectors_of_one_rank_at_a_time(gang: Gang) -> None:
    block_bytes = 64 * 256 * 4
    assert max(gang.run(largest_bytes, "ring")) == block_bytes
    assert min(gang.run(largest_bytes, "gather")) == 4 * block_bytes


def chosen(limit_bytes: int) -> str:
    """Name of the transport that `auto` takes for 4 ranks of 3 vectors of 8 numbers."""
    saved, distributed.GATHER_LIMIT_BYTES = distributed.GATHER_LIMIT_BYTES, limit_bytes
    try:
        wants = Wants(content=True, id=True, scale=True)
        peers = distributed.peers_of(torch.arange(3), torch.zeros(3, 8), wants, "auto", dist.group.WORLD)
    finally:
        distributed.GATHER_LIMIT_BYTES = saved
    return type(peers).__name__


def test_auto_gathers_up_to_the_limit_and_takes_the_ring_beyond(gang: Gang) -> None:
    gathered_bytes = 4 * 3 * 8 * (4 + 4)
    assert set(gang.run(chosen, gathered_bytes)) == {"Gather"}
    assert set(gang.run(chosen, gathered_bytes - 1)) == {"Ring"}


def evaluate(kind: str) -> float:
    torch.manual_seed(0)
    loss = ContentIdContrast(OPTIONS, WIDTH) if kind == "global" else SampledContrast(SampledOptions(), WIDTH)
    if dist.get_rank() == 0 and kind == "sampled16":
        check_alignment(loss, WIDTH)  # would hang if it were collective
    rows = torch.arange(4) + 4 * dist.get_rank()
    torch.manual_seed(dist.get_rank())
    sides = torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        return float(loss(sides[0], sides[1], rows, torch.ones_like(rows)))


def test_all_ranks_take_part_by_default_and_sampled16_stays_local(gang: Gang) -> None:
    seen = gang.run(evaluate, "global")
    alone = gang.run(evaluate_local)
    assert sum(seen) / 4 > max(alone), "sixteen items are harder to tell apart than four"
    assert len(set(gang.run(evaluate, "sampled16"))) == 4


def evaluate_local() -> float:
    torch.manual_seed(0)
    group = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    assert isinstance(group, dist.ProcessGroup)
    loss = ContentIdContrast(OPTIONS, WIDTH, group)
    torch.manual_seed(dist.get_rank())
    sides = torch.randn(2, 4, WIDTH)
    return float(loss(sides[0], sides[1], torch.arange(4), torch.ones(4, dtype=torch.int64)).detach())
