"""A fragment: the unit of state that the engine holds and a checkpoint stores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""fp32 master weight, Adam's first and second moment."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece `[start, start + len(tensor))` of a flattened parameter."""

    parameter: str
    kind: str
    """One of `KINDS`."""
    start: int
    tensor: Tensor
    """fp32, 1-D; a view into the engine where it comes from there."""
