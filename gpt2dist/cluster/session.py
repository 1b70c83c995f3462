"""A Ray session for one command: a cluster that is there already, or a private one of our own.

While it is open, everything that Ray, DeepSpeed and the workers print goes to a log file; the terminal keeps
what matters.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

# Read by Ray when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # a notice may leave only seconds
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")  # then Ray counts the machines anew
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the workers beside any other load

import ray
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from gpt2dist.cluster.scratch import new_token, temporary_directory
from gpt2dist.config import UserError

LOOPBACK = "127.0.1.1" if sys.platform == "linux" else None
"""Address of a private cluster's node. Ray replaces 127.0.0.1 by the outer address; elsewhere it stays on loopback."""
TOKEN, MODE = "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
STARTS = 2
"""How often it is tried to start a private cluster."""
OBJECT_STORE_BYTES = 512 << 20
"""Of a private cluster: blocks in flight are a few MB each."""

NO_NODES_FOR_DATA = {"RAY_DATA_CLUSTER_AUTOSCALER": "V2", "RAY_DATA_CLUSTER_SCALING_UP_UTIL_THRESHOLD": "inf"}
"""Ray Data then takes the CPUs that are there, and asks no autoscaler for more: it has no other switch."""


@contextlib.contextmanager
def output_to_log(path: Path) -> Iterator[IO[str]]:
    """Send file descriptors 1 and 2 to `path`, also for child processes; yields the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    terminal = os.fdopen(os.dup(saved[0]), "w")
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        terminal.close()
        for target, fd in zip((1, 2), saved, strict=True):
            os.dup2(fd, target)
            os.close(fd)


@contextlib.contextmanager
def ray_session(
    num_cpus: int, num_gpus: int, address: str | None, env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Join the cluster at `address` (or RAY_ADDRESS), or start a private one and stop it at the end.

    `env`: environment variables of this command's processes on a cluster that it joins.

    Raises:
        UserError: there is no cluster at the address, or none can be started.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    temporary, outer = None, {name: os.environ.get(name) for name in (TOKEN, MODE)}
    if address:
        _check_reachable(address)
        try:
            ray.init(address=address, runtime_env={"env_vars": dict(env)} if env else None)
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise UserError(f"address: {address}: no Ray cluster answers there ({str(e).splitlines()[0]})") from None
    else:
        temporary = _start(num_cpus, num_gpus)
    # Ray Data's own bars and chatter go to the log with the rest.
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
            _set_environment(outer)


def _start(num_cpus: int, num_gpus: int) -> str:
    """A private cluster with a token of its own; returns its directory.

    Ray gives itself 30 s: beside a burst of other load a second try helps.

    Raises:
        UserError: it does not start, or the machine has fewer GPUs.
    """
    if num_gpus:
        import torch

        if (have := torch.cuda.device_count()) < num_gpus:
            raise UserError(f"cluster.gpus_per_worker: {num_gpus} GPUs are needed, this machine has {have} for torch")
    problem = ""
    for _ in range(STARTS):
        temporary = temporary_directory()
        _set_environment({TOKEN: str(new_token(temporary)), MODE: None})  # Ray then turns tokens on by itself
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=temporary,
                _node_ip_address=LOOPBACK,
            )
        except Exception as e:  # Ray's own type for it is Exception
            problem = str(e).splitlines()[0]
            ray.shutdown()
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            return temporary
    raise UserError(f"Ray does not start on this machine: {problem}")


def _set_environment(variables: Mapping[str, str | None]) -> None:
    """Also for Ray's cached token."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    AuthenticationTokenLoader.instance().reset_cache()


def _check_reachable(address: str) -> None:
    """Ray itself retries a dead address for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto" and the like: Ray finds it out
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as e:
        raise UserError(f"address: {address}: no Ray cluster answers there ({e.strerror or e})") from None
