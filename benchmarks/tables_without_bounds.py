"""Fixed, hashed and managed user and item tables of equal size: validation AUC, and who has a row to himself.

    python benchmarks/tables_without_bounds.py --data DATA [--seeds 0] [--out benchmarks/results/tables.md]

ID-only models, so that nothing but the tables differs. The test split is not read.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from tqdm import tqdm

from torchrec_em3.build import open_data
from torchrec_em3.commands.train import train
from torchrec_em3.components.managed_ids import hashed_rows
from torchrec_em3.config import Config, EmbeddingConfig, LoaderConfig, ModelConfig, TrainConfig
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw_ids import item_ids, user_ids
from torchrec_em3.parsing import resolve_parts
from torchrec_em3.process_group import Ranks, process_group
from torchrec_em3.trained_run import TrainedRun, open_trained_run

ROW = "| {table} | {rows} | {auc} | {user_shared} | {user_unknown} | {item_shared} | {item_unknown} |"


def main(
    data: str,
    work: str = "runs/tables",
    shares: tuple[float, ...] = (0.5, 0.25),
    policies: tuple[str, ...] = ("lfu", "lru", "distance_lfu"),
    seeds: tuple[int, ...] = (0,),
    epochs: int = 2,
    out: str = "benchmarks/results/tables.md",
) -> None:
    """Train what is not there yet and write the table.

    Args:
        data: Prepared folder.
        work: Where runs go.
        shares: Rows of the tables as shares of the users and items with training rows.
        policies: Evictions of managed tables.
        seeds: Seeds of the training.
        epochs: Passes over the training rows, at most.
        out: Markdown file to write.
    """
    prepared = open_data(Config(data=data, model=ModelConfig(content="none")))
    kinds = {"hashed": {"ids": "hashed"}}
    kinds |= {f"managed, {name}": {"ids": "managed", "eviction": name} for name in policies}
    cells: list[tuple[str, float, dict[str, str]]] = [("fixed", 1.0, {})] + [
        (kind, share, spec) for share in shares for kind, spec in kinds.items()
    ]
    lines = []
    for kind, share, spec in tqdm(cells, unit="table"):
        rows = {
            "user_table": 1 + int(share * prepared.known_users),
            "item_table": 1 + int(share * prepared.known_items),
        }
        tables = {name: {**spec, "rows": count} for name, count in rows.items()} if spec else {}
        found = []
        for seed in seeds:
            run = Path(work) / f"{kind.replace(', ', '-')}-{share:g}-{seed}"
            config = Config(
                data=data,
                run=str(run),
                seed=seed,
                loader=LoaderConfig(batch_size=2048),
                model=ModelConfig(content="none"),
                embeddings=EmbeddingConfig(tables=tables),
                train=TrainConfig(epochs=epochs),
            )
            with process_group() as ranks:
                found.append(_measure(config, run, ranks))
        means = {name: np.mean([values[name] for values in found]) for name in found[0]}
        shown = {name: f"{value:.4f}" if name == "auc" else f"{value:.1%}" for name, value in means.items()}
        lines.append(ROW.format(table=kind, rows=" / ".join(f"{count:,}" for count in rows.values()), **shown))
        print(lines[-1], flush=True)
    Path(out).write_text(_page(prepared, seeds, lines), encoding="utf-8")


def _measure(config: Config, run: Path, ranks: Ranks) -> dict[str, float]:
    if not (run / "training.json").is_file():
        train(resolve_parts(config), ranks, overwrite=True, evaluate=False)
    trained = open_trained_run(run, ranks)
    rows = trained.data.split_rows("validation")
    values = {"auc": float(trained.progress["best_value"])}
    for side, row_of in (("user", _user_rows(trained)), ("item", _item_rows(trained))):
        counts = trained.data.user_train_count if side == "user" else trained.data.item_train_count
        values |= {f"{side}_{name}": value for name, value in _shares(row_of, counts > 0, rows[side]).items()}
    return values


def _shares(row_of: np.ndarray, trained: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Return which share of the events finds its row shared with another id that was trained on, or has none."""
    users_of_row = np.bincount(row_of[trained], minlength=row_of.max() + 1)
    row, others = row_of[ids], users_of_row[row_of[ids]] - trained[ids]
    return {"shared": float(np.mean((row > 0) & (others > 0))), "unknown": float(np.mean(row == 0))}


def _user_rows(trained: TrainedRun) -> np.ndarray:
    """Return the row of each user, 0 for "unknown"; where rows are managed, a number of its own for each with a row."""
    data, users = trained.data, trained.sharded.model.users
    rows = np.arange(data.user_rows)
    if users.by_id is not None:
        id_U = torch.from_numpy(user_ids(data))
        with torch.no_grad():
            _, known_U = users.by_id(id_U)
        return np.where(known_U.numpy(), rows, 0)
    spec = trained.config.embeddings.tables.get("user_table", {})
    return _vocabulary(rows, data.known_users) if not spec else _hashed(user_ids(data), spec)


def _item_rows(trained: TrainedRun) -> np.ndarray:
    """As `_user_rows`, for the catalogue."""
    data = trained.data
    rows = np.arange(data.item_rows)
    spec: dict[str, Any] = trained.config.embeddings.tables.get("item_table", {})
    if spec.get("ids") == "hashed":
        return _hashed(item_ids(data), spec)
    item_U = torch.from_numpy(rows)
    with torch.no_grad():
        known = trained.sharded.model.items(item_U, item_U[:0]).known_U
    return np.where(known.numpy(), rows, 0)


def _vocabulary(rows: np.ndarray, known: int) -> np.ndarray:
    return np.where(rows <= known, rows, 0)


def _hashed(ids: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    rows: np.ndarray = hashed_rows(torch.from_numpy(ids), spec["rows"]).numpy()
    return rows


def _page(data: PreparedData, seeds: tuple[int, ...], lines: list[str]) -> str:
    return (
        "# Tables without bounds: fixed, hashed and managed ids\n\n"
        f"{data.meta['dataset']}, split `{data.meta['split']}`: {data.known_users:,} users and {data.known_items:,} "
        f"items with training rows. ID-only DIN, mean over {len(seeds)} seed(s), best validation. Rows of the user / "
        "item table; shares of the validation rows whose user (item) finds its row shared with another trained on, or "
        "has none and is unknown. Printed by\n\n"
        f"```\npython {shlex.join(sys.argv)}\n```\n\n"
        + ROW.format(
            table="ids",
            rows="rows",
            auc="validation AUC",
            user_shared="users shared",
            user_unknown="users unknown",
            item_shared="items shared",
            item_unknown="items unknown",
        )
        + "\n|---|---|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
