"""The parts that docs/your-own-parts.md shows keep their contracts and train, as they stand on the page."""

import json
import re
from pathlib import Path

import pytest

from tests.components.alignment_contract import check_alignment
from tests.components.encoder_contract import check_encoder
from tests.components.ranker_contract import BLOCK_DIMS, check_ranker
from tests.components.tower_contract import COUNTS, DIMS, WIDTH, check_tower
from torchrec_em3.cli import run as em3
from torchrec_em3.parts import build_part, load_plugins
from torchrec_em3.registry import ALIGNMENTS, ENCODERS, RANKERS, TOWERS

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-parts.md").read_text(encoding="utf-8")
MODULES = ("towers", "encoders", "rankers", "losses")
PLUGINS = ",".join(f"parts_of_the_page.{name}" for name in MODULES)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's package, under a name that no other test has."""
    shown = dict(re.findall(r"\(in `my_package/(\w+)\.py`\).*?```python\n(.*?)```", PAGE, re.DOTALL))
    assert set(shown) == set(MODULES)
    folder = tmp_path / "parts_of_the_page"
    folder.mkdir()
    for name, source in shown.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugins(PLUGINS)


def test_the_parts_keep_their_contracts() -> None:
    check_tower(build_part(TOWERS, "mean", {}, DIMS, COUNTS, WIDTH))
    check_encoder(build_part(ENCODERS, "hashed_words", {}), ["a mug", "another, larger mug", "jam"])
    for num_tasks in (1, 2):
        check_ranker(build_part(RANKERS, "wide_deep", {"hidden": 8}, BLOCK_DIMS, num_tasks), num_tasks)
    check_alignment(build_part(ALIGNMENTS, "margin", {}, 16), width=16)


def test_the_parts_train_together(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    prepare = ["prepare", "simulated", "--out", str(data), "--plugins", PLUGINS]
    prepare += ["--text_encoder", "hashed_words", "--image_encoder", "none", "--catalogue.num_items", "60"]
    assert em3([*prepare, "--catalogue.num_users", "40", "--catalogue.num_interactions", "1500"]) == 0
    train = ["train", "--data", str(data), "--run", str(run), "--plugins", PLUGINS, "--train.epochs", "1"]
    train += ["--model.content", "mean", "--model.ranker", "wide_deep", "--model.alignment", "margin"]
    assert em3([*train, "--loader.batch_size", "256", "--model.embedding_dim", "8", "--train.log_every", "1"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "train"]
    assert steps
    assert all(line["alignment_loss"] > 0 for line in steps)
