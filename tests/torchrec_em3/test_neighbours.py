"""`em3 neighbours`: which item is meant, and who is near it, against a plain computation."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.tiny_parts  # noqa: F401  registers the tiny encoders
from torchrec_em3.cli import run as em3
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import ConfigError
from torchrec_em3.item_embeddings import ItemEmbeddings
from torchrec_em3.neighbours import find_items, nearest_items


def items_of(titles: list[str], seed: int = 0) -> ItemEmbeddings:
    random = np.random.default_rng(seed)
    vectors = {name: random.standard_normal((len(titles), 4)).astype(np.float32) for name in ("content", "id")}
    known, present = (random.random(len(titles)) < 0.7 for _ in range(2))
    return ItemEmbeddings([f"i{place}" for place in range(len(titles))], titles, known, present, vectors, {})


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ("i2", [2]),
        ("toy story (1995)", [0]),
        ("Toy Story", [0, 1]),
        ("ALIEN", [2]),  # a whole title stands above those that contain it
        ("alien", [2]),
        ("liens", [3]),
        ("i1", [1]),
    ],
)
def test_an_item_is_found_by_id_title_or_part_of_it(wanted: str, places: list[int]) -> None:
    items = items_of(["Toy Story (1995)", "Toy Story 2 (1999)", "Alien", "Aliens", ""])
    assert find_items(items, wanted) == places


def test_an_unknown_item_is_refused_with_the_nearest_title() -> None:
    items = items_of(["Toy Story (1995)", ""])
    with pytest.raises(
        ConfigError, match=r"no item has the id 'Toy Stroy \(1995\)'.*Did you mean 'Toy Story \(1995\)'"
    ):
        find_items(items, "Toy Stroy (1995)")
    with pytest.raises(ConfigError, match="no item has the id ''"):
        find_items(items, "")


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 30),
    top=st.integers(1, 40),
    space=st.sampled_from(["content", "id"]),
)
def test_the_nearest_are_nearest_by_cosine(seed: int, count: int, top: int, space: str) -> None:
    items = items_of([""] * count, seed)
    valid, vectors = items.valid(space), items.vectors[space].astype(np.float64)
    for item in range(count):
        near = nearest_items(items, item, space, top)
        assert (near is None) == (not valid[item])
        if near is None:
            continue
        others = [other for other in np.flatnonzero(valid) if other != item]
        cosine = {
            int(other): vectors[other] @ vectors[item] / np.linalg.norm(vectors[other]) / np.linalg.norm(vectors[item])
            for other in others
        }
        assert len(near) == min(top, len(others))
        assert [n.similarity for n in near] == pytest.approx(sorted(cosine.values(), reverse=True)[:top], abs=1e-5)
        assert [cosine[n.item] for n in near] == pytest.approx([n.similarity for n in near], abs=1e-5)


@pytest.fixture(scope="module")
def trained(tiny_cold_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("neighbours") / "run"
    small = ["--loader.batch_size", "256", "--model.embedding_dim", "8", "--train.epochs", "1"]
    assert em3(["train", "--data", str(tiny_cold_data), "--run", str(run), *small]) == 0
    return run


def test_the_command_embeds_once_and_prints_both_spaces(
    trained: Path, tiny_cold_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = PreparedData.open(tiny_cold_data).items.to_pylist()
    title_of = {item["raw_id"]: item["title"] for item in catalogue}
    often, never = catalogue[1], catalogue[-1]
    assert never["train_count"] == 0
    capsys.readouterr()
    assert em3(["neighbours", str(trained), often["raw_id"], "--top", "3"]) == 0
    written = (trained / "items" / "items.parquet").stat().st_mtime_ns
    first, heading, *rows = capsys.readouterr().out.splitlines()
    assert first == f"{often['title']}  [{often['raw_id']}]"
    assert heading.split("  ")[-1].strip() == "by ID"
    assert len(rows) == 3
    for row in rows:
        cells = re.findall(r"(-?\d\.\d\d)  (.+?)  \[(item-\d+)\]", row)
        assert len(cells) == 2
        assert all(title_of[raw_id] == title for _, title, raw_id in cells)
    for row in zip(*(re.findall(r"-?\d\.\d\d", row) for row in rows), strict=True):
        assert [float(value) for value in row] == sorted((float(value) for value in row), reverse=True)
    assert em3(["neighbours", str(trained), never["raw_id"], "--top", "1000"]) == 0
    alone = capsys.readouterr().out
    assert "by content" in alone
    assert "by ID" not in alone
    assert (trained / "items" / "items.parquet").stat().st_mtime_ns == written
    assert em3(["neighbours", str(trained), often["raw_id"], "--by", "id"]) == 0
    assert "by content" not in capsys.readouterr().out


def test_what_cannot_be_answered_is_one_line(
    trained: Path, tiny_cold_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never = PreparedData.open(tiny_cold_data).items["raw_id"][-1].as_py()
    cases = {
        (never, "--by", "id"): f"item {never} has no training row, so no ID embedding of its own",
        ("no such thing at all",): "no item has the id 'no such thing at all'",
        (never, "--top", "0"): "--top is 0, must be at least 1",
    }
    for arguments, message in cases.items():
        capsys.readouterr()
        assert em3(["neighbours", str(trained), *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line


def test_an_ambiguous_title_lists_the_candidates(
    trained: Path, tiny_cold_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = PreparedData.open(tiny_cold_data).items["title"].to_pylist()[1:]
    count = sum("e" in title.casefold() for title in titles)
    assert count > 20
    assert em3(["neighbours", str(trained), "e"]) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 20
    assert f"'e' is part of {count} titles, of which 20 are shown; give an id or more of the title" in printed.err
