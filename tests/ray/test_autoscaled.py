"""A fleet that comes when a run needs it: an empty cluster with Ray's autoscaler and the node types of cluster.yaml.

Its provider makes nodes of processes on this machine; head, autoscaler and scheduling are the real ones.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gpt2dist.cluster.local import LocalCluster
from gpt2dist.config import RunConfig
from tests.conftest import ROOT, tiny_run
from tests.ray.test_train import CLI, Run, assert_audit, events, steps_done, wait_for, write

IDLE_S = 12.0


def raylets(cluster: LocalCluster) -> dict[str, psutil.Process]:
    """The worker nodes that run: their raylets by id; the head's is not among them."""
    found = {}
    for p in psutil.Process(cluster.head.process.pid).children(recursive=True):
        try:
            if p.name() == "raylet" and p.status() != psutil.STATUS_ZOMBIE:
                env = p.environ()
                if kind := env.get("RAY_NODE_TYPE_NAME"):
                    found[f"{kind} {env['RAY_CLOUD_INSTANCE_ID'][-2:]}"] = p
        except psutil.Error:
            continue
    return found


@dataclass
class Timeline:
    """What was seen of nodes, and what the command said, with seconds since the beginning."""

    cluster: LocalCluster
    began: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)

    def say(self, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self.began:6.1f} s  {text}")
        print(self.lines[-1], flush=True)

    def read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self.say(f"submit: {line.rstrip()}")

    def look(self) -> set[str]:
        now = set(raylets(self.cluster))
        for name in sorted(now - self.nodes):
            self.say(f"node {name} is there")
        for name in sorted(self.nodes - now):
            self.say(f"node {name} has gone")
        self.nodes = now
        return now


@contextlib.contextmanager
def started(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Iterator[Timeline]:
    """An empty cluster of cluster.yaml's node types; nothing of it is left at the end."""
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")  # 8 processes a node, on 2 cores
    file = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    autoscaling = {**file, "idle_timeout_minutes": IDLE_S / 60, **changes}
    with LocalCluster(dashboard=True, autoscaling=autoscaling) as cluster:
        yield Timeline(cluster)
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(cluster.directory) in line]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Timeline]:
    with started(monkeypatch) as timeline:
        yield timeline


def job_command(fleet: Timeline, *arguments: str) -> subprocess.Popen[str]:
    """A command of a user who has the cluster's token and the address of its dashboard."""
    env = {k: v for k, v in fleet.cluster.env.items() if k != "RAY_ADDRESS"}
    command = [*CLI, *arguments, "--address", f"http://{fleet.cluster.host(0)}:{fleet.cluster.dashboard_port}"]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextlib.contextmanager
def submitted(fleet: Timeline, run_file: Path) -> Iterator[subprocess.Popen[str]]:
    """`gpt2dist submit --follow` to the fleet; what it prints is in the timeline."""
    with job_command(fleet, "submit", str(run_file), "--follow") as following:
        reader = threading.Thread(target=fleet.read, args=(following,), daemon=True)
        reader.start()
        try:
            yield following
        finally:
            following.kill()
            reader.join(10)


def stop(fleet: Timeline, run: RunConfig, following: subprocess.Popen[str]) -> None:
    """`gpt2dist jobs stop`: the driver, which runs on the head, saves and ends."""
    with job_command(fleet, "jobs", "stop", run.name) as stopping:
        said, _ = stopping.communicate(timeout=90)
    assert stopping.returncode == 0, said
    assert following.wait(30) == 0


def one_a_node(tmp_path: Path, data: str, **changes: Any) -> RunConfig:
    """A run with one worker on a machine of the type l4, which has 8 CPUs."""
    where = {"storage": str(tmp_path), "data__path": data}
    return tiny_run(**where, train__steps=100_000, checkpoint__every_steps=20, cluster__cpus_per_worker=6, **changes)


