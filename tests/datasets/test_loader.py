"""The loader: order, sharding by rank, resume, histories, filling up."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_em3.batch import HISTORY, TARGET, Batch
from torchrec_em3.datasets.loader import BatchStream, batch_loader
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import DataError


def stream(folder: Path, split: str = "train", batch_size: int = 64, **options: int) -> BatchStream:
    data = PreparedData.open(folder)
    return BatchStream(data, split, batch_size=batch_size, max_history=options.pop("max_history", 10), **options)


def rows(batches: Iterable[Batch]) -> list[tuple[int, int, float, tuple[int, ...]]]:
    """Everything that identifies a row, in order."""
    found = []
    for batch in batches:
        histories = torch.split(batch.sparse[HISTORY].values(), batch.sparse[HISTORY].lengths().tolist())
        items = batch.sparse[TARGET].values().tolist()
        for user, item, label, weight, history in zip(
            batch.user.tolist(), items, batch.label.tolist(), batch.weight.tolist(), histories, strict=True
        ):
            if weight:
                found.append((user, item, label, tuple(history.tolist())))
    return found


def test_histories_are_the_users_strictly_earlier_events(tiny_data: Path) -> None:
    data = PreparedData.open(tiny_data)
    events: dict[int, list[tuple[int, int]]] = {}
    columns = [data.split_rows(split) for split in ("train", "validation", "test")]
    for part in columns:
        for user, item, time in zip(part["user"], part["item"], part["timestamp"], strict=True):
            events.setdefault(int(user), []).append((int(time), int(item)))
    for split, part in zip(("validation", "test"), columns[1:], strict=True):
        for (user, _, _, history), time in zip(rows(stream(tiny_data, split)), part["timestamp"], strict=True):
            earlier = [item for when, item in sorted(events[user], key=lambda event: event[0]) if when < time]
            assert history == tuple(earlier[-10:])


def test_evaluation_yields_every_row_once_in_time_order_for_any_number_of_ranks(tiny_data: Path) -> None:
    alone = rows(stream(tiny_data, "test"))
    assert len(alone) == PreparedData.open(tiny_data).meta["counts"]["test"]
    ranks = [list(stream(tiny_data, "test", batch_size=30, rank=rank, world_size=3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1, "every rank must take part in every step"
    assert [row for step in zip(*ranks, strict=True) for row in rows(step)] == alone


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 40), (7, 11), (8, 11), (16, 5)])
def test_a_weighted_mean_over_ranks_is_that_of_the_rows_without_filler(
    tiny_data: Path, world_size: int, batch_size: int
) -> None:
    ranks = [
        list(stream(tiny_data, "test", batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    fill = 0
    for step in zip(*ranks, strict=True):
        real = torch.cat([batch.label[batch.weight > 0] for batch in step])
        means = [(batch.label * batch.weight).mean() for batch in step]
        assert float(sum(means) / world_size) == pytest.approx(float(real.mean()))
        fill += sum(len(batch) for batch in step) - len(real)
    assert fill > 0 or world_size == 1


def test_training_order_does_not_depend_on_the_number_of_ranks(tiny_data: Path) -> None:
    alone = rows(stream(tiny_data, batch_size=64, seed=3))
    pair = [list(stream(tiny_data, batch_size=32, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    assert [row for step in zip(*pair, strict=True) for row in rows(step)] == alone


def test_epochs_and_seeds_shuffle_differently(tiny_data: Path) -> None:
    source = stream(tiny_data, seed=0)
    first = rows(source)
    source.seek(1)
    second = rows(source)
    assert first != second
    assert rows(stream(tiny_data, seed=1)) != first
    assert rows(stream(tiny_data, seed=0)) == first


@settings(max_examples=10, deadline=None)
@given(done=st.integers(0, 30), world=st.integers(1, 3))
def test_an_epoch_continued_at_another_number_of_ranks_loses_and_doubles_nothing(
    tiny_data: Path, done: int, world: int
) -> None:
    whole = rows(stream(tiny_data, batch_size=1))
    position = done * 64
    rest: list[list[Batch]] = []
    for rank in range(world):
        source = stream(tiny_data, batch_size=16, rank=rank, world_size=world)
        source.seek(0, position)
        rest.append(list(source))
    continued = [row for step in zip(*rest, strict=True) for row in rows(step)]
    assert continued == whole[position : position + len(continued)]
    assert len(whole) - position - len(continued) < 16 * world


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stateful_loader_resumes_in_mid_epoch(tiny_data: Path, num_workers: int) -> None:
    whole = list(batch_loader(stream(tiny_data), num_workers))
    loader = batch_loader(stream(tiny_data), num_workers)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    resumed = batch_loader(stream(tiny_data), num_workers)
    resumed.load_state_dict(loader.state_dict())
    assert rows(resumed) == rows(whole[5:])


def test_items_kept_out_of_training_are_kept_out_of_its_histories(tiny_cold_data: Path) -> None:
    data = PreparedData.open(tiny_cold_data)
    train = rows(stream(tiny_cold_data, max_history=50))
    assert max(item for _, item, _, _ in train) <= data.known_items
    assert max(item for _, _, _, history in train for item in history) <= data.known_items
    cold_in_test = [item for _, _, _, history in rows(stream(tiny_cold_data, "test")) for item in history]
    assert max(cold_in_test) > data.known_items, (
        "at test time they are known by their content and do belong in histories"
    )


def test_new_users_share_row_zero(tiny_data: Path) -> None:
    data = PreparedData.open(tiny_data)
    for batch in stream(tiny_data, "test"):
        row_B = batch.sparse["user"].values()
        assert torch.equal(row_B, torch.where(batch.user <= data.known_users, batch.user, 0))


def test_a_training_split_smaller_than_a_step_is_refused(tiny_data: Path) -> None:
    with pytest.raises(DataError, match=r"fewer than one step of 10000; lower --loader.batch_size"):
        stream(tiny_data, batch_size=10_000)


def test_labels_are_zero_and_one(tiny_data: Path) -> None:
    labels = np.array([label for _, _, label, _ in rows(stream(tiny_data))])
    assert set(labels) == {0.0, 1.0}
