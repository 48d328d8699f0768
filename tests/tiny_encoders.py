"""An encoder that can be cut: three small layers with random weights, read as a user's would be."""

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.registry import ENCODERS, NoOptions

WORDS = 50
WIDTH = 6


class TinyModel(nn.Module):
    """Embedded words, then layers that mix a text's words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, rows_UPW: Tensor, valid_UP: Tensor) -> ModalityTokens:
        hidden_UPD = rows_UPW if rows_UPW.is_floating_point() else self.words(rows_UPW.squeeze(2).long())
        shown_UP1 = valid_UP[..., None].to(hidden_UPD.dtype)
        for layer in self.layers:
            mean_U1D = (hidden_UPD * shown_UP1).sum(1, keepdim=True) / shown_UP1.sum(1, keepdim=True)
            hidden_UPD = hidden_UPD + torch.tanh(layer(hidden_UPD + mean_U1D))
        return ModalityTokens(hidden_UPD * shown_UP1, valid_UP)


@ENCODERS.register("tiny_deep_text")
class TinyDeepEncoder:
    """A user's encoder of texts that offers a cut."""

    modality, dim, max_tokens, source, dtype, layers = "text", WIDTH, 4, "tiny_deep", torch.float16, 3

    def __init__(self, options: NoOptions | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.model = TinyModel().requires_grad_(False)

    def ids(self, inputs: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids_nP1 = torch.zeros(len(inputs), self.max_tokens, 1, dtype=torch.int32)
        lengths_n = torch.ones(len(inputs), dtype=torch.int64)
        for row, text in enumerate(inputs):
            words = text.split()[: self.max_tokens]
            lengths_n[row] = max(len(words), 1)
            for place, word in enumerate(words):
                ids_nP1[row, place, 0] = hashlib.sha256(word.encode()).digest()[0] % WORDS
        return ids_nP1, lengths_n

    def encode(self, inputs: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids_nP1, lengths_n = self.ids(inputs)
        with torch.no_grad():
            return self.model(ids_nP1, torch.arange(self.max_tokens) < lengths_n[:, None])[0], lengths_n

    def prefix(self, cut: int) -> "TinyDeepEncoder | TinyIds":
        if cut == 0:
            return TinyIds(self)
        part = copy.deepcopy(self)
        part.model.layers = part.model.layers[:cut]
        return part

    def suffix(self, cut: int) -> TinyModel:
        part = copy.deepcopy(self.model)
        part.layers = part.layers[cut:]
        if cut:
            del part.words
        return part


class TinyIds:
    """The words of a text by number."""

    modality, dim, max_tokens, source, dtype = "text", 1, TinyDeepEncoder.max_tokens, "tiny_deep", torch.int32

    def __init__(self, encoder: TinyDeepEncoder) -> None:
        self.encode = encoder.ids
