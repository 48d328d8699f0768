"""`em3 neighbours`: the items nearest to one item, by content and by ID."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.build import open_data
from torchrec_em3.checkpoint import CheckpointFolder
from torchrec_em3.errors import ConfigError
from torchrec_em3.item_embeddings import ItemEmbeddings, embed_catalogue
from torchrec_em3.neighbours import SPACES, Neighbour, find_items, nearest_items
from torchrec_em3.parsing import CommandParser
from torchrec_em3.process_group import process_group
from torchrec_em3.run_folder import check_data, read_run
from torchrec_em3.runlog import configure_logging
from torchrec_em3.trained_run import best_step, describe_origin, open_trained_run

DESCRIPTION = "Print the items nearest to one item by cosine, by content and by ID where it has both."
MAX_CANDIDATES = 20
WIDTH = 48
HEADINGS = {"content": "by content", "id": "by ID"}


def main(arguments: Sequence[str]) -> None:
    """Run `em3 neighbours`."""
    parser = CommandParser("neighbours", DESCRIPTION)
    parser.add_argument("run", type=str, help="Run folder of `em3 train`.")
    parser.add_argument("item", type=str, help="Raw id of an item, or part of its title.")
    parser.add_argument("--top", type=int, default=10, help="Neighbours to print.")
    parser.add_argument("--by", choices=list(SPACES), default=None, help="Print one kind only.")
    parser.add_argument("--data", type=str, default="", help="Prepared folder, if it has moved since training.")
    values = parser.parse(arguments)
    if values.top < 1:
        raise ConfigError(f"--top is {values.top}, must be at least 1")
    configure_logging(first_rank=True)
    items = _embeddings(Path(values.run), values.data)
    item = _choose(items, values.item)
    spaces = (values.by,) if values.by else SPACES
    found = {space: nearest_items(items, item, space, values.top) for space in spaces}
    columns = {space: near for space, near in found.items() if near is not None}
    if not columns:
        raise ConfigError(_why_not(items, item, spaces))
    print(_name(items, item))
    print(_side_by_side(items, columns))


def _embeddings(run: Path, data_folder: str) -> ItemEmbeddings:
    """Return what `em3 embed` wrote, or write it if it is not there or of another checkpoint."""
    config = read_run(run)
    with process_group() as ranks:
        data = open_data(dataclasses.replace(config, data=data_folder or config.data))
        check_data(run, data)
        checkpoints = CheckpointFolder(run / "checkpoints", ranks)
        origin = describe_origin(checkpoints, best_step(run, checkpoints), data)
        items = ItemEmbeddings.read(run / "items", origin)
        if items is None:
            items = embed_catalogue(open_trained_run(run, ranks, data_folder), ranks)
            assert items is not None, "a single process is rank 0"
            items.write(run / "items")
    return items


def _choose(items: ItemEmbeddings, wanted: str) -> int:
    """Return the one item that is meant; print the candidates if there are several."""
    found = find_items(items, wanted)
    if len(found) == 1:
        return found[0]
    print("\n".join(_name(items, item) for item in found[:MAX_CANDIDATES]))
    more = f", of which {MAX_CANDIDATES} are shown" if len(found) > MAX_CANDIDATES else ""
    raise ConfigError(f"'{wanted}' is part of {len(found)} titles{more}; give an id or more of the title")


def _why_not(items: ItemEmbeddings, item: int, spaces: Sequence[str]) -> str:
    reasons = {
        "content": "has neither text nor picture" if "content" in items.vectors else "is in a run without content",
        "id": "has no training row, so no ID embedding of its own",
    }
    return f"item {items.raw_id[item]} {' and '.join(reasons[space] for space in spaces)}; choose another item or --by"


def _name(items: ItemEmbeddings, item: int, width: int | None = None) -> str:
    """Return title and id; a title that makes it longer than `width` is cut, the id never."""
    title, raw_id = items.title[item] or "untitled", f"  [{items.raw_id[item]}]"
    if width is not None and len(title) + len(raw_id) > width:
        title = f"{title[: max(width - len(raw_id) - 3, 0)]}..."
    return title + raw_id


def _side_by_side(items: ItemEmbeddings, columns: dict[str, list[Neighbour]]) -> str:
    """Return the neighbours of each space in a column of its own."""
    lines = ["     " + "".join(f" {HEADINGS[space]:<{WIDTH + 7}}" for space in columns).rstrip()]
    for place in range(max(len(near) for near in columns.values())):
        cells = [_cell(items, near, place) for near in columns.values()]
        lines.append(f"{place + 1:>3}  {''.join(cells)}".rstrip())
    return "\n".join(lines)


def _cell(items: ItemEmbeddings, near: list[Neighbour], place: int) -> str:
    if place >= len(near):
        return " " * (WIDTH + 8)
    return f"{near[place].similarity:5.2f}  {_name(items, near[place].item, WIDTH):<{WIDTH}} "
