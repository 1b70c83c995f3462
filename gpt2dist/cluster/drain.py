"""Drain this machine's Ray nodes: nothing new is placed on them, and Ray Train learns by when they are gone.

``python -m gpt2dist.cluster.drain`` does it in a process of its own: Ray's client waits up to 40 s for a head that is
away, and ends the process where it finds no token.
"""

from __future__ import annotations

import json
import sys

from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # not in its stub
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo

RPC_SECONDS = 5.0


def drain_nodes(address: str, node_ip: str | None, message: str, deadline: float) -> list[str]:
    """Tell Ray that this machine will be preempted.

    Args:
        address: host:port of the cluster, or "auto": the one that a Ray process of this machine belongs to.
        node_ip: the machine's address as Ray knows it; by default found out as `ray start` does.
        message: shown by Ray as the reason.
        deadline: when the machine is gone, in Unix seconds.

    Returns:
        The ids of the nodes that drain now: all living ones with this machine's address.

    Raises:
        RuntimeError: no such node, or Ray refused.
        Exception: whatever Ray raises when it is not reached or the token is wrong.
    """
    address = services.canonicalize_bootstrap_address(address) or ""
    if not address:
        raise RuntimeError("no Ray runs on this machine")
    node_ip = node_ip or services.get_node_ip_address(address)
    client = GcsClient(address=address)
    living = [n for n in client.get_all_node_info(timeout=RPC_SECONDS).values() if n.state == GcsNodeInfo.ALIVE]
    ids = [node.node_id.hex() for node in living if node.node_manager_address == node_ip]
    if not ids:
        raise RuntimeError(f"none of the {len(living)} nodes of {address} has the address {node_ip}")
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    for node_id in ids:
        accepted, why_not = client.drain_node(node_id, reason, message, round(deadline * 1000), timeout=RPC_SECONDS)
        if not accepted:
            raise RuntimeError(f"node {node_id}: Ray refused to drain it: {why_not}")
    return ids


def main() -> None:
    """Waits for one request on standard input, the arguments of `drain_nodes` as a JSON object.

    Prints the ids, one a line; or one line that says why not, with exit code 1.
    """
    request = sys.stdin.readline()
    if not request:  # whoever started us is gone
        return
    try:
        ids = drain_nodes(**json.loads(request))
    except Exception as e:
        print(f"{type(e).__name__}: {e}".splitlines()[0])
        sys.exit(1)
    print("\n".join(ids))


if __name__ == "__main__":
    main()
