"""When to save: by steps, by minutes, or at the interval that loses least; and again later after a failure."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

from gpt2dist.config import CheckpointSection
from gpt2dist.train.interval import WRITES_APART, young_daly
from gpt2dist.train.saver import Outcome, Saver

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
"""After a save that failed, doubled each time."""
RECENT_SAVES, RECENT_STEPS = 5, 50
"""From which the cost of a save is estimated."""

LONGEST_GAP_S = 86400.0


class SaveTimes:
    """Rank 0's clock. `due` is asked after every step."""

    def __init__(self, config: CheckpointSection, saver: Saver, events: list[dict[str, Any]]) -> None:
        """events: of the run so far (`JsonLines.in_time`), from which the time between failures is estimated."""
        self.config, self.saver = config, saver
        self._began = time.monotonic()  # when the newest save began
        self._asked = False
        self._pause, self._not_before = FIRST_PAUSE_S, 0.0
        self._failures = sum(e["event"] in ("failure", "preemption") for e in events)
        self._seconds_before = running_seconds(events)
        self._start = self._began
        self._during: list[float] = []  # seconds of the steps in which a save was in flight
        self._apart: deque[float] = deque(maxlen=RECENT_STEPS)  # of those in which none was
        self._stalls: deque[float] = deque(maxlen=RECENT_SAVES)
        self._slowdowns: deque[float] = deque(maxlen=RECENT_SAVES)
        self.reasoning = self._interval()
        """How the interval came about; only `seconds` where it is not automatic."""

    def step(self, seconds: float) -> None:
        """A step took so long; what it waited for a save does not count."""
        (self._during if self.saver.busy else self._apart).append(seconds)

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps; stays so until `begun`."""
        if any(n and step % n == 0 for n in (self.config.every_steps, self.config.keep_every)):
            self._asked = True
        now = time.monotonic()
        by_time = 0 < self.interval <= now - self._began
        return (self._asked or by_time) and now >= self._not_before

    def ask(self) -> None:
        """Save as soon as possible."""
        self._asked, self._not_before = True, 0.0

    def begun(self) -> None:
        """A save has begun."""
        self._asked, self._began = False, time.monotonic()

    def ended(self, outcome: Outcome) -> dict[str, Any] | None:
        """Take a save's outcome into account; returns the reasoning where the automatic interval changed by a fifth."""
        during, self._during = self._during, []
        if outcome.problem:
            self._asked = True
            self._not_before = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
            return None
        self._pause = FIRST_PAUSE_S
        usual = statistics.median(self._apart) if self._apart else 0.0
        self._stalls.append(outcome.stall)
        self._slowdowns.append(max(0.0, sum(during) - len(during) * usual) if usual else 0.0)
        if self.config.every_minutes != "auto":
            return None
        new = self._interval()
        if abs(new["seconds"] - self.interval) < 0.2 * self.interval:
            return None
        self.reasoning = new
        return new

    @property
    def interval(self) -> float:
        """Seconds between the beginnings of two saves; 0: only by steps."""
        return self.reasoning["seconds"]

    def _interval(self) -> dict[str, float]:
        minutes = self.config.every_minutes
        if minutes != "auto":
            return {"seconds": 60 * minutes}
        write = self.saver.estimate(self.saver.bytes, statistics.median)
        stall, slowdown = write / 20, 0.0
        if self._stalls:
            stall, slowdown = statistics.median(self._stalls), statistics.median(self._slowdowns)
        # What is not known yet counts as one failure in checkpoint.mtbf_hours.
        seconds = self._seconds_before + time.monotonic() - self._start
        mtbf = (seconds + 3600 * self.config.mtbf_hours) / (self._failures + 1)
        best = young_daly(stall + slowdown, mtbf)
        return {
            "seconds": max(best, WRITES_APART * write),
            "young_daly_s": best,
            "stall_s": stall,
            "slowdown_s": slowdown,
            "write_s": write,
            "mtbf_s": mtbf,
            "failures": self._failures,
        }


def running_seconds(events: list[dict[str, Any]]) -> float:
    """Seconds in which some attempt was under way, to the precision of the events' times.

    Two events of an attempt are less than a day apart: else somebody has set the clock.
    """
    total, last = 0.0, None
    for event in events:
        if last is not None and event["event"] != "launch":
            total += min(max(0.0, event["time"] - last), LONGEST_GAP_S)
        last = None if event["event"] in ("launch", "end", "failure") else event["time"]
    return total
