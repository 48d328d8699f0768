"""Tiny runs and packages for the tests of export, scoring and serving."""

from pathlib import Path

from torchrec_em3.cli import run as em3

SMALL = ["--loader.batch_size", "128", "--loader.max_history", "10", "--model.embedding_dim", "8"]


def train(data: Path, run: Path, *options: str) -> Path:
    """Train one epoch and return the run folder."""
    assert em3(["train", "--data", str(data), "--run", str(run), "--train.epochs", "1", *SMALL, *options]) == 0
    return run


def export(run: Path, out: Path, precision: str) -> Path:
    """Export a run and return the package."""
    assert em3(["export", str(run), "--out", str(out), "--precision", precision]) == 0
    return out
