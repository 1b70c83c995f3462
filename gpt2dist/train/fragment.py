"""A fragment: the unit of state that the engine holds and a checkpoint stores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""fp32 master weight, Adam's first and second moment."""
EMA = "ema"
"""Moving average of the weight, where `optim.ema_decay` asks for it."""


def kinds(optimizer: str, ema: bool, parameter: str, ndim: int) -> tuple[str, ...]:
    """The kinds that a parameter has: a matrix under Muon only a first moment, its momentum; an average if wanted."""
    names = KINDS[:2] if optimizer == "muon" and is_muon_matrix(parameter, ndim) else KINDS
    return (*names, EMA) if ema else names


def is_muon_matrix(parameter: str, ndim: int) -> bool:
    """Whether `optim.name = "muon"` gives a parameter to Muon: the matrices inside the blocks."""
    return ndim == 2 and parameter.startswith("h.")


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece `[start, start + len(tensor))` of a flattened parameter."""

    parameter: str
    kind: str
    """One of `KINDS`, or `EMA`."""
    start: int
    tensor: Tensor
    """fp32, 1-D; a view into the engine where it comes from there."""
