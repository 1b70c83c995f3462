"""Room that Ray keeps for a run: given back where a driver died before it could.

Ray Train reserves the room of an elastic run with Ray's AutoscalingCoordinator. After the death of a driver that
reservation lives on for up to 200 s, and the same run, started again, would wait for the room that it has itself.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state
from ray.core.generated import gcs_pb2
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.util.placement_group import PlacementGroup

from gpt2dist.train import rundir

COORDINATOR = "AutoscalingCoordinator"
"""Ray's name for its actor, and of the namespace in which that is."""
ACCELERATOR_LABEL = "ray.io/accelerator-type"
TIMEOUT_S = 5.0
PLACED = (gcs_pb2.PlacementGroupTableData.CREATED, gcs_pb2.PlacementGroupTableData.PREPARED)
"""States of a placement group that has its room."""
WAITING = (gcs_pb2.PlacementGroupTableData.PENDING, gcs_pb2.PlacementGroupTableData.RESCHEDULING)


class ReservationLog(ControllerCallback):  # type: ignore[misc]
    """Writes under which name Ray Train reserves room to events.jsonl, from Ray Train's controller."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray Train calls this once for each worker group."""
        requester = f"train-{train_run_context.run_id}"
        event = {"time": time.time(), "event": "reservation", "requester": requester, "run_dir": self.run_dir}
        rundir.events_log(self.run_dir).try_append(event)


class OnItsMachines(ControllerCallback):  # type: ignore[misc]
    """Counts the room for an elastic group on machines with its accelerator alone.

    Ray Train counts what is reserved for the group, and that on any machine: the group was ended for a larger one which
    could not be placed.
    """

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray Train calls this in the process that decides; nobody else is in it."""
        ElasticScalingPolicy._count_possible_workers = lambda policy, reserved: self._count(policy.scaling_config)

    def _count(self, config: Any) -> int:
        needs = {name: n for name, n in config._resources_per_worker_not_none.items() if n}
        try:
            free, going = available_resources_per_node(), ray_state.get_draining_nodes()
            mine = [n["NodeID"] for n in ray.nodes() if n["Labels"].get(ACCELERATOR_LABEL) == self.accelerator]
            placed = sum(len(group.bundles) for group in groups(*PLACED))
        except Exception as e:  # the head is busy, or away: nothing is decided now
            print(f"room on {self.accelerator} is not known: {type(e).__name__}", flush=True)
            return 0
        nodes = [free[node] for node in mine if node in free and node not in going]
        room = sum(int(min(has.get(name, 0.0) / n + 1e-6 for name, n in needs.items())) for has in nodes)
        return int(min(placed + room, config.max_workers))


def groups(*states: int) -> list[Any]:
    """Placement groups of this driver that are in one of these states, as Ray's head describes them."""
    own = ray.get_runtime_context().get_job_id()
    texts = ray_state._connect_and_get_accessor().get_placement_group_table()
    tables = map(gcs_pb2.PlacementGroupTableData.FromString, texts)
    return [table for table in tables if table.creator_job_id.hex() == own and table.state in states]


def remove_groups() -> None:
    """Remove the placement groups of this driver: one that failed while it was set up leaves its own behind."""
    try:
        for group in groups(*PLACED, *WAITING):
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    except Exception as e:  # the head is busy, or away: that is no reason to end a run
        print(f"the room of the last worker group is not given back yet: {type(e).__name__}", flush=True)


def release(run_dir: str, events: list[dict[str, Any]]) -> None:
    """Give back what the last command of a run has reserved; that command has ended. Ray must be initialized.

    In a copy of a run directory the events are of another run, which may be at work.
    """
    starts = [i for i, event in enumerate(events) if event["event"] == "launch"]
    last = events[starts[-1] :] if starts else []
    own = [e for e in last if e["event"] == "reservation" and e.get("run_dir", run_dir) == run_dir]
    requesters = [event["requester"] for event in own if "requester" in event]
    if not requesters:
        return
    try:
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
        ray.get([coordinator.cancel_request.remote(requester) for requester in requesters], timeout=TIMEOUT_S)
    except ValueError:  # a new cluster: nothing is reserved
        pass
    except ray.exceptions.RayError as e:
        print(f"room that a dead driver had reserved is not given back yet: {type(e).__name__}", flush=True)
