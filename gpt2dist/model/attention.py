"""Attention, and a form of it for short sequences on CPUs whose own is slow in the backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2dist.model.linear import product_dtype

SHORT = 256
"""Tokens. Up to here keeping the probabilities is faster than torch's kernel, which computes them again; the scores of
longer sequences do not stay in a cache."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, causal: bool) -> Tensor:
    """softmax(QKᵀ/√d_k)V, see `F.scaled_dot_product_attention`. q, k, v, result: [B, n_head, T, d_k]."""
    dtype = q.dtype
    if causal and not dropout and keeps_probabilities(q.shape[2], dtype, q.device) and torch.is_grad_enabled():
        out: Tensor = _Kept.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out
    if product_dtype(dtype, q.device) != dtype:
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal).to(dtype)


def use_units(dtype: torch.dtype, device: torch.device, dropout: float = 0.0) -> None:
    """From now on in this process: whether units for bf16 multiply fp32 operands, rounding them; results are fp32.

    dtype: of the weights. Where it is bf16 the only such operands are those of `_Kept`, which are bf16 numbers; with
    dropout torch's attention has others.
    """
    if device.type == "cpu":
        setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        setting.fp32_precision = "bf16" if _has_units(dtype, device) and not dropout else "none"


def keeps_probabilities(length: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether causal attention without dropout keeps length² probabilities a head for the backward pass."""
    return device.type == "cpu" and _has_units(dtype, device) and length <= SHORT


def _has_units(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and product_dtype(dtype, device) == dtype


class _Kept(torch.autograd.Function):
    """Scores and softmax in fp32, probabilities rounded to bf16, as torch's kernel does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, length = q.shape, q.shape[2]
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        later = torch.full((length, length), -torch.inf, device=q.device).triu(1)
        scores = torch.bmm(q.float(), k.float().transpose(1, 2))
        probabilities = torch.softmax(scores * (1 / math.sqrt(shape[3])) + later, -1).to(q.dtype)
        ctx.save_for_backward(q, k, v, probabilities)
        return torch.bmm(probabilities, v).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, probabilities = ctx.saved_tensors
        shape, scale = grad.shape, 1 / math.sqrt(grad.shape[3])
        grad = grad.reshape(-1, *shape[2:])
        of_probabilities = torch.bmm(grad, v.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, q.dtype)
        grad_q = torch.bmm(of_scores, k).mul_(scale)
        grad_k = torch.bmm(of_scores.transpose(1, 2), q).mul_(scale)
        grad_v = torch.bmm(probabilities.transpose(1, 2), grad)
        return grad_q.view(shape), grad_k.view(shape), grad_v.view(shape)
