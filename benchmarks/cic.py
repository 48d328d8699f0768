"""Memory and time of the contrastive loss: the plain form with its B x B matrix against the tiled one.

    OMP_NUM_THREADS=1 python benchmarks/cic.py
    OMP_NUM_THREADS=1 python benchmarks/cic.py --sizes '[2048, 8192]' --markdown true
    OMP_NUM_THREADS=1 python benchmarks/cic.py --sizes '[131072]' --repeats 1            # 2 to 3 minutes

One step is loss and gradients of both sides and the scale, float32, a tenth of the rows repeating an item. Every figure
comes from a fresh process: peak memory above what was there before the first step, and process CPU seconds (user and
system, the least of the repeats), which other jobs on the machine disturb less than wall time.

What limits the tiled form is arithmetic, not memory: four products of 2 B^2 D floating-point operations (similarities
twice, because the second pass makes them again; then the two gradients) and two exponentials an element. The floor
printed below the table is that work at the speed of the same product and exponential on one tile, timed in this run;
what is above it are two weighted sums, an addition and a multiplication an element. Much of the plain form's time is
page faults of its B x B buffers, which come fresh from the system in every step; with
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment they are paid only once.
"""

import functools
import multiprocessing
import os
import pathlib
import resource
import sys
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

import jsonargparse
import psutil
import torch
from torch import Tensor, nn

from torchrec_em3.components.alignment.info_nce import info_nce
from torchrec_em3.components.alignment.tiled import CPU_TILE

MIB = 2.0**20
PLAIN_BYTES = 17  # an element of the plain form at its peak, measured at 16384 rows
SCALE = 1 / 0.07


class Cost(NamedTuple):
    """Of one step of one form."""

    peak_bytes: int
    cpu_seconds: float


def plain(content_BD: Tensor, id_BD: Tensor, item_B: Tensor, scale: Tensor) -> Tensor:
    """Return the loss the usual way, through a masked B x B matrix and two cross-entropies."""
    same_BB = item_B[:, None] == item_B[None, :]
    same_BB.fill_diagonal_(False)
    logit_BB = (scale * content_BD @ id_BD.T).masked_fill(same_BB, -torch.inf)
    label_B = torch.arange(len(item_B), device=item_B.device)
    return 0.5 * (nn.functional.cross_entropy(logit_BB, label_B) + nn.functional.cross_entropy(logit_BB.T, label_B))


def inputs_of(rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return unit vectors of both sides, items and the scale."""
    torch.manual_seed(0)
    content_BD, id_BD = (nn.functional.normalize(torch.randn(rows, dim), dim=1).requires_grad_() for _ in range(2))
    return content_BD, id_BD, torch.randint(0, 5 * rows, (rows,)), torch.tensor(SCALE, requires_grad=True)


def run_step(form: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor], tile: int) -> float:
    """Return the CPU seconds of one step."""
    started = time.process_time()
    loss = plain(*inputs) if form == "plain" else info_nce(*inputs, backend="tiled", tile=tile)
    loss.backward()
    return time.process_time() - started


def peak_bytes(reset: bool = False) -> int:
    """Return the largest resident size of this process so far, or since the last reset where the system can do that."""
    if sys.platform == "linux":
        if reset:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(form: str, rows: int, dim: int, tile: int, repeats: int, answer: Connection) -> None:
    """Send the cost of `form`; runs in a process of its own."""
    run_step(form, inputs_of(256, dim), tile)
    inputs = inputs_of(rows, dim)
    peak_bytes(reset=True)
    before = psutil.Process().memory_info().rss
    seconds = [run_step(form, inputs, tile)]
    extra = max(0, peak_bytes() - before)
    seconds += [run_step(form, inputs, tile) for _ in range(repeats - 1)]
    answer.send(Cost(extra, min(seconds)))


def cost_of(form: str, rows: int, dim: int, tile: int, repeats: int) -> Cost | None:
    """Return the cost measured in a fresh process, or None if that process died for want of memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(form, rows, dim, tile, repeats, theirs))
    process.start()
    theirs.close()
    try:
        cost: Cost | None = ours.recv()
    except EOFError:
        cost = None
    process.join()
    return cost


