"""Run directories made without training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from upath import UPath

from gpt2dist.config import RunConfig
from gpt2dist.data.order import consumed
from gpt2dist.model.gpt2 import GPT2
from gpt2dist.train import checkpoint
from gpt2dist.train.fragment import EMA, KINDS, Fragment
from gpt2dist.train.index import Index, SavedFile, SavedFragment
from gpt2dist.train.snapshot import Snapshot


def write_rank(directory: UPath, rank: int, fragments: Iterable[Fragment]) -> tuple[SavedFile, list[SavedFragment]]:
    """Write one rank's file at once; returns its description for the index."""
    snapshot = Snapshot(rank, attempt=1)
    snapshot.take(fragments)
    return snapshot.write(directory), snapshot.table


def save_run(
    run: RunConfig,
    model: GPT2,
    step: int = 4,
    ranks: int = 2,
    average: GPT2 | None = None,
    fingerprint: str = "f",
) -> str:
    """A run directory with a checkpoint of the model's weights, each parameter cut in pieces as ZeRO does.

    average: the averaged weights, where the run has them.
    """
    directory = checkpoint.step_directory(run.run_dir, step)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    parts = []
    for rank in range(ranks):
        fragments = []
        for name, p in model.named_parameters():
            flat = p.detach().flatten()
            low, high = (r * len(flat) // ranks for r in (rank, rank + 1))
            for kind in KINDS:
                piece = flat[low:high] if kind == "weight" else torch.zeros(high - low)
                fragments.append(Fragment(name, kind, low, piece))
            if average:
                fragments.append(Fragment(name, EMA, low, average.get_parameter(name).detach().flatten()[low:high]))
        parts.append(write_rank(directory, rank, fragments))
    index = Index(
        step=step,
        position=consumed(run.batch, step),
        data_fingerprint=fingerprint,
        config=run.model_dump(mode="json"),
        world_size=ranks,
        zero_stage=2,
        attempt=1,
        scalars={"optimizer_steps": float(step)},
        parameters=shapes,
        fragments=[f for _, table in parts for f in table],
        files=[file for file, _ in parts],
    )
    checkpoint.commit(directory, index)
    Path(run.run_dir, "config.toml").write_text(run.to_toml())
    return run.run_dir
