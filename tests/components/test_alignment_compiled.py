"""The Triton kernels compile for CUDA devices that need not be there, from the arguments of real calls, and keep all
their values in registers.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from torchrec_em3.components.alignment.grid import Side
from torchrec_em3.components.alignment.info_nce import info_nce
from torchrec_em3.errors import ConfigError

triton = pytest.importorskip("triton")


class Device(NamedTuple):
    """What Triton asks a driver for when it compiles."""

    capability: int

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled for one device is not taken for another

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling:
    """In place of a tuned kernel: compiles for every tile instead of launching the best."""

    def __init__(self, kernel: Any, made: list[Any]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, programs: Any) -> Callable[..., None]:
        return lambda **arguments: self.made.extend(self.kernel.warmup(grid=programs, **arguments))


def instructions_of(kernel: Any, folder: Path) -> str:
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout


class Case(NamedTuple):
    capability: int
    dtype: torch.dtype
    width: int
    shifted: bool = False


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(80, torch.bfloat16, 128),
        Case(90, torch.bfloat16, 128),
        Case(90, torch.bfloat16, 20, shifted=True),
        Case(80, torch.float16, 64),
        Case(90, torch.float32, 64),
    ],
    ids=str,
)
def test_no_tile_spills_registers(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchrec_em3.components.alignment import triton_grid

    made: list[Any] = []
    tuned = triton_grid.tuned
    monkeypatch.setattr(triton_grid, "tuned", lambda *key: Compiling(tuned(*key), made))
    monkeypatch.setattr(triton.runtime.driver, "_active", Device(case.capability))
    vectors, weights = torch.zeros(300, case.width, dtype=case.dtype), torch.ones(300, dtype=torch.float32)
    side = Side(vectors, torch.arange(300), weights.double() if case.shifted else weights)
    grid = triton_grid.TritonGrid(side, side, 5.0)
    grid.sums()
    grid.gradients(side.weight_N, side.weight_N, True, False)
    assert {kernel.name for kernel in made} == {"sums_kernel", "gradient_kernel"}
    for kernel in made:
        code = instructions_of(kernel, tmp_path)
        assert f"sm_{case.capability}" in code
        assert "MUFU.EX2" in code, "an exponential is part of both kernels"
        assert "LDL" not in code, f"{kernel.name} {kernel.metadata} loads spilt registers"
        assert "STL" not in code, f"{kernel.name} {kernel.metadata} spills registers"
        tensor_cores = "HGMMA" if case.capability == 90 else "HMMA"
        assert (tensor_cores in code) == (case.dtype != torch.float32), "float32 is multiplied as float32"


def test_the_kernels_refuse_what_they_cannot_take() -> None:
    item = torch.arange(4)
    for vectors, message in (
        (torch.zeros(4, 8), "vectors are on cpu"),
        (torch.zeros(4, 129), "129 wide, kernels take up to 128 of torch.float32"),
        (torch.zeros(4, 257, dtype=torch.bfloat16), "257 wide, kernels take up to 256 of torch.bfloat16"),
        (torch.zeros(4, 8, dtype=torch.float64), "vectors are torch.float64, kernels take"),
    ):
        with pytest.raises(ConfigError, match=f"backend triton: .*{message}.*set backend to auto or tiled"):
            info_nce(vectors, vectors, item, 1.0, backend="triton")
        assert torch.isfinite(info_nce(vectors, vectors, item, 1.0))
