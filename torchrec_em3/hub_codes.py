"""The semantic codes of a catalogue as one file beside the weights of a model that reads them.

Shape letters: I catalogue rows (row 0, "unknown", included), U items, L levels.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchrec_em3.batch import ItemCodes
from torchrec_em3.errors import CheckpointError
from torchrec_em3.item_tokens import CodeSource
from torchrec_em3.tensor_files import make_readable

__all__ = ["CODES_FILE", "SavedCodes", "save_codes"]

CODES_FILE = "codes.safetensors"


def save_codes(path: Path, codes: CodeSource, item_rows: int) -> None:
    """Write the codes of every row of a catalogue."""
    tensors: dict[str, Tensor] = {}
    for name, (codes_IL, present_I) in codes.fetch(torch.arange(item_rows)).items():
        tensors |= {f"{name}.codes": codes_IL.int(), f"{name}.present": present_I}
    save_file(tensors, path)
    make_readable(path)


class SavedCodes:
    """What `save_codes` wrote, as the model asks for it (`item_tokens.CodeSource`)."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            CheckpointError: If it is missing or no such file.
        """
        try:
            tensors = load_file(path)
            names = sorted(name.removesuffix(".codes") for name in tensors if name.endswith(".codes"))
            self._codes = {name: ItemCodes(tensors[f"{name}.codes"], tensors[f"{name}.present"]) for name in names}
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{path} does not hold the codes of a catalogue ({error})") from error

    def fetch(self, items_U: Tensor, device: torch.device | None = None) -> dict[str, ItemCodes]:
        """Return the codes of `items_U` by name, on `device`."""
        row_U = items_U.cpu()
        return {
            name: ItemCodes(codes_IL[row_U].long().to(device), present_I[row_U].to(device))
            for name, (codes_IL, present_I) in self._codes.items()
        }
