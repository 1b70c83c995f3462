"""What the ranks of tests/distributed run."""

from __future__ import annotations

import hashlib
import itertools
import resource
from collections.abc import Iterable
from typing import Any

import psutil
import torch

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import local_blocks, split_blocks
from gpt2dist.model import gpt2
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


def initial_digests(runs: list[RunConfig]) -> list[str]:
    """For each run one sha256 over the initial fp32 weights, put together from all ranks' fragments."""
    return [_initial_digest(run) for run in runs]


def _initial_digest(run: RunConfig) -> str:
    engine = Engine(run, torch.device("cpu"))
    mine = [
        (f.parameter, f.start, f.tensor.numpy().tobytes()) for f in engine.fragments(owned=True) if f.kind == "weight"
    ]
    pieces = sorted(piece for part in engine.gather_objects(mine) for piece in part)
    engine.close()
    return weights_digest((name, content) for name, _, content in pieces)


def weights_digest(pieces: Iterable[tuple[str, bytes]]) -> str:
    """sha256 of (parameter, content) pairs; a parameter may come in several consecutive ones."""
    digest = hashlib.sha256()
    for name, group in itertools.groupby(pieces, lambda piece: piece[0]):
        digest.update(name.encode())
        for _, content in group:
            digest.update(content)
    return digest.hexdigest()


def startup_peak(run: RunConfig) -> int:
    """Bytes that this process needed at its peak to build the engine, beside what importing took."""
    gpt2.parameter_shapes(gpt2.GPT2Config.from_run(run))  # torch imports much for its first tensor without storage
    before = psutil.Process().memory_info().rss
    engine = Engine(run, torch.device("cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    engine.close()
    return peak - before


def committed_step(run: RunConfig) -> int:
    """Step of the newest checkpoint."""
    found = newest(run.run_dir)
    return found.index.step if found else 0
