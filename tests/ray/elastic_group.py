"""One elastic worker group on machines with an accelerator, as `train` starts it: python -m … ACCELERATOR FILE STORAGE.

Each worker adds a line to FILE twice a second: "rank of world size".
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from gpt2dist.train.reservation import ACCELERATOR_LABEL, OnItsMachines


def begin(config: dict[str, Any]) -> None:
    """Log, without end."""
    context = ray.train.get_context()
    while True:
        with Path(config["file"]).open("a") as f:
            f.write(f"{context.get_world_rank()} of {context.get_world_size()}\n")
        time.sleep(0.5)


def main(accelerator: str, file: str, storage: str) -> None:
    """Runs until it is killed."""
    ray.init(log_to_driver=False)
    scaling = ScalingConfig(
        num_workers=(1, 2),
        use_gpu=True,
        resources_per_worker={"CPU": 1, "GPU": 1},
        label_selector={ACCELERATOR_LABEL: accelerator},
        elastic_resize_monitor_interval_s=3.0,
    )
    run_config = RunConfig(name="group", storage_path=storage, callbacks=[OnItsMachines(accelerator)])
    config = {"file": file}
    torch_config = ray.train.torch.TorchConfig(backend="gloo")
    TorchTrainer(
        begin, train_loop_config=config, torch_config=torch_config, scaling_config=scaling, run_config=run_config
    ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
