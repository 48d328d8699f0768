"""The plan as a page: self-contained, the same figures as the plan, bars to scale."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_em3.config import Config, EmbeddingConfig, ModelConfig
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.plan_chart import WIDTH, Part, Stack, stacked_bars
from torchrec_em3.plan_measured import read_measured
from torchrec_em3.plan_page import to_html, to_markdown
from torchrec_em3.plan_study import DEFAULT_TOKENS, planned_schema, study
from torchrec_em3.plan_text import format_bytes, measured_rows, to_text
from torchrec_em3.topology import GIB, Cluster, read_cluster

FACTS = {"tables": "user <b>1</b> row"}


class Page(HTMLParser):
    """What a browser would load, run or show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.shown += data


@pytest.fixture(scope="module")
def plans() -> list[dict[str, Any]]:
    small = Cluster(name="small", world_size=8, local_world_size=8, device="cuda", hbm_gb=20, ddr_gb=8)
    schema = planned_schema("user=3e8,city=50,item=3e8", DEFAULT_TOKENS)
    config = resolve_parts(Config())
    return study(schema, config, [small, read_cluster("8xH100"), read_cluster("16xCPU")])


def test_the_page_loads_and_runs_nothing(plans: list[dict[str, Any]]) -> None:
    text = to_html(plans, FACTS)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|url\(|@import", text)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert "user <b>1</b> row" in page.shown


def test_page_and_markdown_show_every_table_and_the_outcome(plans: list[dict[str, Any]]) -> None:
    assert [plan["fits"] for plan in plans] == [False, True, True]
    shown, markdown = Page(to_html(plans, FACTS)).shown, to_markdown(plans, FACTS)
    for text in (shown, markdown):
        for plan in plans:
            budget = plan["budget"]
            for amount in (budget["bank_bytes"], budget["dense_bytes"], plan["token_bytes"]):
                assert format_bytes(amount) in text
            for table in plan["tables"]:
                assert table["fqn"].rpartition(".")[2] in text
                assert f"{table['rows']:,}" in text
                assert format_bytes(table["weight_bytes"]) in text
        for word in ("small", "does not fit", "8xH100", "Nearest to fitting", "half precision", "largest over mean"):
            assert word in text
        assert format_bytes(plans[0]["shortages"][0]["over_bytes"]) in text


def test_markdown_tables_have_as_many_cells_in_every_row(plans: list[dict[str, Any]]) -> None:
    lines = to_markdown(plans, FACTS).splitlines()
    assert lines.count("## Comparison") == 1
    for above, line in itertools.pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert above.count("|") == line.count("|")


def test_a_single_plan_is_not_compared(plans: list[dict[str, Any]]) -> None:
    assert "Comparison" not in to_markdown(plans[1:2], FACTS)
    assert "Comparison" not in Page(to_html(plans[1:2], FACTS)).shown


def test_the_terminal_shows_the_remedies_too(plans: list[dict[str, Any]]) -> None:
    text = to_text(plans[0])
    assert "Nothing fits" in text
    assert "--embeddings.precision fp16" in text
    assert "content bank" in to_text(plans[1])
    assert "What would change" not in to_text(plans[1])


@pytest.mark.parametrize(("sharding", "charts"), [("row_wise", 0), ("table_wise", 2)])
def test_ranks_are_drawn_where_they_differ(sharding: Literal["row_wise", "table_wise"], charts: int) -> None:
    """Row-wise tables load every rank alike, so charts by rank would repeat those at the top."""
    config = Config(model=ModelConfig(content="none"), embeddings=EmbeddingConfig(sharding=sharding))
    schema = planned_schema("user=8e6,item=8e6", "")
    plan = study(schema, resolve_parts(config), [read_cluster("8xH100")])
    assert to_html(plan, FACTS).count("<svg") == 2 + charts


@given(
    st.lists(st.lists(st.just(0.0) | st.floats(1, 1e12), min_size=1, max_size=4), min_size=1, max_size=5),
    st.floats(1, 1e12),
)
def test_bars_are_to_scale_and_stay_inside(lengths: list[list[float]], limit: float) -> None:
    stacks = [
        Stack(str(i), [Part("part", j, value) for j, value in enumerate(row)], "", limit)
        for i, row in enumerate(lengths)
    ]
    svg = str(stacked_bars(stacks, "title", format_bytes))
    longest = max(limit, *(sum(row) for row in lengths))
    found = [float(width) for width in re.findall(r'fill" x="[^"]*" y="[^"]*" width="([^"]*)"', svg)]
    wanted = [max(value / longest * (WIDTH - 8), 0.5) for row in lengths for value in row if value > 0]
    assert found == pytest.approx(wanted, abs=0.06)
    edges = re.findall(r'<rect[^>]* x="([^"]*)"[^>]* width="([^"]*)"', svg)
    assert all(float(x) + float(width) <= WIDTH + 1 for x, width in edges)


def test_names_in_a_chart_are_escaped() -> None:
    svg = stacked_bars([Stack("<a>", [Part("<b>", 1, 1.0)], "<c>")], "<d>", format_bytes)
    assert not re.search(r"<[abcd]>", str(svg))
    assert stacked_bars([Stack("a", [Part("b", 1, 0.0)], "c")], "d", format_bytes) == ""


@pytest.mark.parametrize("place", [1, 2])
def test_what_a_run_took_stands_beside_its_plan(tmp_path: Path, plans: list[dict[str, Any]], place: int) -> None:
    run, plan = tmp_path / "run", plans[place]
    run.mkdir()
    assert read_measured(run) is None
    (run / "plan.json").write_text(json.dumps(plan))
    assert read_measured(run) is None, "a run that has not ended has measured nothing"
    cuda = plan["device"] == "cuda"
    taken = {"table_bytes": 5 * 2**20, "peak_rss_bytes": 3 * GIB, "peak_device_bytes": 7 * GIB if cuda else None}
    times = {"steps": 9, "step_ms": 102.4, "loading_ms": 2.5, "computing_ms": 99.9, "processor_ms": None}
    measured = [{"rank": rank, **taken, **times} for rank in range(plan["world_size"])]
    (run / "plan.json").write_text(json.dumps({**plan, "measured": measured}))
    table = read_measured(run)
    assert table is not None
    assert len(table.rows) == plan["world_size"]
    row, rank = dict(zip(table.head, table.rows[0], strict=True)), plan["ranks"][0]
    fixed = plan["budget"]["bank_bytes"] + plan["budget"]["dense_bytes"]
    if cuda:
        assert row["device mem planned"] == format_bytes(rank["hbm_bytes"] + fixed)
        assert row["host mem planned"] == format_bytes(rank["ddr_bytes"])
        assert table.rows[0][4] == "7.00 GiB"
    else:
        assert row["host mem planned"] == format_bytes(rank["ddr_bytes"] + fixed)
    assert (row["tables planned"], row["held"]) == (format_bytes(rank["table_bytes"]), "5.00 MiB")
    assert (row["peak"], row["a step"], row["processor"]) == ("3.00 GiB", "102", "-")
    shown = Page(to_html(plans, FACTS, table)).shown
    for text in (to_markdown(plans, FACTS, table), shown, to_text({**plan, "measured": measured})):
        assert "3.00 GiB" in text


def test_of_many_ranks_the_slowest_are_shown(plans: list[dict[str, Any]]) -> None:
    plan = plans[2]
    times = {"step_ms": 1.0, "loading_ms": 0.0, "computing_ms": 1.0, "processor_ms": 1.0}
    taken = {"table_bytes": 1, "peak_rss_bytes": 1, "peak_device_bytes": None}
    measured = [{"rank": rank, **taken, **times} for rank in range(40)]
    measured[33]["step_ms"] = 9.0
    many = {**plan, "ranks": plan["ranks"] * 3, "measured": measured}
    rows = measured_rows(many)[1:]
    assert [row[0] for row in rows] == [*map(str, range(15)), "33", "... and 24 faster ranks"]
