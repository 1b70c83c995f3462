"""Matrix products on CPUs where torch's own are slow.

In bf16 and fp16 without units for them, torch multiplies in a loop that is several times slower than its fp32 product.
So the operands become fp32, which is exact, as are the products of two such numbers; sums are fp32, the result is
rounded once. What backward keeps is 16-bit, but for attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16
"""Up to these many, as when tokens are generated, a product takes as long as reading W does."""
SLICES = 16
"""Of W, which the threads share then, but on Intel's CPUs."""

INTEL = "Intel" in str(torch.cpu.get_capabilities().get("cpu_name"))
"""Where torch's own product of few rows is faster: measured on a Xeon. On an EPYC it takes 2 to 4 times as long."""

_UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""Of x86 and Arm, by their names in `torch.cpu.get_capabilities`; any of them is enough."""

WITHOUT_UNITS = frozenset(
    dtype for dtype, names in _UNITS.items() if not any(torch.cpu.get_capabilities().get(name) for name in names)
)
"""The 16-bit types for which this CPU has no units."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which matrices of `dtype` are multiplied: their own, or fp32."""
    return torch.float32 if device.type == "cpu" and dtype in WITHOUT_UNITS else dtype


class Linear(nn.Linear):
    """x Wᵀ + b, as `nn.Linear`."""

    def reset_parameters(self) -> None:
        """Random values; on a meta device, where there are none to set, torch would import half of itself for them."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; result: [..., out_features]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b, as `F.linear`. x: [..., in]; weight: [out, in]; bias: [out]; result: [..., out]."""
    few = x.shape[:-1].numel() <= FEW_ROWS and not torch.is_grad_enabled()
    has_units = product_dtype(x.dtype, x.device) == x.dtype
    if few and x.device.type == "cpu":
        if x.dtype == torch.float32 and not INTEL:
            return _of_few_rows(x, weight, bias)
        if x.dtype == torch.bfloat16 and has_units:
            return _of_few_bf16_rows(x, weight, bias)
    if few or has_units:  # for few rows, converting W takes longer than torch's loop
        return F.linear(x, weight, bias)
    out: Tensor = _InFp32.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _of_few_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(W xᵀ)ᵀ + b, slices of W one after the other.

    On AMD's CPUs torch's x Wᵀ uses one thread for one row, and for a few lays out all of W anew in every call.
    """
    slices = weight.view(math.gcd(len(weight), SLICES), -1, weight.shape[1])
    columns = x.flatten(0, -2).t().expand(len(slices), -1, -1)
    return torch.add(torch.bmm(slices, columns).flatten(0, 1).t(), bias).reshape(*x.shape[:-1], -1).contiguous()


def _of_few_bf16_rows(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(W xᵀ)ᵀ + b, rounded before the bias too. For x Wᵀ, oneDNN lays out all of W anew in every call."""
    rows = x.flatten(0, -2)
    if len(rows) == 1:
        return torch.addmv(bias, weight, rows[0]).view(*x.shape[:-1], -1)
    out = x.new_empty(len(rows), len(weight))
    return torch.add(torch.mm(weight, rows.t()).t(), bias, out=out).view(*x.shape[:-1], -1)


class _InFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)  # under ZeRO-3 the weight's values come and go
        out = torch.addmm(bias.float(), x.flatten(0, -2).float(), weight.float().t())
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2).float()
        grad_x = torch.mm(rows, weight.float()).to(x.dtype).view(x.shape)
        grad_weight = torch.mm(rows.t(), x.flatten(0, -2).float()).to(x.dtype)
        return grad_x, grad_weight, rows.sum(0).to(x.dtype)
