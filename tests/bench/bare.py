"""The engine and the loop alone, one process: the other side of `tests.bench.training.overhead`."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from gpt2dist.config import RunConfig
from tests.distributed.jobs import train_run


def main() -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DS_ACCELERATOR="cpu")  # DeepSpeed asks for them
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
    train_run(RunConfig.model_validate_json(sys.argv[1]))
    dist.destroy_process_group()


main()
