"""Every comparator of docs/comparators.md is reached by options alone, trains, and is measured."""

import json
import re
import shlex
from pathlib import Path

import pytest

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from torchrec_em3.cli import run as em3

PAGE = (Path(__file__).parents[2] / "docs" / "comparators.md").read_text(encoding="utf-8")
SMALL = ["--loader.batch_size", "256", "--loader.max_history", "10", "--model.embedding_dim", "8"]


def comparators() -> dict[str, str]:
    """Return the options of each row of the page's first table by the row's name."""
    rows = re.findall(r"^\| ([^|`]+) \| `(--model[^`]*)` \|", PAGE, flags=re.MULTILINE)
    return {name.strip(): options for name, options in rows}


def test_the_page_names_every_comparator_once() -> None:
    options = list(comparators().values())
    assert len(options) == len(set(options)) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("options", comparators().values())
def test_trains_and_is_measured(options: str, tiny_cold_data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(tiny_cold_data), "--run", str(tmp_path), "--train.epochs", "1"]
    assert em3(["train", *arguments, *SMALL, *shlex.split(options)]) == 0
    test = json.loads((tmp_path / "summary.json").read_text())["test"]
    assert 0.0 < test["auc"] < 1.0
    assert list(test["slices"]["user_history"]) == ["0", "1-5", "6-20", "21+"]
    assert sum(part["n"] for part in test["slices"]["user_history"].values()) == test["n"]
