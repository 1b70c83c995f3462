"""The private cluster of one command: on loopback, closed to whoever has not its token."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)

from gpt2dist.cluster.session import ray_session
from gpt2dist.train import reservation

pytestmark = pytest.mark.timeout(180)

KNOCK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).get_all_node_info(); print('in')"
STRANGER = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_gcs_rpc_server_reconnect_timeout_s": "1"}


def _knock(address: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", KNOCK, address], env=env, capture_output=True, text=True, timeout=90)


def test_a_stranger_is_refused_and_the_environment_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the user has turned tokens off for other clusters."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with ray_session(1, 0, None):
        address = ray.get_runtime_context().gcs_address
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        assert stat.S_IMODE(os.stat(token).st_mode) == 0o600
        if sys.platform == "linux":
            assert address.startswith("127.")
        assert _knock(address, dict(os.environ)).stdout == "in\n"
        refused = _knock(address, {**os.environ, **STRANGER})
        assert refused.returncode != 0
        assert "InvalidAuthToken" in refused.stderr
    assert not os.path.exists(token)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_room_of_a_dead_driver_is_given_back() -> None:
    """What Ray's own client has reserved under the name in the log, and nothing else."""
    events = [
        {"event": "launch"},
        {"event": "reservation", "requester": "train-of-an-earlier-command"},
        {"event": "launch"},
        {"event": "reservation", "requester": "train-dead", "run_dir": "runs/run"},
        {"event": "reservation", "requester": "train-of-another-run", "run_dir": "runs/of-which-this-is-a-copy"},
    ]

    def reserved(name: str) -> float:
        nodes = ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote(name)).values()
        return float(sum(node.get("CPU", 0) for node in nodes))

    with ray_session(4, 0, None):
        reservation.release("runs/run", events)  # no coordinator yet
        for name in ("train-dead", "train-of-another-run"):
            TrainAutoscalingCoordinatorClient(name).send_resource_request(ScalingConfig(num_workers=1), 1)
            assert reserved(name) == 1
        reservation.release("runs/run", events)
        assert reserved("train-of-another-run") == 1
        assert reserved("train-dead") == 0
