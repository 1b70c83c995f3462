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
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then constant or a half cosine to min_lr."""
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.schedule == "constant":
        return o.lr
    progress = (step - o.warmup_steps) / max(1, steps - o.warmup_steps)
    return o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))
