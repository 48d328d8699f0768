"""Run folders as training leaves them, without training: for tests of whatever reads runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.metrics import attainable_auc, ranking_metrics, sliced_metrics

DIM = 16
GIB = 1024**3


def plan_dict(world_size: int) -> dict[str, Any]:
    """Return a plan with one table split by rows over all ranks."""
    rows = 4000 // world_size
    shards = [
        {"rank": rank, "size": [rows, DIM], "offset": [rank * rows, 0], "hbm_bytes": 0, "ddr_bytes": rows * DIM * 8}
        | {"perf_ms": 0.4 + 0.1 * rank, "perf_parts_ms": {}}
        for rank in range(world_size)
    ]
    table = {
        "fqn": "items.tables.item",
        "rows": 4000,
        "dim": DIM,
        "weight_bytes": 4000 * DIM * 4,
        "features": ["target"],
    }
    table |= {"sharding_type": "row_wise", "compute_kernel": "fused", "pooling_factors": [1.0], "shards": shards}
    table |= {"hbm_bytes": 0, "ddr_bytes": 4000 * DIM * 8, "perf_ms": sum(shard["perf_ms"] for shard in shards)}
    ranks = [
        {"rank": shard["rank"], "hbm_bytes": 0, "ddr_bytes": shard["ddr_bytes"], "perf_ms": shard["perf_ms"]}
        | {"num_shards": 1, "hbm_available_bytes": 0, "ddr_available_bytes": 8 * GIB}
        for shard in shards
    ]
    imbalance = {"hbm_bytes": None, "ddr_bytes": 1.0, "perf_ms": 1.1}
    head = {"fits": True, "world_size": world_size, "local_world_size": world_size, "device": "cpu", "batch_size": 1024}
    head |= {"planning_seconds": 0.2, "proposals": 3, "plans": 3, "torchrec_text": "--- Planner Statistics ---"}
    return head | {"tables": [table], "ranks": ranks, "imbalance": imbalance}


def fake_run(
    folder: Path, data: PreparedData, *, content: bool, seed: int = 0, noise: float = 0.6, world_size: int = 1
) -> Path:
    """Write a run folder whose predictions are the true chances with noise.

    An ID-only run knows nothing of items without training rows; one with content knows them almost as well as others.
    """
    rng = np.random.default_rng(seed + 10 * content)
    folder.mkdir(parents=True)
    tower = "fusion_qformer" if content else "none"
    config = {
        "data": str(data.folder),
        "run": str(folder),
        "seed": seed,
        "loader": {"batch_size": 1024, "max_history": 50},
        "model": {"content": tower, "history": "cache", "alignment": "global", "embedding_dim": DIM},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    _write(
        folder / "versions.json", {"torchrec_em3": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "torchrec": "1.8.0"}
    )
    plan = plan_dict(world_size)
    _write(folder / "plan.json", plan)
    (folder / "plan.txt").write_text("Sharding plan\n")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events.out.tfevents.0").write_bytes(b"")
    metrics = {split: _predict(folder, data, split, rng, content, noise) for split in ("validation", "test")}
    _write_log(folder / "metrics.jsonl", metrics["validation"], rng, content)
    _write_embeddings(folder / "embeddings.npz", data, rng, content)
    summary = {
        "split": data.meta["split"],
        "seed": seed,
        "samples": 5 * data.meta["counts"]["train"],
        "best_step": 900,
        "model": {"ranker": "din", "content": tower, "history": "cache", "alignment": "global"},
        **metrics,
        "cpu_seconds_per_1k": 0.151 if content else 0.122,
        "peak_rss_bytes": int((1.1 + 0.3 * content) * GIB),
        "parameters": {
            "tables": 128_000,
            "dense": 61_234 if content else 21_345,
            "total": 189_234 if content else 149_345,
        },
        "world_size": world_size,
        "versions": {"torchrec_em3": "0.1.0"},
    }
    if "attainable_auc" in metrics["test"]:
        summary["attainable_auc"] = metrics["test"]["attainable_auc"]
    _write(folder / "summary.json", summary)
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, allow_nan=False))


def _predict(
    folder: Path, data: PreparedData, split: Any, rng: np.random.Generator, content: bool, noise: float
) -> dict[str, Any]:
    rows = data.split_rows(split)
    chance = np.clip(rows["probability"].astype(float), 0.01, 0.99)
    seen = data.item_train_count[rows["item"]] > 0
    true = np.log(chance / (1 - chance))
    blind = np.log(chance.mean() / (1 - chance.mean())) + rng.normal(size=len(true))
    logit = np.where(seen | content, true, blind) + (noise - 0.1 * content) * rng.normal(size=len(true))
    (folder / "predictions").mkdir(exist_ok=True)
    columns = {"user": rows["user"].astype(np.int64), "item": rows["item"].astype(np.int64)}
    columns |= {"label": rows["label"].astype(np.float32), "logit": logit.astype(np.float32)}
    np.savez(folder / "predictions" / f"{split}.npz", **columns)
    result: dict[str, Any] = dict(ranking_metrics(rows["label"], logit, user=rows["user"]))
    result["slices"] = sliced_metrics(
        rows["label"],
        logit,
        train_count=data.item_train_count[rows["item"]],
        known_user=data.user_train_count[rows["user"]] > 0,
        history_length=rows["history_end"] - data.history_offsets[rows["user"]],
        user=rows["user"],
        probability=rows["probability"],
    )
    result["attainable_auc"] = attainable_auc(rows["probability"], rows["label"])
    return result


def _write_log(path: Path, end: dict[str, Any], rng: np.random.Generator, content: bool) -> None:
    lines = []
    for step in range(20, 1001, 20):
        loss = end["logloss"] + 0.12 * np.exp(-step / 200) + 0.004 * rng.normal()
        values = {"rank_loss": loss, "loss": loss}
        if content:
            contrast = 2.0 + 3.0 * np.exp(-step / 150) + 0.03 * rng.normal()
            values |= {"alignment_loss": contrast, "loss": loss + 0.1 * contrast}
            values |= {"bank_coverage": 1 - np.exp(-step / 120), "bank_similarity": 0.97 - 0.2 * np.exp(-step / 100)}
        lines.append({"step": step, "epoch": step // 201, "phase": "train", "samples": step * 1024, **values})
        if step % 200 == 0:
            gap = np.exp(-step / 250)
            values = {"auc": end["auc"] - 0.08 * gap, "gauc": None, "logloss": end["logloss"] + 0.03 * gap}
            unseen = end["slices"]["item_frequency"]["0"]["auc"]
            values |= {"auc_unseen_items": None if unseen is None else unseen - 0.1 * gap * content}
            lines.append(
                {"step": step, "epoch": step // 200 - 1, "phase": "validation", "samples": step * 1024, **values}
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_embeddings(path: Path, data: PreparedData, rng: np.random.Generator, content: bool) -> None:
    item = np.sort(rng.permutation(np.arange(1, data.item_rows))[:3000])
    names, kind = np.unique(np.array(data.items["category"].to_pylist())[item], return_inverse=True)
    centres = rng.normal(size=(len(names), DIM))
    arrays = {"item": item, "id": 0.5 * centres[kind] + rng.normal(size=(len(item), DIM))}
    arrays["id"][data.item_train_count[item] == 0] = 0.0
    if content:
        arrays["content"] = 1.5 * centres[kind] + 0.6 * rng.normal(size=(len(item), DIM))
        arrays["present"] = rng.random(len(item)) > 0.02
        arrays["known"] = data.item_train_count[item] > 0
        arrays["aligned_id"] = arrays["id"] / np.maximum(np.linalg.norm(arrays["id"], axis=1, keepdims=True), 1e-5)
        near = arrays["aligned_id"] + 0.2 * rng.normal(size=(len(item), DIM))
        arrays["aligned_content"] = near / np.linalg.norm(near, axis=1, keepdims=True)
    floats = {name: array.astype(np.float32) for name, array in arrays.items() if array.dtype == np.float64}
    np.savez(path, **(arrays | floats))
