"""The comparison with other libraries: its rows, our loader on them, and the conversation with the workers."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_em3.batch import HISTORY, TARGET
from torchrec_em3.datasets.loader import BatchStream

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES: dict[str, Any] = {"num_batches": 3, "batch_size": 16, "num_users": 100, "num_items": 40, "max_history": 7}
TASK: dict[str, Any] = {"embedding_dim": 8, "hidden": [8], "attention_hidden": [4]}
WORKER = """
from protocol import serve

print("an import says hello", flush=True)

class Fake:
    def __init__(self, rows, task):
        print("a library says hello")
        if not task.hidden:
            raise SystemExit("no widths")
        self.losses = task.options

    def bare(self, steps):
        return self.losses["bare"]

    def full(self, steps):
        return self.losses["full"]

serve(Fake, packages=["numpy"])
"""


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Any:
    """The scripts import each other by bare names, as scripts do."""
    folders = [str(BENCHMARKS / "peers"), str(BENCHMARKS)]
    sys.path[:0] = folders
    yield
    del sys.path[: len(folders)]


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@given(fill=st.floats(0.5, 1.0), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_rows_are_padded_behind_and_filled_as_asked(fill: float, seed: int) -> None:
    rows = script("rows").draw_rows(**SIZES, fill=fill, seed=seed)
    filled = rows.history > 0
    assert (filled == (np.arange(7) < rows.length[:, None])).all()
    assert rows.length.min() >= max(1, round((2 * fill - 1) * 7))
    assert rows.length.max() <= 7
    assert rows.history.max() <= 40
    assert 1 <= rows.item.min() <= rows.item.max() <= 40
    assert len(set(rows.user)) == len(rows.user)
    assert 1 <= rows.user.min() <= rows.user.max() <= 100


def test_more_rows_than_users_are_refused() -> None:
    with pytest.raises(ValueError, match="--num_users 40; lower --batches"):
        script("rows").draw_rows(**SIZES | {"num_users": 40}, fill=1.0)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = script("rows").draw_rows(**SIZES, fill=0.5)
    rows.write(tmp_path / "rows.npz")
    found = script("rows").Rows.read(tmp_path / "rows.npz")
    assert found.num_users == 100
    assert found.batch_size == 16
    for name in ("user", "item", "history", "length", "label"):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))


@pytest.mark.parametrize("fill", [0.5, 1.0])
def test_our_loader_delivers_exactly_these_rows(fill: float) -> None:
    rows = script("rows").draw_rows(**SIZES, fill=fill)
    data = script("ours_worker")._RowData.of(rows, Path("none"), {})
    found = []
    for batch in BatchStream(data, "train", batch_size=16, max_history=7):
        histories = torch.split(batch.sparse[HISTORY].values(), batch.sparse[HISTORY].lengths().tolist())
        columns = batch.sparse["user"].values(), batch.sparse[TARGET].values(), batch.label
        for *row, history in zip(*(column.tolist() for column in columns), histories, strict=True):
            found.append((*row, history.tolist()))
    unpadded = [history[:length].tolist() for history, length in zip(rows.history, rows.length, strict=True)]
    wanted = zip(rows.user.tolist(), rows.item.tolist(), rows.label.tolist(), unpadded, strict=True)
    assert sorted(found) == sorted(wanted)


class TestWorker:
    def start(self, tmp_path: Path, **changes: Any) -> Any:
        turns = script("protocol")
        rows = script("rows").draw_rows(**SIZES, fill=1.0)
        rows.write(tmp_path / "rows.npz")
        (tmp_path / "worker.py").write_text(WORKER)
        task = turns.Task(**TASK | {"folder": str(tmp_path / "own")} | changes)
        env = {"PYTHONPATH": str(BENCHMARKS / "peers")}
        python = Path(sys.executable)
        return turns.Worker("fake", python, tmp_path / "worker.py", tmp_path / "rows.npz", task, env)

    def test_takes_turns_whatever_the_library_prints(self, tmp_path: Path) -> None:
        with self.start(tmp_path, options={"bare": 0.5, "full": 0.25}) as worker:
            assert worker.versions == {"numpy": np.__version__}
            assert worker.turn("bare", 2).loss == 0.5
            turn = worker.turn("full", 2)
        assert turn.loss == 0.25
        assert turn.seconds_per_1k >= 0
        assert 0.01 < turn.peak_gib < 1
        log = (tmp_path / "own" / "worker.log").read_text()
        assert "an import says hello" in log
        assert "a library says hello" in log

    def test_a_loss_that_is_not_finite_is_an_error(self, tmp_path: Path) -> None:
        with (
            self.start(tmp_path, options={"bare": float("nan"), "full": 0.0}) as worker,
            pytest.raises(RuntimeError, match="fake: loss is nan after 2 steps of 'bare'"),
        ):
            worker.turn("bare", 2)

    def test_a_worker_that_dies_is_named_with_its_last_words(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"(?s)fake: .* exit code 1; .*no widths"):
            self.start(tmp_path, hidden=[])
