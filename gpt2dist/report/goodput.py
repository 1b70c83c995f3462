"""Where the time of a run went: every second of all its commands and attempts in one category.

Computed from events.jsonl and metrics.jsonl alone. docs/goodput.md says what falls in which category, and why.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

from gpt2dist.report.history import understood
from gpt2dist.train import rundir
from gpt2dist.train.interval import WRITES_APART, expected_goodput, young_daly
from gpt2dist.train.spent import Spent, spent_by

Category = Literal[
    "productive", "redone", "start_up", "data_wait", "checkpoint_stall", "evaluation", "lost_to_failure", "idle"
]
MEANING: dict[Category, str] = {
    "productive": "steps that were kept",
    "redone": "steps that had to be done again, or are not saved yet",
    "start_up": "from the beginning of a command, or of another attempt, to its first step",
    "data_wait": "steps that waited for their batch",
    "checkpoint_stall": "steps that waited for a save, the last one of an attempt included",
    "evaluation": "validation loss",
    "lost_to_failure": "from the last step before a failure until it was noticed and another attempt began",
    "idle": "between a command's end and the next one; and what the loop did beside its steps",
}


def title(category: Category) -> str:
    """A category in words."""
    return "start-up" if category == "start_up" else category.replace("_", " ")


@dataclass(frozen=True)
class Allowed:
    """What failures and saves as they were would leave of the time with the best interval between saves."""

    share: float
    """By Daly's formula; start-up, evaluation and data wait are no part of it."""
    interval_s: float
    mtbf_s: float
    """Mean time between failures: the wall clock without pauses ÷ failures."""
    restart_s: float
    """Mean time from the last step before a failure to the first step after it."""
    stall_s: float
    """Median for which a save held up the loop."""
    write_s: float
    """Median from a save's beginning to its commit."""


@dataclass(frozen=True)
class Goodput:
    """Times are in seconds."""

    wall_s: float
    """From the beginning of the first command to the last thing that is known."""
    seconds: dict[Category, float]
    """Their sum is `wall_s`."""
    worker_seconds: dict[Category, float]
    """Times the world size of the attempt; nothing while no command ran."""
    paused_s: float
    """The part of `idle` between the end of a command that was to end and the next one."""
    commands: int
    attempts: int
    failures: int
    """Attempts that ended without having saved: killed, failed, hung, or taken away too soon."""
    allowed: Allowed | None
    """None as long as there was no failure, or no save."""

    @property
    def share(self) -> float:
        """Goodput: the productive share of the time in which the run was to go on."""
        running = self.wall_s - self.paused_s
        return self.seconds["productive"] / running if running else 0.0

    def cost(self, price_per_hour: float) -> dict[Category, float]:
        """Dollars by category; price_per_hour: of one worker."""
        return {category: s / 3600 * price_per_hour for category, s in self.worker_seconds.items()}

    def to_json(self, price_per_hour: float | None) -> dict[str, Any]:
        """For --json."""
        cost: dict[str, Any] | None = None
        if price_per_hour is not None:
            parts = self.cost(price_per_hour)
            cost = {"price_per_hour": price_per_hour, "total": sum(parts.values()), "parts": parts}
        return {"goodput": self.share, **asdict(self), "cost": cost}


def goodput(events: Iterable[dict[str, Any]], metrics: Iterable[dict[str, Any]]) -> Goodput:
    """Account for the whole time of a run.

    events: of events.jsonl, by `JsonLines.in_time`; metrics: the lines of metrics.jsonl.
    """
    return _Account(list(events), metrics).result()


def of_run(run_dir: str) -> Goodput:
    """Account for a run directory, as far as it is written. Raises `UserError` where an event is not understood."""
    with understood(run_dir):
        return goodput(rundir.events_log(run_dir).in_time(), rundir.metrics_log(run_dir).each())


@dataclass
class _Stretch:
    category: Category
    seconds: float
    workers: int | None
    """None: those of the attempt that is starting up."""


