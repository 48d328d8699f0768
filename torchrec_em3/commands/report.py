"""`em3 report`: compare runs in one self-contained HTML file."""

from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.config import NONE
from torchrec_em3.datasets.remote_folder import local_folder
from torchrec_em3.item_attention import choose_items, read_attention
from torchrec_em3.parsing import CommandParser
from torchrec_em3.process_group import process_group
from torchrec_em3.registry import TOWERS
from torchrec_em3.report import AttentionReading, write_report
from torchrec_em3.run_folder import read_run
from torchrec_em3.runlog import configure_logging
from torchrec_em3.trained_run import open_trained_run

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
    parser.add_argument(
        "--attention",
        type=str,
        default="",
        help="Raw ids of items, joined by commas, or auto: shows what the first run with queries attends to in them.",
    )
    values = parser.parse(arguments)
    configure_logging(first_rank=True)
    runs = [Path(run) for run in values.runs]
    out = Path(values.out) if values.out else runs[0] / "report.html"
    data, images = (local_folder(values.data) if values.data else None, Path(values.images) if values.images else None)
    attention = _read_attention(runs, values.attention, values.data) if values.attention else None
    print(f"wrote {write_report(runs, out, data, images, attention)}")


def _read_attention(runs: Sequence[Path], wanted: str, data_folder: str) -> AttentionReading:
    """Look into items by the first run whose tower has queries, or the first of all, which then is refused."""
    run = next((run for run in runs if _has_queries(run)), runs[0])
    with process_group() as ranks:
        trained = open_trained_run(run, ranks, data_folder)
        return AttentionReading(run.name, read_attention(trained, choose_items(trained.data, wanted)), trained.data)


def _has_queries(run: Path) -> bool:
    tower = read_run(run).model.content
    return tower != NONE and hasattr(TOWERS.get(tower).build, "token_attention")
