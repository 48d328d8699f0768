"""`em3 plan`: the sharding plan of a config, here or on a cluster that is not there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrec_em3.build import open_data
from torchrec_em3.config import Config
from torchrec_em3.encoder_suffixes import EncoderSuffixes, build_suffixes
from torchrec_em3.errors import ConfigError
from torchrec_em3.id_tables import with_id_tables
from torchrec_em3.parsing import CommandParser, parse_config
from torchrec_em3.plan_measured import read_measured
from torchrec_em3.plan_page import to_html, to_markdown
from torchrec_em3.plan_study import DEFAULT_TOKENS, planned_schema, study
from torchrec_em3.plan_tables import Table
from torchrec_em3.plan_text import to_text
from torchrec_em3.runlog import configure_logging, write_json
from torchrec_em3.schema import FeatureSchema
from torchrec_em3.topology import Cluster, cluster_presets, read_cluster

DESCRIPTION = (
    "Print how TorchRec's planner would shard the tables, with estimates of memory and time for each rank, and what "
    "would help where nothing fits. Needs neither the cluster nor a process group nor, with --rows, any data: tables "
    "are planned on meta tensors."
)


def main(arguments: Sequence[str]) -> None:
    """Run `em3 plan`."""
    config, values = parse_config("plan", DESCRIPTION, arguments, _add_arguments)
    configure_logging(first_rank=True)
    clusters = _clusters(values)
    schema, encoders = _schema(config, values)
    plans = study(schema, config, clusters, encoders)
    print("\n\n".join(to_text(plan) for plan in plans))
    if values.out:
        _write(Path(values.out), plans, _facts(schema, config), read_measured(Path(config.run)) if config.run else None)
        print(f"wrote {values.out}")
    if not any(plan["fits"] for plan in plans):
        raise ConfigError(f"no sharding plan fits {', '.join(cluster.label for cluster in clusters)}; see above")


def _add_arguments(parser: CommandParser) -> None:
    presets = ", ".join(cluster_presets())
    parser.add_argument(
        "--topology",
        type=str,
        default="",
        help=f"Machines to plan for, in place of the options below: {presets}, or a YAML file; several with commas.",
    )
    parser.add_argument("--world_size", type=int, default=1, help="Number of ranks.")
    parser.add_argument("--local_world_size", type=int, default=0, help="Ranks on one machine; 0: up to 8.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="What a rank computes on.")
    parser.add_argument("--hbm_gb", type=float, default=80.0, help="Memory of one accelerator, GiB.")
    parser.add_argument("--ddr_gb", type=float, default=16.0, help="Host memory of one rank, GiB.")
    parser.add_argument("--rows", type=str, default="", help="Plan without data for tables like user=1e9,item=1e10.")
    parser.add_argument("--tokens", type=str, default=DEFAULT_TOKENS, help="With --rows: tokens of an item.")
    parser.add_argument(
        "--out",
        type=str,
        default="",
        help="Folder for plan.json, plan.md and plan.html; a name that ends in .json gets the JSON of one plan alone. "
        "If --run is a trained run, the pages show what it took beside its plan.",
    )


def _clusters(values: Any) -> list[Cluster]:
    if values.topology:
        single = {"world_size": 1, "local_world_size": 0, "device": "cpu", "hbm_gb": 80.0, "ddr_gb": 16.0}
        for option, default in single.items():
            if values[option] != default:
                raise ConfigError(f"--{option} {values[option]} has no effect beside --topology; set it in a YAML file")
        return [read_cluster(name.strip()) for name in values.topology.split(",")]
    cluster = Cluster(
        world_size=values.world_size,
        local_world_size=values.local_world_size or min(values.world_size, 8),
        device=values.device,
        hbm_gb=values.hbm_gb,
        ddr_gb=values.ddr_gb,
    )
    return [cluster]


def _schema(config: Config, values: Any) -> tuple[FeatureSchema, EncoderSuffixes | None]:
    """Return the schema of the data, or of what --rows describes, and the encoders that its tokens still need."""
    if values.rows and config.data:
        raise ConfigError(
            f"--rows {values.rows} stands in place of --data, but --data is {config.data}; give one of them"
        )
    if values.rows:
        return planned_schema(values.rows, values.tokens if config.uses_content else ""), None
    meta = open_data(config).meta
    encoders = build_suffixes(config.model.encoders, meta["modalities"], config.data) if config.uses_content else None
    return FeatureSchema.from_meta(meta), encoders


def _facts(schema: FeatureSchema, config: Config) -> dict[str, str]:
    schema = with_id_tables(schema, config.embeddings)
    tables = {feature.name: feature.rows for feature in schema.pooled_features} | {"item": schema.known_items + 1}
    raw = {schema.user_features[0].name: schema.user_ids.rows, "item": schema.item_ids.rows}
    tables |= {name: rows for name, rows in raw.items() if rows}
    model, embeddings = config.model, config.embeddings
    return {
        "tables": ", ".join(f"{name} {rows:,} rows" for name, rows in tables.items()),
        "width": f"{model.embedding_dim}, stored as {embeddings.precision}, {embeddings.optimizer}",
        "rows a step": f"{config.loader.batch_size} a rank, history up to {config.loader.max_history}",
        "content": f"{model.content}, history {model.history}, catalogue {schema.item_rows:,} rows",
        "sharding": embeddings.sharding,
    }


def _make_folder(out: Path, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}); choose another place") from error


def _write(out: Path, plans: Sequence[Mapping[str, Any]], facts: Mapping[str, str], measured: Table | None) -> None:
    if out.suffix == ".json":
        if len(plans) > 1:
            raise ConfigError(f"--out {out} holds one plan, and there are {len(plans)}; name a folder")
        _make_folder(out, out.parent)
        write_json(out, plans[0])
        return
    _make_folder(out, out)
    write_json(out / "plan.json", {"facts": facts, "plans": plans})
    (out / "plan.md").write_text(to_markdown(plans, facts, measured), encoding="utf-8")
    (out / "plan.html").write_text(to_html(plans, facts, measured), encoding="utf-8")
