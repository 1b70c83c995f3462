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


FEW_RANKS = 4
"""Up to here ranks on CPUs send each other's parts of the gradients directly. An owner gets (ranks − 1) times the bytes
of its part: with 16-bit gradients and 5 ranks as many as by an all-reduce in fp32."""


def sums_at_owners(device: str, ranks: int) -> bool:
    """Whether gradients of stages 1 and 2 go as they are to owners, who sum them in fp32; else an all-reduce does.

    A rank that is alone owns all of them. device: "cpu" or "cuda".
    """
    return ranks == 1 or (device == "cpu" and ranks <= FEW_RANKS)


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece `[start, start + len(tensor))` of a flattened parameter."""

    parameter: str
    kind: str
    """One of `KINDS`, or `EMA`."""
    start: int
    tensor: Tensor
    """fp32, 1-D; a view into the engine where it comes from there."""
