"""`em3 export`: a run as a package that scores without the training code, or as a folder for the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.errors import ConfigError
from torchrec_em3.export import Exported, export_package
from torchrec_em3.export_parity import Parity
from torchrec_em3.hub import save_pretrained
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
    parser.add_argument(
        "--format", choices=["package", "hub"], default="package", help="hub: model.safetensors, config, model card."
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=None,
        help="How a package stores its tables; int8 by default.",
    )
    parser.add_argument("--data", type=str, default="", help="Prepared folder, if it has moved since training.")
    values = parser.parse(arguments)
    run, out, hub = Path(values.run), Path(values.out), values.format == "hub"
    if hub and values.precision not in (None, "fp32"):
        raise ConfigError(f"--format hub is written in fp32, not {values.precision}; leave --precision out")
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        trained = open_trained_run(run, ranks, values.data)
        if hub:
            parity = save_pretrained(trained, run, out, ranks)
            print(f"{_describe(parity)}\nwrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
        else:
            _say(out, export_package(trained, out, values.precision or "int8", ranks))


def _say(out: Path, exported: Exported) -> None:
    ratio = exported.float_bytes / exported.table_bytes
    print(
        f"{_describe(exported.parity)}\n"
        f"tables and content {exported.table_bytes} bytes, {ratio:.2f} times smaller than float32; "
        f"package {exported.package_bytes} bytes\n"
        f"wrote {out}: {exported.version}\n"
        f"next: em3 serve {out}"
    )


def _describe(parity: Parity) -> str:
    auc = "undefined" if parity.auc is None else f"{parity.auc:.5f} -> {parity.package_auc:.5f}"
    edges = f" ({parity.exempt} rows at the edge of a similarity tier left out)" if parity.exempt else ""
    return f"{parity.rows} validation rows: largest change of a logit {parity.max_logit_change:.2g}{edges}, AUC {auc}"
