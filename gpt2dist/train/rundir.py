"""The files of a run directory, readable from storage alone.

config.toml (resolved), checkpoints/, metrics.jsonl, ledger.jsonl, events.jsonl, log.txt; after a hang stacks/.
"""

from __future__ import annotations

from typing import Any

from gpt2dist.config import RunConfig
from gpt2dist.storage import JsonLines, location, publish, read_bytes, remove

REQUEST_FILE = "request"
"""While this file is in the run directory, the worker group saves and ends after the step that it is on."""
STACKS = "stacks"
"""Directory of the stacks of ranks that hung."""
STOP, RESIZE = "stop", "resize"
"""What the file may say: end the run, or only this group, so that another one of another size goes on."""
METRICS_FLUSH_S = 5.0
"""On an object store, metrics reach metrics.jsonl at most this many seconds late."""


def metrics_log(run_dir: str) -> JsonLines:
    """metrics.jsonl: a line a step."""
    return JsonLines(location(run_dir) / "metrics.jsonl", METRICS_FLUSH_S)


def ledger_log(run_dir: str) -> JsonLines:
    """ledger.jsonl: a line a committed step."""
    return JsonLines(location(run_dir) / "ledger.jsonl")


def events_log(run_dir: str) -> JsonLines:
    """events.jsonl: starts, commits, failures, the end."""
    return JsonLines(location(run_dir) / "events.jsonl")


def rewinds(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rewinds of a run: what each left out stays out for ever."""
    return [event for event in events if event["event"] == "rewind"]


def with_rewinds(run: RunConfig, events: list[dict[str, Any]]) -> RunConfig:
    """The run with what its rewinds have left out in `data.skip`, beside what the run file leaves out."""
    found = {(first, end) for event in rewinds(events) for first, end in event["positions"]}
    data = run.data.model_copy(update={"skip": sorted({*run.data.skip, *found})})
    return run.model_copy(update={"data": data})


def request(run_dir: str, what: str) -> None:
    """Ask the worker group for `STOP` or `RESIZE`; a stop is never replaced."""
    if requested(run_dir) != STOP:
        publish(location(run_dir) / REQUEST_FILE, what.encode())


def requested(run_dir: str) -> str:
    """`STOP`, `RESIZE`, or nothing."""
    try:
        text = read_bytes(location(run_dir) / REQUEST_FILE).decode()
    except FileNotFoundError:
        return ""
    return text if text == RESIZE else STOP  # also a file that a person has made by hand


def withdraw(run_dir: str) -> None:
    """Take a request back."""
    remove(location(run_dir) / REQUEST_FILE)
