import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tests.benchmarks.scripts import load


def test_counts_are_those_of_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = load(monkeypatch, "routing")
    item_rows, width = 10, 4
    item_WB = np.array([[1, 1, 2, 9], [2, 5, 9, 9], [9, 9, 9, 9]])
    own = [set(items) for items in item_WB.tolist()]
    owned = [{item for item in set.union(*own) if item // 4 == rank} for rank in range(3)]
    abroad = sum(len(mine - theirs) for mine, theirs in zip(own, owned, strict=True))
    assert (abroad, [len(items) for items in owned]) == (3, [2, 1, 1])
    local = abroad * 2 * (8 + 4 * (width + 1)) / 3e6
    owner = abroad * (8 + 2 * 4 * (width + 3)) / 3e6
    assert routing.count_step(item_WB, item_rows, width) == pytest.approx([7, 3, local, 4, 2, owner])


def test_the_report_has_a_table_and_a_chart_for_each_stream(
    monkeypatch: pytest.MonkeyPatch, tmp_path, tiny_data
) -> None:
    routing = load(monkeypatch, "routing")
    routing.main(data=str(tiny_data), batch_size=64, largest=4, num_items=500, out=str(tmp_path))
    assert (tmp_path / "routing.md").read_text().count("\n| 4 |") == 3
    drawing = ET.parse(tmp_path / "routing.svg").getroot()
    assert len(drawing.findall("{http://www.w3.org/2000/svg}svg")) == 3
