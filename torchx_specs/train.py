"""TorchX components: the same training and evaluation that `em3` runs, started by any TorchX scheduler.

    torchx run -s local_cwd torchx_specs/train.py:ddp -j 1x2 --config configs/movielens.yaml --data DATA --run RUN
    torchx run -s local_cwd torchx_specs/train.py:ddp ... -- --model.content none --train.epochs 2
    torchx run -s local_cwd torchx_specs/train.py:evaluate --run RUN

The paths are read by the processes that are started, so on a cluster they must exist there. TorchX reads the types of
the arguments at run time: postponed evaluation of annotations would break this file.
"""

from typing import Optional

import torchx.specs as specs
from torchx.components import dist

__all__ = ["ddp", "evaluate"]

MODULE = "torchrec_em3"


def ddp(
    *script_args: str,
    config: str,
    data: str,
    run: str,
    j: str = "1x1",
    seed: Optional[int] = None,  # noqa: UP045 (the form that TorchX parses)
    resume: bool = False,
    max_retries: int = 0,
    image: str = "",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    threads: int = 1,
) -> specs.AppDef:
    """Train a model on one or many processes.

    Args:
        script_args: further options of `em3 train`, after a lone --
        config: preset to read, a YAML file
        data: prepared folder
        run: run folder to write
        j: [{min_hosts}:]{hosts}x{processes per host}
        seed: seed of the run; left out, the preset decides
        resume: go on from the newest checkpoint in the run folder
        max_retries: restarts after a failure, by torchrun and, where it has them, by the scheduler
        image: container image with torchrec-em3 installed, for schedulers that need one
        cpu: CPU cores per host
        gpu: GPUs per host
        memMB: memory per host in MB
        threads: CPU threads per process
    """
    return dist.ddp(
        "train",
        # torchrun's own parser stops at --run, which it takes for an abbreviation of --run-path.
        *("--config", config, "--data", data, "--run_folder", run),
        *(() if seed is None else ("--seed", str(seed))),
        *(("--resume",) if resume else ()),
        *script_args,
        m=MODULE,
        name="em3/train",
        j=j,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        max_retries=max_retries,
        env=_environment(max_retries, threads),
    )


def evaluate(
    *script_args: str,
    run: str,
    j: str = "1x1",
    image: str = "",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    threads: int = 1,
) -> specs.AppDef:
    """Evaluate a trained model on its validation and test rows.

    Args:
        script_args: further options of `em3 evaluate`, after a lone --
        run: run folder, as training left it
        j: {hosts}x{processes per host}
        image: container image with torchrec-em3 installed, for schedulers that need one
        cpu: CPU cores per host
        gpu: GPUs per host
        memMB: memory per host in MB
        threads: CPU threads per process
    """
    return dist.ddp(
        *("evaluate", run, *script_args),
        m=MODULE,
        name="em3/evaluate",
        j=j,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        env=_environment(0, threads),
    )


def _environment(max_retries: int, threads: int) -> dict[str, str]:
    """Return what torchrun must find in its environment.

    A shared rendezvous store keeps the keys of a dead attempt, and a restarted gang then connects to processes that are
    gone; and local schedulers ignore max_retries, so that only torchrun itself can restart.
    """
    restarts = {"PET_MAX_RESTARTS": str(max_retries)} if max_retries > 0 else {}
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": str(threads), **restarts}
