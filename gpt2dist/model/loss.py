"""Cross-entropy of the tied output head without a second copy of the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2dist.model.linear import product_dtype

CHUNK = 512
"""Positions whose logits are there at a time where products are fp32, on the CPU: enough for products with the whole
table to be fast."""
ROWS = {"cpu": 64, "cuda": 2048}
"""Elsewhere, positions whose 16-bit logits are in fp32 at a time: on the CPU what its cache holds, on CUDA enough to
fill it."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean of −log softmax(x Wᵀ)[target] in nats, the softmax over the first `vocab_size` rows of W.

    x: [N, C]; weight: [V, C], V ≥ vocab_size, of x's dtype; targets: int64 [N]; result: scalar fp32.

    The logits are computed once; softmax and loss are fp32. In training their gradient (softmax − one-hot) takes their
    place in memory during the forward pass.
    """
    in_chunks = x.device.type == "cpu" and product_dtype(x.dtype, x.device) == torch.float32
    if torch.is_grad_enabled():
        function: Any = _InChunks if in_chunks else _Whole
        loss: Tensor = function.apply(x, weight, targets, vocab_size)
        return loss
    weight = weight.to(product_dtype(x.dtype, x.device))
    losses = []
    for part, target in zip(torch.split(x, CHUNK), torch.split(targets, CHUNK), strict=True):
        logits = F.linear(part.to(weight.dtype), weight)[:, :vocab_size]
        losses.append(F.cross_entropy(logits.float(), target, reduction="none"))
    return torch.cat(losses).mean()


class _InChunks(torch.autograd.Function):
    """All in the forward pass, a chunk of positions after the other; backward scales by the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        table = weight.float()
        losses, grad_x, grad_table = torch.empty(len(x)), torch.empty(x.shape), torch.zeros_like(table)
        buffer = torch.empty(min(CHUNK, len(x)), len(table))
        for start in range(0, len(x), CHUNK):
            part, target = x[start : start + CHUNK].float(), targets[start : start + CHUNK]
            logits = torch.mm(part, table.t(), out=buffer[: len(part)])
            losses[start : start + CHUNK] = _to_gradient(logits, target, vocab_size)
            grad_x[start : start + CHUNK] = torch.mm(logits, table)
            grad_table.addmm_(logits.t(), part)
        ctx.gradients, ctx.dtype = (grad_x, grad_table), x.dtype
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad_x, grad_table), ctx.gradients = ctx.gradients, None
        scale = grad_loss / len(grad_x)
        return grad_x.mul_(scale).to(ctx.dtype), grad_table.mul_(scale).to(ctx.dtype), None, None


class _Whole(torch.autograd.Function):
    """The logits of all positions at once, in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        logits = torch.mm(x, weight.t())
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        rows = ROWS[x.device.type]
        for start in range(0, len(x), rows):
            part = logits[start : start + rows]
            gradient = part.float()
            losses[start : start + rows] = _to_gradient(gradient, targets[start : start + rows], vocab_size)
            part.copy_(gradient)
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


def _to_gradient(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Replace fp32 logits [N, V] by softmax − one-hot; result: −log softmax(logits)[target], [N]."""
    z, at = logits[:, :vocab_size], targets[:, None]
    largest, of_target = z.amax(-1, keepdim=True), z.gather(1, at)
    total = z.sub_(largest).exp_().sum(-1, keepdim=True)
    z.div_(total).scatter_add_(1, at, z.new_full(at.shape, -1.0))
    logits[:, vocab_size:] = 0
    return (total.log() + largest - of_target)[:, 0]
