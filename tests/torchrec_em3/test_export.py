"""`em3 export`: the package scores as the trained model does, for every ranker and history, or is not written."""

import ast
import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.coded_data import prepare_coded
from tests.torchrec_em3.packages import export, train
from torchrec_em3 import export_parity
from torchrec_em3.cli import run as em3
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.errors import CheckpointError, NumericError
from torchrec_em3.evaluate import Predictions
from torchrec_em3.export_parity import split_requests
from torchrec_em3.serving.graph_file import load_graph
from torchrec_em3.serving.package import write_manifest
from torchrec_em3.serving.rows import PRECISIONS, PackedTable, Precision, pack_rows
from torchrec_em3.serving.scorer import Request, Scorer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tiny_cold_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_cold_data, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def package(run: Path) -> Path:
    return export(run, run.parent / "package", "fp32")


def test_the_package_scores_the_test_split_as_it_was_evaluated(run: Path, package: Path, tiny_cold_data: Path) -> None:
    """Cold items, unknown users and short histories included; the validation split was compared by the export."""
    evaluated = np.load(run / "predictions" / "test.npz")
    scorer = Scorer.load(package)
    parts = split_requests(PreparedData.open(tiny_cold_data), "test", scorer.config.max_history)
    logit = np.concatenate([logit for part in parts for logit in scorer.logits(part)])
    np.testing.assert_allclose(logit, evaluated["logit"], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["--model.ranker", "dcn_v2"],
        ["--model.ranker", "dlrm"],
        ["--model.ranker", "deepfm"],
        ["--model.content", "none"],
        ["--model.content", "none", "--model.ranker", "dlrm"],
        ["--model.history", "none"],
        ["--model.history", "lora_qformer"],
        ["--model.history", "shared"],
        ["--model.attention_hidden", "[]", "--model.content_attention_hidden", "[8,4]"],
        ["--model.similarity", "statistics", "--model.ranker", "dlrm"],
        ["--model.similarity", "both"],
        ["--model.similarity", "histogram", "--model.history", "shared"],
    ],
    ids=" ".join,
)
def test_every_model_exports_with_parity(options: list[str], tiny_cold_data: Path, tmp_path: Path) -> None:
    run = train(tiny_cold_data, tmp_path / "run", *options)
    config = json.loads((export(run, tmp_path / "package", "fp32") / "config.json").read_text())
    assert config["parity"]["rows"] > 100
    assert config["parity"]["max_logit_change"] < 1e-4
    assert config["content"] == ("none" not in options or "--model.history" in options)


@pytest.mark.parametrize("content", ["fusion_qformer", "none"])
def test_codes_as_features_export_with_parity(content: str, coded_data: Path, tmp_path: Path) -> None:
    run = train(coded_data, tmp_path / "run", "--model.codes", "features", "--model.content", content)
    package = export(run, tmp_path / "package", "fp32")
    scorer = Scorer.load(package)
    assert scorer.config.codes
    assert scorer.config.content == (content != "none")
    evaluated = np.load(run / "predictions" / "test.npz")
    parts = split_requests(PreparedData.open(coded_data), "test", scorer.config.max_history)
    logit = np.concatenate([logit for part in parts for logit in scorer.logits(part)])
    np.testing.assert_allclose(logit, evaluated["logit"], atol=1e-5)


@pytest.fixture(scope="module")
def coded_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_coded(tmp_path_factory.mktemp("coded"), encoders=True)


def test_the_auc_of_every_task_is_compared() -> None:
    label_BT = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    expected = Predictions(np.zeros(4), np.zeros(4), label_BT, label_BT * 2.0 - 1.0)
    worse_BT = np.stack([expected.logit[:, 0], expected.logit[::-1, 1]], 1)
    nothing_B = np.zeros(4, dtype=bool)
    assert export_parity.compare(expected.logit * 1.1, expected, "int8", nothing_B).auc == 1.0
    with pytest.raises(NumericError, match=r"validation AUC from 1\.00000 to 0\.00000"):
        export_parity.compare(worse_BT, expected, "int8", nothing_B)
    with pytest.raises(NumericError, match="logit of validation row 0 from -1"):
        export_parity.compare(worse_BT, expected, "fp32", nothing_B)
    near_B = np.abs(worse_BT - expected.logit).any(1)
    with pytest.raises(NumericError, match="changes the validation AUC"):
        export_parity.compare(worse_BT, expected, "fp32", near_B)


