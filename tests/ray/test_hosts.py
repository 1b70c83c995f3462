"""Hosts with networks of their own: namespaces of this machine's kernel, on one switch. Needs root on Linux."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.cluster.local import LocalCluster, Node
from tests.conftest import tiny_run
from tests.distributed.test_engine import logged
from tests.ray.test_faults import TWO_NODES, on_cluster, stop, undisturbed
from tests.ray.test_train import Run, assert_audit, events, steps_done, training, wait_for, write

__all__ = ["on_cluster"]

SUBNET = "10.213.77"
PREFIX = f"g2d{os.getpid() % 10**6}"
SEEN_DEAD = {
    # How Ray finds out that a host does not answer; its own values are longer.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "GLOO_SOCKET_IFNAME": "eth0",  # the name of this machine means no host
}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


def _may_make_namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        _ip("netns", "add", f"{PREFIX}-try")
        _ip("netns", "del", f"{PREFIX}-try")
    except subprocess.CalledProcessError:
        return False
    return True


class Hosts(LocalCluster):
    """A local cluster whose nodes are in network namespaces of their own."""

    def host(self, number: int) -> str:
        return f"{SUBNET}.{number + 1}"

    def inside(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", f"{PREFIX}-{number}"]

    def plug(self, number: int, state: str) -> None:
        """state: up, down."""
        _ip("-n", f"{PREFIX}-switch", "link", "set", f"port{number}", state)

    def restart(self, node: Node) -> Node:
        """Ray on a host that it has given up: what a machine's supervisor does."""
        node.kill()
        self.nodes.remove(node)
        return self.add_node(3)


@contextlib.contextmanager
def switch(hosts: int) -> Iterator[None]:
    """Namespaces with an address each, connected by a bridge in one more. Nothing else is reached from there."""
    names = [f"{PREFIX}-switch", *(f"{PREFIX}-{i}" for i in range(hosts))]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", names[0], "link", "add", "bridge", "type", "bridge")
        _ip("-n", names[0], "link", "set", "bridge", "up")
        for i, name in enumerate(names[1:]):
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", names[0])
            _ip("-n", name, "addr", "add", f"{SUBNET}.{i + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", names[0], "link", "set", f"port{i}", "master", "bridge", "up")
        yield
    finally:
        for name in made:
            _ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not _may_make_namespaces(), reason="may make no network namespaces")
def test_host_cut_off_in_mid_step_and_back(
    ranks: Callable[..., list[Any]],
    make_data: Callable[..., str],
    gpt2dist: Run,
    tmp_path: Path,
    on_cluster: Callable[[LocalCluster], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers on two hosts; one loses its network: the other goes on alone, and with both when it is back."""
    for name, value in SEEN_DEAD.items():
        monkeypatch.setenv(name, value)
    run = tiny_run(storage=str(tmp_path), data__path=make_data([30_000]), **TWO_NODES)
    with switch(3), Hosts() as cluster:
        cluster.add_node(3)
        second = cluster.add_node(3)
        on_cluster(cluster)
        with training(write(run, tmp_path), inside=cluster.inside(0)) as process:
            wait_for(lambda: events(run, "start") and steps_done(run) >= 120)
            cluster.plug(2, "down")
            wait_for(lambda: len(events(run, "start")) == 2, 180)
            alone = events(run, "start")[1]["step"]
            wait_for(lambda: steps_done(run) >= alone + 60)
            cluster.plug(2, "up")
            cluster.restart(second)
            wait_for(lambda: len(events(run, "start")) == 3, 180)
            stop(process, run)
    starts = events(run, "start")
    assert [e["world_size"] for e in starts] == [2, 1, 2]
    assert starts[1]["step"] > 0  # from a checkpoint
    assert starts[2]["redone_steps"] == 0  # saved before it grew
    assert logged(run) == pytest.approx(undisturbed(run, ranks, 2), abs=1e-5)
    assert_audit(gpt2dist, run, steps_done(run))
