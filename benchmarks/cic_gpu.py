"""The contrastive loss on a CUDA device: checks the Triton kernels against float64, then measures them.

    python benchmarks/cic_gpu.py > table.md             # checks, then the table; 10 minutes at most
    python benchmarks/cic_gpu.py --only checks
    python benchmarks/cic_gpu.py --device cpu           # the checks alone, at tiny sizes, in Triton's interpreter

Prints Markdown. Exit codes: 0 done, 1 an error beyond its limit (then nothing is measured), 2 no CUDA device.

A check compares loss and gradients with a B x B matrix in float64 from the same rounded vectors, half precision being
that of autocast; an error is relative to the largest entry, and two runs must agree in every bit. A measured step is
loss and gradients of both sides and the scale from float32 leaves under bfloat16 autocast, a tenth of the rows
repeating an item; milliseconds are the median of CUDA events after a warm-up, which includes the choice of tiles;
memory is the peak above what was allocated before. TFLOP/s counts the five products of 2 B^2 D operations that the
kernels take (one for the sums, two for each gradient) and stands beside a dense bfloat16 product of this run, so that
the share says how far the kernels are from the machine.
"""

import os
import statistics
import sys
from collections.abc import Callable
from typing import Literal, NamedTuple

import jsonargparse
import torch
from cic import MIB, SCALE, inputs_of, line_of, plain
from torch import Tensor

from torchrec_em3.components.alignment.backend import LARGEST_WIDTH
from torchrec_em3.components.alignment.info_nce import info_nce

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PLAIN_BYTES = 24  # an element of the plain form at its peak, about: logits, their softmax and its gradient, twice
MATMUL_SIZE = 8192
PRODUCTS = 5
STEPS = 10


class Check(NamedTuple):
    """One comparison with float64."""

    rows: int
    dim: int
    dtype: torch.dtype
    scale: float

    @property
    def limits(self) -> tuple[float, float]:
        """Return the largest relative errors of loss and scale, and of the sides' gradients.

        The loss and its exponentials are float32 whatever the vectors are; beyond a scale of 40 their exponents carry
        an error of 2e-5. Slopes are rounded to the type of the vectors, to TF32 for float16, and a gradient is what
        attraction and repulsion leave of each other.
        """
        exact = 1e-5 if self.scale <= 40 else 1e-4
        rounding = {torch.float32: 0.0, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}[self.dtype]
        return exact, exact + rounding


