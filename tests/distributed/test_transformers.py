"""A training run of ours against transformers' GPT-2 with torch's AdamW, from the same weights on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import SampleOrder
from gpt2dist.model import gpt2, hf
from gpt2dist.train.optim import learning_rate
from tests.conftest import tiny_run
from tests.distributed import jobs
from tests.distributed.test_engine import Losses, largest_difference, logged


def transformers_losses(run: RunConfig) -> Losses:
    """Mean loss of each step's global batch; decay for matrices and embeddings only, as everywhere."""
    model = GPT2LMHeadModel.from_pretrained(run.model.init_from)
    o = run.optim
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    data = Mixture.open(run)
    order, split = SampleOrder(run, data), MixedSplit(data, "train", run.data.seq_len)
    losses = {}
    for step in range(run.train.steps):
        tokens = torch.from_numpy(split.samples(order.step(step).reshape(-1)).astype("int64"))
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        gradients = [p.grad.double() for p in model.parameters()]
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))  # fp32 is off by 1e-4
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), o.grad_clip, norm.float())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step, run.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
    return losses


@pytest.mark.timeout(240)
def test_twenty_steps_from_imported_weights(
    ranks: Callable[..., list[Any]], make_data: Callable[..., str], tmp_path: Path
) -> None:
    imported = str(tmp_path / "imported")
    config = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16)
    parameters = dict(gpt2.build(config, seed=11).named_parameters())
    hf.export(imported, config, parameters.__getitem__)
    data = make_data([3000, 3000])
    runs = [
        tiny_run(
            name=f"stage-{stage}",
            storage=str(tmp_path),
            data__path=data,
            model={"n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.0, "init_from": imported},
            train={"steps": 20, "precision": "fp32", "zero_stage": stage, "peak_tflops": 1.0},
            checkpoint__every_steps=10,
        )
        for stage in (0, 1, 2, 3)
    ]
    reference = transformers_losses(runs[0])
    ranks(jobs.train_runs, 2, runs)
    for run in runs:
        assert largest_difference(logged(run), reference) <= 1e-5, run.run_dir
