"""TorchX components for the commands that run on one or many processes: train, evaluate, embed, benchmark.

    torchx run -s local_cwd torchx_specs/train.py:train -j 1x2 --config configs/movielens.yaml --data DATA --run RUN
    torchx run -s local_cwd torchx_specs/train.py:train ... -- --model.content none --train.epochs 2
    torchx run -s local_cwd torchx_specs/train.py:evaluate --run RUN

What a run leaves is in its folder: metrics.jsonl, tensorboard/ and checkpoints/. The paths are read by the processes
that are started, so on a cluster they must exist there: give them as mounts. docs/torchx.md shows other schedulers.
TorchX reads this file alone and the types of the arguments at run time: it cannot import a neighbour, and postponed
evaluation of annotations would break it.
"""

from typing import Dict, List, Optional  # noqa: UP035 (the forms that TorchX parses)

import torchx.specs as specs
from torchx.components import dist

__all__ = ["benchmark", "embed", "evaluate", "train"]

MODULE = "torchrec_em3"


def train(
    *script_args: str,
    config: str,
    data: str,
    run: str,
    seed: int = 0,
    mirror: str = "",
    j: str = "1x1",
    max_retries: int = 0,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    threads: int = 1,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Train a model; started again with the same arguments, it goes on from the newest checkpoint.

    Args:
        script_args: further options of `em3 train`, after a lone --
        config: preset to read, a YAML file
        data: prepared folder
        run: run folder; metrics.jsonl, tensorboard/ and checkpoints/ go there
        seed: seed of the run
        mirror: URL such as s3://bucket/run to which each checkpoint is copied, and from which a new machine goes on
        j: [{min_hosts}:]{hosts}x{processes per host}
        max_retries: restarts after a failure, by torchrun and, where it has them, by the scheduler
        image: container image with torchrec-em3 installed, for schedulers that need one
        h: named resource of a host, for example aws_p4d.24xlarge; overrides cpu, gpu and memMB
        cpu: CPU cores per host
        gpu: GPUs per host
        memMB: memory per host in MB
        threads: CPU threads per process
        env: further environment variables, NAME=value,NAME=value
        mounts: mounts, type=bind|volume,src=/on/the/host,dst=/in/the/container[,readonly]
    """
    return dist.ddp(
        # torchrun's own parser stops at --run, which it takes for an abbreviation of --run-path.
        *("train", "--config", config, "--data", data, "--run_folder", run),
        *("--seed", str(seed), "--restartable", *(("--train.mirror", mirror) if mirror else ()), *script_args),
        m=MODULE,
        name="em3/train",
        j=j,
        max_retries=max_retries,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        env=_environment(max_retries, threads, env),
        mounts=mounts,
    )


def evaluate(
    *script_args: str,
    run: str,
    data: str = "",
    j: str = "1x1",
    max_retries: int = 0,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    threads: int = 1,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Evaluate a trained model on its validation and test rows, and write summary.json into its run folder.

    Args:
        script_args: further options of `em3 evaluate`, after a lone --
        run: run folder, as training left it
        data: prepared folder, if it has moved since training
        j: {hosts}x{processes per host}
        max_retries: restarts after a failure, by torchrun and, where it has them, by the scheduler
        image: container image with torchrec-em3 installed, for schedulers that need one
        h: named resource of a host, for example aws_p4d.24xlarge; overrides cpu, gpu and memMB
        cpu: CPU cores per host
        gpu: GPUs per host
        memMB: memory per host in MB
        threads: CPU threads per process
        env: further environment variables, NAME=value,NAME=value
        mounts: mounts, type=bind|volume,src=/on/the/host,dst=/in/the/container[,readonly]
    """
    return dist.ddp(
        *("evaluate", run, f"--data={data}", *script_args),
        m=MODULE,
        name="em3/evaluate",
        j=j,
        max_retries=max_retries,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        env=_environment(max_retries, threads, env),
        mounts=mounts,
    )


def embed(
    *script_args: str,
    run: str,
    out: str,
    data: str = "",
    j: str = "1x1",
    max_retries: int = 0,
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    threads: int = 1,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Write the embeddings of all items of a run, or of new ones with `-- --new_items DIR`.

    Args:
        script_args: further options of `em3 embed`, after a lone --
        run: run folder, as training left it
        out: folder to write
        data: prepared folder, if it has moved since training
        j: {hosts}x{processes per host}
        max_retries: restarts after a failure, by torchrun and, where it has them, by the scheduler
        image: container image with torchrec-em3 installed, for schedulers that need one
        h: named resource of a host, for example aws_p4d.24xlarge; overrides cpu, gpu and memMB
        cpu: CPU cores per host
        gpu: GPUs per host
        memMB: memory per host in MB
        threads: CPU threads per process
        env: further environment variables, NAME=value,NAME=value
        mounts: mounts, type=bind|volume,src=/on/the/host,dst=/in/the/container[,readonly]
    """
    return dist.ddp(
        *("embed", run, "--out", out, f"--data={data}", *script_args),
        m=MODULE,
        name="em3/embed",
        j=j,
        max_retries=max_retries,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        env=_environment(max_retries, threads, env),
        mounts=mounts,
    )


def benchmark(
    *script_args: str,
    config: str,
    data: str,
    run: str,
    steps: int = 10,
    j: str = "1x1",
    image: str = "",
    h: Optional[str] = None,  # noqa: UP045
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    threads: int = 1,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """Time training steps by `em3 profile`: samples per second, and where the time goes by part of the model.

    Args:
        script_args: further options of `em3 profile`, after a lone --
        config: preset to read, a YAML file
        data: prepared folder
        run: folder to write the table and the traces to
        steps: steps to profile; as many are timed without profiler
        j: {hosts}x{processes per host}
        image: container image with torchrec-em3 installed, for schedulers that need one
        h: named resource of a host, for example aws_p4d.24xlarge; overrides cpu, gpu and memMB
        cpu: CPU cores per host
        gpu: GPUs per host
        memMB: memory per host in MB
        threads: CPU threads per process
        env: further environment variables, NAME=value,NAME=value
        mounts: mounts, type=bind|volume,src=/on/the/host,dst=/in/the/container[,readonly]
    """
    return dist.ddp(
        *("profile", "--config", config, "--data", data, "--run_folder", run, "--steps", str(steps), *script_args),
        m=MODULE,
        name="em3/benchmark",
        j=j,
        image=image,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        env=_environment(0, threads, env),
        mounts=mounts,
    )


def _environment(
    max_retries: int,
    threads: int,
    env: Optional[Dict[str, str]],  # noqa: UP006, UP045
) -> Dict[str, str]:  # noqa: UP006
    """Return what torchrun must find in its environment, and what the caller adds.

    A shared rendezvous store keeps the keys of a dead attempt, and a restarted gang then connects to processes that are
    gone; and local schedulers ignore max_retries, so that only torchrun itself can restart. After SIGTERM torchrun
    would wait 30 seconds alone for a step, or a validation, and the checkpoint that follows. After a failure it waits
    as long for ranks that hang, so not for ever.
    """
    return {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PET_MAX_RESTARTS": str(max_retries),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
        "OMP_NUM_THREADS": str(threads),
        **(env or {}),
    }