class _Account:
    """Walks through the events; `now` is the time up to which every second is accounted for."""

    def __init__(self, events: list[dict[str, Any]], metrics: Iterable[dict[str, Any]]) -> None:
        self.events = events
        self.stretches: list[_Stretch] = []
        first = events[0] if events else {"time": 0.0}
        self.began = self.now = float(first.get("began", first["time"]))
        self.workers = 0
        self.attempt: int | None = None
        # new: no command yet; open: a worker group is coming or at work; failed; going on: ended on purpose, another
        # group follows; over: saved, nothing follows.
        self.state: Literal["new", "open", "failed", "going on", "over"] = "new"
        self.paused = 0.0
        self.failures = 0
        self.restarting = False  # no step yet since a failure
        self.restart_s = 0.0
        saved = _saved_steps(events)
        found = spent_by(metrics, lambda line: (line["step"] < saved, line["attempt"]))
        self.kept = {attempt: spent for (is_saved, attempt), spent in found.items() if is_saved}
        self.redone: dict[int, list[Spent]] = defaultdict(list)
        dropped = [Spent(**spent) for e in events if e["event"] == "start" for spent in e.get("redone", [])]
        for spent in [*dropped, *(spent for (is_saved, _), spent in found.items() if not is_saved)]:
            self.redone[spent.attempt].append(spent)

    def result(self) -> Goodput:
        handlers = {
            "launch": self._launch,
            "restart": self._restart,
            "start": self._start,
            "eval": self._eval,
            "end": self._end,
            "rewind": self._end,
            "failure": self._failure,
            "exit": self._exit,
        }
        for event in self.events:
            if handler := handlers.get(event["event"]):
                handler(event)
        if self.state == "open":
            last = self.events[-1]["time"]
            if self._steps():
                self._to(last, "idle", self.workers)
            else:
                self._to(last, "start_up", None)
        seconds: dict[Category, float] = dict.fromkeys(MEANING, 0.0)
        worker_seconds: dict[Category, float] = dict.fromkeys(MEANING, 0.0)
        for stretch in self.stretches:
            seconds[stretch.category] += stretch.seconds
            worker_seconds[stretch.category] += stretch.seconds * (stretch.workers or 0)
        allowed = self._allowed()
        if not all(
            map(math.isfinite, [self.now - self.began, *seconds.values(), *(astuple(allowed) if allowed else ())])
        ):
            raise ValueError("a time that is not finite")
        kinds = [e["event"] for e in self.events]
        return Goodput(
            wall_s=self.now - self.began,
            seconds=seconds,
            worker_seconds=worker_seconds,
            paused_s=self.paused,
            commands=kinds.count("launch"),
            attempts=kinds.count("start"),
            failures=self.failures,
            allowed=allowed,
        )

    # ------------------------------------------------------------------ events

    def _launch(self, event: dict[str, Any]) -> None:
        began = event.get("began", event["time"])
        if self.state == "over":
            self.paused += max(0.0, began - self.now)
            self._to(began, "idle", 0)
        elif self.state != "new":
            self._fail(began, workers=0)  # killed: until when it ran is not known
        self.state, self.attempt = "open", None

    def _restart(self, event: dict[str, Any]) -> None:
        if self.state == "going on":
            self._to(event["time"], "start_up", None)
        else:
            self._fail(event["time"])
        self.state, self.attempt = "open", None

    def _start(self, event: dict[str, Any]) -> None:
        if self.state == "open" and self.attempt is not None:  # Ray has begun anew, for machines that came or went
            self._fail(event["time"])
        self.workers, self.attempt, self.state = event["world_size"], event["attempt"], "open"
        self._to(event["time"], "start_up", None)
        for stretch in self.stretches:
            if stretch.workers is None:
                stretch.workers = self.workers

    def _eval(self, event: dict[str, Any]) -> None:
        self._to(event["time"] - event.get("seconds", 0.0), "start_up", self.workers)
        self._to(event["time"], "evaluation", self.workers)

    def _end(self, event: dict[str, Any]) -> None:
        if self.state == "open":
            self._to(event["time"], "checkpoint_stall" if self._steps() else "start_up", self.workers)
        over = event["event"] == "end" and event["reason"] in ("finished", "stopped")
        self.state = "over" if over else "going on"

    def _failure(self, event: dict[str, Any]) -> None:
        if self.state == "open":
            self._fail(event["time"])

    def _exit(self, event: dict[str, Any]) -> None:
        if self.state in ("over", "going on"):
            self._to(event["time"], "idle", self.workers)
            self.state = "over"
        elif event.get("stopped") and (self.state == "failed" or self.attempt is None):  # while no group was there
            self._to(event["time"], "lost_to_failure" if self.state == "failed" else "start_up", 0)
            self.state = "over"
        else:
            self._fail(event["time"])

    # ------------------------------------------------------------------ time

    def _to(self, when: float, category: Category, workers: int | None) -> None:
        """What was not accounted for until `when`; clocks of several machines may differ, so perhaps nothing."""
        seconds = max(0.0, when - self.now)
        self.stretches.append(_Stretch(category, seconds, workers))
        self.now += seconds
        if self.restarting and category in ("start_up", "lost_to_failure"):
            self.restart_s += seconds

    def _steps(self) -> bool:
        """The steps of the open attempt, and what came before them; whether there were any."""
        if self.attempt is None:
            return False
        kept, redone = self.kept.get(self.attempt), self.redone[self.attempt]
        every = [*redone, kept] if kept else redone
        if not every:
            return False
        self._to(min(s.begin for s in every), "start_up", self.workers)
        self.restarting = False
        parts: dict[Category, float] = {
            "productive": kept.step_s - kept.data_wait_s if kept else 0.0,
            "redone": sum(s.step_s - s.data_wait_s for s in redone),
            "data_wait": sum(s.data_wait_s for s in every),
            "checkpoint_stall": sum(s.checkpoint_s for s in every),
            "evaluation": sum(s.eval_s for s in every),
        }
        whole, known = max(0.0, max(s.end for s in every) - self.now), sum(parts.values())
        if known > whole:  # by clocks that were set, or differ: the sum is to be right
            parts = {category: seconds * whole / known for category, seconds in parts.items()}
        else:
            parts["idle"] = whole - known
        self.stretches += [_Stretch(category, seconds, self.workers) for category, seconds in parts.items()]
        self.now += whole
        return True

    def _fail(self, when: float, workers: int | None = None) -> None:
        """From the last thing known until `when` the time is lost."""
        if self.state == "open":
            self._steps()
        if self.attempt is not None and workers is None:
            workers = self.workers
        if self.state != "failed":
            self.failures += 1
        self.restarting = True
        self._to(when, "lost_to_failure", workers)
        self.state = "failed"

    def _allowed(self) -> Allowed | None:
        saves = [e for e in self.events if e["event"] == "commit" and "stall_s" in e]
        if not self.failures or not saves:
            return None
        stall = statistics.median(float(e["stall_s"]) for e in saves)
        write = statistics.median(float(e.get("work_s", e["seconds"])) for e in saves)
        mtbf = (self.now - self.began - self.paused) / self.failures
        restart = self.restart_s / self.failures
        interval = max(young_daly(stall, mtbf), WRITES_APART * write)
        late = write if write > stall else 0.0
        share = expected_goodput(interval, stall, restart, mtbf, late)
        return Allowed(share, interval, mtbf, restart, stall, write)


def _saved_steps(events: list[dict[str, Any]]) -> int:
    """How many steps are saved up to now."""
    saved = 0
    for event in events:
        if event["event"] == "start":
            saved = event["step"]
        elif event["event"] in ("commit", "end"):
            saved = max(saved, event["step"])
    return int(saved)
