"""The histogram of content-ID cosines and the bars against ID-only."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.fake_runs import fake_run
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.report_ablation import ablations
from torchrec_em3.report_alignment import alignment_histograms, pair_cosines
from torchrec_em3.run_record import Embeddings, read_records
from torchrec_em3.variants import group_variants
from torchrec_em3.verdict import compare


@pytest.fixture(scope="module")
def data(tiny_cold_data: Path) -> PreparedData:
    return PreparedData.open(tiny_cold_data)


def embeddings(content: np.ndarray, ids: np.ndarray, known: np.ndarray) -> Embeddings:
    every = np.ones(len(ids), dtype=bool)
    return Embeddings(np.arange(len(ids)), ids, content, every, known, content, ids)


def test_items_meet_their_own_id_and_that_of_another() -> None:
    ids = np.eye(6, dtype=np.float32)
    matched, other = pair_cosines(embeddings(3 * ids, ids, np.array([True] * 5 + [False])))
    assert matched.tolist() == [1.0] * 5
    assert other.tolist() == [0.0] * 5


def test_a_run_without_vectors_of_its_loss_is_named(data: PreparedData, tmp_path: Path) -> None:
    folders = [fake_run(tmp_path / "kept", data, content=True), fake_run(tmp_path / "id", data, content=False)]
    shutil.copytree(folders[0], tmp_path / "old")
    config = yaml.safe_load((folders[0] / "config.yaml").read_text()) | {"other": 1}
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    path = tmp_path / "old" / "embeddings.npz"
    with np.load(path) as arrays:
        columns = {name: arrays[name] for name in ("item", "id", "content", "present")}
    np.savez(path, **columns)
    found = alignment_histograms(group_variants(read_records([*folders, tmp_path / "old"])))
    [chart] = found["charts"]
    assert found["without"] == ["old"]
    assert chart["name"] == "kept"
    assert chart["above"] > 0.9
    assert chart["matched"] > chart["other"] + 0.3
    assert chart["items"] <= int((data.item_train_count > 0).sum())


def test_fewer_than_two_pairs_are_no_histogram() -> None:
    ids = np.eye(3, dtype=np.float32)
    assert pair_cosines(embeddings(ids, ids, np.array([True, False, False]))) is None


def test_each_variant_has_a_bar_with_its_interval(data: PreparedData, tmp_path: Path) -> None:
    folders = [fake_run(tmp_path / name, data, content=name != "id", seed=3) for name in ("id", "a", "b")]
    config = yaml.safe_load((folders[2] / "config.yaml").read_text())
    config["model"]["alignment"] = "none"
    (folders[2] / "config.yaml").write_text(yaml.safe_dump(config))
    records = read_records(folders)
    comparisons = compare(records, dict.fromkeys([record.name for record in records], data))
    assert comparisons[1].title.startswith("Content ('fusion_qformer, history cache, alignment none')")
    [entry] = ablations(comparisons)
    assert len(entry["legend"]) == 2
    assert entry["legend"][1].endswith("alignment none against ID only")
    assert entry["chart"].count("<rect") == 4
    assert entry["chart"].count('class="whisker"') == 4
    for comparison in comparisons:
        assert f": {comparison.slices[0].difference:.4f}" in entry["chart"]
    assert ablations(comparisons[:1]) == []
