"""A private Ray cluster of several nodes on this machine: real `ray start` processes, on loopback, with a token.

To try out what only several nodes can show, and to break them: a node can be killed, or drained as a cloud does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gpt2dist.cluster.scratch import end_with_parent, new_token, temporary_directory

START_S = 60.0
"""How long a node may take to start."""
STORE_BYTES = 200 << 20
NETWORK = "127.0.1"
"""Loopback addresses of the nodes; Ray takes 127.0.0.1 for another name of the machine's outer address."""
FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
FAKE_HEAD_ID, FAKE_HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""Ray's own, fixed in that provider."""
RAY = str(Path(sys.executable).with_name("ray"))


class NodeFailed(Exception):
    """A node did not start; the message says why."""


@dataclass
class Node:
    """One `ray start` process and its children."""

    name: str
    address: str
    """An IP address of its own."""
    id: str
    """Ray's, in hex."""
    process: subprocess.Popen[bytes]
    children: dict[int, psutil.Process] = field(default_factory=dict)

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to all of it, as when a machine loses its power."""
        family: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            family = {p.pid: p for p in psutil.Process(self.process.pid).children(recursive=True)}
        self.process.kill()
        for child in family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        psutil.wait_procs(list(family.values()), timeout=10)


class LocalCluster:
    """A head, and any number of nodes that join it; all of them end when `stop` is called.

    Everything lies in a directory of its own; Ray's own files have to, since a socket's path must be short.
    """

    def __init__(
        self, head_cpus: float = 0, dashboard: bool = False, autoscaling: Mapping[str, Any] | None = None
    ) -> None:
        """autoscaling: a cluster file of `ray up`, whose node types then come as processes of this machine.

        Raises `NodeFailed`.
        """
        self.directory = Path(temporary_directory())
        self.port = free_port()
        self.dashboard_port = free_port() if dashboard else 0
        self.address = f"{self.host(0)}:{self.port}"
        self.nodes: list[Node] = []
        self.env = {
            # The environment with which a command joins the cluster; its nodes have it too.
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # of `python` in a job
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(new_token(self.directory)),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        }
        port = [f"--dashboard-host={self.host(0)}", f"--dashboard-port={self.dashboard_port}"] if dashboard else []
        head = ["--head", f"--port={self.port}", f"--temp-dir={self.directory}"]
        if autoscaling is not None:
            head.append(f"--autoscaling-config={self._autoscaling(autoscaling)}")
        self.head = self._start("head", head_cpus, [*head, f"--include-dashboard={dashboard}", *port])

    def host(self, number: int) -> str:
        """IP address of a node; 0: the head."""
        return f"{NETWORK}.{number + 1}"

    def inside(self, number: int) -> list[str]:
        """What a command starts with to run on a node."""
        return []

    def _autoscaling(self, cluster_file: Mapping[str, Any]) -> Path:
        """Ray's provider that makes nodes of processes, with the node types and limits of a cluster file."""
        types = {}
        for name, entry in cluster_file["available_node_types"].items():
            is_head = name == cluster_file["head_node_type"]
            kept = {key: entry[key] for key in ("resources", "labels", "min_workers", "max_workers") if key in entry}
            store = {"object_store_memory": STORE_BYTES}
            kept["resources"] = kept["resources"] | ({} if is_head else store)
            types[FAKE_HEAD_TYPE if is_head else name] = {**kept, "node_config": {}}
        provider = {
            "type": "external",
            "module": FAKE_PROVIDER,
            "gcs_address": self.address,
            "head_node_id": FAKE_HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        }
        config = {
            **{key: value for key, value in cluster_file.items() if key != "docker"},
            **{key: [] for key in cluster_file if key.endswith("_commands")},  # nothing is installed
            "auth": {},
            "file_mounts": {},
            "provider": provider,
            "available_node_types": types,
            "head_node_type": FAKE_HEAD_TYPE,
        }
        path = self.directory / "autoscaling.json"
        path.write_text(json.dumps(config))
        self.env |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        return path

    def add_node(self, cpus: float, *options: str) -> Node:
        """A new node with so many logical CPUs; `options` for `ray start`. Raises `NodeFailed`."""
        node = self._start(f"node-{len(self.nodes) + 1}", cpus, [f"--address={self.address}", *options])
        self.nodes.append(node)
        return node

    def drain(self, node: Node, seconds: float) -> None:
        """Tell Ray that the node will be taken away in so many seconds, as a cloud's notice does."""
        command = [RAY, "drain-node", f"--address={self.address}", f"--node-id={node.id}"]
        why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=taken away on purpose"]
        how = f"--deadline-remaining-seconds={round(seconds)}"
        subprocess.run([*command, *why, how], env=self.env, check=True, capture_output=True, timeout=60)

    def stop(self) -> None:
        """End all nodes, the head last, and remove their files."""
        for node in [*self.nodes, self.head]:
            if node.alive():
                node.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self, name: str, cpus: float, options: list[str]) -> Node:
        try:
            return self._try_to_start(name, cpus, options)
        except NodeFailed:  # Ray gives itself 30 s: beside a burst of other load a second try helps
            return self._try_to_start(name, cpus, options)

    def _try_to_start(self, name: str, cpus: float, options: list[str]) -> Node:
        id_ = FAKE_HEAD_ID if "RAY_FAKE_CLUSTER" in self.env and name == "head" else secrets.token_hex(28)
        number = 0 if name == "head" else len(self.nodes) + 1
        address = self.host(number)
        log = self.directory / f"{name}.log"
        command = [*self.inside(number), RAY, "start", "--block", *options]
        command += [
            f"--num-cpus={cpus:g}",
            f"--object-store-memory={STORE_BYTES}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port()}",  # through which jobs go; Ray's default is one for all
            "--disable-usage-stats",
            f"--node-ip-address={address}",
        ]
        with log.open("wb") as out:
            env = {**self.env, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": id_}
            if id_ == FAKE_HEAD_ID:
                env["RAY_CLOUD_INSTANCE_ID"] = id_
            env.pop("RAY_ADDRESS")  # `ray start` has it as an option
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                preexec_fn=end_with_parent,  # a node then ends its children
            )
        node = Node(name, address, id_, process)
        end = time.monotonic() + START_S
        while "Ray runtime started" not in (text := log.read_text(errors="replace")):
            if not node.alive() or time.monotonic() > end:
                if node.alive():
                    node.kill()
                last = text.strip().splitlines()[-1:] or ["it said nothing"]
                raise NodeFailed(f"{name} did not start: {last[0]}")
            time.sleep(0.1)
        return node


def free_port() -> int:
    """A free TCP port on loopback, outside the range that Ray keeps for its workers."""
    while True:
        with socket.socket() as s:
            s.bind((f"{NETWORK}.1", 0))
            port = int(s.getsockname()[1])
        if not 10002 <= port <= 19999:
            return port
