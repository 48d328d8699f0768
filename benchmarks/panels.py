"""Charts of a report side by side in one SVG file, for a document."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

__all__ = ["panels"]

STYLE = """<style>text{font:11px sans-serif;fill:#333}.grid{stroke:#ddd}.axis{stroke:#666}
.s0{color:#0067a3}.s1{color:#b35900}.s2{color:#2e7d32}.stroke{stroke:currentColor;stroke-width:1.8;fill:none}
.fill{fill:currentColor}.band{fill:currentColor;opacity:.15}</style>
<rect width="100%" height="100%" fill="#fff"/>"""
WIDTH, HEIGHT, CHART_HEIGHT = 340, 250, 220


def panels(charts: Mapping[str, Markup], columns: int = 1, legend: Sequence[str] = ()) -> str:
    """Return an SVG file with each chart under its name.

    Args:
        charts: What `torchrec_em3.plots.line_chart` returned, by name.
        columns: Charts in a row.
        legend: Names of the series, in their order; they stand in a line above all charts.
    """
    head, parts = 24 if legend else 0, []
    for place, name in enumerate(legend):
        parts.append(
            f'<g class="s{place}"><rect class="fill" x="{10 + 120 * place}" y="10" width="18" height="4"/></g>'
        )
        parts.append(f'<text x="{34 + 120 * place}" y="16">{escape(name)}</text>')
    for place, (name, chart) in enumerate(charts.items()):
        left, top = place % columns * WIDTH, place // columns * HEIGHT + head
        box = f'<svg x="{left}" y="{top + 24}" width="{WIDTH - 10}" height="{CHART_HEIGHT}" '
        parts.append(f'<text x="{left + 10}" y="{top + 16}">{escape(name)}</text>')
        parts.append(str(chart).replace("<svg ", box, 1))
    wide, high = WIDTH * columns, HEIGHT * -(-len(charts) // columns) + head
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}">'
    return f"{opening}{STYLE}{''.join(parts)}</svg>\n"
