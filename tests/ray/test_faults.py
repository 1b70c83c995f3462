"""Machines that go, with notice and without, and workers that hang: the curve does not know of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gpt2dist.cluster.local import LocalCluster
from gpt2dist.config import RunConfig
from tests.conftest import tiny_run
from tests.distributed import jobs
from tests.distributed.test_engine import logged
from tests.processes import train_workers
from tests.ray.test_train import Run, assert_audit, events, steps_done, training, wait_for, write

TWO_NODES: dict[str, Any] = {
    "cluster__workers": [1, 2],
    "cluster__cpus_per_worker": 2,
    "cluster__resize_interval_s": 5.0,
    "checkpoint__every_steps": 50,
    "train__steps": 100_000,
    "optim__lr": 3e-4,  # at 3e-3 one and two undisturbed ranks differ by 1e-2 after 200 steps, all of it rounding
    "optim__min_lr": 3e-5,
}


@pytest.fixture
def on_cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[[LocalCluster], None]:
    """Commands that start from now on join this cluster."""

    def join(cluster: LocalCluster) -> None:
        for name, value in cluster.env.items():
            if name.startswith("RAY_"):
                monkeypatch.setenv(name, value)

    return join


def stop(process: subprocess.Popen[str], run: RunConfig) -> str:
    """Ctrl-C, some steps after the newest start."""
    resumed = events(run, "start")[-1]["step"]
    wait_for(lambda: steps_done(run) >= resumed + 10)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return str(output)


def undisturbed(run: RunConfig, ranks: Callable[..., list[Any]], world_size: int) -> dict[int, float]:
    """The losses of the same run as far as it came, with nothing happening to it, and without Ray."""
    train = run.train.model_copy(update={"stop_at": steps_done(run)})
    other = run.model_copy(update={"name": "undisturbed", "train": train})
    ranks(jobs.train_runs, world_size, [other], timeout=240)
    return logged(other)


@pytest.mark.faults
@pytest.mark.timeout(420)
def test_drained_node_costs_no_step(
    ranks: Callable[..., list[Any]],
    make_data: Callable[..., str],
    gpt2dist: Run,
    tmp_path: Path,
    on_cluster: Callable[[LocalCluster], None],
) -> None:
    """Two workers on two nodes; one is drained with 20 s of notice. The other goes on, with no step done twice."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([30_000]), **TWO_NODES)
    with LocalCluster() as cluster:
        cluster.add_node(3)
        second = cluster.add_node(3)
        on_cluster(cluster)
        with training(write(run, tmp_path)) as process:
            wait_for(lambda: steps_done(run) >= 20)
            assert events(run, "start")[-1]["world_size"] == 2
            cluster.drain(second, 20)
            wait_for(lambda: events(run, "preemption"), 20)
            wait_for(lambda: any(e["reason"] == "preempted" for e in events(run, "end")), 30)
            wait_for(lambda: len(events(run, "start")) == 2, 90)
            second.kill()
            output = stop(process, run)
    (notice,) = events(run, "preemption")
    assert notice["action"] in ("save", "leave")
    first, again = events(run, "start")
    assert (first["world_size"], again["world_size"]) == (2, 1)
    assert again["redone_steps"] == 0
    assert events(run, "failure") == []
    assert "taken away" in output
    assert logged(run) == pytest.approx(undisturbed(run, ranks, 2), abs=1e-5)
    assert_audit(gpt2dist, run, steps_done(run))


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_notice_too_short_for_a_save(
    make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path, on_cluster: Callable[[LocalCluster], None]
) -> None:
    """One second of notice: the last checkpoint it is, and that is said; unless that second was enough."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([30_000]), **TWO_NODES)
    with LocalCluster() as cluster:
        cluster.add_node(3)
        second = cluster.add_node(3)
        on_cluster(cluster)
        with training(write(run, tmp_path)) as process:
            wait_for(lambda: events(run, "commit"))
            cluster.drain(second, 1)
            wait_for(lambda: len(events(run, "start")) == 2, 120)
            second.kill()
            printed = stop(process, run)
    (notice,) = events(run, "preemption")
    if notice["action"] in ("lost", "late"):  # whether the workers hear of it early in that second is chance
        assert "will be done again" in printed
        assert events(run, "start")[1]["redone_steps"] > 0
    assert_audit(gpt2dist, run, steps_done(run))


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_group_grows_with_the_cluster_and_shrinks_when_a_node_dies(
    ranks: Callable[..., list[Any]],
    make_data: Callable[..., str],
    gpt2dist: Run,
    tmp_path: Path,
    on_cluster: Callable[[LocalCluster], None],
) -> None:
    """One node, then two (saved first: nothing is done again), then one of them dies without notice."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([30_000]), **TWO_NODES)
    with LocalCluster() as cluster:
        cluster.add_node(3)
        on_cluster(cluster)
        with training(write(run, tmp_path)) as process:
            wait_for(lambda: steps_done(run) >= 20)
            second = cluster.add_node(3)
            wait_for(lambda: len(events(run, "start")) == 2, 120)
            resumed = events(run, "start")[1]["step"]
            wait_for(lambda: steps_done(run) >= resumed + 60)
            second.kill()
            wait_for(lambda: len(events(run, "start")) == 3, 180)
            stop(process, run)
    starts = events(run, "start")
    assert [e["world_size"] for e in starts] == [1, 2, 1]
    assert starts[1]["redone_steps"] == 0
    assert [e["workers"] for e in events(run, "resize")] == [2]
    assert logged(run) == pytest.approx(undisturbed(run, ranks, 2), abs=1e-5)
    assert_audit(gpt2dist, run, steps_done(run))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_group_does_not_grow_onto_machines_of_another_kind(tmp_path: Path) -> None:
    """Those of another run, perhaps; Ray Train would end the group for one that cannot be placed. GPUs in name only."""
    log = tmp_path / "log"
    log.touch()
    with LocalCluster() as cluster:
        cluster.add_node(3, "--num-gpus=1", "--labels=ray.io/accelerator-type=A100")
        command = [sys.executable, "-m", "tests.ray.elastic_group", "A100", str(log), str(tmp_path / "storage")]
        process = subprocess.Popen(command, env=cluster.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: log.read_text().startswith("0 of 1\n"))
            cluster.add_node(3, "--num-gpus=1", "--labels=ray.io/accelerator-type=L4")
            time.sleep(20)  # of 3 s between two looks
            before = len(log.read_text())
            wait_for(lambda: len(log.read_text()) > before, 10)
            assert set(log.read_text().splitlines()) == {"0 of 1"}
            cluster.add_node(3, "--num-gpus=1", "--labels=ray.io/accelerator-type=A100")
            wait_for(lambda: {"0 of 2", "1 of 2"} < set(log.read_text().splitlines()))
        finally:
            process.kill()
            process.wait()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_stopped_worker_is_found_out(
    ranks: Callable[..., list[Any]], make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path
) -> None:
    """SIGSTOP: within the time that is set the stacks of both ranks are written and the group starts again."""
    run = tiny_run(
        storage=str(tmp_path), data__path=make_data([30_000]), train__steps=100_000, cluster__hang_timeout_s=5.0
    )
    with training(write(run, tmp_path)) as process:
        wait_for(lambda: steps_done(run) >= 6)
        workers = train_workers(process.descendants())  # type: ignore[attr-defined]
        os.kill(workers[-1].pid, signal.SIGSTOP)
        wait_for(lambda: events(run, "hang"), 15)
        wait_for(lambda: len(events(run, "start")) == 2, 60)
        assert not psutil.pid_exists(workers[-1].pid) or workers[-1].status() == psutil.STATUS_ZOMBIE
        stop(process, run)
    stacks = sorted((Path(run.run_dir) / "stacks").iterdir())
    assert [path.name for path in stacks] == ["attempt-1-rank-00000.txt", "attempt-1-rank-00001.txt"]
    for path in stacks:
        assert "trainer.py" in path.read_text()
    assert logged(run) == undisturbed(run, ranks, 2)
    assert_audit(gpt2dist, run, steps_done(run))


@pytest.mark.faults
@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="here it can be set up")
def test_a_group_that_cannot_be_set_up_ends_with_its_cause(make_data: Callable[..., str], tmp_path: Path) -> None:
    """Nor does the room of the first one stay taken, for which the next would wait."""
    run = tiny_run(
        storage=str(tmp_path), data__path=make_data([3000]), cluster__gpus_per_worker=1, cluster__max_failures=1
    )
    with LocalCluster() as cluster:
        cluster.add_node(6, "--num-gpus=2")
        command = [sys.executable, "-m", "gpt2dist", "train", str(write(run, tmp_path))]
        done = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: training failed: RuntimeError: ")
    assert "NCCL" in done.stderr
    assert [e["cause"].partition(":")[0] for e in events(run, "failure")] == ["RuntimeError"] * 2