@pytest.mark.parametrize(
    ("version", "unknown_then"),
    [(1, ("codes", "tasks", "dense", "widths")), (2, ("dense", "widths")), (3, ("dense", "widths")), (4, ("widths",))],
)
def test_packages_of_before_are_read(
    version: int, unknown_then: tuple[str, ...], package: Path, tiny_cold_data: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(package, old)
    config = json.loads((old / "config.json").read_text()) | {"format_version": version}
    kept = {name: value for name, value in config.items() if name not in unknown_then}
    (old / "config.json").write_text(json.dumps(kept))
    (old / "manifest.json").unlink()
    write_manifest(old)
    manifest = json.loads((old / "manifest.json").read_text()) | {"format_version": version}
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert not {"user_rows", "item_rows"} & load_file(old / "tables.safetensors").keys(), "nor were these known"
    (part, *_) = split_requests(PreparedData.open(tiny_cold_data), "test", 10)
    scorer = Scorer.load(old)
    assert scorer.config.format_version == version
    for found, expected in zip(scorer.logits(part), Scorer.load(package).logits(part), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_packages_of_a_later_format_are_refused(package: Path, tmp_path: Path) -> None:
    manifest = json.loads((package / "manifest.json").read_text()) | {"format_version": 6}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has format version 6, this program reads 1, 2, 3, 4, 5; export"):
        Scorer.load(tmp_path)


def test_candidates_of_one_request_score_as_alone(package: Path, tiny_cold_data: Path) -> None:
    scorer = Scorer.load(package)
    data = PreparedData.open(tiny_cold_data)
    items = data.items["raw_id"].to_pylist()[1:]
    user = data.users["raw_id"][1].as_py()
    for history in ([], items[:1], ["new", *items[100:103]], items[:50]):
        (together,) = scorer.logits([Request(user, history, [*items, "never seen"])])
        alone = scorer.logits([Request(user, history, [item]) for item in [*items, "never seen"]])
        np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
        assert together.std() > 1e-3
    assert scorer.logits([Request(user, [], [])])[0].shape == (0,)
    assert scorer.logits([]) == []


def test_what_is_unknown_scores_as_unknown(package: Path, tiny_cold_data: Path) -> None:
    scorer = Scorer.load(package)
    items = PreparedData.open(tiny_cold_data).items["raw_id"].to_pylist()[1:]
    known, cold = items[0], items[-1]
    assert scorer.knows(cold)
    assert not scorer.knows("never seen")
    (logit,) = scorer.logits([Request("nobody", items[:3], ["never seen", "nor this", cold, known])])
    assert logit[0] == logit[1]
    assert len(set(logit.tolist())) == 3, "a cold item is told from an unknown one by its content"


@pytest.mark.parametrize("width", [1, 2, 3, 8, 129, 258])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_any_width_are_packed(precision: Precision, width: int) -> None:
    rows_ND = 7 + torch.rand(5, width)
    found_ND = PackedTable(pack_rows(rows_ND, precision), precision, width)(torch.arange(5))
    # Half a step of the row's own range, and the fp16 of its scale and bias.
    error = {"fp32": 0.0, "fp16": 0.004, "int8": 0.01, "int4": 0.04}[precision]
    torch.testing.assert_close(found_ND, rows_ND, atol=error, rtol=0)


def test_packed_rows_of_before_are_read_whole() -> None:
    rows_ND = torch.rand(5, 6)
    packed_NP = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(rows_ND, 8)
    torch.testing.assert_close(PackedTable(packed_NP, "int8")(torch.arange(5)), rows_ND, atol=0.01, rtol=0)


def test_content_of_an_odd_width_is_exported_by_default(tiny_cold_data: Path, tmp_path: Path) -> None:
    run = train(tiny_cold_data, tmp_path / "run", "--model.content", "frozen_pool")
    assert em3(["export", str(run), "--out", str(tmp_path / "package")]) == 0
    scorer = Scorer.load(tmp_path / "package")
    assert (scorer.config.precision, scorer.config.widths["content"] % 2) == ("int8", 1)
    full = Scorer.load(export(run, tmp_path / "full", "fp32"))
    (part, *_) = split_requests(PreparedData.open(tiny_cold_data), "test", 10)
    np.testing.assert_allclose(np.stack(scorer.logits(part)), np.stack(full.logits(part)), atol=0.1)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_lower_precisions_are_smaller_and_keep_the_auc(precision: str, run: Path, package: Path) -> None:
    small = export(run, run.parent / precision, precision)
    parity = json.loads((small / "config.json").read_text())["parity"]
    assert abs(parity["auc"] - parity["package_auc"]) <= 1e-3
    assert 0 < parity["max_logit_change"] < 0.1
    full, less = ((folder / "tables.safetensors").stat().st_size for folder in (package, small))
    assert less < 0.8 * full


def test_a_package_that_differs_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score = Scorer.logits
    monkeypatch.setattr(Scorer, "logits", lambda self, requests: [x + 2e-5 for x in score(self, requests)])
    assert em3(["export", str(run), "--out", str(tmp_path / "p"), "--precision", "fp32"]) == 5
    assert "more than 1e-05 allows; nothing was written" in capsys.readouterr().err
    monkeypatch.setattr(export_parity, "_auc", lambda label, logit: float(logit.sum()))
    assert em3(["export", str(run), "--out", str(tmp_path / "p"), "--precision", "int8"]) == 5
    assert "use a higher --precision" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_touched(run: Path, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(package)
    assert em3(["export", str(run), "--out", str(package)]) == 2
    assert "exists" in capsys.readouterr().err
    assert digest(package) == before
    assert em3(["export", str(run), "--out", str(package / "config.json" / "inside")]) == 2
    assert "inside cannot be made (Not a directory); choose another folder" in capsys.readouterr().err


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_scorer_imports_no_training_code(package: Path) -> None:
    program = f"""
import pathlib, sys
from torchrec_em3.serving.scorer import Request, Scorer
print(Scorer.load(pathlib.Path({str(package)!r})).score([Request("1", [], ["1", "2"])])[0].shape)
print(sorted(name for name in sys.modules if name.startswith("torchrec")))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    shape, modules = done.stdout.splitlines()
    assert shape == "(2,)"
    serving = (f".serving.{name}" for name in ("graph_file", "package", "rows", "scorer"))
    own = ["", ".errors", ".schema", ".serving", *serving]
    assert ast.literal_eval(modules) == [f"torchrec_em3{name}" for name in own]


@pytest.mark.parametrize("name", ["config.json", "dense.pt2", "tables.safetensors", "items.parquet", "users.parquet"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_packages_are_refused(name: str, damage: str, package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "p")
    path = tmp_path / "p" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage == "flipped":
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        Scorer.load(tmp_path / "p")


class Touch:
    """A pickle of this writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["examples", "weight"])
def test_a_graph_that_holds_a_pickle_is_refused_unread(place: str, package: Path, tmp_path: Path) -> None:
    planted = io.BytesIO()
    torch.save(Touch(tmp_path / "executed"), planted)
    with zipfile.ZipFile(package / "dense.pt2") as source, zipfile.ZipFile(tmp_path / "planted.pt2", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if place == "examples" and "/sample_inputs/" in name:
                content = planted.getvalue()
            if place == "weight" and name.endswith("weight_0"):
                content = planted.getvalue()
            if place == "weight" and name.endswith("weights_config.json"):
                config = json.loads(content)
                next(iter(config["config"].values()))["use_pickle"] = True
                content = json.dumps(config).encode()
            target.writestr(name, content)
    with pytest.raises(CheckpointError, match="pickled, which could run code"):
        load_graph(tmp_path / "planted.pt2")
    assert not (tmp_path / "executed").exists()
