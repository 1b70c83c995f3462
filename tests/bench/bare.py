"""The engine and the loop alone, one process: the other side of `tests.bench.training.overhead`."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from gpt2dist.config import RunConfig
from tests.distributed.jobs import train_run


def main() -> None:
    run = RunConfig.model_validate_json(sys.argv[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
    backend = "nccl" if run.cluster.gpus_per_worker else "gloo"
    dist.init_process_group(backend, init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
    train_run(run)
    dist.destroy_process_group()


main()
