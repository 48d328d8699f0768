"""Who goes through the grid of the contrastive loss: plain torch operations in tiles, or Triton kernels."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchrec_em3.components.alignment.grid import Grid, Side
from torchrec_em3.components.alignment.tiled import TiledGrid
from torchrec_em3.errors import ConfigError

__all__ = ["LARGEST_WIDTH", "Backend", "BackendName", "choose_backend"]

BackendName = Literal["auto", "tiled", "triton"]
LARGEST_WIDTH = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
"""Of vectors in the Triton kernels, whose tiles lie in registers and shared memory in their whole width."""


class Backend(NamedTuple):
    """How a grid is made, and in which type it takes the vectors; None is that of the sums."""

    build: Callable[[Side, Side, float], Grid]
    operand_dtype: torch.dtype | None


def choose_backend(name: BackendName, content_ND: Tensor, id_ND: Tensor, tile: int = 0) -> Backend:
    """Return the backend for these vectors.

    Args:
        name: `tiled`; `triton`; or `auto`, which is triton where it can be and tiled elsewhere.
        content_ND: Content vectors.
        id_ND: ID vectors.
        tile: Rows and columns of a tile of `tiled`; 0 picks for the device.

    Raises:
        ConfigError: If triton is asked for and cannot be.
    """
    tiled = Backend(partial(TiledGrid, size=tile), None)
    if name == "tiled" or (name == "auto" and not content_ND.is_cuda):
        return tiled
    operand = _operand_dtype(content_ND, id_ND)
    obstacle = _obstacle(content_ND, operand)
    if obstacle is None:
        from torchrec_em3.components.alignment.triton_grid import TritonGrid

        return Backend(TritonGrid, operand)
    if name == "triton":
        raise ConfigError(f"alignment backend triton: {obstacle}; set backend to auto or tiled")
    return tiled


def _operand_dtype(content_ND: Tensor, id_ND: Tensor) -> torch.dtype:
    """Return the type in which Triton multiplies: that of the vectors, or of autocast where it is on, as in matmul."""
    device = content_ND.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(content_ND.dtype, id_ND.dtype)


def _obstacle(content_ND: Tensor, operand: torch.dtype) -> str | None:
    """Return why Triton cannot take these vectors, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if operand not in LARGEST_WIDTH:
        return f"vectors are {operand}, kernels take {', '.join(map(str, LARGEST_WIDTH))}"
    if content_ND.shape[1] > LARGEST_WIDTH[operand]:
        return f"vectors are {content_ND.shape[1]} wide, kernels take up to {LARGEST_WIDTH[operand]} of {operand}"
    if not content_ND.is_cuda:
        from torchrec_em3.components.alignment.triton_kernels import INTERPRETED

        if not INTERPRETED.value:
            return f"vectors are on {content_ND.device.type}, kernels run on cuda"
    return None
