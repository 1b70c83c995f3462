"""The stream: tokens/s that one consumer gets from Ray Data on one core, and data wait in the smoke run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ray

from gpt2dist.data.shards import Manifest
from gpt2dist.data.stream import ExactStream, step_batches
from gpt2dist.train import rundir
from tests.bench.common import PAIRS, Row
from tests.conftest import ROOT, make_shard, tiny_run

SHARDS, SHARD_TOKENS, STEPS = 8, 8_000_000, 3000


def alone() -> Iterator[Row]:
    """M tokens/s at T = 1024 with no training behind it; Ray gets one CPU."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rng = np.random.default_rng(0)
        shards = [
            make_shard(directory, f"train-{i:05d}.npy", rng.integers(0, 50257, SHARD_TOKENS)) for i in range(SHARDS)
        ]
        manifest = Manifest(request={}, documents={}, splits={"train": shards})
        (directory / "manifest.json").write_bytes(manifest.to_bytes())
        ray.init(num_cpus=1, include_dashboard=False, object_store_memory=512 << 20, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        rates = [_tokens_per_s(directory) / 1e6 for _ in range(PAIRS)]
        ray.shutdown()
    yield Row("stream alone, 1 core, T = 1024", rates, 10, "M tokens/s")


def _tokens_per_s(directory: Path) -> float:
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


def wait() -> Iterator[Row]:
    """Data wait ÷ step time over all steps of the smoke run."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "gpt2dist"]
        run_file = ROOT / "jobs" / "smoke.toml"
        subprocess.run([*command, "prepare", run_file], cwd=name, check=True, capture_output=True, timeout=300)
        subprocess.run([*command, "train", run_file], cwd=name, check=True, capture_output=True, timeout=900)
        steps = rundir.metrics_log(f"{name}/runs/smoke").read()
    share = sum(step["data_wait_s"] for step in steps) / sum(step["step_s"] for step in steps)
    yield Row("data wait / step time, smoke run", [share], 0.01, "share", at_most=True)
