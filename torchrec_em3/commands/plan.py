"""`em3 plan`: the sharding plan of a config, here or on a cluster that is not there."""

from collections.abc import Sequence
from pathlib import Path

from torchrec_em3.build import build_model, open_data
from torchrec_em3.parsing import CommandParser, parse_config
from torchrec_em3.runlog import configure_logging, write_json
from torchrec_em3.sharding import Cluster, make_plan

DESCRIPTION = (
    "Print how TorchRec's planner would shard the tables, with estimates of memory and time for each rank. "
    "Needs neither the cluster nor a process group: tables are planned on meta tensors."
)


def main(arguments: Sequence[str]) -> None:
    """Run `em3 plan`."""
    config, values = parse_config("plan", DESCRIPTION, arguments, _add_arguments)
    configure_logging(first_rank=True)
    cluster = Cluster(
        world_size=values.world_size,
        local_world_size=values.local_world_size or min(values.world_size, 8),
        device=values.device,
        hbm_gb=values.hbm_gb,
        ddr_gb=values.ddr_gb,
    )
    data = open_data(config)
    _, report = make_plan(build_model(config, data), config, cluster)
    print(report.as_text())
    if values.out:
        write_json(Path(values.out), report.as_dict())
        print(f"wrote {values.out}")


def _add_arguments(parser: CommandParser) -> None:
    parser.add_argument("--world_size", type=int, default=1, help="Number of ranks.")
    parser.add_argument("--local_world_size", type=int, default=0, help="Ranks on one machine; 0: up to 8.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="What a rank computes on.")
    parser.add_argument("--hbm_gb", type=float, default=80.0, help="Memory of one accelerator, GiB.")
    parser.add_argument("--ddr_gb", type=float, default=16.0, help="Host memory of one rank, GiB.")
    parser.add_argument("--out", type=str, default="", help="Also write the plan to this JSON file.")
