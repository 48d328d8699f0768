"""The grid in plain torch operations, on any device: one tile at a time, in a buffer that all tiles share.

Shape letters: N rows, M columns, D width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchrec_em3.components.alignment.grid import Side

__all__ = ["CPU_TILE", "TiledGrid"]

CPU_TILE = 512  # fits the caches; 256 to 1024 differ by less than a tenth (benchmarks/cic.py --tile)
DEVICE_TILE = 4096  # accelerators: enough work for one kernel launch, two buffers of 64 MiB; not tuned


class TiledGrid:
    """A `Grid` of square tiles; vectors and weights are of one type, which the tiles have too."""

    def __init__(self, rows: Side, columns: Side, scale: float, size: int = 0) -> None:
        """Cut the grid into tiles of `size` rows and columns; 0 picks for the device."""
        size = size or (CPU_TILE if rows.vector_ND.device.type == "cpu" else DEVICE_TILE)
        self.rows, self.columns, self.scale = rows, columns, scale
        self._row_cuts, self._column_cuts = _cuts(len(rows.item_N), size), _cuts(len(columns.item_N), size)
        self._first_meeting, self._last_meeting = self._meetings()

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of each row and of each column; see `Grid`."""
        row_N, column_M = torch.zeros_like(self.rows.weight_N), torch.zeros_like(self.columns.weight_N)
        for i, j, tile in self._tiles():
            row_N[i].addmv_(tile, self.columns.weight_N[j])
            column_M[j].addmv_(tile.t(), self.rows.weight_N[i])
        return row_N, column_M

    def gradients(
        self, u_N: Tensor, v_M: Tensor, wants_rows: bool, wants_columns: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the row and the column vectors; see `Grid`."""
        rows, columns = self.rows, self.columns
        weighted_row_ND, weighted_column_MD = (side.vector_ND * side.weight_N[:, None] for side in (rows, columns))
        row_ND = torch.zeros_like(rows.vector_ND) if wants_rows else None
        column_MD = torch.zeros_like(columns.vector_ND) if wants_columns else None
        buffer = self._buffer()
        for i, j, tile in self._tiles():
            slope = torch.add(u_N[i, None], v_M[None, j], out=_shaped(buffer, i, j)).mul_(tile)
            if row_ND is not None:
                row_ND[i].addmm_(slope, weighted_column_MD[j])
            if column_MD is not None:
                column_MD[j].addmm_(slope.t(), weighted_row_ND[i])
        for gradient, side in ((row_ND, rows), (column_MD, columns)):
            if gradient is not None:
                gradient.mul_(side.weight_N[:, None]).mul_(self.scale)
        return row_ND, column_MD

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield each tile's rows, columns and values; the values are overwritten by the next tile."""
        column_DM = self.columns.vector_ND.t()
        buffer = self._buffer()
        for number, i in enumerate(self._row_cuts):
            meeting = range(self._first_meeting[number], self._last_meeting[number])
            for other, j in enumerate(self._column_cuts):
                tile = _shaped(buffer, i, j)
                tile.addmm_(self.rows.vector_ND[i], column_DM[:, j], beta=0, alpha=self.scale).exp_()
                if other in meeting:
                    tile.masked_fill_(self.rows.item_N[i, None] == self.columns.item_N[None, j], 0.0)
                yield i, j, tile

    def _buffer(self) -> Tensor:
        """Return uninitialised space for the largest tile."""
        shape = [cuts[0].stop if cuts else 0 for cuts in (self._row_cuts, self._column_cuts)]
        return self.rows.vector_ND.new_empty(shape[0] * shape[1])

    def _meetings(self) -> tuple[list[int], list[int]]:
        """Return, for each row of tiles, the range of column tiles that share an item with it."""
        row_first, row_last = _ends(self.rows.item_N, self._row_cuts)
        column_first, column_last = _ends(self.columns.item_N, self._column_cuts)
        first = torch.searchsorted(column_last, row_first)
        last = torch.searchsorted(column_first, row_last, right=True)
        return first.tolist(), last.tolist()


def _cuts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _ends(item_N: Tensor, cuts: list[slice]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest item of each cut of an ascending list."""
    first = torch.tensor([cut.start for cut in cuts], dtype=torch.int64, device=item_N.device)
    last = torch.tensor([cut.stop - 1 for cut in cuts], dtype=torch.int64, device=item_N.device)
    return item_N[first], item_N[last]


def _shaped(buffer: Tensor, i: slice, j: slice) -> Tensor:
    height, width = i.stop - i.start, j.stop - j.start
    return buffer[: height * width].view(height, width)
