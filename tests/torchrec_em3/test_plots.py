import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_em3.number_format import count, date, decimals, percent, short_count, signed, size, three_digits
from torchrec_em3.plots import Bar, BarGroup, Dot, Line, bar_chart, line_chart, map_chart, reliability_chart, short

EVIL = "<script>&\"'"
NUMBERS = st.floats(-1e9, 1e9, allow_nan=False).map(lambda x: round(x, 6))


def elements(chart, tag):
    """Elements of a chart by tag; fails if the chart is not well-formed."""
    return [element for element in ET.fromstring(str(chart)).iter() if element.tag == tag]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_lines_stay_inside_the_drawing(points):
    chart = line_chart([Line("a", 0, *zip(*points, strict=True))], "x", "y")
    _, _, width, height = map(float, ET.fromstring(str(chart)).attrib["viewBox"].split())
    for circle in elements(chart, "circle"):
        assert 0 <= float(circle.attrib["cx"]) <= width
        assert 0 <= float(circle.attrib["cy"]) <= height
    assert len(elements(chart, "circle")) == len(points)
    ticks = [t for t in elements(chart, "text") if t.attrib["class"] == "tick"]
    assert 2 <= len(ticks) <= 20


def test_higher_values_are_drawn_higher():
    chart = line_chart([Line("a", 0, [0, 1, 2], [0.1, 0.5, 0.3])], "rows", "AUC")
    ys = [float(circle.attrib["cy"]) for circle in elements(chart, "circle")]
    assert ys[1] < ys[2] < ys[0]
    assert [title.text for title in elements(chart, "title")][1:] == ["a: 0.1 at 0", "a: 0.5 at 1", "a: 0.3 at 2"]


def test_bars_grow_from_the_base_up_and_down():
    bars = [Bar("a", 0, 0.7), Bar("b", 1, 0.4), Bar("c", 2, None)]
    chart = bar_chart([BarGroup("0", "n = 5", bars, mark=0.8)], "AUC", 0.5)
    up, down = elements(chart, "rect")
    assert float(up.attrib["y"]) + float(up.attrib["height"]) == pytest.approx(float(down.attrib["y"]), abs=0.11)
    assert float(up.attrib["height"]) == pytest.approx(2 * float(down.attrib["height"]), rel=0.02)
    [mark] = [line for line in elements(chart, "line") if line.attrib["class"] == "mark"]
    assert float(mark.attrib["y1"]) < float(up.attrib["y"])


def test_texts_are_escaped():
    charts = [
        line_chart([Line(EVIL, 0, [1], [2])], EVIL, EVIL),
        bar_chart([BarGroup(EVIL, EVIL, [Bar(EVIL, 0, 0.6)])], EVIL, 0.5),
        reliability_chart([Line(EVIL, 0, [0.1], [0.2], [0.1], [0.3])]),
        map_chart([Dot(0.5, 0.5, 3, EVIL)], EVIL),
    ]
    for chart in charts:
        assert "<script" not in chart
        assert EVIL in [title.text for title in elements(chart, "title")] or "&lt;script&gt;" in chart


def test_nothing_to_draw_draws_nothing():
    assert not line_chart([Line("a", 0, [], [])], "x", "y")
    assert not bar_chart([BarGroup("a", "", [Bar("a", 0, None)])], "y", 0.5)
    assert not reliability_chart([])


def test_unseen_items_are_hollow_and_on_top():
    chart = map_chart([Dot(0, 0, 0, "cold", hollow=True), Dot(1, 1, 1, "warm")], "map")
    warm, cold = elements(chart, "path")
    assert "hollow" in cold.attrib["class"]
    assert "hollow" not in warm.attrib["class"]
    assert cold.attrib["d"] != warm.attrib["d"]


def test_series_and_categories_differ_in_more_than_colour():
    chart = line_chart([Line("a", 0, [0, 1], [0, 1]), Line("b", 1, [0, 1], [1, 0])], "x", "y")
    assert len({line.attrib["stroke-dasharray"] for line in elements(chart, "polyline")}) == 2
    shapes = {path.attrib["d"][-30:] for path in elements(map_chart([Dot(0, 0, k, "") for k in range(4)], ""), "path")}
    assert len(shapes) == 4


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (short(1500), "1.5k"),
        (short(2_500_000), "2.5M"),
        (short(0.25), "0.25"),
        (decimals(0.79126), "0.7913"),
        (decimals(None), "\N{EN DASH}"),
        (decimals(float("nan")), "\N{EN DASH}"),
        (decimals("x"), "\N{EN DASH}"),
        (decimals(True), "\N{EN DASH}"),
        (signed(0.0123), "+0.0123"),
        (signed(-0.5, 2), "\N{MINUS SIGN}0.50"),
        (count(1234567), "1,234,567"),
        (short_count(189_234), "189 k"),
        (short_count(999_600), "1.00 M"),
        (short_count(12), "12"),
        (percent(0.786), "79%"),
        (size(None), "\N{EN DASH}"),
        (size(3 * 2**30), "3.00 GiB"),
        (three_digits(0.12234), "0.122"),
        (three_digits(12.345), "12.3"),
        (three_digits(0.9999), "1.00"),
        (three_digits(0), "0"),
        (three_digits(1234.5), "1234"),
        (date(978307200), "2001-01-01 00:00 UTC"),
        (date(1e20), "100,000,000,000,000,000,000"),
    ],
)
def test_numbers_as_people_read_them(text, want):
    assert text == want
