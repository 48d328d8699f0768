"""Content of the items: one frozen vector a modality, from feature files or from the project's text encoder.

Shape letters: U items, T = 1 token, I width of a modality.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.encoders.text import MINILM_PACKAGE, MiniLMEncoder, MiniLMOptions
from torchrec_em3.components.towers.tokens import masked_mean
from torchrec_em3.errors import DataError

__all__ = ["as_tokens", "encode_texts", "read_features"]

MAX_TOKENS = 32
ITEMS_AT_A_TIME = 1024


def read_features(path: Path, num_items: int) -> Tensor:
    """Return the vectors of a `.npy` file [U, I] as float32; row i belongs to item i.

    Raises:
        DataError: If the file cannot be read, has another number of rows, or holds NaN or infinity.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; it must be a float array of items x width") from error
    if array.ndim != 2 or len(array) != num_items or not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{path} holds {array.dtype} {array.shape}, must be floats of {num_items} items x width")
    features_UI = torch.from_numpy(array.astype(np.float32))
    if not bool(torch.isfinite(features_UI).all()):
        raise DataError(f"{path} holds NaN or infinity; repair the features")
    return features_UI


def encode_texts(texts: tuple[str, ...], work: Path) -> Tensor:
    """Return the mean MiniLM token of each text [U, I]; kept in `work` under a hash of encoder and texts."""
    name = hashlib.sha256("\n".join((MINILM_PACKAGE, str(MAX_TOKENS), *texts)).encode()).hexdigest()[:16]
    path = work / f"text-{name}.npy"
    if not path.is_file():
        encoder = MiniLMEncoder(MiniLMOptions(max_tokens=MAX_TOKENS))
        rows = []
        for start in range(0, len(texts), ITEMS_AT_A_TIME):
            tokens_UTI, lengths_U = encoder.encode(texts[start : start + ITEMS_AT_A_TIME])
            valid_UT = torch.arange(MAX_TOKENS) < lengths_U[:, None]
            rows.append(masked_mean(ModalityTokens(tokens_UTI, valid_UT)))
        work.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        np.save(unfinished, torch.cat(rows).numpy())
        unfinished.replace(path)
    return read_features(path, len(texts))


def as_tokens(features: Mapping[str, Tensor]) -> dict[str, ModalityTokens]:
    """Return each modality's vectors as one token an item, brought to a root mean square of 1.

    A row of zeros is an item without the modality and becomes a masked token.
    """
    tokens = {}
    for name, features_UI in features.items():
        rms_U1 = features_UI.square().mean(1, keepdim=True).sqrt()
        valid_U1 = rms_U1 > 0
        scaled_UI = features_UI / rms_U1.masked_fill(~valid_U1, 1.0)
        tokens[name] = ModalityTokens(scaled_UI[:, None], valid_U1)
    return tokens
