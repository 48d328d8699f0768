"""A batch on its way into the model: its ids may travel between the ranks before its turn has come."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torchrec.streamable import Multistreamable

from torchrec_em3.batch import Batch
from torchrec_em3.components.item_routing import Route
from torchrec_em3.components.lookup import JoinedLookup, Lookup
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
        route: Way of the distinct targets to the ranks that encode them; None where each rank encodes its own.
    """

    batch: Batch
    items: DistinctItems
    user_rows: Lookup | JoinedLookup
    item_rows: Lookup
    route: Route | None

    def send(self) -> None:
        """Begin to send the ids to the ranks that hold their rows. Collective."""
        for way in self._ways():
            way.send()

    def receive(self) -> None:
        """Wait for the ids that the other ranks sent. Collective."""
        for way in self._ways():
            way.receive()

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory alive until `stream` has used it (called by TorchRec's train pipelines)."""
        for part in (self.batch, *self._ways(), *vars(self.items).values()):
            part.record_stream(stream)

    def _ways(self) -> Iterator[Lookup | Route]:
        yield from (self.user_rows, self.item_rows)
        if self.route is not None:
            yield self.route
