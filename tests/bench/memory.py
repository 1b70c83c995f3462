"""Peak memory of a rank as measured ÷ as `--dry-run` predicts, two gloo ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpt2dist.cluster import plan
from gpt2dist.config import RunConfig
from gpt2dist.train.engine import Engine
from tests.bench.common import Row
from tests.conftest import tiny_run
from tests.ranks import run_ranks

WORLD = 2
SHAPE: dict[str, Any] = {
    "model": {"n_layer": 4, "n_head": 6, "n_embd": 384},
    "data": {"seq_len": 256},
    "batch": {"micro_sequences": 2, "micro_batches": 4},
}


def peak(run: RunConfig) -> int:
    """Bytes by which this rank has grown after a step and a half of two micro-batches each."""
    engine = Engine(run, torch.device("cpu"))
    for _ in range(2):
        for _ in range(engine.gas):
            shape = (run.batch.micro_sequences, run.data.seq_len + 1)
            engine.forward_backward(torch.randint(0, 50257, shape), padding=False)
        engine.step(1e-4)
    result = engine.memory.bytes()
    engine.close()
    return result


def ratio(precision: str, stage: int) -> float:
    """Of the rank that needs most."""
    run = tiny_run(train__precision=precision, train__zero_stage=stage, **SHAPE)
    predicted = sum(plan.memory(run).values())
    with tempfile.TemporaryDirectory() as name:
        return max(run_ranks(peak, WORLD, (run,), Path(name) / "rendezvous", 150)) / predicted


def rows() -> Iterator[Row]:
    """One a stage and precision; the ratio is to lie in 0.9 … 1.1, of which the table shows the upper end."""
    for precision in ("bf16", "fp32"):
        for stage in (1, 2, 3):
            name = f"peak memory / predicted, stage {stage}, {precision}, {WORLD} workers"
            yield Row(name, [ratio(precision, stage) for _ in range(3)], 1.1, "bytes ratio, 0.9 at least", at_most=True)
