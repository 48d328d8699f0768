"""From a raw data set to a prepared folder: index, split, encode, write; docs/data-format.md describes the folder."""

import json
import logging
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from torchrec_em3 import __version__
from torchrec_em3.components.encoders.cut import check_cut
from torchrec_em3.components.interfaces import TokenEncoder
from torchrec_em3.datasets import splits
from torchrec_em3.datasets.checks import check_raw, check_task_names
from torchrec_em3.datasets.codes import write_codes
from torchrec_em3.datasets.event_features import measure_dense
from torchrec_em3.datasets.ids import count_codes, to_dictionary
from torchrec_em3.datasets.indexing import IndexedDataset, index_dataset
from torchrec_em3.datasets.negatives import check_sampling
from torchrec_em3.datasets.ordered_events import write_events
from torchrec_em3.datasets.prepared import FORMAT_VERSION, hash_content
from torchrec_em3.datasets.prepared_tables import write_items, write_users, write_vocabularies
from torchrec_em3.datasets.raw import RawDataset
from torchrec_em3.datasets.token_reduction import reduce_tokens
from torchrec_em3.datasets.tokens import write_tokens
from torchrec_em3.errors import ConfigError, DataError
from torchrec_em3.registry import ENCODERS, closest

__all__ = ["PrepareOptions", "prepare"]

