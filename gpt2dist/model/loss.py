"""Cross-entropy of the tied output head without a second copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = {"cpu": 64, "cuda": 2048}
"""Positions whose logits are in fp32 at a time: on the CPU what its cache holds, on CUDA enough to fill it."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean of −log softmax(x Wᵀ)[target] in nats, the softmax over the first `vocab_size` rows of W.

    x: [N, C]; weight: [V, C], V ≥ vocab_size, of x's dtype; targets: int64 [N]; result: scalar fp32.

    The logits are computed once, in the dtype of x; softmax and loss are fp32. In training their gradient
    (softmax − one-hot) takes their place in memory during the forward pass.
    """
    if torch.is_grad_enabled():
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, vocab_size)  # type: ignore[no-untyped-call]
        return loss
    logits = F.linear(x, weight)
    rows = ROWS[x.device.type]
    parts = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    losses = [F.cross_entropy(part[:, :vocab_size].float(), t, reduction="none") for part, t in parts]
    return torch.cat(losses).mean()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        logits = torch.mm(x, weight.t())
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        rows = ROWS[x.device.type]
        for start in range(0, len(x), rows):
            part, t = logits[start : start + rows], targets[start : start + rows, None]
            log_p = torch.log_softmax(part[:, :vocab_size], dim=-1, dtype=torch.float32)
            losses[start : start + rows] = -log_p.gather(1, t)[:, 0]
            gradient = log_p.exp_()
            gradient.scatter_add_(1, t, gradient.new_full(t.shape, -1.0))
            part[:, :vocab_size] = gradient
            part[:, vocab_size:] = 0
        ctx.save_for_backward(x, weight)
        ctx.gradient = logits
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        scale = grad_loss / len(x)
        # Scaled in fp32 after the product, so that small loss weights cost no precision.
        grad_x = (torch.mm(ctx.gradient, weight) * scale).to(x.dtype)
        grad_weight = torch.mm(ctx.gradient.t(), (x * scale).to(x.dtype))
        ctx.gradient = None
        return grad_x, grad_weight, None, None
