"""What follows when a worker group has ended."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train

from gpt2dist.train import checkpoint, reservation, rundir
from gpt2dist.train.launch import TrainingFailed, TrainJob
from tests.conftest import tiny_run


def test_a_group_that_fails_after_it_has_logged_a_rewind_is_followed_by_one_without_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may die between the event and the end of the last one: the next group has to know of the event."""
    run = tiny_run(storage=str(tmp_path), train__rewind=True)
    Path(run.run_dir).mkdir()
    events = rundir.events_log(run.run_dir)
    skips: list[Any] = []

    def fit(job: TrainJob) -> Any:
        skips.append(job.run.data.skip)
        if len(skips) > 1:
            return SimpleNamespace(return_value="finished")
        events.append({"time": time.time(), "event": "start", "attempt": 1, "step": 0})
        events.append({"time": time.time(), "event": "rewind", "attempt": 1, "steps": [5, 8], "positions": [[14, 30]]})
        events.append({"time": time.time(), "event": "failure", "cause": "worker 1: its process died"})
        raise ray.train.TrainingFailedError("worker 1")

    monkeypatch.setattr(TrainJob, "_worker_group", lambda job, scratch: SimpleNamespace(fit=lambda: fit(job)))
    monkeypatch.setattr(reservation, "remove_groups", lambda: None)  # there is no Ray here
    job = TrainJob(run, time.time())
    job._thread.join(30)
    job.check()
    assert not ray.is_initialized()
    assert [list(skip) for skip in skips] == [[], [(14, 30)]]
    assert "skip = []" not in (Path(run.run_dir) / "config.toml").read_text()


@pytest.mark.parametrize("by_file", [True, False])
def test_a_group_that_dies_before_it_has_stopped_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_file: bool
) -> None:
    """Its last steps are not saved: no command may say that all is well."""
    run = tiny_run(storage=str(tmp_path), cluster__max_failures=3)
    Path(run.run_dir).mkdir()
    go_on = threading.Event()

    def fit() -> None:
        go_on.wait(30)
        raise ray.train.TrainingFailedError("worker 1")

    monkeypatch.setattr(TrainJob, "_worker_group", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(reservation, "remove_groups", lambda: None)  # there is no Ray here
    job = TrainJob(run, time.time())
    if by_file:
        rundir.request(run.run_dir, rundir.STOP)
    else:
        job.request_stop()
    go_on.set()
    job._thread.join(30)
    with pytest.raises(TrainingFailed):
        job.check()
    assert not ray.is_initialized()


def test_foreign_lines_and_a_clock_that_is_set_back_stop_no_run(tmp_path: Path) -> None:
    run = tiny_run(storage=str(tmp_path))
    events = rundir.events_log(run.run_dir)
    events.append({"time": 50.0, "event": "start", "attempt": 1, "step": 4}, {"time": 20.0, "event": "failure"})
    for kind in ("start", "commit", "rewind", "reservation"):
        events.append({"time": 30.0, "event": kind}, {"time": 30.0, "event": kind, "attempt": "x", "step": None})
    assert rundir.start_step(run.run_dir) == rundir.saved_step(run.run_dir) == 4
    assert [start["attempt"] for start in rundir.starts(events.read())] == [1]
    assert rundir.with_rewinds(run, events.read()) == run
    assert checkpoint.left_behind(run.run_dir, events.read()) == []
    reservation.release(run.run_dir, [{"time": 1.0, "event": "launch"}, *events.read()])
    newest = SimpleNamespace(_events=events)
    assert TrainJob._newest(newest, "start", "failure") == "start"  # type: ignore[arg-type]
    events.append({"time": 40.0, "event": "failure", "cause": "x"})
    assert TrainJob._newest(newest, "start", "failure") == "failure"  # type: ignore[arg-type]
