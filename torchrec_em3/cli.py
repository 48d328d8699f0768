"""The command `em3`: picks the subcommand and turns errors into one line and an exit code."""

import importlib
import os
import sys
from collections.abc import Sequence

import torchrec_em3
from torchrec_em3.errors import EM3Error
from torchrec_em3.registry import closest

__all__ = ["main"]

COMMANDS = {
    "demo": "simulate a catalogue, train ID-only and EM3, and compare them in a report",
    "prepare": "turn raw files into a prepared folder: splits, histories, encoder tokens",
    "train": "train a model on a prepared folder",
    "follow": "train on shards of events as they arrive, each measured before it is trained on",
    "shard": "write a split of a prepared folder as shards, to try `em3 follow`",
    "profile": "train a few steps and show where their time goes, by part of the model",
    "evaluate": "measure a trained run again",
    "embed": "write the embeddings of all items, or of new ones, for search and serving",
    "neighbours": "print the items nearest to one item, by content and by ID",
    "export": "write a package that scores without the training code",
    "score": "score a Parquet file with a package",
    "serve": "score over HTTP with a package",
    "plan": "show how TorchRec's planner would shard the tables, also for a cluster that is not there",
    "report": "compare runs in one self-contained HTML file",
    "parts": "list the pluggable parts and their options",
}
EXIT_CODES = "exit codes: 0 done, 2 usage, 3 data, 4 checkpoint, 5 numeric, 6 preempted (checkpoint saved), 7 hung step"


def _help() -> str:
    lines = [f"  {name:<12}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: em3 COMMAND [options]        em3 COMMAND --help        em3 --version",
            "",
            "End-to-end training of a multimodal model and a ranking model (EM3) on TorchRec.",
            "",
            *lines,
            "",
            EXIT_CODES,
            "",
        ]
    )


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors of ours become one line on standard error."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"torchrec-em3 {torchrec_em3.__version__}\n")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        sys.stderr.write(
            f"em3: unknown command '{name}'; commands: {', '.join(COMMANDS)}.{closest(name, list(COMMANDS))}\n"
        )
        return 2
    try:
        # Loading TorchRec takes seconds; --version and a mistyped command should not.
        importlib.import_module(f"torchrec_em3.commands.{name}").main(arguments[1:])
    except EM3Error as error:
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"em3 {name}{'' if rank == '0' else f' (rank {rank})'}: {error}\n")
        return error.exit_code
    return 0


def main() -> None:
    """Entry point of the console script and of `python -m torchrec_em3`."""
    # A plug-in may lie in the working directory; last, so that nothing there hides an installed package.
    sys.path.append(os.getcwd())
    sys.exit(run(sys.argv[1:]))
