"""The machines that a plan is made for: presets by name, YAML files, and TorchRec's description of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

import torchrec_em3
from torchrec_em3.errors import ConfigError
from torchrec_em3.parsing import parse_options
from torchrec_em3.registry import closest

__all__ = ["GIB", "Cluster", "cluster_presets", "read_cluster"]

GIB = 1024**3
_BYTES_PER_MS = 1e6
"""Bytes a millisecond, the planner's unit, in one GB/s."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks, and the memory and bandwidths that each of them has to itself."""

    name: str = ""
    """What reports call it."""
    world_size: int = 1
    """Number of ranks."""
    local_world_size: int = 1
    """Ranks on one machine."""
    device: str = "cpu"
    """What a rank computes on, cpu or cuda."""
    hbm_gb: float = 80.0
    """Memory of one accelerator in GiB; ignored on CPU."""
    ddr_gb: float = 16.0
    """Host memory of one rank in GiB."""
    hbm_gb_per_s: float | None = None
    """Bandwidth of the accelerator's memory in 10^9 bytes a second; null here and below: TorchRec's default."""
    ddr_gb_per_s: float | None = None
    """Bandwidth of a rank's share of the host memory."""
    host_link_gb_per_s: float | None = None
    """Between host memory and accelerator, one way."""
    intra_host_gb_per_s: float | None = None
    """Between a rank and the others on its machine, one way."""
    inter_host_gb_per_s: float | None = None
    """Between a rank and those on other machines, one way."""

    def __post_init__(self) -> None:
        """Check that the ranks fill whole machines, and that no size is absurd."""
        if self.world_size < 1 or self.local_world_size < 1 or self.world_size % self.local_world_size:
            raise ConfigError(
                f"--world_size {self.world_size} must be a positive multiple of "
                f"--local_world_size {self.local_world_size}"
            )
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"topology: device is '{self.device}', must be cpu or cuda")
        for field in ("hbm_gb", "ddr_gb"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ConfigError(f"topology: {field} is {getattr(self, field)}, must be a finite number >= 0")
        for field, value in self._bandwidths().items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"topology: {field} is {value}, must be a finite number > 0")

    @property
    def num_hosts(self) -> int:
        """Machines."""
        return self.world_size // self.local_world_size

    @property
    def label(self) -> str:
        """What a column of a comparison is called: the name, or what the ranks are."""
        return self.name or f"{self.world_size} x {self.device}"

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Memory of one rank by kind, "hbm" and "ddr"."""
        hbm_gb = self.hbm_gb if self.device == "cuda" else 0.0
        return {"hbm": int(hbm_gb * GIB), "ddr": int(self.ddr_gb * GIB)}

    def topology(self) -> Topology:
        """Return TorchRec's description of the cluster."""
        bandwidths = {name: None if gb is None else gb * _BYTES_PER_MS for name, gb in self._bandwidths().items()}
        memory = self.memory_bytes
        return TopologyFactory.create_topology(
            TrainerConfig(world_size=self.world_size, local_world_size=self.local_world_size),
            HardwareConfig(
                hbm_cap_bytes=memory["hbm"],
                ddr_cap_bytes=memory["ddr"],
                hbm_mem_bw=bandwidths["hbm_gb_per_s"],
                ddr_mem_bw=bandwidths["ddr_gb_per_s"],
                hbm_to_ddr_mem_bw=bandwidths["host_link_gb_per_s"],
                intra_host_bw=bandwidths["intra_host_gb_per_s"],
                inter_host_bw=bandwidths["inter_host_gb_per_s"],
            ),
            # Without this TorchRec takes the capacities and ignores the bandwidths.
            KernelConfig(compute_device=self.device, use_hardware_based_bandwidth=True),
        )

    def _bandwidths(self) -> dict[str, float | None]:
        return {
            "hbm_gb_per_s": self.hbm_gb_per_s,
            "ddr_gb_per_s": self.ddr_gb_per_s,
            "host_link_gb_per_s": self.host_link_gb_per_s,
            "intra_host_gb_per_s": self.intra_host_gb_per_s,
            "inter_host_gb_per_s": self.inter_host_gb_per_s,
        }


def cluster_presets() -> dict[str, Path]:
    """Return the YAML file of each preset that comes with the package, by name."""
    folders = [Path(folder) / "configs" / "topologies" for folder in torchrec_em3.__path__]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def read_cluster(name: str) -> Cluster:
    """Read a preset or a YAML file.

    Args:
        name: Name of a preset such as "8xH100", or the path of a YAML file with the fields of `Cluster`.

    Raises:
        ConfigError: If there is no such preset or file, or a field is unknown or ill-typed.
    """
    presets = cluster_presets()
    path = presets.get(name, Path(name))
    if not path.is_file():
        known = ", ".join(presets)
        raise ConfigError(
            f"--topology {name} is neither a preset nor a YAML file; presets: {known}.{closest(name, list(presets))}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--topology {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"--topology {name} holds no fields; copy a preset, for example {presets['8xH100'].name}")
    fields: dict[str, Any] = {"name": path.stem, **{str(key): value for key, value in values.items()}}
    return parse_options(Cluster, fields, "topology")
