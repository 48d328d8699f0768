"""Products from Amazon's metadata of 2014, 2018 and 2023: what a text encoder reads of each, and its picture."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_em3.datasets.picture_download import local_pictures
from torchrec_em3.datasets.plain_text import plain_text
from torchrec_em3.datasets.raw import RawItems
from torchrec_em3.datasets.records import Record, read_records
from torchrec_em3.errors import DataError

__all__ = ["CONTENT_FIELDS", "ITEM_FIELDS", "Product", "describe_product", "raw_items", "read_products"]

ITEM_FIELDS = ("parent_asin", "asin")
"""Names of an item's id: that of 2023, where an `asin` is one of several variants of the item, and the older one."""

CONTENT_FIELDS = ("title", "description", "categories", "category", "imUrl")
"""Fields of which a line of metadata has at least one, in any year."""

_MAX_TEXT = 2000  # characters; several times what any of the text encoders reads
_CATEGORY_LEVELS = slice(1, 4)  # the first level is the name of the whole data set; below the fourth come bullet points
# Beginnings of page scripts stand in place of some titles of 2018.
_SCRIPT = "getTime"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    """What the metadata says of one item; each may be "".

    Attributes:
        title: Title in plain words.
        text: What the text encoder reads.
        category: Second level of the category path, or the first where there is no other.
        picture: Address of its picture.
    """

    title: str = ""
    text: str = ""
    category: str = ""
    picture: str = ""


def read_products(path: Path, wanted: Iterable[str]) -> dict[str, Product]:
    """Read the metadata of the items wanted; a line at a time, so the file may have any size.

    Args:
        path: One product a line, JSON or Python literals, plain or gzip.
        wanted: Item ids.

    Returns:
        Product by id, for the items that the file knows. Where it repeats an item the first line counts.

    Raises:
        DataError: With file, row and field, if a line is malformed or has no id.
    """
    wanted = frozenset(wanted)
    products: dict[str, Product] = {}
    repeated = 0
    for row, record in read_records(path):
        item = next((record[name] for name in ITEM_FIELDS if record.get(name)), None)
        if not isinstance(item, str):
            raise DataError(f"{path} row {row}: no {' or '.join(ITEM_FIELDS)} among {', '.join(record)[:80]}")
        if item in products:
            repeated += 1
        elif item in wanted:
            products[item] = describe_product(record)
    if repeated:
        logger.warning("%s: %d lines describe an item again; the first was kept", path, repeated)
    logger.info("%s: describes %d of %d items", path, len(products), len(wanted))
    return products


def raw_items(item_id: np.ndarray, products: Mapping[str, Product], images: Path | None) -> RawItems:
    """Return the catalogue of `item_id`; an item without product or picture has empty fields.

    Args:
        item_id: Distinct ids, str.
        products: What is known of them.
        images: Folder with pictures called `<item id>.jpg` (or .jpeg, .png, .webp), or None.

    Raises:
        DataError: If `images` is not a folder.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: not a folder; give the folder that holds the pictures <item id>.jpg")
    pictures = local_pictures(images) if images is not None else {}
    known = [products.get(item, Product()) for item in item_id.tolist()]
    undescribed = [item for item in item_id.tolist() if item not in products]
    if undescribed and products:
        logger.warning("%d items (first: %s) are not described; they have no text", len(undescribed), undescribed[0])
    return RawItems(
        item_id=item_id.astype(object),
        title=np.array([product.title for product in known], dtype=object),
        text=np.array([product.text for product in known], dtype=object),
        image=np.array([pictures.get(item, "") for item in item_id.tolist()], dtype=object),
        category=np.array([product.category for product in known], dtype=object),
    )


def describe_product(record: Record) -> Product:
    """Return title, text, category and picture of one line of metadata.

    The text is title, brand (unless the title names it), categories, features, description: the most telling words
    first, because encoders cut off the end.
    """
    title = _first(record.get("title"))
    if _SCRIPT in title:
        title = ""
    brand = _first(record.get("brand") or record.get("store"))
    path = _category_path(record.get("categories") or record.get("category"))
    parts = [
        title,
        brand if brand.lower() not in title.lower() else "",
        ", ".join(dict.fromkeys(path[_CATEGORY_LEVELS])),
        *_texts(record.get("features") or record.get("feature")),
        *_texts(record.get("description")),
    ]
    text = " ".join(part if part[-1] in ".!?" else f"{part}." for part in parts if part)
    category = path[min(1, len(path) - 1)] if path else ""
    return Product(title, text[:_MAX_TEXT], category, _picture(record))


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """Yield the texts of a field, which some years give as one text, others as a list or a list of lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple) and depth < 3:
        for one in value:
            yield from _strings(one, depth + 1)


def _texts(value: Any) -> list[str]:
    return [text for one in _strings(value) if (text := plain_text(one))]


def _first(value: Any) -> str:
    return next(iter(_texts(value)), "")


def _category_path(value: Any) -> list[str]:
    """Return the names on the way to the product; of several ways (2014) the first."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    return _texts(value)


def _picture(record: Record) -> str:
    """Return the address of the product's main picture, in a size above that of a thumbnail where there is one."""
    images = record.get("images")
    if isinstance(images, list):  # 2023; in the list, the main picture is marked
        shown = [image for image in images if isinstance(image, dict)]
        shown.sort(key=lambda image: image.get("variant") != "MAIN")
        candidates: list[Any] = [image.get(size) for image in shown for size in ("large", "hi_res", "thumb")]
    else:
        candidates = [record.get(name) for name in ("imageURLHighRes", "imageURL", "imUrl")]
    return next((text.strip() for text in _strings(candidates) if text.strip()), "")
