"""`em3 plan`: what it takes, what it writes, how it ends."""

import json
from pathlib import Path

import pytest

from torchrec_em3.cli import run

SMALL = ("--rows", "user=1e6,item=1e6", "--model.content", "none")


def plan(*arguments: str) -> int:
    try:
        return run(("plan", *arguments))
    except SystemExit as stop:
        return int(stop.code or 0)


def test_several_topologies_are_written_as_json_markdown_and_html(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plans"
    assert plan(*SMALL, "--topology", "8xH100,2xCPU", "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "8xH100: 8 x cuda on 1 host" in text
    assert "2xCPU: 2 x cpu on 1 host" in text
    assert sorted(path.name for path in out.iterdir()) == ["plan.html", "plan.json", "plan.md"]
    written = json.loads((out / "plan.json").read_text())
    assert [each["cluster"]["name"] for each in written["plans"]] == ["8xH100", "2xCPU"]
    assert written["facts"]["tables"] == "user 1,000,001 rows, item 1,000,001 rows"


def test_the_options_of_one_cluster_still_describe_it(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    cluster = ("--world_size", "16", "--local_world_size", "8", "--device", "cuda", "--hbm_gb", "80")
    assert plan("--data", str(tiny_data), *cluster, "--out", str(out)) == 0
    written = json.loads(out.read_text())
    assert (written["world_size"], written["local_world_size"], written["device"]) == (16, 8, "cuda")
    assert written["memory_bytes"]["hbm"] == 80 * 1024**3


def test_where_nothing_fits_the_reason_is_written_and_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plans"
    huge = ("--rows", "user=1e10,item=1e11", "--model.content", "none", "--model.embedding_dim", "16")
    assert plan(*huge, "--topology", "2xCPU", "--out", str(out)) == 2
    printed = capsys.readouterr()
    assert "too little" in printed.out
    assert printed.err.strip().splitlines()[-1].endswith("no sharding plan fits 2xCPU; see above")
    assert "does not fit" in (out / "plan.md").read_text()


def test_tables_are_constrained_by_name_in_a_config_file(tmp_path: Path) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "plan.json"
    path.write_text("embeddings:\n  tables:\n    item_table:\n      sharding: [table_wise]\n")
    assert plan("--config", str(path), *SMALL, "--topology", "8xH100", "--out", str(out)) == 0
    tables = {table["fqn"]: table["sharding_type"] for table in json.loads(out.read_text())["tables"]}
    assert tables["items.tables.item_table"] == "table_wise"


def test_a_plan_is_written_below_folders_that_are_not_there_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*SMALL, "--out", str(tmp_path / "new" / "plan.json")) == 0
    assert (tmp_path / "new" / "plan.json").is_file()
    assert plan(*SMALL, "--out", str(tmp_path / "new" / "plan.json" / "below")) == 2
    assert "cannot be made (Not a directory); choose another place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "8xH10"), "Did you mean '8xH100'"),
        (("--topology", "8xH100", "--world_size", "4"), "--world_size 4 has no effect beside --topology"),
        (("--data", "somewhere"), "give one of them"),
        (("--topology", "8xH100,2xCPU", "--out", "plan.json"), "plan.json holds one plan"),
        (("--embeddings.tables", '{"itm_table": {"sharding": ["row_wise"]}}'), "Did you mean 'item_table'"),
        (("--embeddings.tables", '{"item_table": {"sharding": ["row_wide"]}}'), "row_wide"),
        (("--embeddings.tables", '{"item_table": {"shardin": ["row_wise"]}}'), "Did you mean 'sharding'"),
        (("--embeddings.tables", '{"item_table": {"cached_share": 0}}'), "cached_share is 0"),
        (("--embeddings.tables", '{"item_table": {"cached_share": 1}}'), "cached_share is 1"),
        (
            ("--model.content", "concat", "--world_size", "4", "--rows", "user=9,item=4"),
            "5 rows cannot be split over 4",
        ),
        (("--seed", "-1"), "--seed is -1, must be from 0 to 4294967295"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*SMALL, *arguments) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
