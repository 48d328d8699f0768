"""Items encoded and bytes exchanged in a step where each rank encodes its own targets, and where owners do it for all.

    python benchmarks/routing.py --data DATA --out benchmarks/results

Counted from the ids alone, for 1 to 256 ranks: targets of a prepared folder in shuffled epochs, and Zipf(1.1) items in
two orders of the catalogue, at random and by popularity. Nothing is trained, and no rank is started. Prints Markdown
tables; with `--out` writes them to routing.md and draws routing.svg.

Counted as exchanged is what leaves a rank for another one: the ids of targets, 8 bytes each, and their float32 rows.
local   rows of the bank, content and step, come from the owners, and the encoded ones go back to be written
owner   content comes from the owners with three numbers that say what became of it; gradients of all of it go back
What both forms exchange alike is left out: embeddings, bank rows of histories, contrastive loss, dense gradients.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from numpy.typing import NDArray
from panels import panels

from torchrec_em3.components.item_routing import owned_rows
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.plots import Line, line_chart

ID_BYTES, FLOAT_BYTES = 8, 4
NOTES = 3
"""Numbers beside the content of an item on its way home (see `torchrec_em3.content_path`)."""
ZIPF_EXPONENT = 1.1


@dataclass(frozen=True)
class Stream:
    """Target items of rows in the order of training: `items` over and over, of a catalogue of `item_rows` rows."""

    name: str
    items: NDArray[np.int64]
    item_rows: int

    def steps(self, rows: int, steps: int) -> Iterator[NDArray[np.int64]]:
        """Yield the targets of some global batches."""
        for step in range(steps):
            yield np.take(self.items, np.arange(step * rows, (step + 1) * rows), mode="wrap")


@dataclass(frozen=True)
class Counts:
    """Means over steps, of one step; `most` is the rank that has most, `mb` is 10^6 bytes, the mean of the ranks."""

    ranks: int
    local_all: float
    local_most: float
    local_mb: float
    owner_all: float
    owner_most: float
    owner_mb: float


def count_step(item_WB: NDArray[np.int64], item_rows: int, width: int) -> list[float]:
    """Return the fields of `Counts` after the first, for one global batch.

    Args:
        item_WB: Targets of each rank's rows.
        item_rows: Rows of the catalogue.
        width: Width of content.
    """
    ranks = len(item_WB)
    block = len(owned_rows(item_rows, 0, ranks))
    pairs = np.unique(item_WB + np.arange(ranks)[:, None] * item_rows)
    rank, item = np.divmod(pairs, item_rows)
    abroad = int((item // block != rank).sum())
    distinct = np.unique(item)
    row = FLOAT_BYTES * (width + 1)
    local_bytes = abroad * (ID_BYTES + row + ID_BYTES + row)
    owner_bytes = abroad * (ID_BYTES + 2 * FLOAT_BYTES * (width + NOTES))
    own, owned = np.bincount(rank, minlength=ranks), np.bincount(distinct // block, minlength=ranks)
    return [
        len(pairs), own.max(), local_bytes / ranks / 1e6, len(distinct), owned.max(), owner_bytes / ranks / 1e6,
    ]  # fmt: skip


def count(stream: Stream, ranks: int, batch_size: int, width: int, steps: int) -> Counts:
    """Count some steps of `ranks` ranks."""
    batches = stream.steps(ranks * batch_size, steps)
    found = [count_step(items.reshape(ranks, batch_size), stream.item_rows, width) for items in batches]
    return Counts(ranks, *np.mean(found, axis=0).tolist())


def streams(data: str, rows: int, num_items: int, seed: int) -> Iterator[Stream]:
    """Yield the streams, with `rows` rows at least of those that are drawn."""
    random = np.random.default_rng(seed)
    if data:
        prepared = PreparedData.open(Path(data))
        items = prepared.split_rows("train")["item"]
        epochs = [random.permutation(items) for _ in range(-(-rows // len(items)))]
        yield Stream(prepared.meta["dataset"], np.concatenate(epochs).astype(np.int64), prepared.item_rows)
    weight = np.arange(1, num_items + 1) ** -ZIPF_EXPONENT
    place = np.searchsorted(np.cumsum(weight / weight.sum()), random.random(rows)).clip(max=num_items - 1)
    name = f"Zipf({ZIPF_EXPONENT}) over {num_items:,} items"
    yield Stream(f"{name}, catalogue in random order", random.permutation(num_items)[place] + 1, num_items + 1)
    yield Stream(f"{name}, catalogue by popularity", place + 1, num_items + 1)


def table(found: list[Counts]) -> str:
    """Return a Markdown table."""
    lines = [
        "| ranks | encoded, local | owner | owner / local | on the rank with most, local | owner | owner / local "
        "| MB a rank, local | owner |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for counts in found:
        cells = (
            str(counts.ranks),
            f"{counts.local_all:,.0f}", f"{counts.owner_all:,.0f}", f"{counts.owner_all / counts.local_all:.3f}",
            f"{counts.local_most:,.0f}", f"{counts.owner_most:,.0f}", f"{counts.owner_most / counts.local_most:.3f}",
            f"{counts.local_mb:.3f}", f"{counts.owner_mb:.3f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drawing(results: Mapping[str, list[Counts]]) -> str:
    """Return an SVG file: for each stream what the rank with most has to encode over the number of ranks."""
    charts = {}
    for name, found in results.items():
        power = [float(np.log2(counts.ranks)) for counts in found]
        lines = [
            Line("local", 0, power, [counts.local_most for counts in found]),
            Line("owner", 1, power, [counts.owner_most for counts in found]),
        ]
        charts[name] = line_chart(lines, "log2 of the ranks", "items on the rank with most")
    return panels(charts, legend=("local", "owner"))


def main(
    data: str = "",
    batch_size: int = 2048,
    embedding_dim: int = 64,
    largest: int = 256,
    steps: int = 3,
    num_items: int = 1_000_000,
    seed: int = 0,
    out: str = "",
) -> None:
    """Print the tables.

    Args:
        data: Prepared folder whose training rows are counted; none leaves it out.
        batch_size: Rows per step on each rank.
        embedding_dim: Width of content.
        largest: Largest number of ranks; all powers of two up to it are counted.
        steps: Steps that are averaged.
        num_items: Items of the drawn streams.
        seed: Seed of the draws and of the order of rows.
        out: Folder for routing.md and routing.svg.
    """
    worlds = [2**power for power in range(largest.bit_length())]
    results = {
        stream.name: [count(stream, ranks, batch_size, embedding_dim, steps) for ranks in worlds]
        for stream in streams(data, worlds[-1] * batch_size * steps, num_items, seed)
    }
    intro = (
        "# Encoding targets on their owners\n\nCounted from ids, nothing is run: distinct targets that are encoded in "
        f"a step, over all ranks and on the rank with most, and megabytes that leave a rank for others. {batch_size:,} "
        f"rows a rank, width {embedding_dim}, every target encoded, mean of {steps} steps. Printed by\n\n"
        f"```\npython benchmarks/routing.py {shlex.join(sys.argv[1:])}\n```\n\n"
        "![Items to encode on the rank with most](routing.svg)\n"
    )
    text = "\n".join([intro, *(f"## {name}\n\n{table(found)}\n" for name, found in results.items())])
    print(text)
    if out:
        Path(out, "routing.md").write_text(text, encoding="utf-8")
        Path(out, "routing.svg").write_text(drawing(results), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
