"""Training speed of the whole stack (Ray Train + Ray Data + DeepSpeed) against peers, and against its own engine.

tokens/s is that of the median step after the first ones. Both sides of a ratio have the same threads and huge pages;
in `peers` both are compiled, except for the plain loop. The bare loop has our allocator, peers the C library's.
On a machine with a GPU `peers` and `overhead` run there, at the 124M shape.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2dist.config import RunConfig
from gpt2dist.data.shards import Manifest
from gpt2dist.model.linear import WITHOUT_UNITS
from gpt2dist.train import rundir
from gpt2dist.train.allocator import cpu_worker_environment
from tests.bench import reference
from tests.bench.common import PAIRS, Row, interleaved
from tests.conftest import ROOT, make_shard, tiny_run

STEPS, WARM = 20, 8
_numbers = count()


@contextmanager
def _data() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokens = np.random.default_rng(0).integers(0, 50257, 200_000)
        shard = make_shard(directory, "train-00000.npy", tokens)
        manifest = Manifest(request={}, documents={}, splits={"train": [shard]})
        (directory / "manifest.json").write_bytes(manifest.to_bytes())
        yield directory


def _run(directory: Path, *, threads: int, workers: int = 1, micro_batches: int = 1, **train: Any) -> RunConfig:
    """The reference shape. On a machine with a GPU, workers have one."""
    gpus = {"gpus_per_worker": 1, "cpus_per_worker": 4} if reference.ON_GPU else {}
    return tiny_run(
        name=f"run-{next(_numbers)}",
        storage=str(directory),
        model={"n_layer": reference.LAYERS, "n_head": reference.HEADS, "n_embd": reference.WIDTH},
        data={"path": str(directory), "seq_len": reference.T},
        batch={"micro_sequences": reference.BATCH, "micro_batches": micro_batches},
        train={"steps": STEPS, "precision": "bf16", "zero_stage": 2, **train},
        optim={"lr": 6e-4, "warmup_steps": 0},
        eval={"every_steps": 0},
        checkpoint={"every_steps": 0},
        cluster={"workers": workers, "cpus_per_worker": threads, **gpus},
    )


def _median(run: RunConfig, key: str) -> float:
    return statistics.median(row[key] for row in rundir.metrics_log(run.run_dir).read()[WARM:])


def _execute(threads: int, *command: str, **variables: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "THP_MEM_ALLOC_ENABLE": "1", **variables}
    full = [sys.executable, "-m", *command]
    done = subprocess.run(full, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def _whole_stack(run: RunConfig) -> float:
    path = Path(f"{run.run_dir}.toml")
    path.write_text(run.to_toml())
    _execute(int(run.cluster.cpus_per_worker), "gpt2dist", "train", str(path))
    return _median(run, "tokens_per_s")


def _bare_loop(run: RunConfig) -> float:
    command = ("tests.bench.bare", run.model_dump_json(), f"{run.run_dir}.store")
    _execute(int(run.cluster.cpus_per_worker), *command, **({} if reference.ON_GPU else cpu_worker_environment()))
    return _median(run, "tokens_per_s")


def _peer(kind: str, steps: int = STEPS, warm: int = WARM) -> float:
    return float(_execute(2, "tests.bench.reference", kind, str(steps), str(warm)))


def _faster_precision(kind: str) -> str:
    """The peer in fp32 or under bf16 autocast, which depends on the CPU."""
    if reference.ON_GPU:
        return f"{kind}-bf16"
    if torch.bfloat16 in WITHOUT_UNITS:  # autocast takes minutes a step
        return kind
    return max((kind, f"{kind}-bf16"), key=lambda k: _peer(k, steps=4, warm=1))


def peers() -> Iterator[Row]:
    """The whole stack with one worker of two threads ÷ each peer with two threads, and its MFU."""
    ours: list[float] = []
    mfu: list[float] = []
    theirs: dict[str, list[float]] = {kind: [] for kind in ("plain", *map(_faster_precision, ("fast", "transformers")))}
    with _data() as directory:
        for _ in range(PAIRS):
            run = _run(directory, threads=2, micro_batches=reference.MICRO_BATCHES, compile=True)
            ours.append(_whole_stack(run))
            mfu.append(_median(run, "mfu"))
            for kind, rates in theirs.items():
                rates.append(_peer(kind))
                print(f"  {kind}: {ours[-1] / rates[-1]:.3f}", file=sys.stderr, flush=True)
    for kind, rates in theirs.items():
        name, bar = {
            "plain": ("plain fp32 PyTorch loop", 2.8),
            "fast": ("the loop with compile + fused AdamW", 1.10),
            "transformers": ("transformers with compile + fused AdamW", 1.10),
        }[kind.removesuffix("-bf16")]
        precision = ", bf16 autocast" if kind.endswith("-bf16") else ""
        ratios = [a / b for a, b in zip(ours, rates, strict=True)]
        yield Row(f"whole stack / {name}{precision}", ratios, bar, "tokens/s ratio")
    yield Row("MFU against the matrix product of the same run", mfu, 0.48, "share")


def overhead() -> Iterator[Row]:
    """The whole stack ÷ the same engine driven by a bare loop, without Ray."""
    with _data() as directory:
        ratios = interleaved(
            lambda: _whole_stack(_run(directory, threads=1, micro_batches=reference.MICRO_BATCHES)),
            lambda: _bare_loop(_run(directory, threads=1, micro_batches=reference.MICRO_BATCHES)),
        )
    yield Row("whole stack / bare engine loop, 1 worker x 1 thread", ratios, 0.975, "tokens/s ratio")


def scaling() -> Iterator[Row]:
    """Two workers of one thread ÷ one worker of one thread, the same global batch."""
    with _data() as directory:
        ratios = interleaved(
            lambda: _whole_stack(_run(directory, threads=1, workers=2, micro_batches=2)),
            lambda: _whole_stack(_run(directory, threads=1, micro_batches=2)),
        )
    yield Row("2 workers x 1 thread / 1 x 1", ratios, 1.85, "tokens/s ratio")
