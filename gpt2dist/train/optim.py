"""The optimizers' parameter groups and the learning-rate schedule: pure functions of (config, step)."""

from __future__ import annotations

import math
from typing import Any

import torch

from gpt2dist.config import OptimSection
from gpt2dist.model import gpt2
from gpt2dist.train.fragment import is_muon_matrix


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest, as one optimizer.

    Muon's updates are scaled by 0.2·√max(rows, columns), to the RMS of AdamW's (Liu et al. 2025), so that one learning
    rate and weight decay serve both. torch orthogonalizes in bf16.
    """

    def __init__(self, model: gpt2.GPT2, o: OptimSection) -> None:
        matrices = [p for name, p in model.named_parameters() if is_muon_matrix(name, p.ndim)]
        adam = adamw(model, o)
        taken = {id(p) for p in matrices}
        for group in adam.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in taken]
        muon = torch.optim.Muon(matrices, lr=o.lr, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, adam)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step both."""
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]


def adamw(model: gpt2.GPT2, o: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019) that decays matrices and embeddings only."""
    shapes = gpt2.parameter_shapes(model.config)  # ZeRO-3 has emptied the parameters themselves
    params = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in params.items() if len(shapes[name]) >= 2], "weight_decay": o.weight_decay},
        {"params": [p for name, p in params.items() if len(shapes[name]) < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def ema_decay(o: OptimSection, steps: int) -> float:
    """Decay of the moving average of the weights after `steps` steps.

    The plain one remembers the initial weights for 1/(1 − decay) steps. (1 + n)/(10 + n) is TensorFlow's
    ExponentialMovingAverage with `num_updates`.
    """
    return min(o.ema_decay, (1 + steps) / (10 + steps))


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
