"""The files of a run directory, readable from storage alone.

config.toml (resolved), checkpoints/, metrics.jsonl, ledger.jsonl, events.jsonl, log.txt; after a hang stacks/.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gpt2dist.config import RunConfig, UserError
from gpt2dist.logs import Fields, JsonLines, finite, moment, ranges, text, whole
from gpt2dist.storage import StorageError, file_size, is_local, location, publish, read_bytes, remove

REQUEST_FILE = "request"
"""While this file is in the run directory, the worker group saves and ends after the step that it is on."""
STACKS = "stacks"
"""Directory of the stacks of ranks that hung."""
POLL_S = 3.0
"""Between two looks for a request on an object store."""
STOP, RESIZE = "stop", "resize"
"""What the file may say: end the run, or only this group, so that another one of another size goes on."""
MAX_CONFIG_BYTES = 1 << 20
METRICS_FLUSH_S = 5.0
"""On an object store, metrics reach metrics.jsonl at most this many seconds late."""
SECONDS = ("step_s", "data_wait_s", "checkpoint_s", "eval_s")
METRICS: Fields = {"attempt": whole, "time": moment, **dict.fromkeys(SECONDS, finite)}
LEDGER: Fields = {"step": whole, "attempt": whole, "positions": ranges, "samples_sha256": text}
EVENTS: Fields = {"attempt": whole, "step": whole}
"""What fields of lines have to be, where they are there; in the ledger they have to be there."""


def config_text(run_dir: str) -> bytes:
    """The content of config.toml.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is no run file.
    """
    path = location(run_dir) / "config.toml"
    if (is_local(path) and path.exists() and not path.is_file()) or file_size(path) > MAX_CONFIG_BYTES:
        raise UserError(f"{path}: not a run file")
    return read_bytes(path)


def metrics_log(run_dir: str) -> JsonLines:
    """metrics.jsonl: a line a step."""
    return JsonLines(location(run_dir) / "metrics.jsonl", METRICS_FLUSH_S, {"step": whole}, METRICS)


def ledger_log(run_dir: str) -> JsonLines:
    """ledger.jsonl: a line a committed step."""
    return JsonLines(location(run_dir) / "ledger.jsonl", keys=LEDGER, optional={"data": text})


def events_log(run_dir: str) -> JsonLines:
    """events.jsonl: starts, commits, failures, the end."""
    return JsonLines(location(run_dir) / "events.jsonl", keys={"event": text, "time": moment}, optional=EVENTS)


class Record:
    """The logs of a run, which rank 0 of its group writes."""

    def __init__(self, run_dir: str, rank: int, gather: Callable[[Any], list[Any]]) -> None:
        """`gather`: every rank's item, in order of rank; a collective."""
        self.rank, self.gather = rank, gather
        self.metrics, self.ledger, self.events = metrics_log(run_dir), ledger_log(run_dir), events_log(run_dir)

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank. A collective."""
        return self.gather(value)[0]

    def step(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl; what the storage does not take now waits for the next one."""
        if self.rank == 0:
            self.metrics.try_append(metrics)

    def event(self, event: str, **fields: Any) -> None:
        """A line of events.jsonl, in the same way."""
        if self.rank == 0:
            self.events.try_append({"time": time.time(), "event": event, **fields})

    def flush(self) -> None:
        """Write the lines that wait, where the storage takes them."""
        for log in (self.metrics, self.events):
            with contextlib.suppress(OSError, StorageError):  # it is away, or full
                log.flush()


def rewinds(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rewinds of a run: what each left out stays out for ever."""
    return [
        event for event in events if event["event"] == "rewind" and {"steps", "positions", "attempt"} <= event.keys()
    ]


def starts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The starts of a run's attempts."""
    return [event for event in events if event["event"] == "start" and {"attempt", "step"} <= event.keys()]


def seconds_of(key: str, lines: list[dict[str, Any]], event: str | None = None) -> list[float]:
    """The numbers under a key in lines of a log, in events of this kind only."""
    of_kind = [line for line in lines if line.get("event") == event]
    return [float(line[key]) for line in of_kind if isinstance(line.get(key), (int, float))]


def with_rewinds(run: RunConfig, events: list[dict[str, Any]]) -> RunConfig:
    """The run with what its rewinds have left out in `data.skip`, beside what the run file leaves out."""
    found = {(first, end) for event in rewinds(events) for first, end in event["positions"]}
    skip: list[tuple[int, int]] = []
    for first, end in sorted({*run.data.skip, *found}):
        if skip and first < skip[-1][1]:  # the run file leaves out more around it
            skip[-1] = (skip[-1][0], max(skip[-1][1], end))
        else:
            skip.append((first, end))
    return run.model_copy(update={"data": run.data.model_copy(update={"skip": skip})})


def saved_step(run_dir: str, last: float = float("inf")) -> int:
    """Step of the newest checkpoint, up to `last`, that events.jsonl knows of, also where it is gone; 0: of none."""
    for event in reversed(events_log(run_dir).read()):
        step = event.get("step")
        if event["event"] in ("commit", "start") and type(step) is int and step <= last:
            return int(step)
        if event["event"] == "rewind" and "steps" in event:  # later ones are deleted on purpose
            last = min(last, event["steps"][0])
    return 0


def start_step(run_dir: str) -> int:
    """The step at which the newest attempt starts, as its rank 0 has logged it.

    Here, where torch is not imported: Ray Train's data manager unpickles it, and the workers wait for that.
    """
    return int(starts(events_log(run_dir).read())[-1]["step"])


def request(run_dir: str, what: str) -> None:
    """Ask the worker group for `STOP` or `RESIZE`; a stop is never replaced."""
    if requested(run_dir) == STOP:
        return
    path = location(run_dir) / REQUEST_FILE
    try:
        publish(path, what.encode())
    except OSError:
        if what != STOP or not is_local(path):
            raise
        path.touch()  # on a full disk an empty file may still be made, and it says the same


def requested(run_dir: str) -> str:
    """`STOP`, `RESIZE`, or nothing."""
    try:
        text = read_bytes(location(run_dir) / REQUEST_FILE).decode(errors="replace")
    except FileNotFoundError:
        return ""
    return text if text == RESIZE else STOP  # also a file that a person has made by hand


class Requests:
    """Looks for a request; on an object store now and then, and without waiting for it."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self._local = is_local(location(run_dir))
        self._thread = ThreadPoolExecutor(1, "requests")
        self._look: Future[str] | None = None
        self._not_before = 0.0

    def newest(self) -> str:
        """What `requested` said last; nothing while the storage is away."""
        if self._local:
            with contextlib.suppress(OSError):
                return requested(self.run_dir)
            return ""
        found = ""
        if self._look is not None and self._look.done():
            found = "" if self._look.exception() else self._look.result()
            self._look = None
        now = time.monotonic()
        if self._look is None and now >= self._not_before:
            self._not_before = now + POLL_S
            self._look = self._thread.submit(requested, self.run_dir)
        return found


def withdraw(run_dir: str) -> None:
    """Take a request back."""
    remove(location(run_dir) / REQUEST_FILE)
