"""Runs with tables of raw ids as packages and as hub folders: scores are the model's, the map stays as it was."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.torchrec_em3.packages import export, train
from tests.torchrec_em3.test_serve import serving
from torchrec_em3.cli import run as em3
from torchrec_em3.datasets.loader import BatchStream
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw_ids import item_ids, user_ids
from torchrec_em3.export import Exported, export_package
from torchrec_em3.export_parity import split_requests
from torchrec_em3.hub import from_pretrained
from torchrec_em3.process_group import process_group
from torchrec_em3.serving.scorer import Request, Scorer
from torchrec_em3.trained_run import open_trained_run

USERS, ITEMS = 24, 60
OTHER = {"hashed": "managed", "managed": "hashed"}


class Case(NamedTuple):
    """A run whose items have ids of one kind, and its users of the other; with two packages and the state around one.

    Attributes:
        items: Kind of the items' ids.
        run: Its folder.
        data: What it was trained on.
        package: In float32.
        small: In int8.
        exported: What was said of `small`.
        before: Tables and maps before that export.
        after: The same after it.
    """

    items: str
    run: Path
    data: PreparedData
    package: Path
    small: Path
    exported: Exported
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@pytest.fixture(scope="module", params=list(OTHER))
def case(request: pytest.FixtureRequest, tiny_cold_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder, kind = tmp_path_factory.mktemp("raw"), request.param
    tables = {"item_table": {"ids": kind, "rows": ITEMS}, "user_table": {"ids": OTHER[kind], "rows": USERS}}
    run = train(tiny_cold_data, folder / "run", "--embeddings.tables", json.dumps(tables))
    package = export(run, folder / "package", "fp32")
    with process_group() as ranks:
        trained = open_trained_run(run, ranks)
        before = copy_of(trained.sharded.module.state_dict())
        exported = export_package(trained, folder / "small", "int8", ranks)
        after = copy_of(trained.sharded.module.state_dict())
    return Case(kind, run, trained.data, package, folder / "small", exported, before, after)


def copy_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tables and the maps of one process."""
    whole = {name: value.local_shards()[0].tensor for name, value in state.items() if hasattr(value, "local_shards")}
    return {name: value.clone() for name, value in whole.items() if "table" in name}


def test_the_package_scores_the_test_split_as_it_was_evaluated(case: Case) -> None:
    evaluated = np.load(case.run / "predictions" / "test.npz")
    scorer = Scorer.load(case.package)
    parts = split_requests(case.data, "test", scorer.config.max_history)
    logit = np.concatenate([logit for part in parts for logit in scorer.logits(part)])
    np.testing.assert_allclose(logit, evaluated["logit"], atol=1e-5)
    parity = json.loads((case.package / "config.json").read_text())["parity"]
    assert parity["rows"] > 100
    assert parity["max_logit_change"] <= 1e-5


@pytest.mark.parametrize("table", ["item", "user"])
def test_each_row_is_written_once(case: Case, table: str) -> None:
    """Which row an id has is worked out from the checkpoint here."""
    ids, rows = (item_ids(case.data), ITEMS) if table == "item" else (user_ids(case.data), USERS)
    (weight,) = (value for name, value in case.before.items() if name.endswith(f"{table}_table.weight"))
    if (case.items if table == "item" else OTHER[case.items]) == "hashed":
        expected = np.where(ids == 0, 0, 1 + ids % (rows - 1))
    else:
        names = (f"{table}_table._mch_sorted_raw_ids", f"{table}_table._mch_remapped_ids_mapping")
        of_map = [value.tolist() for end in names for name, value in case.before.items() if name.endswith(end)]
        row_of = dict(zip(*of_map, strict=True))
        expected = np.array([row_of.get(raw_id, 0) for raw_id in ids.tolist()])
        assert (expected[1:] == 0).any(), "some have no row"
    tensors = load_file(case.package / "tables.safetensors")
    place, written = tensors[f"{table}_rows"], tensors[f"{table}_table"]
    assert (place.dtype, len(place), int(place[0])) == (torch.int32, len(ids), 0)
    assert torch.equal(written[place.long()], weight[torch.from_numpy(expected)])
    assert len(written) == len(np.unique(expected)) == len(place.unique()) <= rows


