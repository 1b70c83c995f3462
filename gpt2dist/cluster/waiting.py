"""What a run waits for before its workers start: room on the nodes of its cluster, and what the autoscaler does.

Asked from the driver, of Ray's GCS: it works on clusters with and without a dashboard or an autoscaler.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray._private.worker import global_worker
from ray.core.generated import autoscaler_pb2

from gpt2dist.config import RunConfig
from gpt2dist.train import reservation

TIMEOUT_S = 5.0
RECENT_S = 120.0
"""A machine that could not be started is told of for so long."""


class Room:
    """The room for one run's workers. Ray must be initialized."""

    def __init__(self, run: RunConfig) -> None:
        c = run.cluster
        self.needs = {"CPU": float(c.cpus_per_worker)} | (
            {"GPU": float(c.gpus_per_worker)} if c.gpus_per_worker else {}
        )
        self.accelerator, self.workers = c.accelerator, c.min_workers
        self._at_least = "at least " if c.max_workers > c.min_workers else ""

    def missing(self) -> str:
        """What the run waits for, in words; nothing where its workers have their room, or find it at once."""
        try:
            return "" if self._placed() else self._missing()
        except ray.exceptions.RayError as e:  # the head is busy, or away, which is no reason to end a run
            return f"waiting for an answer of Ray's head ({type(e).__name__})"

    def nothing_runs(self) -> bool:
        """Whether no worker group has its room, and there is none to be had now; not where nobody answers."""
        try:
            return not self._placed() and bool(self._missing())
        except ray.exceptions.RayError:
            return False

    def _missing(self) -> str:
        reply = autoscaler_pb2.GetClusterStatusReply()
        reply.ParseFromString(global_worker.gcs_client.get_cluster_status(timeout_s=TIMEOUT_S))
        nodes = [n for n in reply.cluster_resource_state.node_states if self._may_run_on(n)]
        free = sum(self._fit(n.available_resources) for n in nodes)
        ever = sum(self._fit(n.total_resources) for n in nodes)
        if free >= self.workers:
            return ""
        what = f"{self._at_least}{self.workers} worker{'s' if self.workers > 1 else ''} of {self._amount()}"
        on = f" on {self.accelerator}" if self.accelerator else ""
        return f"waiting for {what}{on}: room for {free}, {self._outlook(reply.autoscaling_state, ever)}"

    def _placed(self) -> bool:
        """Whether Ray has put the worker group of this driver on nodes."""
        return bool(reservation.groups(*reservation.PLACED))

    def _may_run_on(self, node: Any) -> bool:
        usable = node.status in (autoscaler_pb2.NodeStatus.RUNNING, autoscaler_pb2.NodeStatus.IDLE)
        return usable and self.accelerator in ("", node.labels.get(reservation.ACCELERATOR_LABEL))

    def _fit(self, resources: Mapping[str, float]) -> int:
        return int(min(resources.get(name, 0.0) / amount + 1e-6 for name, amount in self.needs.items() if amount))

    def _outlook(self, autoscaler: Any, ever: int) -> str:
        """What may bring more room; ever: workers for which there is room if nothing else ran."""
        starting = Counter[str]()
        for request in autoscaler.pending_instance_requests:
            starting[request.ray_node_type_name] += request.count
        starting.update(i.ray_node_type_name for i in autoscaler.pending_instances)
        failed = [f for f in autoscaler.failed_instance_requests if f.failed_ts >= time.time() - RECENT_S]
        said = []
        if starting:
            said.append("starting " + ", ".join(f"{n} × {kind}" for kind, n in sorted(starting.items())))
        if failed:
            last = max(failed, key=lambda f: f.failed_ts)
            reason = " ".join(last.reason.split()) or "monitor.log on the head says why"
            said.append(f"{last.ray_node_type_name} could not be started: {reason}")
        if not said:
            said.append(self._why_nothing_starts(autoscaler, ever))
        return "; ".join(said)

    def _why_nothing_starts(self, autoscaler: Any, ever: int) -> str:
        if ever >= self.workers:
            return "the nodes are busy with something else"
        if not autoscaler.autoscaler_state_version:
            return "the nodes are too few" if ever else "no node fits"
        if any(self._wants_the_same(request) for request in _infeasible(autoscaler)):
            return "the autoscaler has no node for them: too large, or its limits are reached"
        return "asked for more nodes"

    def _wants_the_same(self, request: Any) -> bool:
        return all(request.resources_bundle.get(name) == amount for name, amount in self.needs.items())

    def _amount(self) -> str:
        parts = (f"{n:g} {kind}{'s' if n != 1 else ''}" for kind, n in self.needs.items() if n)
        return " and ".join(parts) or "no CPU"


def _infeasible(autoscaler: Any) -> Iterator[Any]:
    """What the autoscaler cannot get: placement groups, and what Ray Train has asked for before it makes one."""
    for gang in autoscaler.infeasible_gang_resource_requests:
        yield from gang.requests
    for constraint in autoscaler.infeasible_cluster_resource_constraints:
        yield from (by_count.request for by_count in constraint.resource_requests)
