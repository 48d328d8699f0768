"""The model card: what the model is and what was measured of it, from the run's summary.json."""

from collections.abc import Mapping
from typing import Any

from torchrec_em3.number_format import count, decimals

__all__ = ["model_card"]

_CARD = """---
library_name: torchrec-em3
tags:
- recommendation
- ctr-prediction
- multimodal
metrics:
- roc_auc
---

# EM3 ranking model

Scores a user's candidates from IDs, history and content. Ranker `{ranker}`, content tower `{content}`, history content
`{history}`, {parameters} parameters. Checkpoint: {checkpoint}. Data: content hash {data}, split `{split}`, seed {seed}.

| rows | number | AUC | GAUC | log loss |
|---|---|---|---|---|
{rows}

As `summary.json` of the run has it. Items never trained on have no ID embedding, so their row shows what content does.

```python
from torchrec_em3.hub import from_pretrained

model = from_pretrained("THIS FOLDER OR REPOSITORY")
```

The model takes rows of the catalogue and {users} in a `torchrec_em3.batch.Batch`, as
{loader} makes them of the prepared data.
To score by raw ids, export the run as a package: `em3 export RUN --out PACKAGE`.
"""


def model_card(summary: Mapping[str, Any], origin: Mapping[str, str], raw_users: bool) -> str:
    """Return the card as Markdown.

    Args:
        summary: Contents of summary.json.
        origin: Checkpoint and data (see `trained_run.describe_origin`).
        raw_users: Whether the model takes raw ids of users.
    """
    loader = "torchrec_em3.datasets.loader"
    measured = {
        "validation": summary["validation"],
        "test": summary["test"],
        "test, items never trained on": summary["test"]["slices"]["item_frequency"]["0"],
    }
    # The rows above are the main task's, which comes first.
    for task in list(summary["test"].get("tasks", {}))[1:]:
        measured[f"test, task {task}"] = summary["test"]["tasks"][task]
    rows = [
        f"| {name} | {count(values['n'])} | {decimals(values['auc'])} | {decimals(values['gauc'])} | "
        f"{decimals(values['logloss'])} |"
        for name, values in measured.items()
    ]
    names = {name: summary["model"][name] for name in ("ranker", "content", "history")}
    return _CARD.format(
        **names,
        **origin,
        parameters=count(summary["parameters"]["total"]),
        split=summary["split"],
        seed=summary["seed"],
        users="raw ids of users" if raw_users else "of the user table",
        loader=f"`{loader}.BatchStream(..., raw_users=True)`" if raw_users else f"`{loader}`",
        rows="\n".join(rows),
    )
