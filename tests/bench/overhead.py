"""The whole stack (Ray Train + Ray Data + DeepSpeed) against the same engine in a bare loop.

One worker, the same threads on both sides; tokens/s is the median over the steps of a run after its first ones.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from gpt2dist.config import RunConfig
from gpt2dist.data.shards import Manifest
from gpt2dist.train import rundir
from tests.bench.common import Row, interleaved
from tests.conftest import ROOT, make_shard, tiny_run

STEPS, WARM = 24, 8


def make_run(directory: Path, name: str) -> RunConfig:
    return tiny_run(
        name=name,
        storage=str(directory),
        model={"n_layer": 4, "n_head": 4, "n_embd": 256},
        data={"path": str(directory / "data"), "seq_len": 128},
        batch={"micro_sequences": 4, "micro_batches": 1},
        train={"steps": STEPS, "precision": "bf16", "zero_stage": 1, "peak_tflops": 1.0},
        eval={"every_steps": 0},
        checkpoint={"every_steps": 0},
        cluster={"workers": 1},
    )


def tokens_per_s(run: RunConfig) -> float:
    rows = rundir.metrics_log(run.run_dir).read()
    return statistics.median(row["tokens_per_s"] for row in rows[WARM:])


def whole_stack(run: RunConfig, directory: Path) -> float:
    path = directory / f"{run.name}.toml"
    path.write_text(run.to_toml())
    subprocess.run([sys.executable, "-m", "gpt2dist", "train", path], check=True, capture_output=True, timeout=300)
    return tokens_per_s(run)


def bare_loop(run: RunConfig, directory: Path) -> float:
    command = [sys.executable, "-m", "tests.bench.bare", run.model_dump_json(), str(directory / f"{run.name}.store")]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=ROOT)
    return tokens_per_s(run)


def stack() -> Iterator[Row]:
    """tokens/s of the whole stack (Ray Train + Ray Data + DeepSpeed) ÷ the same engine in a bare loop."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "data").mkdir()
        tokens = np.random.default_rng(0).integers(0, 50257, 200_000)
        shard = make_shard(directory / "data", "train-00000.npy", tokens)
        manifest = Manifest(request={}, documents={}, splits={"train": [shard]})
        (directory / "data" / "manifest.json").write_bytes(manifest.to_bytes())
        number = count()
        ratios = interleaved(
            lambda: whole_stack(make_run(directory, f"stack-{next(number)}"), directory),
            lambda: bare_loop(make_run(directory, f"bare-{next(number)}"), directory),
        )
    yield Row("whole stack / bare engine loop, 1 worker x 1 thread", ratios, 0.975, "tokens/s ratio")
