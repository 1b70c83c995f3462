"""Cross-entropy of the tied output head without a second copy of the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2dist.model.linear import product_dtype

CHUNK = 512
"""Positions whose logits are there at a time where products are fp32 on the CPU: enough for the products with the whole
table to be fast."""
ROWS = {"cpu": 8, "cuda": 512}
"""Positions whose softmax is computed at a time, in fp32: on the CPU what a cache holds, on CUDA enough to fill it."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, compiled: bool = False
) -> Tensor:
    """Mean of −log softmax(x Wᵀ)[target] in nats, the softmax over the first `vocab_size` rows of W.

    x: [N, C]; weight: [V, C], V ≥ vocab_size, of x's dtype; targets: int64 [N]; result: scalar fp32.

    The logits are computed once; softmax and loss are fp32. In training their gradient (softmax − one-hot) takes their
    place in memory during the forward pass; so there is one backward pass at most. `compiled`: on CUDA torch.compile
    fuses the softmax.
    """
    working = product_dtype(x.dtype, x.device)
    in_chunks = x.device.type == "cpu" and working == torch.float32
    if torch.is_grad_enabled():
        loss: Tensor
        if in_chunks:
            loss = _InChunks.apply(x, weight, targets, vocab_size)  # type: ignore[no-untyped-call]
        else:
            loss = _Whole.apply(x, weight, targets, vocab_size, compiled)  # type: ignore[no-untyped-call]
        return loss
    weight, losses = weight.to(working), []
    for part, target in zip(torch.split(x, CHUNK), torch.split(targets, CHUNK), strict=True):
        logits = F.linear(part.to(working), weight)[:, :vocab_size]
        losses.append(F.cross_entropy(logits.float(), target, reduction="none"))
    return torch.cat(losses).mean()


class _InChunks(torch.autograd.Function):
    """Products in fp32. The forward pass does it all, one chunk of positions after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        table = weight.float()
        losses, grad_x, grad_table = torch.empty(len(x)), torch.empty(x.shape), torch.empty(table.shape)
        buffer = torch.empty(min(CHUNK, len(x)), len(table))
        for start in range(0, len(x), CHUNK):
            chunk = slice(start, start + CHUNK)
            part = x[chunk].float()
            logits = torch.mm(part, table.t(), out=buffer[: len(part)])
            losses[chunk] = _to_gradient(logits, targets[chunk], vocab_size)
            torch.mm(logits, table, out=grad_x[chunk])
            grad_table.addmm_(logits.t(), part, beta=1 if start else 0)
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, compiled: bool) -> Tensor:
        logits = torch.mm(x, weight.t())
        losses = _to_gradient(logits, targets, vocab_size, compiled)
        ctx.save_for_backward(x, weight)
        ctx.gradient = logits
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        scale = grad_loss / len(x)
        # Scaled in fp32 after the product, so that small loss weights cost no precision.
        grad_x = (torch.mm(ctx.gradient, weight) * scale).to(x.dtype)
        grad_weight = torch.mm(ctx.gradient.t(), (x * scale).to(x.dtype))
        ctx.gradient = None
        return grad_x, grad_weight, None, None, None


def _to_gradient(logits: Tensor, targets: Tensor, vocab_size: int, compiled: bool = False) -> Tensor:
    """Replace logits [N, V] by softmax − one-hot, computed in fp32; result: −log softmax(logits)[target], fp32 [N]."""
    logits[:, vocab_size:] = -torch.inf
    if logits.is_cuda:
        if compiled:  # keeps nothing in fp32 in memory
            losses = _compiled(_softmax_on_cuda)(logits, targets)
        else:
            parts = zip(torch.split(logits, ROWS["cuda"]), torch.split(targets, ROWS["cuda"]), strict=True)
            losses = torch.cat([_softmax_on_cuda(*part) for part in parts])
    else:
        losses = _softmax_on_cpu(logits, targets)
    at_target = (torch.arange(len(logits), device=logits.device), targets)
    logits[at_target] = losses.neg().expm1().to(logits.dtype)  # scatter_ goes through the whole of it
    return losses


def _softmax_on_cuda(logits: Tensor, targets: Tensor) -> Tensor:
    """Replace logits by their softmax; see `_to_gradient`. Compiled, in two passes over memory."""
    logs = torch.log_softmax(logits, -1, dtype=torch.float32)
    losses = logs.gather(1, targets[:, None])[:, 0].neg()
    logits.copy_(logs.exp_())
    return losses


_compiled: Callable[..., Callable[..., Tensor]] = functools.cache(torch.compile)


def _softmax_on_cpu(logits: Tensor, targets: Tensor) -> Tensor:
    """The same, some rows at a time, which stay in the cache."""
    of_target = logits.gather(1, targets[:, None]).float()
    losses = torch.empty_like(of_target)
    rows = min(ROWS["cpu"], len(logits))
    buffer = None  # in fp32 the logits themselves
    if logits.dtype != torch.float32:
        buffer = torch.empty(rows, logits.shape[1], dtype=torch.float32)
    for start in range(0, len(logits), rows):
        part = logits[start : start + rows]
        z = part if buffer is None else buffer[: len(part)].copy_(part)
        largest = z.amax(-1, keepdim=True)
        total = z.sub_(largest).exp_().sum(-1, keepdim=True)
        losses[start : start + rows] = total.log() + (largest - of_target[start : start + rows])
        z.mul_(total.reciprocal_())
        if buffer is not None:
            part.copy_(z)
    return losses[:, 0]
