"""Where the time of steps went, from their lines in metrics.jsonl; sums stay when the lines themselves are dropped."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
KEYS = {"time", "step_s", "attempt"}


@dataclass(frozen=True)
class Spent:
    """Steps of one attempt, and what they took; seconds, and Unix times."""

    attempt: int
    steps: int
    begin: float
    """The first of them began."""
    end: float
    """The last of them had ended, and the evaluation after it."""
    step_s: float
    data_wait_s: float
    """Part of `step_s`."""
    checkpoint_s: float
    """For which saves held up the loop between them."""
    eval_s: float


def by_attempt(lines: Iterable[dict[str, Any]]) -> list[Spent]:
    """Sums over the lines of each attempt, oldest attempt first."""
    found = spent_by(lines, lambda line: int(line["attempt"]))
    return [found[attempt] for attempt in sorted(found)]


def spent_by(lines: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], K]) -> dict[K, Spent]:
    """Sums over the lines with the same key, which must tell attempts apart; no line is kept."""
    found: dict[K, Spent] = {}
    for line in lines:
        if line.keys() >= KEYS:  # every line since attempts are counted
            group, one = key(line), _of_one(line)
            found[group] = _plus(found[group], one) if group in found else one
    return found


def _of_one(line: dict[str, Any]) -> Spent:
    return Spent(
        line["attempt"],
        1,
        begin=line["time"] - line["step_s"],
        end=line["time"] + line.get("eval_s", 0.0),
        step_s=line["step_s"],
        data_wait_s=line.get("data_wait_s", 0.0),
        checkpoint_s=line.get("checkpoint_s", 0.0),
        eval_s=line.get("eval_s", 0.0),
    )


def _plus(a: Spent, b: Spent) -> Spent:
    return replace(
        a,
        steps=a.steps + b.steps,
        begin=min(a.begin, b.begin),
        end=max(a.end, b.end),
        step_s=a.step_s + b.step_s,
        data_wait_s=a.data_wait_s + b.data_wait_s,
        checkpoint_s=a.checkpoint_s + b.checkpoint_s,
        eval_s=a.eval_s + b.eval_s,
    )
