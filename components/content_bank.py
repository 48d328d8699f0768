"""The content bank: the last known content of every item, sharded over ranks.

Shape letters: V items, D width of content.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.tensor_pool import TensorPool

__all__ = ["ContentBank"]

NEVER = 0.0


class ContentBank(nn.Module):
    """One non-trainable row of content an item, written by the target branch and read by the history branch [ours].

    EM3's abstract asks for content in long histories without the cost of encoding them; a bank keyed by item is how
    LEMUR and others do it [follow-up]. Rows live in TorchRec's `TensorPool`, which is sharded by row like a table, so
    that no rank holds the whole bank. The column after the content is the step of the last write, counted from 1; 0
    means never. Steps are exact in float32 up to 2**24.
    """

    def __init__(self, item_rows: int, dim: int, device: torch.device) -> None:
        """Create an empty bank of `item_rows` rows of width `dim` on `device` (meta until it is sharded)."""
        super().__init__()
        self.pool = TensorPool(item_rows, dim + 1, torch.float32, device=device)

    @torch.no_grad()
    def read(self, item_V: Tensor) -> tuple[Tensor, Tensor]:
        """Return content_VD and the step of each row's last write, step_V (0: never). Collective over ranks."""
        rows = self.pool(item_V)
        rows = rows.wait() if hasattr(rows, "wait") else rows
        return rows[:, :-1], rows[:, -1]

    @torch.no_grad()
    def write(self, item_V: Tensor, content_VD: Tensor, step: int) -> None:
        """Store the rows of distinct items as of `step` (from 1). Collective over ranks; `item_V` may be empty."""
        stamp_V1 = content_VD.new_full((item_V.numel(), 1), float(step))
        self.pool.update(item_V, torch.cat([content_VD.detach().float(), stamp_V1.float()], 1))

    @torch.no_grad()
    def forget(self, item_V: Tensor) -> None:
        """Make the rows of distinct items as if never written. Collective over ranks; `item_V` may be empty."""
        self.pool.update(item_V, torch.zeros(item_V.numel(), self.pool.dim, device=item_V.device))
