"""Progress on a pipe: what a run waits for, and when that is said."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from gpt2dist.report import live
from gpt2dist.report.console import make_console
from gpt2dist.train import rundir
from tests.conftest import tiny_run


def test_what_a_run_waits_for_is_said_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "WAIT_S", 0.2)
    monkeypatch.setattr(live, "WAIT_LOOK_S", 0.0)
    monkeypatch.setattr(live, "_sleep", lambda *_: time.sleep(0.25))
    run = tiny_run(storage=str(tmp_path))
    Path(run.run_dir).mkdir()

    def happens() -> Iterator[str]:
        """One look of the follower after another, and what the run waits for then."""
        log = rundir.events_log(run.run_dir)
        log.append({"time": time.time(), "event": "launch"})
        yield "too early to say"
        yield from ["", "room for 0", "room for 0", "room for 1", "", ""]
        log.append({"time": time.time(), "event": "start", "attempt": 1, "world_size": 2, "step": 0, "redone_steps": 0})
        yield "not asked for"
        rundir.metrics_log(run.run_dir).append({"step": 4, "loss": 2.0, "lr": 1e-3, "tokens_per_s": 10.0})
        yield "not asked for"
        log.append({"time": time.time(), "event": "failure", "cause": "worker 0: its process died"})
        yield "too early to say"
        yield from ["room for 1", "room for 1"]

    looks = happens()
    now = ""

    def done() -> bool:
        nonlocal now
        now = next(looks, "over")
        return now == "over"

    console = Console(file=io.StringIO(), width=200)
    live.follow(run, console, done, 0.0, missing=lambda: now)
    assert isinstance(console.file, io.StringIO)
    assert [line.split(";")[0] for line in console.file.getvalue().splitlines()] == [
        "room for 0",
        "room for 1",
        "the wait is over",
        "attempt 1: 2 workers, from the start",
        "step 5/12  loss 2.0000  lr 1.00e-03  10 tok/s",
        "failed: worker 0: its process died",
        "room for 1",
    ]


def test_an_event_of_a_clock_that_is_behind_is_told_once(tmp_path: Path) -> None:
    """Written by a worker on another machine, or seen late; what was there before the command is not told."""
    run = tiny_run(storage=str(tmp_path))
    log = rundir.events_log(run.run_dir)
    began = time.time()
    log.append({"time": began - 60, "event": "failure", "cause": "of an earlier command"})

    def happens() -> Iterator[bool]:
        log.append({"time": began + 20, "event": "launch"})
        yield False
        start = {"attempt": 1, "world_size": 2, "step": 0, "redone_steps": 0}
        log.append({"time": began + 10, "event": "start", **start})
        yield False
        rundir.metrics_log(run.run_dir).append({"step": 4, "loss": 2.0, "lr": 1e-3, "tokens_per_s": 10.0})
        yield False
        yield True

    looks = happens()
    console = Console(file=io.StringIO(), width=200)
    live.follow(run, console, lambda: next(looks, True), began)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "attempt 1: 2 workers, from the start",
        "step 5/12  loss 2.0000  lr 1.00e-03  10 tok/s",
    ]


def test_a_terminal_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    """Its file lies on a full disk, or nobody reads the pipe any more."""
    run = tiny_run(storage=str(tmp_path))
    log = rundir.events_log(run.run_dir)
    log.append({"time": 1.0, "event": "start", "attempt": 1, "world_size": 2, "step": 0, "redone_steps": 0})
    rundir.metrics_log(run.run_dir).append({"step": 4, "loss": 2.0, "lr": 1e-3, "tokens_per_s": 10.0})
    reader, writer = os.pipe()
    os.close(reader)
    for place in ("/dev/full", writer):
        with contextlib.suppress(OSError), open(place, "w") as file:
            console = make_console(file)
            with pytest.raises(OSError, match=".*"):
                console.print("x" * 10_000)
            looks = iter([False, False, True])
            live.follow(run, console, lambda looks=looks: next(looks, True), 0.0)  # type: ignore[misc]
            assert next(looks, None) is None


def test_storage_that_is_away_ends_no_run(tmp_path: Path) -> None:
    """Whatever the file system calls it: here, too many levels of symbolic links."""
    run = tiny_run(storage=str(tmp_path))
    Path(run.run_dir).symlink_to(run.run_dir)
    with pytest.raises(OSError, match="symbolic"):
        rundir.requested(run.run_dir)
    assert live._tails(run) == ([], [])
    assert rundir.Requests(run.run_dir).newest() == ""
