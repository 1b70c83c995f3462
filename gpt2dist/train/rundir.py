"""The files of a run directory, readable from storage alone.

config.toml (resolved), checkpoints/, metrics.jsonl, ledger.jsonl, events.jsonl, log.txt.
"""

from __future__ import annotations

from gpt2dist.storage import JsonLines, location

STOP_FILE = "stop"
"""While this file is in the run directory, the run saves and ends after the step that it is on."""
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
