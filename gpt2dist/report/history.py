"""What happened to a run, from its events: attempts with their causes, and events in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from gpt2dist.config import UserError
from gpt2dist.report.live import describe
from gpt2dist.train import rundir

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


def read(run_dir: str) -> list[dict[str, Any]]:
    """The events of a run, in the order of time. Raises `UserError` where there are none."""
    if events := rundir.events_log(run_dir).in_time():
        return events
    if rundir.metrics_log(run_dir).tail():
        raise UserError(f"{run_dir}/events.jsonl: missing or without events, though metrics.jsonl has steps")
    raise UserError(f"{run_dir}: no events yet")


@contextlib.contextmanager
def understood(run_dir: str) -> Iterator[None]:
    """For what is made of events: raises `UserError` where one lacks a field of its kind, or has a foreign value."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as e:
        what = f"no {e}" if isinstance(e, KeyError) else e
        raise UserError(f"{run_dir}/events.jsonl: a line is not understood ({what})") from e


def attempts(events: list[dict[str, Any]]) -> list[Attempt]:
    """All attempts of a run, oldest first; events: `JsonLines.in_time`."""
    found: list[Attempt] = []
    cause: Cause = "command"
    at_work = False
    for event in events:
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
