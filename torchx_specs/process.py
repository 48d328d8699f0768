"""TorchX components for the commands of one process: prepare, plan, serve.

    torchx run -s local_cwd torchx_specs/process.py:prepare --kind movielens --out DATA -- --source ml-1m
    torchx run -s local_cwd torchx_specs/process.py:plan --topology 8xH100 --out OUT -- --rows user=1e9,item=1e10
    torchx run -s local_cwd torchx_specs/process.py:serve --package PACKAGE --port 8000

On a cluster the paths must exist where the process runs: give them as mounts. TorchX reads the types of the arguments
at run time: postponed evaluation of annotations would break this file.
"""

from typing import Dict, List, Optional  # noqa: UP035 (the forms that TorchX parses)

import torchx.specs as specs

__all__ = ["plan", "prepare", "serve"]

MODULE = "torchrec_em3"


def prepare(
    *script_args: str,
    kind: str,
    out: str,
    max_retries: int = 0,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Turn raw files into a prepared folder, which appears when it is complete.

    Args:
        script_args: further options of `em3 prepare KIND`, after a lone --, for example --source ml-1m
        kind: parquet, movielens, amazon, sequences or simulated
        out: prepared folder to write
        max_retries: restarts after a failure, where the scheduler has them
        image: container image with torchrec-em3 installed, for schedulers that need one
        h: named resource of the host, for example aws_m5.2xlarge; overrides cpu, gpu and memMB
        cpu: CPU cores
        gpu: GPUs
        memMB: memory in MB
        env: further environment variables, NAME=value,NAME=value
        mounts: mounts, type=bind|volume,src=/on/the/host,dst=/in/the/container[,readonly]
    """
    return specs.AppDef(
        name="prepare",
        roles=[
            specs.Role(
                name="prepare",
                image=image,
                entrypoint="python",
                args=["-m", MODULE, "prepare", kind, "--out", out, *script_args],
                env={**(env or {})},
                max_retries=max_retries,
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
                mounts=specs.parse_mounts(mounts or []),
            )
        ],
    )


def plan(
    *script_args: str,
    topology: str,
    out: str,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Show how TorchRec's planner would shard the tables on clusters that need not be there.

    Args:
        script_args: further options of `em3 plan`, after a lone --, for example --rows user=1e9,item=1e10
        topology: clusters, presets like 8xH100 or YAML files, with commas between them
        out: folder to write plans and page to
        image: container image with torchrec-em3 installed, for schedulers that need one
        h: named resource of the host, for example aws_m5.2xlarge; overrides cpu and memMB
        cpu: CPU cores
        memMB: memory in MB
        env: further environment variables, NAME=value,NAME=value
        mounts: mounts, type=bind|volume,src=/on/the/host,dst=/in/the/container[,readonly]
    """
    return specs.AppDef(
        name="plan",
        roles=[
            specs.Role(
                name="plan",
                image=image,
                entrypoint="python",
                args=["-m", MODULE, "plan", "--topology", topology, "--out", out, *script_args],
                env={**(env or {})},
                resource=specs.resource(cpu=cpu, gpu=0, memMB=memMB, h=h),
                mounts=specs.parse_mounts(mounts or []),
            )
        ],
    )


def serve(
    *script_args: str,
    package: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    max_retries: int = 0,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Answer scoring requests over HTTP until stopped.

    Args:
        script_args: further options of `em3 serve`, after a lone --
        package: exported model to serve
        host: address to listen on; in a container 0.0.0.0, behind what guards it
        port: port to listen on
        replicas: servers to start, each in its own container
        max_retries: restarts after a failure, where the scheduler has them
        image: container image with torchrec-em3 installed, for schedulers that need one
        h: named resource of a host, for example aws_m5.2xlarge; overrides cpu, gpu and memMB
        cpu: CPU cores per server
        gpu: GPUs per server
        memMB: memory per server in MB
        env: further environment variables, NAME=value,NAME=value
        mounts: mounts, type=bind|volume,src=/on/the/host,dst=/in/the/container[,readonly]
    """
    return specs.AppDef(
        name="serve",
        roles=[
            specs.Role(
                name="serve",
                image=image,
                entrypoint="python",
                args=["-m", MODULE, "serve", package, "--host", host, "--port", str(port), *script_args],
                env={**(env or {})},
                num_replicas=replicas,
                max_retries=max_retries,
                port_map={"http": port},
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h),
                mounts=specs.parse_mounts(mounts or []),
            )
        ],
    )
