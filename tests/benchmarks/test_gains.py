import json
import xml.etree.ElementTree as ET
from statistics import mean

import pytest

from tests.benchmarks.scripts import load
from tests.documents import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_chart_is_of_the_committed_lines(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    load(monkeypatch, "gains").main(out=str(tmp_path / "gains.svg"))
    assert (tmp_path / "gains.svg").read_text() == (RESULTS / "gains.svg").read_text()


def test_a_chart_shows_the_means_over_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    load(monkeypatch, "gains").main(suites=("amazon",), ranker="DCN-V2", out=str(tmp_path / "gains.svg"))
    lines = [json.loads(line) for line in (RESULTS / "suite-amazon.jsonl").read_text().splitlines()]
    there = {"split": "cold_items", "ranker": "DCN-V2", "row": "EM3", "dataset": "Sports"}
    runs = [line for line in lines if there.items() <= line.items()]
    expected = mean(run["test"]["slices"]["item_frequency"]["0"]["auc"] for run in runs)
    drawing = ET.parse(tmp_path / "gains.svg").getroot()
    assert len(drawing.findall(f"{SVG}svg")) == 3
    assert f"EM3: {expected:.4g} at 0" in [title.text for title in drawing.iter(f"{SVG}title")]
