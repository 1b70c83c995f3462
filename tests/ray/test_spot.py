"""The spot daemon on a real cluster with token authentication: a head and two workers with addresses of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import metadata
from tests.metadata import FAULTS, Metadata

HEAD, FIRST, SECOND = "127.0.1.1", "127.0.1.2", "127.0.1.3"
TOKEN = secrets.token_hex(32)
SECRETS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
RAY = str(Path(sys.executable).with_name("ray"))

# Ray keeps one client and one token a process, so what asks the cluster is a process too.
HOLD = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Busy:
    def ready(self): return True

busy = [Busy.remote() for _ in range(2)]
ray.get([b.ready.remote() for b in busy])
print("ready", flush=True)
from ray._private.state import state
while True:
    address = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    for node, deadline in state.get_draining_nodes().items():
        print(address.get(node, "dead"), deadline, time.time(), flush=True)
    time.sleep(0.1)
"""


@contextlib.contextmanager
def process(*command: str, log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs with its output in a file; ended with all its children."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}, start_new_session=True
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def free_port() -> int:
    while True:  # not one that Ray keeps for its workers
        with socket.socket() as s:
            s.bind((HEAD, 0))
            if not 10002 <= s.getsockname()[1] <= 19999:
                return int(s.getsockname()[1])


@contextlib.contextmanager
def cluster(port: int, logs: Path, *, has_notice: bool = False) -> Iterator[None]:
    """A head that runs nothing and two workers of one CPU.

    has_notice: the second one is drained as soon as it is there, perhaps before `ray start` has seen it.
    """
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="g2d-", dir="/tmp") as directory:
        common = ["--block", "--object-store-memory", "80000000"]
        head = ["--head", "--port", str(port), "--node-ip-address", HEAD, "--num-cpus=0", "--include-dashboard=false"]
        command = [RAY, "start", *common, *head, "--temp-dir", directory]
        env = {**SECRETS, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        stack.enter_context(process(*command, log=logs / "head.log", **env))
        until(lambda: can_connect(port), 120, "the head listens")
        for address in (FIRST, SECOND):  # one after the other: they share a directory, and take file names there
            log = logs / f"{address}.log"
            own = ["--address", f"{HEAD}:{port}", "--node-ip-address", address, "--num-cpus=1"]
            stack.enter_context(process(RAY, "start", *common, *own, log=log, **env))
            if address == FIRST or not has_notice:
                until(lambda log=log: "Ray runtime started" in log.read_text(), 120, "the worker runs")
        yield


def can_connect(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((HEAD, port), timeout=1).close()
        return True
    return False


def daemon(service: Metadata, address: str, log: Path, **env: str) -> Any:
    command = [sys.executable, "-m", "gpt2dist", "cluster", "spot-watch", "--metadata-url", service.url]
    return process(*command, "--address", address, "--node-ip", SECOND, log=log, **{**SECRETS, **env})


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_notice_drains_this_node_and_no_other_whatever_happened_before(tmp_path: Path) -> None:
    port = free_port()
    address = f"{HEAD}:{port}"
    log, holding = tmp_path / "daemon.log", tmp_path / "hold.log"
    with metadata.serve() as service, cluster(port, tmp_path), contextlib.ExitStack() as stack:
        hold = [sys.executable, "-c", HOLD, address]
        stack.enter_context(process(*hold, log=holding, **SECRETS))
        watching = stack.enter_context(daemon(service, address, log))
        until(lambda: "ready" in holding.read_text(), 90, "actors run on both workers")
        until(lambda: (404, "GET", "/latest/meta-data/spot/instance-action") in service.requests, 30, "no notice yet")
        for fault in FAULTS:
            service.fault = fault
            time.sleep(1.5)
        service.fault = ""
        service.tokens.clear()
        time.sleep(2)
        assert watching.poll() is None, log.read_text()
        assert holding.read_text() == "ready\n"  # nothing drains

        announced = time.time()
        deadline = service.aws_notice(seconds=120)
        until(lambda: holding.read_text().count("\n") > 5, 30, f"a node drains; {log.read_text()}")
        lines = [line.split() for line in holding.read_text().splitlines()[1:]]
        assert {(ip, int(ms)) for ip, ms, _ in lines} == {(SECOND, deadline * 1000)}
        assert float(lines[0][2]) - announced < 5
        time.sleep(2)
        assert log.read_text().count("drained Ray node") == 1
        assert watching.poll() is None
        assert TOKEN not in log.read_text()

        twice = subprocess.run(watching.args, capture_output=True, text=True, timeout=30, check=False)
        assert (twice.returncode, twice.stdout) == (0, "spot-watch runs here already\n")


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_a_head_that_is_away_and_a_wrong_token_do_not_end_it(tmp_path: Path) -> None:
    port = free_port()
    address = f"{HEAD}:{port}"
    log = tmp_path / "daemon.log"
    with metadata.serve() as service:
        service.aws_notice(seconds=200)
        with daemon(service, address, log) as watching:
            until(lambda: "not drained" in log.read_text(), 60, "the head is away")
            with cluster(port, tmp_path, has_notice=True):
                until(lambda: "drained Ray node" in log.read_text(), 90, f"the head is back; {log.read_text()}")
                assert watching.poll() is None
                watching.kill()
                watching.wait()
                with daemon(service, address, log, RAY_AUTH_TOKEN="wrong" * 10) as watching:
                    until(lambda: "AuthenticationError" in log.read_text(), 60, "the token is wrong")
                    assert watching.poll() is None