def test_what_is_unknown_scores_as_unknown(case: Case) -> None:
    scorer = Scorer.load(case.package)
    users, items = (table["raw_id"].to_pylist()[1:] for table in (case.data.users, case.data.items))
    alike = dict.fromkeys(scorer.config.user_features[1:], "?")
    asked = [Request(user, items[:3], [*items, "never seen"], alike) for user in ["nobody", *users]]
    logit = np.stack(scorer.logits(asked))
    tensors = load_file(case.package / "tables.safetensors")
    without_row = (tensors["user_rows"][1:] == 0).numpy()
    assert without_row.any() == (case.items == "hashed"), "hashed users have a row each, managed ones not all"
    np.testing.assert_array_equal((np.abs(logit[1:] - logit[0]) < 1e-7).all(1), without_row)
    (nothing,) = scorer.logits([Request("nobody", ["never seen"], ["nor this", "never seen"], alike)])
    assert nothing[0] == pytest.approx(nothing[1], abs=1e-6)


def test_an_export_changes_no_map_and_int8_keeps_the_auc(case: Case) -> None:
    assert sum("_mch_sorted_raw_ids" in name for name in case.before) == 1
    assert all(torch.equal(value, case.after[name]) for name, value in case.before.items())
    parity = case.exported.parity
    assert parity.auc is not None
    assert parity.package_auc == pytest.approx(parity.auc, abs=1e-3)
    assert 0 < parity.max_logit_change < 0.1
    full, small = (load_file(folder / "tables.safetensors") for folder in (case.package, case.small))
    for name in ("user_rows", "item_rows"):
        assert torch.equal(small[name], full[name])
    assert small["item_table"].dtype == torch.uint8


def test_files_are_scored_and_packages_are_swapped(case: Case, tmp_path: Path) -> None:
    user, items = case.data.users["raw_id"][1].as_py(), case.data.items["raw_id"].to_pylist()[1:6]
    table = pa.table({"user": [user] * 5, "history": [items[:2]] * 5, "item": items})
    pq.write_table(table, tmp_path / "in.parquet")
    assert em3(["score", str(case.package), str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")]) == 0
    scores = pq.read_table(tmp_path / "out.parquet")["score"].to_numpy()
    link = tmp_path / "current"
    link.symlink_to(case.small)
    with serving(link) as url:
        link.unlink()
        link.symlink_to(case.package)
        assert requests.post(f"{url}/reload", timeout=60).json()["version"] == Scorer.load(case.package).config.version
        body = {"user": user, "history": items[:2], "candidates": items}
        np.testing.assert_allclose(requests.post(f"{url}/score", json=body).json()["scores"], scores, rtol=1e-5)


def test_a_hub_folder_holds_the_map_and_the_raw_ids(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert em3(["export", str(case.run), "--format", "hub", "--out", str(out)]) == 0
    model = from_pretrained(out)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = BatchStream(case.data, "test", batch_size=64, max_history=10, raw_users=True)
    with torch.no_grad():
        logit = torch.cat([model(batch)[1].logit[batch.weight > 0] for batch in batches]).numpy()
    np.testing.assert_allclose(logit, np.load(case.run / "predictions" / "test.npz")["logit"], atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(before["items._raw_ids"], torch.from_numpy(item_ids(case.data)))
    assert all(torch.equal(before[name], value) for name, value in case.before.items())
    text = (out / "README.md").read_text()
    assert "raw ids of users in a `torchrec_em3.batch.Batch`" in text
    assert "BatchStream(..., raw_users=True)" in text
