"""Managed and hashed ids in one process: who has which row, and row 0 for "unknown"."""

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from torchrec_em3.components.embeddings import ItemEmbedding, UserEmbedding
from torchrec_em3.components.managed_ids import ManagedIds, hashed_rows
from torchrec_em3.errors import CheckpointError
from torchrec_em3.schema import FeatureSchema, IdSpec, SparseFeature

EVICTIONS = ("lfu", "lru", "distance_lfu")
CPU = torch.device("cpu")


def ids_of(eviction: str, rows: int = 4) -> ManagedIds:
    """A map of its own, as one shard of a sharded table has it."""
    spec = IdSpec("managed", rows, eviction)  # type: ignore[arg-type]
    schema = FeatureSchema(user_features=(SparseFeature("user", 1),), item_rows=9, known_items=8, item_ids=spec)
    items = ItemEmbedding(schema, 4, CPU, raw_ids=torch.arange(9) * 10)
    (ids,) = (module for module in items.modules() if isinstance(module, ManagedIds))
    return ids


def step(ids: ManagedIds, values: list[int]) -> list[int]:
    """One training step; returns the rows."""
    feature = JaggedTensor(torch.tensor(values, dtype=torch.int64), lengths=torch.ones(len(values), dtype=torch.int64))
    rows: Tensor = ids({"item_table": feature})["item_table"].values()
    return rows.tolist()


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_new_ids_get_rows_and_unknown_none(eviction: str) -> None:
    ids = ids_of(eviction)
    first = step(ids, [0, 70, 50, 70])
    assert first[0] == 0
    assert first[1] == first[3]
    assert len({*first}) == 3
    (again, last) = step(ids, [50, 60])
    assert again == first[2]
    assert {0, first[1], again, last} == {0, 1, 2, 3}
    ids.eval()
    assert step(ids, [70, 50, 60, 80, 0]) == [first[1], again, last, 0, 0], "evaluation gives out no rows"


def test_the_id_not_seen_for_longest_loses_its_row() -> None:
    ids = ids_of("lru")
    (_, row, _) = step(ids, [10, 20, 30])
    step(ids, [10, 30])
    assert ids.evict() is not None
    assert step(ids, [40, 10]) == [row, step(ids.eval(), [10])[0]]
    assert ids.evict().tolist() == [row]  # type: ignore[union-attr]
    assert step(ids, [20]) == [0]


def test_the_rarest_id_loses_its_row_to_one_that_is_more_frequent() -> None:
    ids = ids_of("lfu")
    (_, _, row) = step(ids, [10, 20, 30])
    step(ids, [10, 20])
    assert step(ids, [40]) == [0], "once is not more often than the rarest"
    assert step(ids, [40, 40]) == [row, row]
    assert step(ids, [30]) == [0]


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_the_map_is_deterministic_and_steps_of_any_size_are_counted_whole(eviction: str) -> None:
    """TorchRec sizes its buffer after the first step; a resumed run's first step is another one."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randint(0, 60, (size,), generator=generator).tolist() for size in (1, 40, 0, 7, 25)]
    one, other = ids_of(eviction, 16), ids_of(eviction, 16)
    for values in steps[:2]:
        assert step(one, values) == step(other, values)
    resumed = ids_of(eviction, 16)
    resumed.load_state_dict({name: value.clone() for name, value in other.state_dict().items()})
    for values in steps[2:]:
        assert step(one, values) == step(resumed, values)
    for name, value in one.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["hashed", "managed"])
def test_unknown_items_and_users_share_row_zero(kind: str) -> None:
    spec = IdSpec(kind, 6)  # type: ignore[arg-type]
    features = (SparseFeature("user", 3), SparseFeature("age", 3))
    schema = FeatureSchema(user_features=features, item_rows=9, known_items=3, user_ids=spec, item_ids=spec)
    raw = torch.arange(9) * 1001
    items = ItemEmbedding(schema, 4, CPU, raw_ids=raw).train()
    (table,) = items.parameters()
    found = items(torch.tensor([0, 2, 7]), torch.tensor([0, 2]))
    assert torch.equal(found.unknown_D, table[0])
    assert torch.equal(found.target_UD[0], table[0])
    assert found.known_U.tolist() == [False, True, True]
    assert torch.equal(found.history_VD, found.target_UD[:2])
    items.eval()
    unseen = items(torch.tensor([5]), torch.tensor([5]))
    assert unseen.known_U.tolist() == [kind == "hashed"]
    assert (kind == "hashed") != torch.equal(unseen.target_UD[0], table[0])
    catalogue = torch.arange(9)
    row_N = items.train().table_rows(catalogue)
    assert catalogue[row_N == 0].tolist() == ([0] if kind == "hashed" else [0, 1, 3, 4, 5, 6, 8])
    assert torch.equal(table[row_N], items.eval()(catalogue, catalogue).target_UD)
    assert items.num_parameters == table.numel() == 24
    assert UserEmbedding(schema, 4, CPU).num_parameters == 4 * (6 + 3)


def test_hashed_rows_leave_row_zero_to_unknown() -> None:
    row = hashed_rows(torch.tensor([0, 4, 5, 2**63 - 2]), 5)
    assert row.tolist() == [0, 1, 2, 3]


def test_shards_are_joined_but_never_split() -> None:
    whole = ids_of("lfu", 8)
    half = whole.rebuild_with_output_id_range((4, 8), [0, 4, 8])
    assert step(half, [3, 0]) == [half.remap(_one(3))["item_table"].values().item(), 4], "unknown has its first row"
    state = half.state_dict() | {"_output_segments_tensor": whole.state_dict()["_output_segments_tensor"]}
    with pytest.raises(CheckpointError, match="saved in 1 shards and cannot be split into other ones; use 1 ranks"):
        half.load_state_dict(state)
    other = whole.rebuild_with_output_id_range((0, 4), [0, 4, 8])
    rows = step(other, [1, 2])
    parts = {name: [part.state_dict()[name] for part in (other, half)] for name in ids_names(whole)}
    joined = {name: torch.cat(values) for name, values in parts.items()}
    whole.load_state_dict(other.state_dict() | joined)
    assert step(whole.eval(), [1, 2, 0, 9]) == [*rows, 0, 0]
    assert step(whole.train(), [3, 4, 5, 6, 7])[0] == step(half.eval(), [3])[0]
    taken = step(whole.eval(), [1, 2, 3, 4, 5, 6, 7])
    assert sorted(taken) == list(range(1, 8)), "the first row of the second shard is a row like others"


def _one(value: int) -> dict[str, JaggedTensor]:
    return {"item_table": JaggedTensor(torch.tensor([value]), lengths=torch.ones(1, dtype=torch.int64))}


def ids_names(ids: ManagedIds) -> list[str]:
    """Names of what a shard has for each of its rows."""
    return [name for name, value in ids.state_dict().items() if len(value) == ids.output_size()]
