"""The command line: exit codes, one-line errors, overrides, plug-ins."""

import json
from pathlib import Path

import pytest
import yaml

import torchrec_em3
from tests.program import ROOT, finish
from torchrec_em3.cli import COMMANDS, run

UNALIGNED = ["--model.alignment_weight", "0"]


def em3(*arguments: str) -> int:
    try:
        return run(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert em3("--version") == 0
    assert torchrec_em3.__version__ in capsys.readouterr().out
    assert em3("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert em3() == 2


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert em3(command, "--help") == 0
    assert f"em3 {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["trian"], 2, "unknown command 'trian'.*Did you mean 'train'"),
        (["train", "--model.contnt", "none"], 2, "--model.contnt.*Did you mean '--model.content'"),
        (["train", "--loader.batch_size", "many"], 2, "loader.batch_size.*many"),
        (["train", "--loader.batch_size", "0"], 2, "--loader.batch_size is 0, must be at least 1"),
        (["train", "--model.embedding_dim", "30"], 2, "must be a multiple of 4"),
        (["train", "--model.content", "fusion_former"], 2, "unknown content tower.*Did you mean 'fusion_qformer'"),
        (["train", "--model.content_options.num_querys", "2"], 2, "num_querys.*Did you mean 'num_queries'"),
        (["train", "--model.content_options.num_queries", "two"], 2, "content_options.*num_queries"),
        (["train", "--model.ranker", "none"], 2, "--model.ranker cannot be none"),
        (["train", "--model.alignment", "sampled16", *UNALIGNED], 2, "sampled16.*alignment_weight is 0, so it"),
        (["train", "--model.alignment_options.temperature", "0.5", *UNALIGNED], 2, "global.*_weight is 0"),
        (["train", "--model.stop_gradient", "true", *UNALIGNED], 2, "leaves the tower untrained; give it a weight"),
        (["train", "--embeddings.sharding", "diagonal"], 2, "embeddings.sharding"),
        (["train", "--plugins", "no_such_package.parts"], 2, "no module 'no_such_package'"),
        (["train"], 2, "no data folder: give --data DIR"),
        (["train", "--data", "nowhere", "--run", "r"], 3, "nowhere"),
        (["evaluate", "nowhere"], 4, "nowhere is not a run folder"),
        (["report", "nowhere"], 3, "nowhere"),
        (["prepare", "moveilens"], 2, "Did you mean 'movielens'"),
        (["prepare", "movielens", "--out", "x"], 2, "give either --source DIR"),
        (["prepare", "movielens", "--out", "x", "--source", "nowhere"], 3, "nowhere"),
        (["prepare", "movielens", "--out", "x", "--source", ".", "--split", "tempral"], 2, "Did you mean 'temporal'"),
        (["plan", "--world_size", "9", "--local_world_size", "8"], 2, "multiple of --local_world_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert em3(*arguments) == code
    assert pytest.importorskip("re").search(message, error_line(capsys))


def test_an_unknown_key_in_a_file_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  embeding_dim: 16\n")
    assert em3("train", "--config", str(path)) == 2
    line = error_line(capsys)
    assert "embeding_dim" in line
    assert "Did you mean '--model.embedding_dim'?" in line


def test_print_config_is_a_valid_config_with_all_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert em3("train", "--model.embedding_dim", "16", "--print_config") == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["embedding_dim"] == 16
    assert yaml.safe_load(printed)["model"]["content_options"]["num_queries"] >= 1
    (tmp_path / "config.yaml").write_text(printed)
    assert em3("train", "--config", str(tmp_path / "config.yaml"), "--print_config") == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("flag", [["--run_folder", "there"], ["--run_folder=there"], ["--run", "there"]])
def test_the_run_folder_has_a_name_that_torchrun_lets_through(
    flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert em3("train", *flag, "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"] == "there"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_are_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert em3("train", "--config", str(path), "--print_config") == 0


def test_a_users_tower_trains_without_a_change_here(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    base = ["train", "--data", str(tiny_data), "--run", str(run_folder), "--plugins", "tests.tiny_parts"]
    base += ["--model.content", "test_mean", "--loader.batch_size", "256", "--train.epochs", "1"]
    assert em3(*base, "--model.content_options.scale", "-1") == 2
    assert "scale is -1" in error_line(capsys)
    assert em3(*base, "--model.embedding_dim", "8", "--model.content_options.scale", "0.5") == 0
    resolved = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert resolved["model"]["content_options"] == {"scale": 0.5}
    assert resolved["plugins"] == "tests.tiny_parts"


@pytest.mark.slow
def test_train_evaluate_report_plan_contract(tiny_data: Path, tmp_path: Path) -> None:
    """What scripts rely on, each command in a process of its own."""
    log = tmp_path / "log"

    def program(*arguments: str) -> None:
        assert finish(["torchrec_em3", *arguments], log) == 0, log.read_text()

    common = [
        "--data",
        str(tiny_data),
        "--loader.batch_size",
        "256",
        "--model.embedding_dim",
        "8",
        "--train.epochs",
        "1",
    ]
    id_only, em3_run = tmp_path / "id_only", tmp_path / "em3"
    program("train", *common, "--run", str(id_only), "--model.content", "none", "--seed", "3", "--skip_evaluation")
    assert not (id_only / "summary.json").exists()
    training = json.loads((id_only / "training.json").read_text())
    program("evaluate", str(id_only))
    program("train", *common, "--run", str(em3_run))
    summary = json.loads((id_only / "summary.json").read_text())
    assert summary["seed"] == 3
    assert summary["split"] == "temporal"
    assert summary["samples"] == training["samples"] > 0
    assert summary["peak_rss_bytes"] == training["peak_rss_bytes"] > 0
    assert summary["best_step"] == training["best_step"]
    assert summary["cpu_seconds_per_1k"] == pytest.approx(1000 * training["cpu_seconds"] / training["samples"])
    assert {"auc", "gauc", "ne", "logloss", "slices"} <= summary["test"].keys()
    assert list(summary["test"]["slices"]["item_frequency"]) == ["0", "1-5", "6-20", "21+"]
    assert all({"auc", "n"} <= part.keys() for part in summary["test"]["slices"]["item_frequency"].values())
    assert {"cpu_seconds_per_1k", "peak_rss_bytes", "parameters", "versions", "attainable_auc"} <= summary.keys()
    before = json.loads((em3_run / "summary.json").read_text())
    program("evaluate", str(em3_run))
    after = json.loads((em3_run / "summary.json").read_text())
    assert after["test"] == before["test"]
    assert after["cpu_seconds_per_1k"] == pytest.approx(before["cpu_seconds_per_1k"])
    program("report", str(id_only), str(em3_run), "--out", str(tmp_path / "report.html"))
    assert "<html" in (tmp_path / "report.html").read_text()
    program(
        "plan",
        "--data",
        str(tiny_data),
        "--world_size",
        "16",
        "--local_world_size",
        "8",
        "--device",
        "cuda",
        "--hbm_gb",
        "80",
        "--out",
        str(tmp_path / "plan.json"),
    )
    assert "item_table" in log.read_text()
    assert json.loads((tmp_path / "plan.json").read_text())["world_size"] == 16
    for name in ("config.yaml", "metrics.jsonl", "plan.json", "plan.txt", "versions.json", "embeddings.npz"):
        assert (em3_run / name).is_file()
    assert list((em3_run / "tensorboard").iterdir())
