"""A cloud without capacity, for tests: Ray's provider of local nodes, which gives no more of them than a file says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

ROOM = "GPT2DIST_TEST_ROOM"
"""Environment variable: the file with the number of nodes."""


class ScarceProvider(FakeMultiNodeProvider):  # type: ignore[misc]
    """Starts as many nodes of a request as there is room for, then fails as EC2 does."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        room = int(Path(os.environ[ROOM]).read_text()) - (len(self._nodes) - 1)  # without the head
        if room > 0:
            super().create_node_with_resources_and_labels(node_config, tags, min(count, room), resources, labels)
        if room < count:
            raise RuntimeError("InsufficientInstanceCapacity: there is no spot capacity")
