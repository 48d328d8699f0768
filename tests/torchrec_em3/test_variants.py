"""Which runs are one variant, what it is called, and what it is compared with."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fake_runs import fake_run
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.run_record import read_records
from torchrec_em3.variants import Variant, closest_baseline, group_variants
from torchrec_em3.verdict import compare


@pytest.fixture(scope="module")
def data(tiny_cold_data: Path) -> PreparedData:
    return PreparedData.open(tiny_cold_data)


def run(folder: Path, data: PreparedData, *, content: bool, seed: int = 0, **model: Any) -> Path:
    """A fake run whose config has further model options."""
    fake_run(folder, data, content=content, seed=seed)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= model
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_where_numbers_are_shown_makes_no_variant(data: PreparedData, tmp_path: Path) -> None:
    folders = [run(tmp_path / name, data, content=False, seed=seed) for seed, name in enumerate(("before", "after"))]
    config = yaml.safe_load((folders[1] / "config.yaml").read_text())
    config["train"] = {**config.get("train", {}), "sinks": ["tensorboard", "wandb"]}
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(config))
    assert [len(variant.runs) for variant in group_variants(read_records(folders))] == [2]


def test_runs_that_differ_in_the_ranker_are_no_seeds_of_one_model(data: PreparedData, tmp_path: Path) -> None:
    folders = [
        run(tmp_path / f"{ranker}{seed}", data, content=content, seed=seed, ranker=ranker)
        for content, ranker in ((False, "din"), (False, "mmoe"))
        for seed in (1, 2)
    ]
    variants = group_variants(read_records(folders))
    assert [(variant.name, len(variant.runs)) for variant in variants] == [
        ("ID only, ranker din", 2),
        ("ID only, ranker mmoe", 2),
    ]
    [comparison] = compare(read_records(folders), {})
    assert (comparison.first, comparison.second) == ("ID only, ranker din", "ID only, ranker mmoe")
    assert comparison.title.startswith("'ID only, ranker mmoe'")
    assert not any("Content" in text for text in (comparison.title, comparison.basis))


@pytest.mark.parametrize("option", ["loader", "train", "model.content_options"])
def test_any_option_but_the_seed_makes_another_variant(data: PreparedData, tmp_path: Path, option: str) -> None:
    folders = [run(tmp_path / name, data, content=True, seed=seed) for seed, name in enumerate(("a", "b", "c"))]
    config = yaml.safe_load((folders[2] / "config.yaml").read_text())
    part = config
    for name in option.split("."):
        part = part.setdefault(name, {})
    part["num_workers"] = 7
    (folders[2] / "config.yaml").write_text(yaml.safe_dump(config))
    variants = group_variants(read_records(folders))
    assert [[record.name for record in variant.runs] for variant in variants] == [["a", "b"], ["c"]]
    assert variants[0].name.endswith("num_workers by default")
    assert variants[1].name.endswith("num_workers 7")


def test_content_is_compared_with_the_id_only_run_that_is_most_like_it(data: PreparedData, tmp_path: Path) -> None:
    folders = [
        run(tmp_path / f"{content}{ranker}", data, content=content, ranker=ranker)
        for content in (False, True)
        for ranker in ("din", "mmoe")
    ]
    variants = group_variants(read_records(folders))
    found = [closest_baseline(variant, variants) for variant in variants]
    assert found == [None, variants[0], variants[0], variants[1]]
    assert closest_baseline(variants[3], variants[2:]) is variants[2]


def test_names_tell_all_variants_apart(data: PreparedData, tmp_path: Path) -> None:
    options = [dict.fromkeys("uvwx", 1), dict.fromkeys("uvwx", 2), dict.fromkeys("uvw", 1) | {"x": 3}]
    folders = [run(tmp_path / str(i), data, content=False, **values) for i, values in enumerate(options)]
    names = [variant.name for variant in group_variants(read_records(folders))]
    assert names == ["ID only, u 1, v 1, w 1, x 1", "ID only, u 2, v 2, w 2", "ID only, x 3, u 1, v 1"]


def test_a_name_holds_three_options_and_no_more(data: PreparedData, tmp_path: Path) -> None:
    folders = [run(tmp_path / name, data, content=False, **dict.fromkeys("uvwxyz", name)) for name in ("a", "b")]
    first, second = group_variants(read_records(folders))
    assert (first.name, second.name) == ("ID only, u a, v a, w a", "ID only, u b, v b, w b")


def test_runs_on_other_data_are_another_variant_of_the_same_name(
    data: PreparedData, tiny_data: Path, tmp_path: Path
) -> None:
    folders = [fake_run(tmp_path / "a", data, content=False)]
    folders.append(fake_run(tmp_path / "b", PreparedData.open(tiny_data), content=False))
    variants: list[Variant] = group_variants(read_records(folders))
    assert [variant.name for variant in variants] == ["ID only", "ID only"]
    assert [closest_baseline(variant, variants) for variant in variants] == [None, None]
