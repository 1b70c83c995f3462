"""Where the time of steps went, from their lines in metrics.jsonl; sums stay when the lines themselves are dropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


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
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if "time" in line:  # every line since attempts are counted
            groups[line["attempt"]].append(line)
    return [_sum(attempt, groups[attempt]) for attempt in sorted(groups)]


def _sum(attempt: int, lines: list[dict[str, Any]]) -> Spent:
    def total(key: str) -> float:
        return float(sum(line.get(key, 0.0) for line in lines))

    return Spent(
        attempt,
        len(lines),
        begin=min(line["time"] - line["step_s"] for line in lines),
        end=max(line["time"] + line.get("eval_s", 0.0) for line in lines),
        step_s=total("step_s"),
        data_wait_s=total("data_wait_s"),
        checkpoint_s=total("checkpoint_s"),
        eval_s=total("eval_s"),
    )
