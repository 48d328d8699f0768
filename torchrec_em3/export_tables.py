"""What a trained model looks up, as whole tables on the CPU: rows of the ID tables and content of every item.

Shape letters: I item rows (row 0, "unknown", included), X item or user rows, N rows of a table, U items of a part, D
width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_em3.code_features import CodeFeatures
from torchrec_em3.components.embeddings import UserEmbedding
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.content_path import ITEMS_AT_A_TIME, ContentPath
from torchrec_em3.datasets.raw_ids import user_ids
from torchrec_em3.id_tables import ITEM_TABLE, USER_TABLE, uses_raw_ids
from torchrec_em3.schema import FeatureSchema
from torchrec_em3.trained_run import TrainedRun

__all__ = ["CatalogueContent", "IdTables", "catalogue_codes", "catalogue_content", "id_tables"]

ROWS_AT_A_TIME = 1 << 16


class CatalogueContent(NamedTuple):
    """Content of every item row, as the target branch and as the history branch read it.

    Attributes:
        target_ID: The tower's output, before the projection.
        history: Rows and validity of all items, and the map on the rows; None where histories have no content.
    """

    target_ID: Tensor
    history: HistoryItems | None


class IdTables(NamedTuple):
    """ID tables as the users and items of a run's data find them.

    Attributes:
        rows: Rows [N, D] of each table by its name, float32. Of a table of raw ids these are the rows that users or
            items of the data have, each once, that of "unknown" first.
        places: `user_rows` and `item_rows`, where the table is of raw ids: for each user or item row the place of its
            row among those, int32 [X].
    """

    rows: dict[str, Tensor]
    places: dict[str, Tensor]


@torch.no_grad()
def id_tables(trained: TrainedRun, device: torch.device) -> IdTables:
    """Look up what the ID tables hold, whatever the sharding plan of this one process.

    Args:
        trained: The run, in evaluation mode: training would give rows to managed ids that are looked up.
        device: Where its model is.
    """
    model, options = trained.sharded.model, trained.config.embeddings
    assert not model.training
    schema = FeatureSchema.from_meta(trained.data.meta)
    places: dict[str, Tensor] = {}
    item_N = torch.arange(schema.known_items + 1, device=device)
    asked = {feature.name: torch.arange(feature.rows, device=device) for feature in schema.pooled_features}
    if uses_raw_ids(options, ITEM_TABLE):
        item_X = torch.arange(schema.item_rows, device=device)
        first_N, places["item_rows"] = _distinct(model.items.table_rows(item_X))
        item_N = item_X[first_N]
    if uses_raw_ids(options, USER_TABLE):
        user_X = torch.from_numpy(user_ids(trained.data)).to(device)
        first_N, places["user_rows"] = _distinct(model.users.table_rows(user_X))
        asked[model.users.names[0]] = user_X[first_N]
    items = [model.items(item_U, item_U[:0])[0].cpu() for item_U in torch.split(item_N, ROWS_AT_A_TIME)]
    return IdTables({ITEM_TABLE: torch.cat(items).float(), **_user_tables(model.users, asked)}, places)


def _distinct(row_X: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each distinct row occurs first, in the order of the rows, and which of them each place has."""
    distinct_N, which_X = torch.unique(row_X, return_inverse=True)
    place_X = torch.arange(len(row_X), device=row_X.device)
    first_N = torch.full_like(distinct_N, len(row_X)).scatter_reduce_(0, which_X, place_X, "amin")
    return first_N, which_X.int().cpu()


def _user_tables(users: UserEmbedding, asked: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of what is asked for of each feature, by the name of its table."""
    parts: dict[str, list[Tensor]] = {name: [] for name in asked}
    longest = torch.arange(max(map(len, asked.values())), device=next(iter(asked.values())).device)
    for place_N in torch.split(longest, ROWS_AT_A_TIME):
        # All tables are asked together; a shorter one repeats its last id, which is cut off again.
        values = torch.cat([id_N[place_N.clamp_max(len(id_N) - 1)] for id_N in asked.values()])
        found = users(KeyedJaggedTensor(keys=list(asked), values=values, lengths=torch.ones_like(values)))
        for name, id_N in asked.items():
            parts[name].append(found[name][: max(0, len(id_N) - int(place_N[0]))].cpu())
    return {f"{name}_table": torch.cat(rows).float() for name, rows in parts.items()}


@torch.no_grad()
def catalogue_content(content: ContentPath, item_rows: int, device: torch.device) -> CatalogueContent:
    """Encode every item with the trained tower, and read it as histories do; nothing of the run changes."""
    targets, histories = [], []
    for item_U in torch.split(torch.arange(item_rows, device=device), ITEMS_AT_A_TIME):
        tower_UD, present_U = content.encode(item_U)
        targets.append(tower_UD.cpu())
        if content.history is not None:
            histories.append(content.as_history(item_U, tower_UD, present_U))
    if not histories:
        return CatalogueContent(torch.cat(targets), None)
    valid = [torch.ones(len(h.rows_VD), dtype=torch.bool) if h.valid_V is None else h.valid_V.cpu() for h in histories]
    rows_ID = torch.cat([history.rows_VD.cpu() for history in histories])
    weight_DD, bias_D = (None if x is None else x.cpu() for x in (histories[0].weight_DD, histories[0].bias_D))
    return CatalogueContent(torch.cat(targets), HistoryItems(rows_ID, torch.cat(valid), weight_DD, bias_D))


@torch.no_grad()
def catalogue_codes(codes: CodeFeatures, item_rows: int, device: torch.device) -> HistoryItems:
    """Return the vector of every item's codes and which items have any, on the CPU."""
    parts = [codes.pool(item_U) for item_U in torch.split(torch.arange(item_rows, device=device), ROWS_AT_A_TIME)]
    rows, valid = zip(*(part[:2] for part in parts), strict=True)
    return HistoryItems(torch.cat(rows).cpu(), torch.cat(valid).cpu())
