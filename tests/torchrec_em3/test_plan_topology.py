"""Machines to plan for: presets, YAML files, and what TorchRec is told of them."""

from pathlib import Path

import pytest

from torchrec_em3.errors import ConfigError
from torchrec_em3.topology import GIB, Cluster, cluster_presets, read_cluster

PRESETS = {"8xH100": 8, "64xH100": 64, "256xH100": 256, "8xH200": 8, "16xA100": 16, "2xCPU": 2, "16xCPU": 16}


def test_the_presets_are_what_their_names_say() -> None:
    assert {name: read_cluster(name).world_size for name in cluster_presets()} == PRESETS
    for name in PRESETS:
        cluster = read_cluster(name)
        assert cluster.label == name
        assert cluster.device == ("cpu" if name.endswith("CPU") else "cuda")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_torchrec_is_told_capacities_and_bandwidths(name: str) -> None:
    cluster = read_cluster(name)
    topology = cluster.topology()
    hbm_gb = cluster.hbm_gb if cluster.device == "cuda" else 0
    assert sum(device.storage.hbm for device in topology.devices) == cluster.world_size * hbm_gb * GIB
    assert sum(device.storage.ddr for device in topology.devices) == cluster.world_size * cluster.ddr_gb * GIB
    assert topology.local_world_size * cluster.num_hosts == topology.world_size
    # TorchRec counts in bytes a millisecond.
    assert topology.ddr_mem_bw * 1000 == pytest.approx(cluster.ddr_gb_per_s * 1e9)
    assert topology.inter_host_bw * 1000 == pytest.approx(cluster.inter_host_gb_per_s * 1e9)
    if cluster.device == "cuda":
        assert topology.hbm_mem_bw * 1000 == pytest.approx(cluster.hbm_gb_per_s * 1e9)
        # What is nearer is faster.
        assert cluster.hbm_gb_per_s > cluster.intra_host_gb_per_s > cluster.inter_host_gb_per_s


def test_presets_of_one_machine_differ_in_number_alone() -> None:
    one, many = read_cluster("8xH100"), read_cluster("64xH100")
    assert {f for f in vars(one) if vars(one)[f] != vars(many)[f]} == {"name", "world_size"}


def test_a_cluster_can_be_written_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("world_size: 24\nlocal_world_size: 4\ndevice: cuda\nhbm_gb: 40\ninter_host_gb_per_s: 12.5\n")
    cluster = read_cluster(str(path))
    assert cluster == Cluster(
        name="mine", world_size=24, local_world_size=4, device="cuda", hbm_gb=40.0, inter_host_gb_per_s=12.5
    )
    assert cluster.topology().inter_host_bw == 12.5e6
    # What the file leaves out is TorchRec's default, not nothing.
    assert cluster.topology().hbm_mem_bw > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrld_size: 8", "wrld_size is not an option.*Did you mean 'world_size'"),
        ("world_size: many", "world_size"),
        ("world_size: 9\nlocal_world_size: 8", "multiple of --local_world_size"),
        ("device: tpu", "device is 'tpu', must be cpu or cuda"),
        ("hbm_gb: -1", "hbm_gb is -1"),
        ("ddr_gb: .nan", "ddr_gb is nan"),
        ("hbm_gb: .inf", "hbm_gb is inf"),
        ("inter_host_gb_per_s: 0", "inter_host_gb_per_s is 0"),
        ("inter_host_gb_per_s: .nan", "inter_host_gb_per_s is nan"),
        ("- 8", "holds no fields"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        read_cluster(str(path))
    assert "\n" not in str(refused.value)


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"8xH10 is neither.*presets: 16xA100.*Did you mean '8xH100'"):
        read_cluster("8xH10")
