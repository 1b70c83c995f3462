"""What happened to a run, from its events: attempts with their causes, and events in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gpt2dist.report.live import describe

Cause = Literal["command", "failed", "killed", "preempted", "resized", "rewound"]


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group."""

    number: int
    step: int
    """With which it begins."""
    world_size: int
    cause: Cause
    """Why it began: a command, or what became of the attempt before."""
    redone: list[dict[str, Any]]
    """What it does again: `Spent` of each attempt that had done it, as JSON."""


def attempts(events: list[dict[str, Any]]) -> list[Attempt]:
    """All attempts of a run, oldest first."""
    found: list[Attempt] = []
    cause: Cause = "command"
    at_work = False
    for event in sorted(events, key=lambda e: float(e["time"])):
        kind = event["event"]
        if kind == "launch":
            cause = "killed" if at_work else "command"
        elif kind == "failure":
            cause = "failed"
        elif kind == "rewind":
            cause = "rewound"
        elif kind == "preemption" or (kind == "end" and event["reason"] == "preempted"):
            cause = "preempted"
        elif kind == "end" and event["reason"] == "resized":
            cause = "resized"
        at_work = at_work and kind not in ("failure", "end", "exit")
        if kind == "start":
            redone = event.get("redone", [])
            found.append(Attempt(event["attempt"], event["step"], event["world_size"], cause, redone))
            cause, at_work = "failed", True
    return found


def words(event: dict[str, Any]) -> str | None:
    """An event for the record; None for those that say nothing to a person."""
    kind = event["event"]
    if kind in ("commit", "restart", "reservation"):
        return None
    if text := describe(event):
        return text
    changes = ", ".join(f"{c['key']}: {c['before']} → {c['now']}" for c in event.get("changes", []))
    if kind == "launch":
        return "a command began" + (f"; changed: {changes}" if changes else "")
    if kind == "exit":
        return "the command ended"
    if kind == "end":
        return f"{event['reason']} at step {event['step']}, saved"
    if kind == "save_interval":
        return f"from now on a save every {event['seconds']:.1f} s, at a failure every {event['mtbf_s'] / 3600:.1f} h"
    if kind == "data_changed":
        return f"other samples from step {event['step']} on: {changes}"
    if kind == "non_finite":
        return str(event["cause"])
    if kind == "diverged":
        return f"the loss diverged in steps {event['steps'][0]} to {event['steps'][1] - 1}, once too often"
    fields = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event"))
    return f"{kind.replace('_', ' ')}: {fields}" if fields else kind.replace("_", " ")
