"""The time of a run with faults, held against a clock outside of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt2dist.config import RunConfig
from gpt2dist.train import rundir
from tests.conftest import tiny_run
from tests.processes import train_workers
from tests.ray.test_train import Run, events, steps_done, training, wait_for, write

DEAD_S, PAUSE_S, HANG_S = 8.0, 6.0, 5.0


def workers(process: Any) -> list[psutil.Process]:
    return train_workers(p for p in process.descendants() if p.is_running())


def kill(process: Any) -> None:
    process.descendants()
    process.kill()
    process.wait()


def seconds_to_first_step(run: RunConfig, since: float, attempt: int) -> float:
    """Until the first step of this attempt was seen; returns when 40 are done, so that some are saved, some are not."""
    wait_for(lambda: len(events(run, "start")) >= attempt)
    first = events(run, "start")[-1]["step"]
    wait_for(lambda: steps_done(run) > first)
    seconds = time.time() - since
    wait_for(lambda: steps_done(run) >= first + 40)
    return seconds


@pytest.mark.slow
@pytest.mark.timeout(470)
def test_categories_sum_to_the_wall_clock(make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path) -> None:
    """Five faults: a worker killed, one stopped, the driver killed, once more while it starts, a worker killed then.

    Then it is stopped, and goes on after a pause.
    """
    run = tiny_run(
        storage=str(tmp_path),
        data__path=make_data([30_000]),
        train__steps=100_000,
        eval__every_steps=20,
        checkpoint__every_steps=25,
        cluster__hang_timeout_s=HANG_S,
        cluster__price_per_hour=1.0,
    )
    path = write(run, tmp_path)
    began = time.time()
    with training(path) as process:
        waited = seconds_to_first_step(run, began, 1)
        workers(process)[0].kill()
        waited += seconds_to_first_step(run, time.time(), 2)
        os.kill(workers(process)[1].pid, signal.SIGSTOP)
        waited += seconds_to_first_step(run, time.time(), 3)
        kill(process)
        dead = time.time()
    time.sleep(DEAD_S)
    with training(path) as process:
        wait_for(lambda: len(events(run, "launch")) == 2)
        kill(process)
    with training(path) as process:
        wait_for(lambda: len(events(run, "start")) == 4)
        workers(process)[0].kill()
        waited += seconds_to_first_step(run, dead, 5)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        stopped = time.time()
    time.sleep(PAUSE_S)
    resumed = time.time()
    with training(path, "--set", f"train.stop_at={steps_done(run) + 40}") as process:
        waited += seconds_to_first_step(run, resumed, 6)
        output, _ = process.communicate(timeout=60)
        wall = time.time() - began
    assert process.returncode == 0, output
    assert "goodput" in output

    found = json.loads(gpt2dist("goodput", run.run_dir, "--json").stdout)
    seconds = found["seconds"]
    print(json.dumps(found, indent=1), "outside:", wall, waited)
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    assert (found["commands"], found["attempts"], found["failures"]) == (4, 6, 5)
    assert found["paused_s"] == pytest.approx(resumed - stopped, abs=1.5)
    assert min(seconds.values()) > 0
    # Before each first step nothing else happened, but for the rest of the step in which a fault came.
    assert seconds["start_up"] + seconds["lost_to_failure"] == pytest.approx(waited, abs=0.02 * wall)
    assert seconds["lost_to_failure"] > HANG_S + DEAD_S
    metrics = rundir.metrics_log(run.run_dir).read()
    assert seconds["productive"] == pytest.approx(sum(m["step_s"] - m["data_wait_s"] for m in metrics))
    assert sum(e["redone_steps"] for e in events(run, "start")) > 0
    assert seconds["evaluation"] > sum(m.get("eval_s", 0.0) for m in metrics)  # those of dropped steps, and the first
    paid = sum(seconds.values()) - found["paused_s"] - DEAD_S
    assert found["cost"]["total"] == pytest.approx(2 * paid / 3600, rel=0.1)