def checks_for(device: str) -> list[Check]:
    """Return the comparisons; sizes that no tile divides, one row more or less than a tile, and the widest vectors."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if device == "cpu":
        return [Check(75, 20, dtype, scale) for dtype in dtypes for scale in (SCALE, 100.0)]
    shapes = [(2, 64), (127, 16), (129, 20), (1000, 128), (4096, 64), (9001, 64), (1000, 256)]
    possible = [(*shape, dtype) for shape in shapes for dtype in dtypes if shape[1] <= LARGEST_WIDTH[dtype]]
    return [Check(*case, scale) for case in possible for scale in (SCALE, 100.0, 300.0)]


def exact_form(content_BD: Tensor, id_BD: Tensor, item_B: Tensor, scale: Tensor) -> Tensor:
    """Return the loss from negatives alone, which keeps the digits of a loss near zero; for float64."""
    similarity_BB = scale * content_BD @ id_BD.T
    differ_BB = item_B[:, None] != item_B[None, :]
    own_B = similarity_BB.diagonal()
    from_content_B = ((similarity_BB - own_B[:, None]).exp() * differ_BB).sum(1)
    from_id_B = ((similarity_BB - own_B[None, :]).exp() * differ_BB).sum(0)
    return 0.5 * (from_content_B.log1p() + from_id_B.log1p()).mean()


def triton_form(content_BD: Tensor, id_BD: Tensor, item_B: Tensor, scale: Tensor) -> Tensor:
    """Return the loss from the Triton kernels."""
    return info_nce(content_BD, id_BD, item_B, scale, backend="triton")


def tiled_form(content_BD: Tensor, id_BD: Tensor, item_B: Tensor, scale: Tensor) -> Tensor:
    """Return the loss from plain operations in tiles."""
    return info_nce(content_BD, id_BD, item_B, scale, backend="tiled")


def leaves_of(rows: int, dim: int, device: str) -> Inputs:
    """Return fresh inputs on the device; a pair is alike, as in training."""
    content_BD, id_BD, item_B, scale = (value.detach() for value in inputs_of(rows, dim))
    id_BD = torch.nn.functional.normalize(content_BD + id_BD, dim=1)
    content_BD, id_BD, scale = (value.to(device).requires_grad_() for value in (content_BD, id_BD, scale))
    return content_BD, id_BD, item_B.to(device), scale


def solve(form: Form, inputs: Inputs) -> list[Tensor]:
    """Return the loss and the gradients of content, ID and scale."""
    content_BD, id_BD, _, scale = inputs
    loss = form(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, [content_BD, id_BD, scale])]


def errors_of(check: Check, device: str) -> list[float]:
    """Return the relative errors of loss, content, ID and scale; infinite where two runs differ in a bit."""
    content_BD, id_BD, item_B, _ = leaves_of(check.rows, check.dim, device)
    scale = torch.tensor(check.scale, device=device, requires_grad=True)
    half = check.dtype != torch.float32
    with torch.autocast(device, check.dtype if half else torch.bfloat16, enabled=half):
        got, again = (solve(triton_form, (content_BD, id_BD, item_B, scale)) for _ in range(2))
    if not all(torch.equal(*values) for values in zip(got, again, strict=True)):
        return [torch.inf] * 4
    rounded = [side.detach().to(check.dtype).double().requires_grad_() for side in (content_BD, id_BD)]
    expected = solve(exact_form, (rounded[0], rounded[1], item_B, scale.detach().double().requires_grad_()))
    # What the scale gets is a small difference of large sums: it is measured against the gradients it is summed from.
    sizes = [float(value.abs().max()) for value in expected]
    sizes[3] = float((expected[1] * rounded[0]).detach().abs().sum()) / check.scale
    pairs = zip(got, expected, sizes, strict=True)
    return [float((value.double() - right).abs().max()) / max(size, 1e-30) for value, right, size in pairs]


def run_checks(device: str) -> bool:
    """Print every check with its errors; return whether all are within their limits."""
    print(line_of(["rows", "width", "type", "scale", "loss", "content", "ID", "scale", "within"], True))
    print("|" + " ---: |" * 9)
    passed = True
    for check in checks_for(device):
        errors = errors_of(check, device)
        exact, rounded = check.limits
        good = all(error <= limit for error, limit in zip(errors, (exact, rounded, rounded, rounded), strict=True))
        passed &= good
        name = str(check.dtype).removeprefix("torch.")
        cells = [f"{check.rows}", f"{check.dim}", name, f"{check.scale:.4g}", *(f"{error:.1e}" for error in errors)]
        print(line_of([*cells, "yes" if good else "NO"], True), flush=True)
    return passed


class Cost(NamedTuple):
    """Of one step."""

    milliseconds: float
    peak_bytes: int


def milliseconds_of(work: Callable[[], object]) -> float:
    """Return the median time of the work on the device, after two rounds of warm-up."""
    times = []
    for step in range(STEPS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end)] if step >= 2 else []
    return statistics.median(times)


def cost_of(form: Form, inputs: Inputs) -> Cost | None:
    """Return the cost of a step, or None where the memory of the device is not enough."""

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = form(*inputs)
        torch.autograd.grad(loss, [inputs[0], inputs[1], inputs[3]])

    try:
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return Cost(milliseconds_of(step), peak)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def dense_teraflops() -> float:
    """Return the speed of a dense bfloat16 product on this device."""
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16)
    return 2 * MATMUL_SIZE**3 / milliseconds_of(lambda: left @ right) / 1e9


def cells_of(rows: int, dim: int, dense: float) -> list[str]:
    """Return one line of the table."""
    inputs = leaves_of(rows, dim, "cuda")
    ours, tiled = cost_of(triton_form, inputs), cost_of(tiled_form, inputs)
    fits = PLAIN_BYTES * rows**2 < torch.cuda.mem_get_info()[0]
    usual = cost_of(plain, inputs) if fits else None
    compiled = cost_of(torch.compile(plain, dynamic=False), inputs) if fits else None
    if ours is None:
        raise SystemExit(f"{rows} rows of width {dim}: the Triton form ran out of memory")
    speed = PRODUCTS * 2 * rows**2 * dim / ours.milliseconds / 1e9
    cells = [f"{rows}", f"{dim}", f"{ours.milliseconds:.3f}", f"{ours.peak_bytes / MIB:.0f}"]
    cells += [f"{speed:.0f}", f"{speed / dense:.0%}"]
    for other in (tiled, usual, compiled):
        cells += [f"{other.milliseconds:.3f}", f"{ours.milliseconds / other.milliseconds:.3f}"] if other else ["-"] * 2
    return [*cells, f"{usual.peak_bytes / MIB:.0f}" if usual else "-"]


def run_measurements(sizes: list[int], dims: list[int]) -> None:
    """Print the table."""
    dense = dense_teraflops()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, dense bfloat16 product {dense:.0f} TFLOP/s.\n")
    heads = ["rows", "width", "triton ms", "triton MiB", "TFLOP/s", "of dense"]
    heads += ["tiled ms", "triton / tiled", "plain ms", "triton / plain", "compiled ms", "triton / comp.", "plain MiB"]
    print(line_of(heads, True) + "\n|" + " ---: |" * len(heads), flush=True)
    for dim in dims:
        for rows in sizes:
            print(line_of(cells_of(rows, dim, dense), True), flush=True)
            torch.compiler.reset()


def main(
    device: Literal["cuda", "cpu"] = "cuda",
    only: Literal["all", "checks", "table"] = "all",
    sizes: list[int] | None = None,
    dims: list[int] | None = None,
) -> None:
    """Check, then measure.

    Args:
        device: cpu runs the checks alone, in Triton's interpreter.
        only: checks, table, or all.
        sizes: Rows to measure; 4096 to 262144 if not given.
        dims: Widths to measure; 64 and 128 if not given.
    """
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing has done yet
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing was run; --device cpu runs the checks in Triton's interpreter", file=sys.stderr)
        raise SystemExit(2)
    if only != "table" and not run_checks(device):
        print("an error is beyond its limit, see the lines marked NO; nothing was measured", file=sys.stderr)
        raise SystemExit(1)
    if only != "checks" and device == "cuda":
        run_measurements(sizes or [2**power for power in range(12, 19)], dims or [64, 128])


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
