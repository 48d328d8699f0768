"""The trained model as a folder in the manner of Hugging Face: weights, config and model card; and back again."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from torchrec_em3.batch import ModalityTokens
from torchrec_em3.components.content_bank import ContentBank
from torchrec_em3.config import Config
from torchrec_em3.datasets.codes import CodeStore
from torchrec_em3.datasets.loader import batch_loader
from torchrec_em3.datasets.tokens import TokenStore
from torchrec_em3.encoder_suffixes import EncoderSuffixes, build_suffixes
from torchrec_em3.errors import CheckpointError, DataError
from torchrec_em3.export import check_exportable, new_folder
from torchrec_em3.export_parity import Parity, compare, model_predictions
from torchrec_em3.export_tables import CatalogueContent, catalogue_content
from torchrec_em3.hub_adapters import save_adapters
from torchrec_em3.hub_card import model_card
from torchrec_em3.hub_codes import CODES_FILE, SavedCodes, save_codes
from torchrec_em3.id_tables import ITEM_TABLE, USER_TABLE, uses_raw_ids
from torchrec_em3.item_tokens import CodeSource, ItemTokens, TokenSource
from torchrec_em3.model import EM3Model
from torchrec_em3.parsing import parse_config
from torchrec_em3.process_group import Ranks
from torchrec_em3.runlog import write_json
from torchrec_em3.schema import CodeSpec, DenseFeature, FeatureSchema, ModalitySpec, SparseFeature
from torchrec_em3.streams import open_stream
from torchrec_em3.tensor_files import make_readable
from torchrec_em3.tier_edges import rows_at_tier_edges
from torchrec_em3.trained_run import TrainedRun

__all__ = ["from_pretrained", "save_pretrained"]

WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
ENCODER_WEIGHTS = ("content.tokens.encoders.",)
CPU = torch.device("cpu")


def save_pretrained(trained: TrainedRun, run: Path, out: Path, ranks: Ranks) -> Parity:
    """Write `model.safetensors`, `config.json` and a model card with the run's measured table, or nothing.

    What is written is read again and compared with the run's model on the validation split.

    Args:
        trained: The run, opened.
        run: Its folder, for `summary.json`.
        out: Folder to make.
        ranks: A single process.

    Raises:
        ConfigError: If `out` exists, or for `check_exportable`.
        DataError: If the run has no summary.json.
        NumericError: If the model that is read again scores differently.
    """
    check_exportable(ranks)
    if not (run / "summary.json").is_file():
        raise DataError(f"{run} has no summary.json for the model card; run em3 evaluate {run}")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    expected, content = model_predictions(trained, ranks), _needed_content(trained.sharded.model, ranks)
    edges, schema = rows_at_tier_edges(trained, content), _schema_as_read(trained)
    # Neither the folders of this machine nor modules to import on another one.
    config = trained.config.as_dict() | {"data": "", "run": "", "plugins": ""}
    with new_folder(out) as folder:
        whole = _unsharded(trained, schema, content)
        save_model(whole, str(folder / WEIGHTS_FILE))
        make_readable(folder / WEIGHTS_FILE)
        save_adapters(folder, whole)
        cuts = {name: spec for name, spec in trained.data.meta["modalities"].items() if "cut" in spec}
        described = {"config": config, "schema": dataclasses.asdict(schema), "encoders": cuts}
        write_json(folder / CONFIG_FILE, {"model_type": "em3", **described})
        if _uses_codes(trained.config, schema):
            save_codes(folder / CODES_FILE, CodeStore(trained.data.codes_folder), schema.item_rows)
        raw_users = uses_raw_ids(trained.config.embeddings, USER_TABLE)
        (folder / CARD_FILE).write_text(model_card(summary, trained.origin, raw_users), encoding="utf-8")
        store = TokenStore(trained.data.tokens_folder) if trained.config.uses_content else None
        return compare(_logits(from_pretrained(folder, store), trained, ranks), expected, "fp32", edges)


def from_pretrained(path_or_id: str | Path, store: TokenSource | None = None, revision: str | None = None) -> EM3Model:
    """Return the model in evaluation mode, tables unsharded on the CPU.

    Parts of your own must be registered before: import their module first.

    Args:
        path_or_id: Folder that `em3 export --format hub` wrote, or the id of a repository on the Hugging Face hub.
        store: Tokens of the catalogue. Without them items that the bank does not hold count as items without content,
            which is what they are at the time of the export; histories other than `cache`, and training, need them.
            Encoders that the run trained are built with them, and left out without.
        revision: Branch, tag or commit of the repository.

    Raises:
        CheckpointError: If it is no such folder, or its weights are not those of its config.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # only who names a repository needs it

        names = [WEIGHTS_FILE, CONFIG_FILE, CODES_FILE]
        folder = Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=names))
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        schema, config = _schema(values["schema"]), values["config"] | {"plugins": ""}
        cuts: dict[str, Any] = values.get("encoders", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not the config of a model ({error})") from error
    resolved, _ = parse_config("export", "", ["--config", json.dumps(config)])
    encoders = None if store is None else build_suffixes(resolved.model.encoders, cuts, str(folder))
    codes = SavedCodes(folder / CODES_FILE) if _uses_codes(resolved, schema) else None
    model = _empty(schema, resolved, store, codes, encoders)
    try:
        missing, unexpected = load_model(model, str(folder / WEIGHTS_FILE), strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: {str(error).splitlines()[0]}") from error
    unused = ENCODER_WEIGHTS if encoders is None else ()
    strange = [*missing, *(name for name in unexpected if not name.startswith(unused))]
    if strange:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: {len(strange)} weights are not the config's, as {strange[0]}")
    return model.eval()


def _schema_as_read(trained: TrainedRun) -> FeatureSchema:
    """Return the schema of the run's data with modalities as its tower reads them."""
    schema, encoders = FeatureSchema.from_meta(trained.data.meta), _encoders(trained.sharded.model)
    return schema if encoders is None else encoders.read_schema(schema)


def _encoders(model: EM3Model) -> EncoderSuffixes | None:
    if model.content is None:
        return None
    assert isinstance(model.content.tokens, ItemTokens)
    return model.content.tokens.encoders


def _uses_codes(config: Config, schema: FeatureSchema) -> bool:
    in_tower = config.uses_content and config.model.codes == "content"
    return bool(schema.codes) and (in_tower or config.uses_code_features)


class _NoTokens:
    """A token store in which no item has content."""

    def __init__(self, schema: FeatureSchema) -> None:
        self._modalities = schema.modalities

    def fetch(self, items_U: Tensor, device: torch.device | None = None) -> dict[str, ModalityTokens]:
        sizes = {spec.name: (len(items_U), spec.max_tokens, spec.dim) for spec in self._modalities}
        return {
            name: ModalityTokens(
                torch.zeros(size, device=device), torch.zeros(size[:2], dtype=torch.bool, device=device)
            )
            for name, size in sizes.items()
        }


def _empty(
    schema: FeatureSchema,
    config: Config,
    store: TokenSource | None,
    codes: CodeSource | None = None,
    encoders: EncoderSuffixes | None = None,
) -> EM3Model:
    raw_ids = None
    if uses_raw_ids(config.embeddings, ITEM_TABLE):
        raw_ids = torch.zeros(schema.item_rows, dtype=torch.int64)
    model = EM3Model(schema, config, store or _NoTokens(schema), CPU, codes, encoders, raw_ids)
    if raw_ids is not None:
        model.items.save_raw_ids()
    return model


def _needed_content(model: EM3Model, ranks: Ranks) -> CatalogueContent | None:
    """Encode the catalogue where the bank or a histogram of similarities is made of it."""
    if model.content is None or (model.content.bank is None and model.content.similarity is None):
        return None
    return catalogue_content(model.content, model.item_rows, ranks.device)


@torch.no_grad()
def _unsharded(trained: TrainedRun, schema: FeatureSchema, content: CatalogueContent | None) -> EM3Model:
    """Return a copy of the run's model, its tables whole and its bank filled for all items, on the CPU."""
    source = trained.sharded.model
    whole = _empty(schema, trained.config, None, encoders=copy.deepcopy(_encoders(source)))
    # The raw ids of the catalogue are a buffer that is no part of the run's state.
    state = dict(source.named_buffers()) | trained.sharded.module.state_dict()
    for name, value in whole.state_dict().items():
        if not name.startswith("content.bank."):
            _copy(state[name], value)
    if source.content is not None and source.content.bank is not None:
        assert whole.content is not None
        assert isinstance(whole.content.bank, ContentBank)
        assert content is not None
        assert content.history is not None
        assert content.history.valid_V is not None
        (row_V,) = torch.where(content.history.valid_V)
        whole.content.bank.write(row_V, content.target_ID[row_V], max(source.step, 1))
    return whole


def _copy(source: Tensor | ShardedTensor, target: Tensor) -> None:
    """Copy a tensor, or all shards of one that this process alone holds."""
    if not isinstance(source, ShardedTensor):
        target.copy_(source)
        return
    for shard in source.local_shards():
        start, size = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        target[tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))] = shard.tensor


@torch.no_grad()
def _logits(model: EM3Model, trained: TrainedRun, ranks: Ranks) -> np.ndarray:
    """Score the validation split."""
    stream = open_stream(trained.config, trained.data, "validation", ranks)
    parts = [model(batch)[1].logit[batch.weight > 0] for batch in batch_loader(stream)]
    return torch.cat(parts).numpy()


def _schema(values: dict[str, Any]) -> FeatureSchema:
    features, sparse = (
        tuple(SparseFeature(**feature) for feature in values.get(name, ())) for name in ("user_features", "sparse")
    )
    modalities = tuple(ModalitySpec(**modality) for modality in values["modalities"])
    codes = tuple(CodeSpec(**code) for code in values["codes"])
    dense = tuple(DenseFeature(**feature) for feature in values.get("dense", ()))
    lists = {"user_features": features, "modalities": modalities, "codes": codes, "tasks": tuple(values["tasks"])}
    lists |= {"sparse": sparse, "dense": dense}
    # A number of dense features, always 0, stood in the config before there were any.
    others = {name: value for name, value in values.items() if name != "num_dense"}
    return FeatureSchema(**{**others, **lists})
