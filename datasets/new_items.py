"""Items that are new to a prepared folder: read, and turned to tokens by the encoders that the folder was made with.

Row 0 is "unknown", as in a catalogue.
"""

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from torchrec_em3.datasets.encoder_record import rebuild_encoder
from torchrec_em3.datasets.ids import check_distinct
from torchrec_em3.datasets.movielens_catalogue import read_catalogue
from torchrec_em3.datasets.parquet_folder import read_items
from torchrec_em3.datasets.parquet_table import ParquetTable
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw import RawItems
from torchrec_em3.datasets.tables import Layout, column_names, find_file, read_table
from torchrec_em3.datasets.token_reduction import project_tokens
from torchrec_em3.datasets.tokens import TokenStore, write_tokens
from torchrec_em3.errors import ConfigError, DataError

__all__ = ["encode_new_items", "read_new_items"]

PICTURE_FOLDERS = ("posters", "images")
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

_ITEMS_CSV = Layout(",", quoted=True, renames=(("movie_id", "item_id"),))
_CONTROL = re.compile(r"[\x00-\x1f\x7f\s]+")

logger = logging.getLogger(__name__)


def read_new_items(folder: Path) -> RawItems:
    """Read `items.parquet` or `items.csv` and find the pictures beside it.

    Parquet is read as `em3 prepare parquet` reads it. In CSV with a column `text` the text encoder reads that, as it
    stands. Without one the file is read as MovieLens items are: the text is made of title, genres and plot.

    Args:
        folder: Holds `items.parquet` (or parts in `items/`) or `items.csv` (`item_id` and any of `title`, `text` or
            MovieLens' columns), and pictures by item id in `posters/` or `images/`.

    Returns:
        The items in the order of the file; `image` is relative to `folder`.

    Raises:
        DataError: If there is no such file, it is malformed, or two items have the same id.
    """
    table, path = ParquetTable.find(folder, "items"), find_file(folder, "items.csv")
    if table is not None:
        items = read_items(table, folder / "images")
        items = replace(items, image=np.array([name and f"images/{name}" for name in items.image], dtype=object))
    elif path is not None:
        names = column_names(path, _ITEMS_CSV)
        items = _read_texts(path, names) if "text" in names else read_catalogue(folder, [])
    else:
        raise DataError(f"{folder}: no items.parquet or items.csv; it needs the columns item_id, title and text")
    if not len(items.item_id):
        raise DataError(f"{folder}: its table holds no items")
    pictures = _find_pictures(folder)
    image = [named or pictures.get(item, "") for named, item in zip(items.image, items.item_id, strict=True)]
    return replace(items, image=np.array(image, dtype=object))


def encode_new_items(items: RawItems, folder: Path, data: PreparedData, out: Path, batch_size: int = 64) -> TokenStore:
    """Write the tokens of new items as `em3 prepare` would have, had the items been there.

    Args:
        items: The items.
        folder: What `items.image` is relative to.
        data: The prepared folder, which names the encoders and holds the reductions; only read.
        out: Where the tokens go, with one folder a modality; item i is row i + 1.
        batch_size: Items that an encoder reads at a time.

    Raises:
        ConfigError: If the folder has no tokens, or an encoder is not to be had or not the one that made them.
    """
    if not data.meta["modalities"]:
        raise ConfigError(
            f"{data.folder} was prepared without encoders, and new items have no semantic codes; prepare with one"
        )
    if data.meta.get("codes"):
        logger.warning(
            "new items have no semantic codes; their content comes from %s", ", ".join(data.meta["modalities"])
        )
    # All encoders before any work, so that a wrong one costs none.
    encoders = {name: rebuild_encoder(name, recorded) for name, recorded in sorted(data.meta["modalities"].items())}
    inputs: dict[str, list[str | Path | None]] = {
        "text": items.text.tolist(),
        "image": [folder / name if name else None for name in items.image.tolist()],
    }
    for modality, encoder in encoders.items():
        cut = data.meta["modalities"][modality].get("cut")
        write_tokens(out / modality, encoder, [None, *inputs[modality]], batch_size, cut)
        directions = data.tokens_folder / modality / "reduction.npy"
        if directions.is_file():
            project_tokens(out / modality, np.load(directions))
    return TokenStore(out)


def _read_texts(path: Path, names: tuple[str, ...]) -> RawItems:
    wanted = [name for name in ("item_id", "title", "text") if name in ("item_id", *names)]
    columns = read_table(path, _ITEMS_CSV, dict.fromkeys(wanted, pa.string()), known=None).to_pydict()
    check_distinct(columns["item_id"], path, "item_id", first_row=2)
    nothing = [""] * len(columns["item_id"])
    return RawItems(
        item_id=np.array(columns["item_id"], dtype=object),
        title=np.array([_CONTROL.sub(" ", title) for title in columns.get("title", nothing)], dtype=object),
        text=np.array(columns["text"], dtype=object),
        image=np.array(nothing, dtype=object),
        category=np.array(nothing, dtype=object),
    )


def _find_pictures(folder: Path) -> dict[str, str]:
    """Return paths by item id; where both folders have one, that of the first stays."""
    found: dict[str, str] = {}
    for name in PICTURE_FOLDERS:
        for path in sorted((folder / name).glob("*")):
            if path.suffix.lower() in PICTURE_SUFFIXES:
                found.setdefault(path.stem, f"{name}/{path.name}")
    return found
