"""The dense part of a trained model as one graph that scores the candidates of requests.

Table look-ups stay outside: the graph takes embeddings and content, so it does not depend on how a package stores them.

Shape letters: R requests, K candidates of a request, L history positions of a request, F features (sparse, or
dense), B = R * K rows, D width, T tasks.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.components.shared_history import SharedHistoryAttention, SharedHistorySimilarity
from torchrec_em3.model import EM3Model

__all__ = ["ServingGraph", "export_graph"]

_Input = tuple[Tensor | None, dict[int, Any] | None]
_EXAMPLE = 3, 5, 4
"""R, K and L of the example to trace; none may be 0 or 1, which torch.export would take for constants."""


class ServingGraph(nn.Module):
    """User, history and candidates of requests to logits [ours].

    What belongs to the request, its user's embeddings, its dense features and its history with the maps on it, enters
    once, whatever the number of candidates.

    Args:
        model: The trained model; its dense parameters are copied.
        num_dense: Dense features that it ranks by.
        history_map: The map on the rows of the history's content (see `HistoryItems`); None without such content.
    """

    def __init__(self, model: EM3Model, num_dense: int, history_map: HistoryItems | None) -> None:
        super().__init__()
        self.num_dense = num_dense
        self.feature_blocks = list(model.feature_blocks.values())
        self.attention = SharedHistoryAttention(copy.deepcopy(model.attention))
        self.ranker = copy.deepcopy(model.ranker)
        self.projection: nn.Linear | None = None
        self.content_attention: nn.Module | None = None
        self.similarity: nn.Module | None = None
        self.codes_attention: nn.Module | None = None
        if model.content is not None:
            self.projection = copy.deepcopy(model.content.projection)
            if history_map is not None:
                self.content_attention = SharedHistoryAttention(copy.deepcopy(model.content.attention), history_map)
            if model.content.similarity is not None:
                self.similarity = SharedHistorySimilarity(copy.deepcopy(model.content.similarity))
        if model.codes is not None:
            self.codes_attention = SharedHistoryAttention(copy.deepcopy(model.codes.attention))

    def forward(
        self,
        user_RFD: Tensor,
        target_RKD: Tensor,
        history_RLD: Tensor,
        length_R: Tensor,
        target_content_RKD: Tensor | None = None,
        history_content_RLD: Tensor | None = None,
        has_content_RL: Tensor | None = None,
        target_codes_RKD: Tensor | None = None,
        history_codes_RLD: Tensor | None = None,
        has_codes_RL: Tensor | None = None,
        dense_RF: Tensor | None = None,
    ) -> Tensor:
        """Return logit_RK, or logit_RKT for several tasks.

        Args:
            user_RFD: Embeddings of the user features and the sparse features of the request, in the schema's order.
            target_RKD: ID embeddings of the candidates.
            history_RLD: ID embeddings of the history, padded to the longest of the requests.
            length_R: Positions of each history, int64.
            target_content_RKD: Content of the candidates before the projection; only where the model has content.
            history_content_RLD: Content rows of the history; only where the model reads content there.
            has_content_RL: Which of them hold content, bool.
            target_codes_RKD: Vectors of the candidates' codes; only where codes are features.
            history_codes_RLD: Vectors of the history's codes; as before.
            has_codes_RL: Which items of the history have codes, bool.
            dense_RF: Dense features, standardised; only where the model has any.
        """
        requests, candidates = target_RKD.shape[:2]
        shown_RL = torch.arange(history_RLD.shape[1], device=length_R.device) < length_R[:, None]
        per_candidate = {"target": target_RKD, "interest": self.attention(target_RKD, history_RLD, shown_RL)}
        if self.projection is not None and target_content_RKD is not None:
            content_RKD = self.projection(target_content_RKD)
            per_candidate["content"] = content_RKD
            if self.content_attention is not None and has_content_RL is not None:
                valid_RL = shown_RL & has_content_RL
                per_candidate["content_interest"] = self.content_attention(content_RKD, history_content_RLD, valid_RL)
                if self.similarity is not None:
                    per_candidate["content_similarity"] = self.similarity(
                        target_content_RKD, history_content_RLD, valid_RL, length_R
                    )
        if self.codes_attention is not None and target_codes_RKD is not None and has_codes_RL is not None:
            per_candidate["codes"] = target_codes_RKD
            per_candidate["codes_interest"] = self.codes_attention(
                target_codes_RKD, history_codes_RLD, shown_RL & has_codes_RL
            )
        if dense_RF is not None:
            per_candidate["context"] = dense_RF[:, None].expand(-1, candidates, -1)
        for place, block in enumerate(self.feature_blocks):
            per_candidate[block] = user_RFD[:, place, None].expand(-1, candidates, -1)
        logit_B: Tensor = self.ranker({name: block_RKD.flatten(0, 1) for name, block_RKD in per_candidate.items()})
        return logit_B.view((requests, candidates, *logit_B.shape[1:]))


@torch.no_grad()
def export_graph(graph: ServingGraph, width: int) -> torch.export.ExportedProgram:
    """Return the graph as torch.export makes it, for any number of requests, candidates and positions from 1 on."""
    graph = graph.cpu().eval()
    examples, shapes = zip(*_inputs(graph, width), strict=True)
    names = ServingGraph.forward.__code__.co_varnames[1:]
    dynamic = dict(zip(names, shapes, strict=False))
    exported = torch.export.export(graph, examples, dynamic_shapes=dynamic)
    # They would be pickled, and a package holds no pickle.
    exported.example_inputs = None
    return exported


def _inputs(graph: ServingGraph, width: int) -> list[_Input]:
    """Return an example of each input and which of its dimensions vary; None for one that the graph does not take."""
    requests, candidates, positions = _EXAMPLE
    R, K, L = (torch.export.Dim(name, min=1) for name in ("requests", "candidates", "positions"))
    request, candidate, position = {0: R}, {0: R, 1: K}, {0: R, 1: L}
    inputs: list[_Input] = [
        (torch.rand(requests, len(graph.feature_blocks), width), request),
        (torch.rand(requests, candidates, width), candidate),
        (torch.rand(requests, positions, width), position),
        (torch.tensor([0, 2, positions]), request),
    ]
    absent: _Input = (None, None)
    content_width = 0 if graph.projection is None else graph.projection.in_features
    has_codes = graph.codes_attention is not None
    for row_width, target, history in (
        (content_width, graph.projection is not None, graph.content_attention is not None),
        (width, has_codes, has_codes),
    ):
        inputs += [
            (torch.rand(requests, candidates, row_width), candidate) if target else absent,
            (torch.rand(requests, positions, row_width), position) if history else absent,
            (torch.rand(requests, positions) < 0.5, position) if history else absent,
        ]
    inputs.append((torch.rand(requests, graph.num_dense), request) if graph.num_dense else absent)
    while inputs[-1][0] is None:
        inputs.pop()
    return inputs
