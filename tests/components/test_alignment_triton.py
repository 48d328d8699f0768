"""The Triton kernels of the contrastive loss, run on the CPU by Triton's interpreter against the float64 restatement.

The interpreter is chosen when triton is imported, so the kernels run in processes of their own.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.components.alignment_contract import check_alignment
from tests.components.test_alignment import assert_near, items_of, reference, solve, unit
from tests.gang import Gang
from torchrec_em3.components.alignment.contrast import ContentIdContrast, ContrastOptions
from torchrec_em3.components.alignment.distributed import TransportName, global_info_nce
from torchrec_em3.components.alignment.info_nce import info_nce

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreters() -> Iterator[Gang]:
    """Two processes whose kernels are interpreted, one NumPy thread each."""
    with pytest.MonkeyPatch.context() as patch, Gang(2, import_anew=True) as gang:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield gang


class Case(NamedTuple):
    scale: float
    dtype: torch.dtype = torch.float32
    num_items: int = 75  # no multiple of the interpreter's tiles, which have 32 rows and 16 columns
    width: int = 20
    repeats: bool = True


def weighted(content: Tensor, id_: Tensor, item: Tensor, scale: Tensor, weight: Tensor, log_q: Tensor) -> Tensor:
    return info_nce(content, id_, item, scale, weight_N=weight, log_q_N=log_q, backend="triton")


def unweighted(content: Tensor, id_: Tensor, item: Tensor, scale: Tensor) -> Tensor:
    return info_nce(content, id_, item, scale, backend="triton")


def weights_of(num_items: int) -> tuple[Tensor, Tensor]:
    """Weights, five of them zero, and logarithms of popularity."""
    weight, log_q = torch.rand(2, num_items, generator=torch.Generator().manual_seed(2))
    weight = weight + 0.1
    weight[: 5 if num_items > 5 else 0] = 0.0
    return weight, log_q


def solve_case(case: Case) -> list[Tensor]:
    sides = unit(case.num_items, case.width, case.dtype)
    return solve(weighted, *sides, items_of(case.num_items, case.repeats), case.scale, *weights_of(case.num_items))


HALF_STEP = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Rounding of slopes and of gradients to the type of the vectors."""


@pytest.mark.parametrize(
    "case",
    [
        Case(0.5),
        Case(14.0),
        Case(14.0, num_items=2, repeats=False),
        Case(14.0, num_items=33, width=16, repeats=False),
        Case(40.0),
        Case(41.0),
        Case(300.0),
        Case(14.0, torch.bfloat16, width=64),
        Case(300.0, torch.bfloat16),
        Case(14.0, torch.float16),
    ],
    ids=lambda case: f"{case.num_items}x{case.width}, scale {case.scale:g}, {case.dtype}",
)
def test_equals_the_reference(interpreters: Gang, case: Case) -> None:
    got, _ = interpreters.run(solve_case, case)
    sides = [side.double() for side in unit(case.num_items, case.width, case.dtype)]
    item = items_of(case.num_items, case.repeats)
    expected = solve(reference, *sides, item, case.scale, *weights_of(case.num_items))
    assert [value.dtype for value in got] == [torch.float32, case.dtype, case.dtype, case.dtype]
    exact = 2e-5 if case.scale > 40 else 3e-6  # float32 holds a logarithm of 300 to 2e-5
    assert_near(got[:1], expected[:1], exact)
    assert_near(got[1:3], expected[1:3], exact + 2 * HALF_STEP[case.dtype])
    # The slope of the scale is what positive and negative pairs leave of each other.
    assert_near(got[3:], expected[3:], 5 * exact + 10 * HALF_STEP[case.dtype])


def solve_edges() -> list[list[Tensor]]:
    return [
        solve(unweighted, *unit(len(item), dtype=torch.float32), torch.tensor(item, dtype=torch.int64), scale)
        for item in ([], [7], [7] * 40)
        for scale in (10.0, 100.0)
    ]


def test_no_two_items_give_exactly_zero(interpreters: Gang) -> None:
    solved, _ = interpreters.run(solve_edges)
    assert [len(values) for values in solved] == [4] * 6
    assert not any(value.any() for values in solved for value in values)


def solve_near_zero() -> list[Tensor]:
    content, _ = unit(40, width=128, dtype=torch.float32)
    return solve(unweighted, content, content, torch.arange(40), 100.0)


def test_a_loss_near_zero_keeps_its_digits(interpreters: Gang) -> None:
    content, _ = unit(40, width=128, dtype=torch.float32)
    got, _ = interpreters.run(solve_near_zero)
    expected = solve(reference, content, content, torch.arange(40), 100.0, torch.ones(40), torch.zeros(40))
    assert expected[0] < 1e-12
    assert_near(got, expected, 5e-5)


