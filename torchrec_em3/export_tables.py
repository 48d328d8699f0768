"""What a trained model looks up, as whole tables on the CPU: rows of the ID tables and content of every item.

Shape letters: I item rows (row 0, "unknown", included), N rows of a table, U items of a part, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_em3.code_features import CodeFeatures
from torchrec_em3.components.interfaces import HistoryItems
from torchrec_em3.content_path import ITEMS_AT_A_TIME, ContentPath
from torchrec_em3.model import EM3Model
from torchrec_em3.schema import FeatureSchema

__all__ = ["CatalogueContent", "catalogue_codes", "catalogue_content", "id_tables"]

ROWS_AT_A_TIME = 1 << 16


class CatalogueContent(NamedTuple):
    """Content of every item row, as the target branch and as the history branch read it.

    Attributes:
        target_ID: The tower's output, before the projection.
        history: Rows and validity of all items, and the map on the rows; None where histories have no content.
    """

    target_ID: Tensor
    history: HistoryItems | None


@torch.no_grad()
def id_tables(model: EM3Model, schema: FeatureSchema, device: torch.device) -> dict[str, Tensor]:
    """Return the rows [N, D] of each ID table by name, float32, whatever the sharding plan of this one process."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ["item_table", *model.users.table_names]}
    sizes = {feature.name: feature.rows for feature in schema.user_features}
    for row_N in torch.split(torch.arange(schema.known_items + 1, device=device), ROWS_AT_A_TIME):
        parts["item_table"].append(model.items(row_N, row_N[:0])[0].cpu())
    for row_N in torch.split(torch.arange(max(sizes.values()), device=device), ROWS_AT_A_TIME):
        # All tables are asked together; a shorter one repeats its last row, which is cut off again.
        values = torch.cat([row_N.clamp_max(rows - 1) for rows in sizes.values()])
        found = model.users(KeyedJaggedTensor(keys=list(sizes), values=values, lengths=torch.ones_like(values)))
        for name, rows in sizes.items():
            parts[f"{name}_table"].append(found[name][: max(0, rows - int(row_N[0]))].cpu())
    return {name: torch.cat(rows).float() for name, rows in parts.items()}


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
