"""The file of the dense graph: torch.export's archive without any pickle in it.

`torch.export.load` unpickles what an archive declares as pickled, example inputs included, and so would run the code of
whoever wrote it. `em3 export` writes an archive without, and one that holds any is refused before it is loaded.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchrec_em3.errors import CheckpointError

__all__ = ["load_graph"]

EXAMPLES = "/data/sample_inputs/"


def load_graph(path: Path) -> Callable[..., Tensor]:
    """Return the graph as a function on tensors.

    Raises:
        CheckpointError: If the file is no such archive, or holds a pickle.
    """
    try:
        _refuse_pickles(path)
        graph: Callable[..., Tensor] = torch.export.load(path).module()
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).splitlines()[0]}); export the run again") from error
    return graph


def _refuse_pickles(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise CheckpointError(f"{path} holds an entry twice; export the run again")
        for name in names:
            pickled = EXAMPLES in name and archive.getinfo(name).file_size > 0
            if name.endswith("_config.json"):
                tensors = json.loads(archive.read(name))["config"].values()
                pickled = any(tensor["use_pickle"] or tensor["tensor_meta"] is None for tensor in tensors)
            if pickled:
                raise CheckpointError(f"{path}: {name} is pickled, which could run code; nothing was loaded")
