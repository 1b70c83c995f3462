"""Groups of like machines, whichever file they are described in."""

from __future__ import annotations

from dataclasses import dataclass

from gpt2dist.cluster.check.document import Path
from gpt2dist.cluster.machines import Machine


@dataclass(frozen=True)
class Group:
    """Workers of one kind."""

    name: str
    path: Path
    most: int
    """Machines that it may grow to."""
    most_path: Path
    """Where that number stands."""
    cpus: float
    gpus: float
    accelerator: str
    """Ray's name of the GPU; empty if unknown."""
    machine: Machine | None
    """The instance type, if it is one that we know."""


@dataclass(frozen=True)
class Cluster:
    """The workers that a file allows."""

    groups: list[Group]
    most: int
    """Machines of all groups together."""
    most_path: Path
    """Where that number stands."""
    mounts: tuple[str, ...]
    """Directories that the head shares with all workers."""
