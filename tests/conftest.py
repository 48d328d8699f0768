"""Shared fixtures: one tiny simulated data set, prepared once per test session."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from torchrec_em3.datasets.prepare import PrepareOptions, prepare
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.simulated import SimulatedOptions, simulate

# One thread each, also in processes that tests start: sums in another order would differ in the last bit.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def prepare_tiny(
    folder: Path, split: str = "temporal", change: Callable[[RawDataset], RawDataset] = lambda raw: raw
) -> Path:
    raw = simulate(SimulatedOptions(num_items=150, num_users=60, num_interactions=3000, seed=0), folder / "raw")
    options = PrepareOptions(split=split, text_encoder="tiny_text", image_encoder="tiny_image", label_threshold=None)
    prepare(change(raw), folder / split, options)
    return folder / split


def with_two_tasks(raw: RawDataset) -> RawDataset:
    likely = raw.probability > np.median(raw.probability)
    return replace(raw, labels={"click": raw.rating, "like": raw.rating * likely})


def with_features(raw: RawDataset) -> RawDataset:
    random = np.random.default_rng(0)
    hint = 100.0 * raw.rating + random.normal(0.0, 60.0, len(raw.rating))
    hint[::20] = np.nan
    mood = np.where(random.random(len(hint)) < 0.8, np.where(raw.rating == 1, "good", "bad"), "")
    device = np.array(["phone", "desk", "watch"])[random.integers(3, size=len(hint))]
    dense, sparse = {"hint": hint, "noise": random.random(len(hint))}, {"mood": mood, "device": device}
    return replace(raw, dense=dense, sparse=sparse)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folder: 60 users, 150 items, 3,000 events, split by time."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_cold_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with split cold_items."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny_cold"), "cold_items")


@pytest.fixture(scope="session")
def tiny_tasks_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same events with two labels: the click, and a like, a click where one was likelier than usual."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny_tasks"), change=with_two_tasks)


@pytest.fixture(scope="session")
def tiny_features_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same events, with a number and a category that half give the label away, and noise of each kind."""
    return prepare_tiny(tmp_path_factory.mktemp("tiny_features"), change=with_features)
