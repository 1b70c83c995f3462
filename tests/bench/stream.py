"""The stream alone: tokens/s that one consumer gets from Ray Data, at T = 1024, with no training behind it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

from gpt2dist.data.shards import Manifest
from gpt2dist.data.stream import ExactStream, step_batches
from tests.conftest import make_shard, tiny_run

SHARDS, SHARD_TOKENS, STEPS, ROUNDS = 8, 8_000_000, 3000, 5


def tokens_per_s(directory: Path) -> float:
    """One run through STEPS steps of 16 sequences, counted from the first batch on."""
    run = tiny_run(
        data={"path": str(directory), "seq_len": 1024},
        model={"preset": "tiny"},
        batch={"micro_sequences": 16, "micro_batches": 1},
        train={"steps": STEPS},
        cluster={"workers": 1},
    )
    (split,) = ExactStream(run, lambda: 0).configure({"train": None}, world_size=1)
    batches = step_batches(split["train"], run, 0, 1, 0)
    next(batches)
    start = time.perf_counter()
    count = sum(batch.tokens.shape[0] * batch.tokens.shape[1] for batch in batches)
    return count * 1024 / (time.perf_counter() - start)


def main() -> None:
    """Prints tokens/s; Ray gets one CPU."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rng = np.random.default_rng(0)
        shards = [
            make_shard(directory, f"train-{i:05d}.npy", rng.integers(0, 50257, SHARD_TOKENS)) for i in range(SHARDS)
        ]
        manifest = Manifest(request={}, documents={}, splits={"train": shards})
        (directory / "manifest.json").write_bytes(manifest.to_bytes())
        ray.init(num_cpus=1, include_dashboard=False, object_store_memory=512 << 20, log_to_driver=False)
        rates = [tokens_per_s(directory) / 1e6 for _ in range(ROUNDS)]
        print(f"stream alone: {statistics.median(rates):.1f} M tokens/s ({min(rates):.1f} to {max(rates):.1f})")
        ray.shutdown()


if __name__ == "__main__":
    main()
