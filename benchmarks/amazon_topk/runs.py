"""Runs the matrix of backbones, ways to use content and seeds; one line of results.jsonl a run, none of them twice."""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.amazon_topk.features import encode_texts, read_features
from benchmarks.amazon_topk.interactions import Interactions, read_inter, read_sequences
from benchmarks.amazon_topk.models import BACKBONES, CONTENTS, Backbone, Content, ModelOptions
from benchmarks.amazon_topk.training import TrainOptions, fit
from torchrec_em3.errors import ConfigError

__all__ = ["read_results", "run"]

MODEL, TRAINING = ModelOptions(), TrainOptions()
ROOT = Path(__file__).parents[2]
SOURCES = (
    *(
        f"benchmarks/amazon_topk/{name}.py"
        for name in ("interactions", "features", "graphs", "models", "ranking", "training")
    ),
    "components/attention.py",
    "components/towers/qformer.py",
    "components/towers/tokens.py",
    "components/alignment/contrast.py",
    "components/alignment/info_nce.py",
    "components/encoders/text.py",
)
"""Files whose content decides the figures of a run."""


def run(
    data: str = "",
    inter: str = "",
    text_feat: str = "",
    image_feat: str = "",
    work: str = "runs/amazon_topk",
    name: str = "Sports",
    backbones: tuple[Backbone, ...] = BACKBONES[:2],
    contents: tuple[Content, ...] = CONTENTS,
    seeds: tuple[int, ...] = (0, 1, 2),
    split_seed: int = 0,
    model: ModelOptions = MODEL,
    training: TrainOptions = TRAINING,
) -> None:
    """Train and measure what is not in results.jsonl yet, all of one seed before the next.

    Args:
        data: Folder of one data set of sequences with phrases; split here, phrases encoded by MiniLM.
        inter: Table with its own split, instead of `data`.
        text_feat: Text features of the items, .npy; instead of encoded phrases where there are some.
        image_feat: Image features of the items, .npy.
        work: Where results.jsonl and encoded texts go.
        name: What to call the data set.
        backbones: Backbones to run.
        contents: Ways to use content to run.
        seeds: Seeds of the training.
        split_seed: Seed of the random split (`data` only).
        model: Options of every model; its backbone and content are those of the matrix.
        training: Options of every training.
    """
    if bool(data) == bool(inter):
        raise ConfigError("give either --data or --inter")
    _show_progress()
    folder = Path(work)
    interactions = read_inter(Path(inter)) if inter else read_sequences(Path(data), split_seed)
    features, origin = _features(interactions, text_feat, image_feat, folder)
    common = {
        "dataset": name,
        "split": interactions.fingerprint(),
        "counts": _counts(interactions),
        "features": origin,
        "code": _code(),
        "commit": _commit(),
        "command": f"python -m benchmarks.amazon_topk {shlex.join(sys.argv[1:])}",
    }
    done = {_identity(row) for row in read_results(folder)}
    for options, seed in _matrix(model, backbones, contents, seeds):
        model_settings = dataclasses.asdict(options) | {"l2": options.l2_weight}
        settings = {"model": model_settings, "training": dataclasses.asdict(training)}
        row: dict[str, Any] = {
            **common,
            **settings,
            "config": _hash(json.dumps(settings, sort_keys=True)),
            "seed": seed,
        }
        if _identity(row) in done:
            continue
        logging.info("%s, content %s, seed %d", options.backbone, options.content, seed)
        row |= _in_own_process(options, training, interactions, features, seed)
        with (folder / "results.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the finished runs; none where there is no results.jsonl."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _matrix(
    model: ModelOptions, backbones: tuple[Backbone, ...], contents: tuple[Content, ...], seeds: tuple[int, ...]
) -> Iterator[tuple[ModelOptions, int]]:
    for seed, backbone, content in product(seeds, backbones, contents):
        yield dataclasses.replace(model, backbone=backbone, content=content), seed


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what makes a run another one; a commit that leaves the sources alone does not."""
    features = json.dumps(row["features"], sort_keys=True)
    return row["dataset"], row["split"], features, row["code"], row["config"], row["seed"]


def _features(data: Interactions, text: str, image: str, work: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the items' vectors by modality, and where they came from."""
    features, origin = {}, {}
    work.mkdir(parents=True, exist_ok=True)
    if not text and data.texts:
        features["text"], origin["text"] = encode_texts(data.texts, work), "MiniLM of short derived phrases"
    for modality, path in (("text", text), ("image", image)):
        if path:
            features[modality] = read_features(Path(path), data.num_items)
            origin[modality] = f"{Path(path).name} sha256 {_hash(Path(path).read_bytes())}"
    return features, origin


def _in_own_process(*arguments: Any) -> dict[str, Any]:
    """Return the figures of `fit`; a process of its own makes CPU time and peak memory those of the run."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_show_progress) as pool:
        return pool.submit(fit, *arguments).result()


def _show_progress() -> None:
    """Log to the console; `force`, because a library that is imported has set up the root logger already."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)


def _counts(data: Interactions) -> dict[str, int]:
    parts = {part: len(data.pairs(part)[0]) for part in ("train", "validation", "test")}
    return {"users": data.num_users, "items": data.num_items, **parts}


def _code() -> str:
    """Return a hash of the files that decide a run's figures, changes that are not committed included."""
    return _hash(b"".join((ROOT / source).read_bytes() for source in SOURCES))


def _commit() -> str:
    """Return the short name of the commit, for people; `_code` tells whether two runs had the same sources."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _hash(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:12]
