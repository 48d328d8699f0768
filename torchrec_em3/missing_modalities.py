"""What a trained run is worth when items lack a modality that they had: tokens with some left out, and the measurement.

Shape letters: N catalogue rows, U items asked for, M modalities.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.errors import ConfigError
from torchrec_em3.evaluate import evaluate_split
from torchrec_em3.item_tokens import TokenSource
from torchrec_em3.process_group import Ranks
from torchrec_em3.runlog import write_json
from torchrec_em3.trained_run import TrainedRun

__all__ = ["ReducedTokens", "measure_without_modalities"]


class ReducedTokens(nn.Module):
    """Tokens of the catalogue in which a random share of the items lack one of the modalities that they have.

    Each item is drawn by itself, and the lost modality is drawn among those that it has; an item with a single modality
    loses that one. What an item loses depends on the seed and its row alone, so it is the same on any number of ranks.

    Args:
        tokens: All tokens of items by modality (see `torchrec_em3.item_tokens.ItemTokens`).
        item_rows: Catalogue rows N, row 0 included.
        share: Chance of an item to be drawn, in [0, 1].
        seed: Seed of the draw.
    """

    def __init__(self, tokens: nn.Module, item_rows: int, share: float, seed: int) -> None:
        super().__init__()
        self._tokens = tokens
        random = np.random.default_rng(seed)
        self._drawn_N = torch.from_numpy(random.random(item_rows) < share)
        self._place_N = torch.from_numpy(random.random(item_rows))

    def forward(self, items_U: Tensor, store: TokenSource | None = None) -> dict[str, ModalityTokens]:
        """Return the tokens of `items_U` by modality, the lost ones marked as not valid."""
        tokens = self._tokens(items_U, store)
        present_UM = torch.stack([valid_UT.any(1) for _, valid_UT in tokens.values()], dim=1)
        rows_U = items_U.cpu()
        drawn_U, place_U = (column_N[rows_U].to(present_UM.device) for column_N in (self._drawn_N, self._place_N))
        lost_U = (place_U * present_UM.sum(1)).long()
        is_lost_UM = present_UM & (present_UM.cumsum(1) - 1 == lost_U[:, None]) & drawn_U[:, None]
        return {
            name: ModalityTokens(tokens_UTD, valid_UT & ~is_lost_UM[:, place : place + 1])
            for place, (name, (tokens_UTD, valid_UT)) in enumerate(tokens.items())
        }


def measure_without_modalities(
    run: Path, trained: TrainedRun, ranks: Ranks, share: float, seed: int
) -> tuple[Path, dict[str, Any]]:
    """Measure both held-out splits with modalities left out, and write the metrics to a file of their own. Collective.

    The content of targets and histories comes from the reduced tokens alike; the bank is written anew in memory, and
    the run's checkpoints, predictions and summary stay as they are. The opened run is of no use for anything else then.

    Args:
        run: Run folder.
        trained: The opened run.
        ranks: This process among its peers.
        share: Chance of an item to lose a modality, in (0, 1].
        seed: Seed of the draw.

    Returns:
        The file, and what is in it.

    Raises:
        ConfigError: If `share` is out of range or the run has no content tower.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"--drop_modality is {share}, must be in (0, 1]")
    model = trained.sharded.model
    if model.content is None:
        raise ConfigError(f"{run} has --model.content none, so it has no modality to drop")
    model.content.tokens = ReducedTokens(model.content.tokens, model.item_rows, share, seed)
    result: dict[str, Any] = {"drop_modality": share, "drop_seed": seed, "checkpoint": trained.origin["checkpoint"]}
    for split in ("validation", "test"):
        result[split] = evaluate_split(trained.sharded, trained.data, split, trained.config, ranks)
    path = run / f"robustness-{share:g}-seed-{seed}.json"
    if ranks.is_first:
        write_json(path, result)
    ranks.barrier()
    return path, result
