"""`em3 embed`: the embeddings of a run's items, or of new items, as files."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from torchrec_em3.config import NONE
from torchrec_em3.datasets.new_items import encode_new_items, read_new_items
from torchrec_em3.errors import ConfigError
from torchrec_em3.item_embeddings import ItemEmbeddings, embed_catalogue, embed_new_items, import_faiss
from torchrec_em3.parsing import CommandParser
from torchrec_em3.parts import load_plugins
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.run_folder import read_run
from torchrec_em3.runlog import configure_logging
from torchrec_em3.trained_run import TrainedRun, open_trained_run

DESCRIPTION = (
    "Write content and ID embeddings of all items of a run, those never trained on included, as Parquet and "
    "safetensors; or those of new items, by their texts and pictures alone."
)


def main(arguments: Sequence[str]) -> None:
    """Run `em3 embed`."""
    values = _parse(arguments)
    run = Path(values.run)
    load_plugins(values.plugins)
    _check_content(run, values)
    with process_group() as ranks:
        configure_logging(ranks.is_first)
        trained = open_trained_run(run, ranks, values.data)
        if values.new_items:
            out = Path(values.out) if values.out else run / "new_items"
            embeddings = _embed_new(trained, Path(values.new_items), ranks)
        else:
            out = Path(values.out) if values.out else run / "items"
            embeddings = embed_catalogue(trained, ranks)
        if embeddings is not None:
            embeddings.write(out, faiss=values.faiss)
            _say(embeddings, out, run, new=bool(values.new_items))
        ranks.barrier()


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = CommandParser("embed", DESCRIPTION)
    parser.add_argument("run", type=str, help="Run folder of `em3 train`.")
    parser.add_argument(
        "--out", type=str, default="", help="Folder to write; RUN/items, or RUN/new_items for new items, by default."
    )
    parser.add_argument(
        "--new_items",
        type=str,
        default="",
        help="Folder with items.parquet or else items.csv, and pictures; these are embedded instead.",
    )
    parser.add_argument("--faiss", action="store_true", help="Also write a FAISS index over the content.")
    parser.add_argument("--data", type=str, default="", help="Prepared folder, if it has moved since training.")
    parser.add_argument("--plugins", type=str, default="", help="Modules that register the encoders of the data.")
    return parser.parse(arguments)


def _check_content(run: Path, values: Namespace) -> None:
    """Refuse what cannot be had, before the model is built."""
    if values.faiss:
        import_faiss()
    for option in ("new_items", "faiss"):
        if getattr(values, option) and read_run(run).model.content == NONE:
            raise ConfigError(
                f"--{option} needs content, and {run} was trained with --model.content none, by IDs alone; "
                "give a run with a content tower"
            )


def _embed_new(trained: TrainedRun, folder: Path, ranks: Ranks) -> ItemEmbeddings | None:
    """Embed the items of `folder` on rank 0; no other is needed, the dense weights are the same on all."""
    if not ranks.is_first:
        return None
    items = read_new_items(folder)
    with tempfile.TemporaryDirectory() as tokens:
        store = encode_new_items(items, folder, trained.data, Path(tokens))
        return embed_new_items(trained, items, store)


def _say(embeddings: ItemEmbeddings, out: Path, run: Path, *, new: bool) -> None:
    count, known, present = len(embeddings.raw_id), int(embeddings.known_N.sum()), int(embeddings.present_N.sum())
    having = [f"{present} with content"] if "content" in embeddings.vectors else []
    having += [] if new else [f"{known} with an ID embedding"]
    print(f"wrote {out}: {count} {'new ' if new else ''}items, {', '.join(having)}")
    if not new:
        print(f"next: em3 neighbours {run} '{next(filter(None, embeddings.title), embeddings.raw_id[0])}'")
