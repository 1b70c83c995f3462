"""The node types of a cluster file of `ray up`."""

from __future__ import annotations

from typing import Any

import yaml

from gpt2dist.cluster.check.document import YAML_ERRORS
from gpt2dist.cluster.machines import Machine, Machines
from gpt2dist.cluster.setups import Candidate
from gpt2dist.config import UserError, read_file

RAY_MAX_WORKERS = 2
"""Ray's default for all workers of a cluster."""


def node_types(path: str, known: Machines) -> tuple[list[Candidate], Machine | None]:
    """The worker node types of a cluster file, and the head's machine where its instance type is known.

    Raises:
        UserError: not such a file, one without workers, or a worker's instance type is missing or unknown.
    """
    table = _read(path)
    types, head_name = table["available_node_types"], table.get("head_node_type")
    limit = _number(table.get("max_workers", RAY_MAX_WORKERS), f"{path}: max_workers")
    found = []
    for name, entry in types.items():
        where = f"{path}: available_node_types.{name}"
        most = min(limit, _number(entry.get("max_workers", 0 if name == head_name else limit), f"{where}.max_workers"))
        if name == head_name and not most:
            continue
        instance = _instance_type(entry)
        if not instance:
            raise UserError(f"{where}.node_config: no InstanceType (machineType on GCP)")
        try:
            machine = known.machine(instance)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        found.append(Candidate(name, instance, machine, most))
    if not found:
        raise UserError(f"{path}: available_node_types: no node type for workers")
    head = known.machines.get(_instance_type(types.get(head_name, {})))
    return found, head


def _read(path: str) -> dict[str, Any]:
    try:
        table = yaml.safe_load(read_file(path))
    except YAML_ERRORS as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    types = table.get("available_node_types") if isinstance(table, dict) else None
    if not isinstance(types, dict) or not all(isinstance(entry, dict) for entry in types.values()):
        raise UserError(f"{path}: not a cluster file of `ray up`: no available_node_types")
    assert isinstance(table, dict)
    head = table.get("head_node_type", "")
    if odd := [name for name in (head, *types) if not isinstance(name, str)]:
        raise UserError(f"{path}: the name of a node type is {odd[0]!r}, which is no text: put it in quotes")
    return table


def _instance_type(entry: dict[str, Any]) -> str:
    """AWS's InstanceType, or the last part of GCP's machineType, which may be a URL."""
    config = entry.get("node_config")
    config = config if isinstance(config, dict) else {}
    return str(config.get("InstanceType") or config.get("machineType") or "").rpartition("/")[2]


def _number(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{where}: a number of machines, got {value!r}")
    return value
