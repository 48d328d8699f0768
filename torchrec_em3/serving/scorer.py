"""Scores candidates with a package, without the training code.

Shape letters: R requests, K candidates of a request, L history positions of a request, F features (of the user, or
dense), D width, T tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from torchrec_em3.errors import CheckpointError, DataError, EM3Error, NumericError
from torchrec_em3.serving.graph_file import load_graph
from torchrec_em3.serving.package import (
    AGAIN,
    GRAPH_FILE,
    ITEMS_FILE,
    TABLES_FILE,
    USERS_FILE,
    check_package,
    read_config,
    vocabulary_file,
)
from torchrec_em3.serving.rows import PackedTable

__all__ = ["Request", "RequestError", "Scorer"]

PAIRS_AT_A_TIME = 1 << 17
"""Pairs of candidate and history position (or column, if those are more) that go through the graph together: what it
stores grows with them."""


@dataclass(frozen=True)
class Request:
    """One user, the user's history and the candidates to score; ids are those of the raw data.

    What the package does not know, a user, an item or a value, counts as "unknown"; nothing is refused for it.

    Attributes:
        user: Id of the user.
        history: Items that the user has seen, most recent last; of a longer one the end counts.
        candidates: Items to score.
        features: Values of the user's side features and of the sparse features of the request by name. Of the former,
            those left out are the ones that the package has of the user; of the latter, they are unknown. True and
            False are the same as "true" and "false".
        dense: Dense features by name, as in the raw data; those left out, and NaN, are unknown.
    """

    user: str
    history: Sequence[str]
    candidates: Sequence[str]
    features: Mapping[str, str | int | bool] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)


class RequestError(DataError):
    """A request cannot be scored.

    Attributes:
        place: Which of the requests it is, from 0.
        reason: What is wrong with it.
    """

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(f"request {place}: {reason}")
        self.place, self.reason = place, reason


class Scorer:
    """A package in memory; make one with `Scorer.load`. Scoring changes nothing, so threads may share it.

    Attributes:
        config: What the package says of itself.
    """

    def __init__(self, folder: Path) -> None:
        """Read a package that was checked already."""
        self.config = read_config(folder)
        self._graph = load_graph(folder / GRAPH_FILE)
        tensors = load_file(folder / TABLES_FILE)
        self._has_rows = {name: tensors.pop(f"has_{name}") for name in ("content", "codes") if f"has_{name}" in tensors}
        table_rows = {name: tensors.pop(name) for name in ("user_rows", "item_rows") if name in tensors}
        self._tables = {
            name: PackedTable(packed, self.config.precision, self.config.widths.get(name))
            for name, packed in tensors.items()
        }
        side_features = self.config.user_features[1:]
        users = pq.read_table(folder / USERS_FILE, page_checksum_verification=True)
        self._users = _rows_by_id(users["raw_id"], first=1)
        self._user_table_row = table_rows.get("user_rows", _vocabulary_rows(len(users), self.config.known_users))
        self._user_features = np.zeros((len(users) + 1, len(side_features)), dtype=np.int64)
        for place, name in enumerate(side_features):
            self._user_features[1:, place] = users[name].to_numpy()
        self._vocabularies = {
            name: _rows_by_id(pq.read_table(folder / vocabulary_file(name))["value"], first=0)
            for name in self.config.given_features
        }
        items = pq.read_table(folder / ITEMS_FILE)
        self._items = _rows_by_id(items["raw_id"], first=1)
        self._item_table_row = table_rows.get("item_rows", _vocabulary_rows(len(items), self.config.known_items))

    @classmethod
    def load(cls, folder: Path) -> "Scorer":
        """Check a package against its manifest and read it.

        Raises:
            CheckpointError: If it is no package, or damaged, or of another format.
        """
        check_package(folder)
        try:
            return cls(folder)
        except (OSError, KeyError, ValueError, pa.ArrowException, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be read ({str(error).splitlines()[0]}); {AGAIN}") from error

    @property
    def num_items(self) -> int:
        """Items that the package knows by their raw id."""
        return len(self._items)

    def knows(self, item: str) -> bool:
        """Return whether the package has this item, by its ID or by its content alone."""
        return item in self._items

    def score(self, requests: Sequence[Request]) -> list[NDArray[np.float32]]:
        """Return the probability of each request's candidates; see `logits`."""
        return [torch.from_numpy(logit_K).sigmoid().numpy() for logit_K in self.logits(requests)]

    def logits(self, requests: Sequence[Request]) -> list[NDArray[np.float32]]:
        """Return the logits of each request's candidates, [K], or [K, T] in the order of `config.tasks` if several.

        Requests go through the graph together as long as that takes little memory, so equal sizes are best.

        Raises:
            RequestError: If a feature is named that the package does not have, or a dense one is too large.
            NumericError: If a logit is not finite where no dense feature is given.
        """
        user_RF = torch.from_numpy(np.array([self._user_rows(*numbered) for numbered in enumerate(requests)]))
        dense_RF = torch.from_numpy(self._dense(requests))
        results: list[NDArray[np.float32]] = []
        for start, stop in self._parts(requests):
            results += self._logits(requests[start:stop], user_RF[start:stop], dense_RF[start:stop])
        for place, logit_K in enumerate(results):
            if not np.isfinite(logit_K).all():
                raise self._not_finite(place, requests[place], dense_RF[place])
        return results

    def _parts(self, requests: Sequence[Request]) -> list[tuple[int, int]]:
        """Return runs of requests that are few enough to go through the graph together."""
        parts, start, candidates, positions = [], 0, 1, self.config.width
        for place, request in enumerate(requests):
            candidates = max(candidates, len(request.candidates))
            positions = max(positions, min(len(request.history), self.config.max_history))
            if place > start and (place + 1 - start) * candidates * positions > PAIRS_AT_A_TIME:
                parts.append((start, place))
                start, candidates, positions = place, len(request.candidates), self.config.width
        return [*parts, (start, len(requests))] if requests else []

    @torch.inference_mode()
    def _logits(self, requests: Sequence[Request], user_RF: Tensor, dense_RF: Tensor) -> list[NDArray[np.float32]]:
        # The graph takes no empty dimension: one padded place stands for nothing.
        target_RK, _ = self._item_rows([request.candidates for request in requests])
        recent = self.config.max_history
        history_RL, length_R = self._item_rows([request.history[-recent:] for request in requests])
        features = enumerate(self.config.user_features + self.config.sparse)
        inputs: list[Tensor | None] = [
            torch.stack([self._tables[f"{name}_table"](user_RF[:, place]) for place, name in features], 1),
            self._look_up("item_table", self._item_table_row[target_RK]),
            self._look_up("item_table", self._item_table_row[history_RL]),
            length_R,
        ]
        inputs += self._rows("content", target_RK, history_RL, self.config.content, self.config.content_history)
        inputs += self._rows("codes", target_RK, history_RL, self.config.codes, self.config.codes)
        inputs.append(dense_RF if self.config.dense else None)
        while inputs[-1] is None:
            inputs.pop()
        logit_RK = self._graph(*inputs)
        return [logit_K[: len(request.candidates)].numpy() for logit_K, request in zip(logit_RK, requests, strict=True)]

    def _rows(
        self, name: str, target_RK: Tensor, history_RL: Tensor, target: bool, history: bool
    ) -> list[Tensor | None]:
        """Return rows of the candidates, rows of the history and which of those count; None for what is not taken."""
        of_history = f"history_{name}" if f"history_{name}" in self._tables else name
        return [
            self._look_up(name, target_RK) if target else None,
            self._look_up(of_history, history_RL) if history else None,
            self._has_rows[name][history_RL] if history else None,
        ]

    def _user_rows(self, place: int, request: Request) -> NDArray[np.int64]:
        """Return the row of the user's table and of each other feature's."""
        user = self._users.get(request.user, 0)
        side, given = self._user_features[user], self.config.given_features
        rows = np.zeros(1 + len(given), dtype=np.int64)
        rows[0] = int(self._user_table_row[user])
        rows[1 : 1 + len(side)] = side
        for name, value in request.features.items():
            if name not in self._vocabularies:
                known = ", ".join(self._vocabularies) or "none"
                raise RequestError(place, f"the package has no feature '{name}'; features: {known}")
            rows[1 + given.index(name)] = self._vocabularies[name].get(_as_text(value), 0)
        return rows

    def _dense(self, requests: Sequence[Request]) -> NDArray[np.float32]:
        """Return the dense features as the model reads them, [R, F]."""
        names = [feature.name for feature in self.config.dense]
        for place, request in enumerate(requests):
            for name in request.dense:
                if name not in names:
                    known = ", ".join(names) or "none"
                    raise RequestError(place, f"the package has no dense feature '{name}'; dense features: {known}")
        dense_RF = np.empty((len(requests), len(names)), dtype=np.float32)
        for column, feature in enumerate(self.config.dense):
            value_R = np.array([request.dense.get(feature.name, np.nan) for request in requests], dtype=np.float64)
            with np.errstate(over="ignore"):
                dense_RF[:, column] = feature.standardise(value_R)
        too_large = np.argwhere(~np.isfinite(dense_RF))
        if len(too_large):
            place, column = map(int, too_large[0])
            raise self._too_large(place, requests[place], column)
        return dense_RF

    def _too_large(self, place: int, request: Request, column: int) -> RequestError:
        feature = self.config.dense[column]
        value = f"dense feature '{feature.name}' is {request.dense[feature.name]}"
        limit = f"must be finite and near enough to its mean {feature.mean:.6g} to be scored"
        return RequestError(place, f"{value}, {limit}; leave it out if it is unknown")

    def _not_finite(self, place: int, request: Request, dense_F: Tensor) -> EM3Error:
        """Return why a logit is not: of what a request holds, dense features alone can be of any size."""
        if not bool(dense_F.any()):
            return NumericError(f"a logit of package {self.config.version} is not finite; export the run again")
        return self._too_large(place, request, int(dense_F.abs().argmax()))

    def _item_rows(self, items: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Return item rows, padded by row 0 to the longest of the lists, at least 1, and the lengths."""
        rows = np.zeros((len(items), max(1, *map(len, items))), dtype=np.int64)
        for place, ids in enumerate(items):
            rows[place, : len(ids)] = [self._items.get(item, 0) for item in ids]
        return torch.from_numpy(rows), torch.tensor([len(ids) for ids in items])

    def _look_up(self, table: str, row_RX: Tensor) -> Tensor:
        return self._tables[table](row_RX.flatten()).view(*row_RX.shape, -1)


def _as_text(value: str | int | bool) -> str:
    """Return a value as `em3 prepare` puts it into a vocabulary."""
    return str(value).lower() if isinstance(value, bool | np.bool_) else str(value)


def _vocabulary_rows(count: int, known: int) -> Tensor:
    """Return the table row of row 0, "unknown", and of `count` others: those beyond the known ones share row 0."""
    row_N = torch.arange(count + 1, dtype=torch.int32)
    return torch.where(row_N <= known, row_N, 0)


def _rows_by_id(ids: pa.ChunkedArray, first: int) -> dict[str, int]:
    return {raw_id: row for row, raw_id in enumerate(ids.to_pylist(), start=first)}
