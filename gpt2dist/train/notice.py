"""What is known of a machine that will be taken away, and what is still worth doing before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MARGIN_S = 1.0
"""Left over after the last save, for the group to end."""


@dataclass(frozen=True)
class Notice:
    """A preemption that was announced."""

    deadline: float | None
    """Unix time at which the machine goes; None: unknown."""
    ranks: tuple[int, ...]
    """The workers on it."""
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to do with the time that is left."""

    action: Literal["save", "leave", "lost"]
    """`save` now and go on until `leave_at`; `leave`: save and end at once; `lost`: not even a save fits."""
    leave_at: float
    """Unix time at which the last save has to begin; training then ends and goes on elsewhere."""


def plan(notice: Notice, now: float, save_seconds: float, step_seconds: float) -> Plan:
    """`save_seconds`: how long a save is at work until its commit, as measured; one more step may come before it."""
    if notice.deadline is None:
        return Plan("leave", now)
    leave_at = notice.deadline - MARGIN_S - step_seconds - 1.5 * save_seconds
    if now + save_seconds + step_seconds > notice.deadline:
        return Plan("lost", notice.deadline)
    if now >= leave_at - save_seconds:
        return Plan("leave", now)
    return Plan("save", leave_at)
