"""The command line on the real Ray: killed, stopped, resumed, and on several nodes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt2dist.cluster.local import LocalCluster
from gpt2dist.config import RunConfig
from gpt2dist.data.order import consumed
from gpt2dist.train import rundir
from tests.conftest import tiny_run
from tests.distributed import jobs
from tests.distributed.test_engine import logged
from tests.processes import train_workers

CLI = [sys.executable, "-m", "gpt2dist"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@contextlib.contextmanager
def training(run_file: Path, *args: str, inside: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """`gpt2dist train` in the background; at the end neither it nor a descendant is left.

    inside: what the command line starts with.
    """
    command = [*inside, *CLI, "train", str(run_file), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen: dict[int, psutil.Process] = {}
    try:
        process.descendants = lambda: _descendants(process, seen)  # type: ignore[attr-defined]
        yield process
    finally:
        _descendants(process, seen)
        process.kill()
        process.wait()
        _stopped(list(seen.values()))


def _stopped(processes: list[psutil.Process]) -> None:
    """Everything ends by itself within 30 s; Ray's two agents, which now and then take minutes, are ended here."""

    def running(p: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        return False

    def is_agent(p: psutil.Process) -> bool:
        return p.name().startswith(("ray::DashboardA", "ray::RuntimeEnv"))

    deadline = time.monotonic() + 30
    while left := [p for p in processes if running(p) and not is_agent(p)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)
    for p in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()


def _descendants(process: subprocess.Popen[str], seen: dict[int, psutil.Process]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        seen.update({p.pid: p for p in psutil.Process(process.pid).children(recursive=True)})
    return list(seen.values())


def wait_for(condition: Callable[[], Any], timeout: float = 150) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def steps_done(run: RunConfig) -> int:
    return len(rundir.metrics_log(run.run_dir).read())


def events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in rundir.events_log(run.run_dir).read() if e["event"] == kind]


def write(run: RunConfig, directory: Path) -> Path:
    path = directory / f"{run.name}.toml"
    path.write_text(run.to_toml())
    return path


def assert_audit(gpt2dist: Run, run: RunConfig, steps: int) -> None:
    done = gpt2dist("audit", run.run_dir, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["steps"], result["samples"]) == (steps, consumed(run.batch, steps))
    assert (result["duplicates"], result["gaps"], result["skipped"]) == (0, 0, 0)


@pytest.mark.slow  # a dozen kills, drivers among them, in tests/chaos
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 3), ("bf16", 2)])
def test_killed_driver_resumes_bitwise(
    ranks: Callable[..., list[Any]],
    make_data: Callable[..., str],
    gpt2dist: Run,
    tmp_path: Path,
    precision: str,
    stage: int,
) -> None:
    """SIGKILL in the middle, the same command again: the curve of a run that nothing happened to, without Ray.

    The batch still grows when it happens.
    """
    changes: dict[str, Any] = {"train__precision": precision, "train__zero_stage": stage, "train__steps": 60}
    changes |= {"data__path": make_data([3000, 3000]), "batch__warmup_steps": 50}
    undisturbed = tiny_run(name="undisturbed", storage=str(tmp_path), **changes)
    ranks(jobs.train_runs, 2, [undisturbed])
    run = tiny_run(name="killed", storage=str(tmp_path), **changes)
    with training(write(run, tmp_path)) as process:
        wait_for(lambda: steps_done(run) >= 9)
        process.descendants()  # type: ignore[attr-defined]
        process.kill()
    before = logged(run)
    done = gpt2dist("train", f"{run.name}.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = events(run, "start")
    assert first["step"] == 0
    assert second["step"] >= 8  # from a checkpoint, not from the start
    after, reference = logged(run), logged(undisturbed)
    assert after == reference
    assert all(before[s] == reference[s] for s in before)
    assert logged(run, "val_loss") == logged(undisturbed, "val_loss")
    assert_audit(gpt2dist, run, 60)
    again = gpt2dist("train", f"{run.name}.toml")
    assert again.returncode == 0
    assert "finished at step 60; nothing to do" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stopped_and_resumed_with_two_one_and_three_workers(
    ranks: Callable[..., list[Any]], make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path
) -> None:
    """A mixture, with another number of workers in each part: the samples of each step are those of one run."""
    data = {make_data([3000, 900], name="a"): 2.0, make_data([1500], name="b"): 1.0}
    changes = {"storage": str(tmp_path), "data__path": data, "train__steps": 40, "optim__ema_decay": 0.9}
    undisturbed = tiny_run(name="undisturbed", **changes)
    ranks(jobs.train_runs, 2, [undisturbed])
    run = tiny_run(name="resized", **changes)
    write(run, tmp_path)
    for workers, stop_at in ((2, 13), (1, 22), (3, 40)):
        sets = [f"cluster.workers={workers}", f"train.stop_at={stop_at}"]
        done = gpt2dist("train", f"{run.name}.toml", *(arg for change in sets for arg in ("--set", change)))
        assert done.returncode == 0, done.stdout + done.stderr
    ledgers = [rundir.ledger_log(r.run_dir).read() for r in (undisturbed, run)]
    ids, resized_ids = ([line["samples_sha256"] for line in lines] for lines in ledgers)
    assert resized_ids == ids
    assert [line["world_size"] for line in ledgers[1]] == 13 * [2] + 9 * [1] + 18 * [3]
    assert logged(run) == pytest.approx(logged(undisturbed), abs=1e-5)
    assert_audit(gpt2dist, run, 40)
    assert "epochs" in done.stdout
    alone, shared = (gpt2dist("evaluate", run.run_dir, "--ema", "--json", *more) for more in ([], ["--workers", "2"]))
    assert shared.returncode == 0, shared.stderr
    a, b = json.loads(alone.stdout), json.loads(shared.stdout)
    assert (a["samples"], a["tokens"]) == (b["samples"], b["tokens"]) == (248, 248 * 16)
    assert (a["accuracy"], a["loss"]) == (b["accuracy"], pytest.approx(b["loss"], rel=1e-9))
    one = gpt2dist("evaluate", run.run_dir, "--json", "--data", "a", "--workers", "2")  # workers start elsewhere
    assert one.returncode == 0, one.stderr
    assert json.loads(one.stdout)["samples"] == 124


@pytest.mark.timeout(300)
def test_killed_worker_restarts_and_ctrl_c_saves(make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path) -> None:
    run = tiny_run(storage=str(tmp_path), data__path=make_data([30_000]), train__steps=100_000)
    began = time.time()
    with training(write(run, tmp_path)) as process:
        wait_for(lambda: steps_done(run) >= 6)
        refused = gpt2dist("train", f"{run.name}.toml")
        assert refused.returncode == 2
        assert "another process is training this run" in refused.stderr
        workers = train_workers(process.descendants())  # type: ignore[attr-defined]
        assert len(workers) == 2
        workers[1].kill()
        wait_for(lambda: len(events(run, "start")) == 2)
        resumed = events(run, "start")[1]["step"]
        wait_for(lambda: steps_done(run) > resumed + 3)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        wall = time.time() - began
    assert process.returncode == 0, output
    spent = json.loads(gpt2dist("goodput", run.run_dir, "--json").stdout)
    assert sum(spent["seconds"].values()) == pytest.approx(wall, rel=0.02, abs=1)  # short: its last moments count
    assert (spent["attempts"], spent["failures"]) == (2, 1)
    assert re.search(r"failed: worker \d: its process died", output)
    assert "saving after this step" in output
    assert resumed >= 4
    (end,) = events(run, "end")
    listed = json.loads(gpt2dist("checkpoint", "ls", run.run_dir, "--json").stdout)
    assert listed[0]["step"] == end["step"] == steps_done(run)
    assert (listed[0]["world_size"], listed[0]["zero_stage"], listed[0]["valid"]) == (2, 2, True)
    assert_audit(gpt2dist, run, end["step"])
    assert gpt2dist("checkpoint", "verify", run.run_dir).returncode == 0
    text = gpt2dist("generate", run.run_dir, "--prompt", "import os", "--max-tokens", "5")
    assert text.returncode == 0
    assert text.stdout.startswith("import os")


def test_stopped_while_it_waits_for_room(make_data: Callable[..., str], tmp_path: Path) -> None:
    """No worker is there that could save and end; all is saved that there is."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), cluster__workers=2, cluster__cpus_per_worker=3)
    printed = tmp_path / "printed"
    with LocalCluster(head_cpus=4) as cluster, printed.open("wb") as out:
        command = [*CLI, "train", str(write(run, tmp_path))]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=cluster.env)
        try:
            wait_for(lambda: "waiting for 2 workers" in printed.read_text(), 60)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, printed.read_text()
        finally:
            process.kill()
    assert "saving after this step" in printed.read_text()
    assert events(run, "start") == []


ABANDONED = """
import sys, time
from gpt2dist.cluster.session import ray_session
from gpt2dist.config import load_run
from gpt2dist.train import launch, rundir

run = load_run(sys.argv[1], ())
with ray_session(1, 0, None):
    job = launch.TrainJob(run, time.time())
    while not [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "reservation"]:
        time.sleep(0.5)
    time.sleep(float(sys.argv[2]))
    job.abandon()
    print("done", job.done())
    job.check()
"""


@pytest.mark.parametrize("after", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_an_abandoned_job_is_out_of_ray_before_ray_is_shut_down(
    make_data: Callable[..., str], tmp_path: Path, after: int
) -> None:
    """Ray may crash where it is shut down under the call of a thread: the exit code was -11, now and then."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), cluster__workers=2)
    command = [sys.executable, "-c", ABANDONED, str(write(run, tmp_path)), str(after)]
    Path(run.run_dir).mkdir()
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "done True" in done.stdout


@pytest.mark.timeout(240)
def test_failure_names_the_cause(make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path) -> None:
    data = make_data([3000])
    shard = Path(data) / "train-00000.npy"
    shard.write_bytes(shard.read_bytes().replace(b"<u2", b"<i2"))  # its size is right, its content is not
    run = tiny_run(storage=str(tmp_path), data__path=data, cluster__max_failures=0)
    write(run, tmp_path)
    done = gpt2dist("train", f"{run.name}.toml")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: training failed: worker ")
    assert "train-00000.npy: holds int16" in line
    assert f"log: {run.run_dir}/log.txt" in line
    assert "Traceback" not in done.stdout
    assert "Traceback" in (Path(run.run_dir) / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_diverged_run_stops_once_and_names_the_samples(
    make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path
) -> None:
    """A learning rate of 1e30 makes all later gradients NaN; no restart can help."""
    changes = {"optim__lr": 1e30, "optim__warmup_steps": 0, "train__max_skipped": 3, "eval__every_steps": 0}
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), **changes)
    write(run, tmp_path)
    done = gpt2dist("train", f"{run.name}.toml")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: training failed: gradients were not finite in 3 steps in a row, the last being step "
    )
    assert len(events(run, "start")) == 1
    assert events(run, "non_finite")[0]["steps"] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_three_nodes_train_to_the_losses_of_one(
    ranks: Callable[..., list[Any]], make_data: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run file by RAY_ADDRESS on a cluster of three nodes, its workers on different ones."""
    from ray.cluster_utils import Cluster

    changes = {"data__path": make_data([3000, 3000]), "cluster__workers": 3}
    single = tiny_run(name="single", storage=str(tmp_path), **changes)
    ranks(jobs.train_runs, 3, [single])
    run = tiny_run(name="nodes", storage=str(tmp_path), **changes)
    write(run, tmp_path)
    store = 100 << 20
    cluster = Cluster()
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=2, object_store_memory=store, include_dashboard=False)
        env = {**os.environ, "RAY_ADDRESS": cluster.address}
        command = [*CLI, "train", "nodes.toml", "--json"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["step"] == 12
    finally:
        cluster.shutdown()
    assert logged(run) == logged(single)