@pytest.mark.slow
@pytest.mark.timeout(470)
def test_nodes_come_are_replaced_and_go(
    fleet: Timeline, make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path
) -> None:
    run = one_a_node(tmp_path, make_data([30_000]))
    assert not fleet.look()
    with submitted(fleet, write(run, tmp_path)) as following:
        wait_for(lambda: following.poll() is not None or (fleet.look() and steps_done(run) >= 30), 240)
        assert following.poll() is None
        time.sleep(20)  # Ray Data asks for more every 10 s, if it may
        assert len(fleet.look()) == 2  # the stream takes what the workers leave of them
        fleet.say(f"{steps_done(run)} steps done; killing a node")
        victim = raylets(fleet.cluster)[min(fleet.nodes)]
        for p in [*victim.children(recursive=True), victim]:
            p.kill()
        wait_for(lambda: fleet.look() and len(events(run, "start")) == 2)
        wait_for(lambda: fleet.look() and steps_done(run) >= events(run, "start")[-1]["step"] + 30)
        assert len(fleet.nodes) == 2
        fleet.say(f"{steps_done(run)} steps done; stopping")
        stop(fleet, run, following)
    wait_for(lambda: not fleet.look(), IDLE_S + 60)
    assert_audit(gpt2dist, run, events(run, "end")[-1]["step"])
    assert [e["world_size"] for e in events(run, "start")] == [2, 2]
    said = "\n".join(fleet.lines)
    assert "waiting for 2 workers of 6 CPUs: room for 0, starting 2 × l4; " in said
    assert "failed: " in said
    assert re.search(r"waiting for 2 workers of 6 CPUs: room for 1, starting \d × l4; ", said)


@pytest.mark.slow
@pytest.mark.timeout(470)
def test_an_elastic_run_shrinks_and_grows(
    fleet: Timeline, make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path
) -> None:
    """A node dies while there is no other to be had: the autoscaler is stopped. On with one worker; then with two."""
    changes: dict[str, Any] = {"cluster__workers": [1, 2], "cluster__resize_interval_s": 5.0}
    run = one_a_node(tmp_path, make_data([30_000]), **changes)
    head = psutil.Process(fleet.cluster.head.process.pid)
    (autoscaler,) = [p for p in head.children(recursive=True) if "/monitor.py" in " ".join(p.cmdline()[:4])]

    def at_work(*sizes: int) -> bool:
        """Whether the groups so far had these sizes, and the last one has done 30 steps."""
        fleet.look()
        starts = events(run, "start")
        return [e["world_size"] for e in starts] == list(sizes) and steps_done(run) >= starts[-1]["step"] + 30

    with submitted(fleet, write(run, tmp_path)) as following:
        wait_for(lambda: following.poll() is not None or at_work(2), 240)
        assert following.poll() is None
        fleet.say(f"{steps_done(run)} steps done; stopping the autoscaler, killing a node")
        autoscaler.suspend()
        try:
            victim = raylets(fleet.cluster)[min(fleet.nodes)]
            for p in [*victim.children(recursive=True), victim]:
                p.kill()
            wait_for(lambda: at_work(2, 1))
        finally:
            autoscaler.resume()
        fleet.say(f"{steps_done(run)} steps done; the autoscaler goes on")
        wait_for(lambda: at_work(2, 1, 2))
        fleet.say(f"{steps_done(run)} steps done; stopping")
        stop(fleet, run, following)
    assert events(run, "start")[-1]["redone_steps"] == 0
    assert_audit(gpt2dist, run, events(run, "end")[-1]["step"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_says_what_it_waits_for(make_data: Callable[..., str], tmp_path: Path) -> None:
    """On a cluster whose nodes nobody starts but a person."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([30_000]), cluster__cpus_per_worker=2)
    printed = tmp_path / "printed"

    def said(text: str) -> bool:
        return text in printed.read_text()

    with LocalCluster() as cluster, printed.open("wb") as out:
        command = [*CLI, "train", str(write(run, tmp_path))]
        driver = subprocess.Popen(command, stdout=out, stderr=out, env=cluster.env)
        try:
            wait_for(lambda: said("waiting for 2 workers of 2 CPUs: room for 0, no node fits; "), 60)
            cluster.add_node(3)
            wait_for(lambda: said("waiting for 2 workers of 2 CPUs: room for 1, the nodes are too few; "), 60)
            cluster.add_node(3)
            assert driver.wait(150) == 0, printed.read_text()
        finally:
            driver.kill()
            driver.wait()
    text = printed.read_text()
    assert text.index("the wait is over") < text.index("attempt 1: 2 workers") < text.index("step 12/12")
