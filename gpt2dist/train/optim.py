"""AdamW's parameter groups and the learning-rate schedule: pure functions of (config, step)."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpt2dist.config import OptimSection
from gpt2dist.model import gpt2


def adamw(model: gpt2.GPT2, o: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019) that decays matrices and embeddings only."""
    shapes = gpt2.parameter_shapes(model.config)  # ZeRO-3 has emptied the parameters themselves
    params = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in params.items() if len(shapes[name]) >= 2], "weight_decay": o.weight_decay},
        {"params": [p for name, p in params.items() if len(shapes[name]) < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def learning_rate(o: OptimSection, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up to lr, then down to min_lr by step `steps`.

    With u the part of the decay that is done: cosine min + (lr − min)·(1 + cos πu)/2 (Loshchilov & Hutter 2017), linear
    and wsd min + (lr − min)·(1 − u). The decay of wsd is the last `decay_steps` (Hu et al. 2024), of the others all
    that follows the warm-up.
    """
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.schedule == "constant":
        return o.lr
    start = o.warmup_steps
    if o.schedule == "wsd":
        start = max(start, steps - (o.decay_steps or -(-steps // 10)))
    u = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    left = 0.5 * (1 + math.cos(math.pi * u)) if o.schedule == "cosine" else 1 - u
    return o.min_lr + (o.lr - o.min_lr) * left
