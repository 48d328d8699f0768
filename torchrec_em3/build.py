"""From a config to data, model and sharded model: the steps that training, evaluation and planning share."""

import psutil
import torch

from torchrec_em3.config import Config
from torchrec_em3.datasets.codes import CodeStore
from torchrec_em3.datasets.prepared import PreparedData
from torchrec_em3.datasets.raw_ids import item_ids
from torchrec_em3.datasets.remote_folder import local_folder
from torchrec_em3.datasets.tokens import TokenStore
from torchrec_em3.encoder_suffixes import build_suffixes, check_bfloat16
from torchrec_em3.errors import ConfigError
from torchrec_em3.id_tables import ITEM_TABLE, uses_raw_ids
from torchrec_em3.model import EM3Model
from torchrec_em3.process_group import Ranks
from torchrec_em3.schema import FeatureSchema
from torchrec_em3.sharding import Cluster, ShardedModel, shard

__all__ = ["build_model", "build_sharded", "open_data"]

GIB = 1024**3


def open_data(config: Config) -> PreparedData:
    """Open the prepared folder that the config names.

    Raises:
        ConfigError: If the config names none, or the model needs content or codes that the folder does not have.
        DataError: If the folder is not a prepared folder of this format.
    """
    if not config.data:
        raise ConfigError("no data folder: give --data DIR, a folder written by `em3 prepare`")
    data = PreparedData.open(local_folder(config.data))
    codes = data.meta.get("codes", {})
    if config.uses_code_features and not codes:
        raise ConfigError(
            f"--model.codes features needs semantic codes, and {config.data} has none; prepare it with --codes"
        )
    if config.uses_content and not data.meta["modalities"] and not (codes and config.model.codes == "content"):
        raise ConfigError(
            f"{config.data} was prepared without encoders; prepare it with one or set --model.content none"
        )
    return data


def build_model(config: Config, data: PreparedData) -> EM3Model:
    """Return the model with its tables on meta and its dense parameters initialised from the seed.

    Raises:
        ConfigError: If more of an encoder shall be trained than lies above the cut of its tokens.
    """
    torch.manual_seed(config.seed)
    schema, codes = FeatureSchema.from_meta(data.meta), CodeStore(data.codes_folder)
    raw_ids = torch.from_numpy(item_ids(data)) if uses_raw_ids(config.embeddings, ITEM_TABLE) else None
    if not config.uses_content:
        return EM3Model(schema, config, None, codes=codes, raw_item_ids=raw_ids)
    # All else starts at the same values, whatever is trained of the encoders.
    with torch.random.fork_rng(devices=[]):
        encoders = build_suffixes(config.model.encoders, data.meta["modalities"], config.data)
    if encoders is not None:
        schema = encoders.read_schema(schema)
    tokens = TokenStore(data.tokens_folder)
    return EM3Model(schema, config, tokens, codes=codes, encoders=encoders, raw_item_ids=raw_ids)


def build_sharded(config: Config, data: PreparedData, ranks: Ranks) -> ShardedModel:
    """Return the model sharded over the ranks there are, planned for the memory that they have. Collective."""
    check_bfloat16(config.model.encoders, ranks.device)
    return shard(build_model(config, data), config, ranks, this_cluster(ranks))


def this_cluster(ranks: Ranks) -> Cluster:
    """Describe the machines that run this job."""
    cuda = ranks.device.type == "cuda"
    return Cluster(
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        device=ranks.device.type,
        hbm_gb=torch.cuda.get_device_properties(ranks.device).total_memory / GIB if cuda else 0.0,
        ddr_gb=psutil.virtual_memory().total / GIB / ranks.local_world_size,
    )