def solve_items_that_floats_merge() -> list[Tensor]:
    content, id_ = unit(2, dtype=torch.float32)
    return [info_nce(content, id_, torch.tensor([first, first + 1]), 5.0, backend="triton") for first in (0, 2**53)]


def test_items_that_floats_merge_stay_apart(interpreters: Gang) -> None:
    (small, large), _ = interpreters.run(solve_items_that_floats_merge)
    assert small == large > 0


def solve_in_chunks() -> list[list[Tensor]]:
    """With all rows in one launch of the sums, again the same, and in three launches."""
    from torchrec_em3.components.alignment import triton_grid

    case, usual = Case(41.0), triton_grid.CHUNK_ROWS
    solved = [solve_case(case), solve_case(case)]
    triton_grid.CHUNK_ROWS = 32
    try:
        return [*solved, solve_case(case)]
    finally:
        triton_grid.CHUNK_ROWS = usual


def test_chunks_change_nothing_and_runs_are_equal_bit_by_bit(interpreters: Gang) -> None:
    (first, second, chunked), _ = interpreters.run(solve_in_chunks)
    assert all(torch.equal(*values) for values in zip(first, second, strict=True))
    assert_near(chunked, first, 1e-6)


def solve_where_wanted(wanted: list[bool]) -> list[Tensor | None]:
    inputs = [side.requires_grad_(want) for side, want in zip(unit(40, dtype=torch.float32), wanted, strict=False)]
    scale = torch.tensor(9.0, requires_grad=wanted[2])
    unweighted(*inputs, torch.arange(40), scale).backward()
    return [value.grad for value in (*inputs, scale)]


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_can_be_wanted_alone(interpreters: Gang, wanted: int) -> None:
    got, _ = interpreters.run(solve_where_wanted, [name == wanted for name in range(3)])
    assert [value is not None for value in got] == [name == wanted for name in range(3)]
    expected = solve(reference, *unit(40), torch.arange(40), 9.0, torch.ones(40), torch.zeros(40))[1 + wanted]
    assert_near([got[wanted]], [expected], 1e-5)


def solve_under_autocast() -> list[list[Tensor]]:
    content, id_ = unit(40, dtype=torch.float32)
    item = torch.arange(40)
    with torch.autocast("cpu", torch.bfloat16):
        cast = solve(unweighted, content, id_, item, 9.0)
    return [cast, solve(unweighted, content.bfloat16(), id_.bfloat16(), item, 9.0)]


def test_autocast_takes_products_in_its_type_and_returns_gradients_in_the_inputs(interpreters: Gang) -> None:
    (cast, half), _ = interpreters.run(solve_under_autocast)
    assert [value.dtype for value in cast] == [torch.float32] * 4
    assert cast[0] == half[0]
    assert torch.equal(cast[1].bfloat16(), half[1])


def keep_the_contract() -> None:
    """Both ranks hold the same items, so this is the loss of one process, by way of the collectives."""
    torch.manual_seed(0)
    check_alignment(ContentIdContrast(ContrastOptions(backend="triton"), 16), 16)


@pytest.mark.slow
def test_the_module_keeps_the_contract(interpreters: Gang) -> None:
    interpreters.run(keep_the_contract)


def solve_sharded(transport: TransportName | None) -> list[Tensor]:
    """Rank 1 holds rows 30 to 50, ten of which rank 0 has too; with no transport, each rank alone holds all rows."""
    rank = dist.get_rank()
    rows = torch.arange(50) if transport is None else [torch.arange(40), torch.arange(30, 50)][rank]
    count = 2 + 2 * (rows % 3)
    if transport is not None:
        count[(rows >= 30) & (rows < 40)] //= 2
    content, id_ = (side[rows].requires_grad_() for side in unit(50, dtype=torch.float32))
    loss = global_info_nce(
        content,
        id_,
        rows + 2**24,
        count,
        torch.tensor(9.0),
        popularity_correction=True,
        group=None if transport is None else dist.group.WORLD,
        backend="triton",
        transport=transport or "auto",
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert content.grad is not None
    assert id_.grad is not None
    gradients = torch.zeros(2, 50, 16)
    gradients[:, rows] = torch.stack([content.grad, id_.grad])
    values = [loss.detach(), *gradients]
    for value in values:
        dist.all_reduce(value)
    return [value / 2 for value in values]


@pytest.mark.parametrize("transport", ["gather", "ring"])
def test_shards_equal_the_whole(interpreters: Gang, transport: TransportName) -> None:
    whole, _ = interpreters.run(solve_sharded, None)
    assert whole[0] > 0.01
    for got in interpreters.run(solve_sharded, transport):
        assert_near(got, whole, 1e-5)
