"""`em3 report`: compare runs in one self-contained HTML file."""

from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.parsing import CommandParser
from torchrec_em3.report import write_report
from torchrec_em3.runlog import configure_logging

DESCRIPTION = "Compare runs side by side in one HTML file that needs no network."


def main(arguments: Sequence[str]) -> None:
    """Run `em3 report`."""
    parser = CommandParser("report", DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=str, help="Run folders; EM3 runs are compared with ID-only ones.")
    parser.add_argument(
        "--out", type=str, default="", help="File to write; report.html beside the first run by default."
    )
    parser.add_argument("--data", type=str, default="", help="Prepared folder, if it has moved since training.")
    parser.add_argument(
        "--images", type=str, default="", help="Folder the pictures were prepared from; shows items and neighbours."
    )
    values = parser.parse(arguments)
    configure_logging(first_rank=True)
    runs = [Path(run) for run in values.runs]
    out = Path(values.out) if values.out else runs[0] / "report.html"
    data, images = (Path(folder) if folder else None for folder in (values.data, values.images))
    print(f"wrote {write_report(runs, out, data, images)}")