def floor_nanoseconds(dim: int, tile: int) -> float:
    """Return the least time of one element: four products and two exponentials at this machine's speed on one tile."""
    left, right, square = torch.randn(tile, dim), torch.randn(dim, tile), torch.rand(tile, tile)
    timings = []
    for work in (functools.partial(torch.mm, left, right, out=square), square.exp_):
        seconds = []
        for _ in range(50):
            square.uniform_()
            started = time.process_time()
            work()
            seconds.append(time.process_time() - started)
        timings.append(min(seconds))
    return (4 * timings[0] + 2 * timings[1]) / tile**2 * 1e9


def row_of(rows: int, dim: int, tile: int, repeats: int, limit_bytes: float) -> tuple[list[str], str]:
    """Return one table row and, where the plain form was left out, the reason."""
    tiled_cost = cost_of("tiled", rows, dim, tile, repeats)
    needed = PLAIN_BYTES * rows**2
    reason = ""
    plain_cost = None
    if needed > limit_bytes:
        reason = (
            f"{rows}: plain form left out, it needs about {needed / 2**30:.0f} GiB of {limit_bytes / 2**30:.0f} GiB"
        )
    else:
        plain_cost = cost_of("plain", rows, dim, tile, repeats)
        reason = "" if plain_cost else f"{rows}: plain form was killed for memory"
    if tiled_cost is None:
        raise SystemExit(f"{rows} rows: the process of the tiled form died")
    nanoseconds = tiled_cost.cpu_seconds / rows**2 * 1e9
    cells = [f"{rows}", "-", f"{tiled_cost.peak_bytes / MIB:.1f}", "-", f"{tiled_cost.cpu_seconds:.3f}", "-"]
    if plain_cost:
        cells[1] = f"{plain_cost.peak_bytes / MIB:.0f}"
        cells[3] = f"{plain_cost.cpu_seconds:.3f}"
        cells[5] = f"{tiled_cost.cpu_seconds / plain_cost.cpu_seconds:.2f}"
    return [*cells, f"{nanoseconds:.1f}"], reason


def line_of(cells: list[str], markdown: bool) -> str:
    """Return one line of the table."""
    padded = [cell.rjust(13) for cell in cells]
    return "| " + " | ".join(padded) + " |" if markdown else " ".join(padded)


def main(
    sizes: list[int] | None = None,
    dim: int = 64,
    tile: int = CPU_TILE,
    repeats: int = 3,
    plain_limit_gib: float = 0.0,
    markdown: bool = False,
) -> None:
    """Print peak memory and CPU time of both forms.

    Args:
        sizes: Rows; 2048 to 65536 if not given.
        dim: Width of the vectors.
        tile: Rows and columns of a tile.
        repeats: Steps of each form, of which the fastest counts.
        plain_limit_gib: Memory the plain form may take; 0 means 0.8 of what is free.
        markdown: Print the table as Markdown.
    """
    limit_bytes = plain_limit_gib * 2**30 or 0.8 * psutil.virtual_memory().available
    heads = ["rows", "plain MiB", "tiled MiB", "plain CPU s", "tiled CPU s", "tiled / plain", "ns / element"]
    reasons = []
    print(line_of(heads, markdown) + ("\n|" + " ---: |" * len(heads) if markdown else ""), flush=True)
    for rows in sizes or [2**power for power in range(11, 17)]:
        cells, reason = row_of(rows, dim, tile, repeats, limit_bytes)
        print(line_of(cells, markdown), flush=True)
        reasons += [reason] if reason else []
    print()
    print(f"Floor: {floor_nanoseconds(dim, tile):.1f} ns an element (4 products of width {dim}, 2 exponentials).")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} CPUs, tile {tile}.")
    for reason in reasons:
        print(reason)


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
