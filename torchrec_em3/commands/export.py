"""`em3 export`: a run as a package that scores without the training code."""

from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.export import Exported, export_package
from torchrec_em3.parsing import CommandParser
from torchrec_em3.process_group import process_group
from torchrec_em3.runlog import configure_logging
from torchrec_em3.serving.rows import PRECISIONS
from torchrec_em3.trained_run import open_trained_run

DESCRIPTION = (
    "Write a package of a run's best checkpoint: tables, content of all items, vocabularies and the dense graph. "
    "It is compared with the model on the validation split first, and not written if the two differ."
)


def main(arguments: Sequence[str]) -> None:
    """Run `em3 export`."""
    parser = CommandParser("export", DESCRIPTION)
    parser.add_argument("run", type=str, help="Run folder of `em3 train`.")
    parser.add_argument("--out", type=str, required=True, help="Folder to make.")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8", help="How tables and content are stored.")
    parser.add_argument("--data", type=str, default="", help="Prepared folder, if it has moved since training.")
    values = parser.parse(arguments)
    out = Path(values.out)
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        trained = open_trained_run(Path(values.run), ranks, values.data)
        _say(out, export_package(trained, out, values.precision, ranks))


def _say(out: Path, exported: Exported) -> None:
    parity, ratio = exported.config.parity, exported.float_bytes / exported.table_bytes
    auc = "undefined" if parity["auc"] is None else f"{parity['auc']:.5f} -> {parity['package_auc']:.5f}"
    print(
        f"{parity['rows']} validation rows: largest change of a logit {parity['max_logit_change']:.2g}, AUC {auc}\n"
        f"tables and content {exported.table_bytes} bytes, {ratio:.2f} times smaller than float32; "
        f"package {exported.package_bytes} bytes\n"
        f"wrote {out}: {exported.config.version}\n"
        f"next: em3 serve {out}"
    )
