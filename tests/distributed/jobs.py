"""What the ranks of tests/distributed run."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import local_blocks, split_blocks
from gpt2dist.train.checkpoint import newest
from gpt2dist.train.engine import Engine
from gpt2dist.train.trainer import Trainer


def train_runs(runs: list[RunConfig]) -> list[dict[str, Any]]:
    """Train each run (or go on with it) on this rank without Ray; returns what the engine held at the end."""
    return [train_run(run) for run in runs]


def train_run(run: RunConfig) -> dict[str, Any]:
    """One run; see `train_runs`."""
    engine = Engine(run, torch.device("cpu"))
    trainer = Trainer(run, engine)
    trainer.restore()
    start = trainer.step
    blocks = local_blocks(run, engine.rank, engine.world_size, start)
    trainer.train(split_blocks(blocks, run, engine.rank, engine.world_size, start))
    result = {"start": start, "elements": owned_elements(engine), "scalars": engine.scalars()}
    engine.close()
    return result


def owned_elements(engine: Engine) -> int:
    """Elements of master weights that this rank would save."""
    return sum(f.tensor.numel() for f in engine.fragments(owned=True) if f.kind == "weight")


def step_once(run: RunConfig) -> dict[str, Any]:
    """Two optimizer steps on fixed tokens; the gradient norm and whether the steps were applied."""
    engine = Engine(run, torch.device("cpu"))
    results = []
    for seed in range(2):
        for slot in range(engine.gas):
            micro_batch = slot * engine.world_size + engine.rank
            generator = torch.Generator().manual_seed(1000 * seed + micro_batch)
            shape = (run.batch.micro_sequences, run.data.seq_len + 1)
            tokens = torch.randint(0, 50257, shape, generator=generator)
            engine.forward_backward(tokens, padding=micro_batch >= run.batch.micro_batches)
        results.append(engine.step(1e-3))
    engine.close()
    return {"norms": [r.grad_norm for r in results], "applied": [r.applied for r in results]}


def initial_digest(run: RunConfig) -> list[tuple[str, int, str]]:
    """This rank's pieces of the initial master weights, hashed."""
    engine = Engine(run, torch.device("cpu"))
    pieces = [
        (f.parameter, f.start, hashlib.sha256(f.tensor.numpy().tobytes()).hexdigest())
        for f in engine.fragments(owned=True)
        if f.kind == "weight"
    ]
    engine.close()
    return pieces


def committed_step(run: RunConfig) -> int:
    """Step of the newest checkpoint."""
    found = newest(run.run_dir)
    return found.index.step if found else 0