NO_ENCODER = "none"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How raw data is split, labelled and encoded."""

    split: str = "temporal"
    """`temporal` (global time cut 80/10/10), `leave_last` (per user) or `cold_items` (10% of items never trained)."""

    seed: int = 0
    """Seed of the choice of cold items and of the sampled negatives."""

    label_threshold: float | None = 4.0
    """Smallest rating that counts as positive; null if ratings are 0 and 1 already."""

    labels: Mapping[str, float] = field(default_factory=dict)
    """Labels by name, each with its smallest positive rating, the main one first; in place of label_threshold."""

    negatives: int = 0
    """Items that the user never took, drawn as rows of label 0 for each positive; they enter no history."""

    negative_sampling: str = "popularity"
    """`popularity` (as often as they are positives of the same split) or `uniform`."""

    text_encoder: str = "minilm"
    """Registered name of the text encoder, or `none`."""

    image_encoder: str = "efficientnet_lite0"
    """Registered name of the image encoder, or `none`."""

    text_encoder_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the text encoder."""

    image_encoder_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the image encoder."""

    text_cut: int | None = None
    """Layers of the text encoder that run here; `em3 train` can train those above. 0 stores wordpieces; null: all."""

    image_cut: int | None = None
    """Blocks of the image encoder that run here; `em3 train` can train those above. 0 stores pixels; null: all."""

    token_dim: int = 128
    """Width to which wider tokens are reduced, along their principal directions; 0 keeps all. Not at a cut."""

    encode_batch_size: int = 64
    """Items that an encoder reads at a time."""

    max_part_rows: int = 4_000_000
    """Most rows of one interactions file."""

    overwrite: bool = False
    """Replace a prepared folder that is there already."""

    def __post_init__(self) -> None:
        """Check each option."""
        if self.split not in splits.SPLITS:
            known = list(splits.SPLITS)
            raise ConfigError(
                f"option split is '{self.split}', must be one of {', '.join(known)}.{closest(self.split, known)}"
            )
        for name in ("encode_batch_size", "max_part_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"option {name} is {getattr(self, name)}, must be at least 1")
        for name in ("seed", "negatives", "token_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"option {name} is {getattr(self, name)}, must be at least 0")
        check_sampling(self.negative_sampling)
        if self.label_threshold is not None and not np.isfinite(self.label_threshold):
            raise ConfigError(f"option label_threshold is {self.label_threshold}, must be a finite number or null")
        check_task_names(self.labels)
        for task, threshold in self.labels.items():
            if not np.isfinite(threshold):
                raise ConfigError(f"option labels.{task} is {threshold}, must be a finite number")


def prepare(raw: RawDataset, out: Path, options: PrepareOptions) -> dict[str, Any]:
    """Write the prepared form of `raw` to the folder `out`.

    Everything goes into a temporary folder beside `out`, which is renamed when it is complete; on failure nothing of it
    stays and what was at `out` before is untouched.

    Args:
        raw: The data set.
        out: Folder to make; its parents are made too.
        options: Split, labels, encoders.

    Returns:
        The contents of `out/meta.json`.

    Raises:
        DataError: If the data is not in order, the split cannot be made, or `out` is in the way.
        ConfigError: If an encoder or one of its options is unknown.
    """
    check_raw(raw)
    raw = replace(raw, user_id=to_dictionary(raw.user_id), item_id=to_dictionary(raw.item_id))
    _check_out(out, options.overwrite)
    encoders = _build_encoders(options)
    indexed = index_dataset(
        raw,
        split=options.split,
        seed=options.seed,
        label_threshold=options.label_threshold,
        labels=options.labels,
        negatives=options.negatives,
        negative_sampling=options.negative_sampling,
    )
    # Before anything is encoded: it refuses a feature that is never known.
    dense = measure_dense(indexed.events, raw.dense)
    with _renamed_when_complete(out) as folder:
        write_events(folder / "interactions", indexed.events, options.max_part_rows)
        _write_histories(folder / "history", indexed)
        features = write_users(folder, raw, indexed)
        sparse = write_vocabularies(folder, indexed.vocabularies)
        table = write_items(folder, raw, indexed)
        modalities = _write_tokens(folder, raw, table, encoders, options)
        raw_ids = indexed.items.raw_id.tolist()
        codes = {name: write_codes(folder / "codes" / name, given, raw_ids) for name, given in raw.codes.items()}
        meta = _describe(raw, indexed, options, features, modalities) | {
            "sparse": sparse,
            "dense": dense,
            "codes": codes,
        }
        meta["content_hash"] = hash_content(folder)
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    logger.info("%s: %s", out, ", ".join(f"{count} {name}" for name, count in meta["counts"].items()))
    return meta


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; give a folder that does not exist yet")
    if not any(out.iterdir()):
        return
    if not (out / "meta.json").is_file() or not (out / "interactions").is_dir():
        raise DataError(f"{out}: is not empty and not a prepared folder; give a folder that does not exist yet")
    if not overwrite:
        raise DataError(f"{out}: holds prepared data already; give another folder or --overwrite")


@contextmanager
def _renamed_when_complete(out: Path) -> Iterator[Path]:
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out} cannot be made ({error.strerror}); choose another place") from error
    mark = secrets.token_hex(4)
    folder, old = out.with_name(f".{out.name}.{mark}.new"), out.with_name(f".{out.name}.{mark}.old")
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rename(old)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _build_encoders(options: PrepareOptions) -> dict[str, tuple[str, TokenEncoder]]:
    """Return name and encoder by modality; before anything is written, so that a wrong option costs no work."""
    chosen = {
        "text": (options.text_encoder, options.text_encoder_options),
        "image": (options.image_encoder, options.image_encoder_options),
    }
    encoders: dict[str, tuple[str, TokenEncoder]] = {}
    for modality, (name, values) in chosen.items():
        cut = getattr(options, f"{modality}_cut")
        if name == NO_ENCODER:
            if cut is not None:
                raise ConfigError(f"--{modality}_cut is {cut}, but --{modality}_encoder is none; name an encoder")
            continue
        part = ENCODERS.get(name)
        known = list(part.options.__dataclass_fields__)
        for key in values:
            if key not in known:
                hint = closest(key, known)
                raise ConfigError(f"encoder '{name}' has no option '{key}'; known: {', '.join(known) or 'none'}.{hint}")
        encoder = part.build(part.options(**values))
        if encoder.modality != modality:
            raise ConfigError(f"encoder '{name}' encodes {encoder.modality}; choose it as {encoder.modality}_encoder")
        if cut is not None:
            check_cut(encoder, name, cut)
        encoders[modality] = (name, encoder)
    return encoders


def _write_histories(folder: Path, indexed: IndexedDataset) -> None:
    folder.mkdir()
    np.save(folder / "offsets.npy", indexed.histories.offsets)
    np.save(folder / "items.npy", indexed.histories.items)


def _write_tokens(
    folder: Path,
    raw: RawDataset,
    items: pa.Table,
    encoders: Mapping[str, tuple[str, TokenEncoder]],
    options: PrepareOptions,
) -> dict[str, dict[str, Any]]:
    described = {}
    for modality, (name, encoder) in encoders.items():
        values = items[modality].to_pylist()
        if not any(values):
            logger.warning("%s: the catalogue names none; left out, so no model on this data will read any", modality)
            continue
        inputs = values if modality == "text" else [raw.image_root / value if value else None for value in values]
        tokens, cut = folder / "tokens" / modality, getattr(options, f"{modality}_cut")
        counts = write_tokens(tokens, encoder, inputs, options.encode_batch_size, cut)
        if cut is None:
            _reduce(tokens, encoder.dim, counts.present, options)
        else:
            logger.info("%s: cut after layer %d; --token_dim does not apply", modality, cut)
        described[modality] = {
            "encoder": name,
            "options": asdict(ENCODERS.get(name).options(**getattr(options, f"{modality}_encoder_options"))),
            "encoder_dim": encoder.dim,
            **json.loads((tokens / "meta.json").read_text(encoding="utf-8")),
            "present": counts.present,
            "missing": counts.missing,
            "broken": counts.broken,
        }
        logger.info("%s: %d present, %d missing, %d broken", modality, counts.present, counts.missing, counts.broken)
    return described


def _reduce(folder: Path, encoder_dim: int, present: int, options: PrepareOptions) -> None:
    """Reduce the tokens of a modality if they are wider than asked for."""
    dim = options.token_dim
    if dim == 0 or dim >= encoder_dim or present == 0:
        return
    kept = reduce_tokens(folder, dim, options.seed)
    logger.info("%s: tokens reduced from %d to %d, %.0f%% of them kept", folder.name, encoder_dim, dim, 100 * kept)


def _describe(
    raw: RawDataset,
    indexed: IndexedDataset,
    options: PrepareOptions,
    features: list[dict[str, Any]],
    modalities: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    train, validation, test = count_codes(indexed.events["split"], 3).tolist()
    return {
        "format_version": FORMAT_VERSION,
        "dataset": raw.name,
        "split": options.split,
        "seed": options.seed,
        "label_threshold": next(iter(indexed.tasks.values())),
        "tasks": [{"name": name, "label_threshold": threshold} for name, threshold in indexed.tasks.items()],
        "negatives": {
            "per_positive": options.negatives,
            "sampling": options.negative_sampling,
            "rows": indexed.events.num_rows - len(indexed.histories.items),
        },
        "counts": {
            "users": len(indexed.users.raw_id) - 1,
            "items": len(indexed.items.raw_id) - 1,
            "known_users": indexed.users.known,
            "known_items": indexed.items.known,
            "interactions": indexed.events.num_rows,
            "train": train,
            "validation": validation,
            "test": test,
        },
        "user_features": features,
        "modalities": modalities,
        "simulated": raw.probability is not None,
        "time_cuts": list(indexed.time_cuts) if indexed.time_cuts else None,
        "versions": {
            "torchrec_em3": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
        },
    }
