"""`make bench`: the whole stack (Ray Train + Ray Data + DeepSpeed) against the same engine in a bare loop.

Interleaved A B A B, one worker, the same threads on both sides; tokens/s is the median over the steps of a run
after its first ones. Prints a table and writes build/bench.json: a list of {name, ratio, low, high, bar, unit}.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.progress import track

from gpt2dist.config import RunConfig
from gpt2dist.data.shards import Manifest
from gpt2dist.train import rundir
from tests.conftest import ROOT, make_shard, tiny_run

PAIRS, STEPS, WARM = 5, 24, 8
BAR = 0.975


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


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "data").mkdir()
        tokens = np.random.default_rng(0).integers(0, 50257, 200_000)
        shard = make_shard(directory / "data", "train-00000.npy", tokens)
        manifest = Manifest(request={}, documents={}, splits={"train": [shard]})
        (directory / "data" / "manifest.json").write_bytes(manifest.to_bytes())
        ratios = []
        for pair in track(range(PAIRS), "pairs"):
            stack = whole_stack(make_run(directory, f"stack-{pair}"), directory)
            ratios.append(stack / bare_loop(make_run(directory, f"bare-{pair}"), directory))
    row = {
        "name": "whole stack / bare engine loop, 1 worker x 1 thread",
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "bar": BAR,
        "unit": "tokens/s ratio",
    }
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "bench.json").write_text(json.dumps([row], indent=1) + "\n")
    print(f"{row['name']}: {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), bar {BAR}")


if __name__ == "__main__":
    main()
