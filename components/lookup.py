"""A lookup in parts, so that the ids of one batch travel between the ranks while another batch is computed."""

from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Multistreamable

__all__ = ["JoinedLookup", "Lookup"]


class Lookup(Multistreamable):
    """Rows of a TorchRec collection that have been asked for.

    Ranks tell each other how many ids they ask for, then send the ids, then look up and send the rows back. Only the
    last part reads a table, so the others may come before another batch has written it. Every part is collective and
    begins without waiting for its end; what is not sharded does everything in `rows`.
    """

    def __init__(self, tables: nn.Module, features: KeyedJaggedTensor) -> None:
        """Begin to tell the other ranks how many ids of `features` each will get."""
        self._tables, self.features = tables, features
        self._counts = self._ids = self._arrived = self._context = None
        if isinstance(tables, ShardedModule):
            self._context = tables.create_context()
            self._counts = tables.input_dist(self._context, features)

    def send(self) -> None:
        """Begin to send the ids."""
        if self._counts is not None:
            self._ids, self._counts = self._counts.wait(), None

    def receive(self) -> None:
        """Wait for the ids that the other ranks sent; `send` comes first where it has not been called."""
        self.send()
        if self._ids is not None:
            self._arrived, self._ids = self._ids.wait(), None

    def rows(self) -> Any:
        """Return what `tables(features)` would; once only."""
        self.receive()
        if self._arrived is None:
            return self._tables(self.features)
        return self._tables.compute_and_output_dist(self._context, self._arrived)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of received ids alive until `stream` has used it."""
        for part in (self.features, self._context, self._arrived):
            if part is not None:
                part.record_stream(stream)


class JoinedLookup(Multistreamable):
    """Lookups of several collections that go together."""

    def __init__(self, *parts: Lookup) -> None:
        """Join lookups that were begun in this order on every rank."""
        self.parts = parts

    def send(self) -> None:
        """Begin to send the ids."""
        for part in self.parts:
            part.send()

    def receive(self) -> None:
        """Wait for the ids that the other ranks sent."""
        for part in self.parts:
            part.receive()

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of received ids alive until `stream` has used it."""
        for part in self.parts:
            part.record_stream(stream)
