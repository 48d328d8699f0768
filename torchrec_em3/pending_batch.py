"""A batch on its way into the model: its ids may travel between the ranks before its turn has come."""

from dataclasses import dataclass

import torch
from torchrec.streamable import Multistreamable

from torchrec_em3.batch import Batch
from torchrec_em3.components.lookup import Lookup
from torchrec_em3.content_path import DistinctItems

__all__ = ["PendingBatch"]


@dataclass(frozen=True)
class PendingBatch(Multistreamable):
    """A batch whose distinct items are known and whose embeddings have been asked for (see `EM3Model.ask`).

    Attributes:
        batch: The batch itself, on the model's device.
        items: Its distinct items.
        user_rows: Lookup of the user features.
        item_rows: Lookup of the distinct items.
    """

    batch: Batch
    items: DistinctItems
    user_rows: Lookup
    item_rows: Lookup

    def send(self) -> None:
        """Begin to send the ids to the ranks that hold their rows. Collective."""
        self.user_rows.send()
        self.item_rows.send()

    def receive(self) -> None:
        """Wait for the ids that the other ranks sent. Collective."""
        self.user_rows.receive()
        self.item_rows.receive()

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory alive until `stream` has used it (called by TorchRec's train pipelines)."""
        for part in (self.batch, self.user_rows, self.item_rows, *vars(self.items).values()):
            part.record_stream(stream)
