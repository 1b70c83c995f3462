"""A run on a cluster: whether its workers find room, and what they share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path as FilePath

from gpt2dist.cluster.check.document import Document, Finding, Path, Severity
from gpt2dist.cluster.machines import Machine
from gpt2dist.config import RunConfig, load_run


@dataclass(frozen=True)
class Group:
    """Workers of one kind."""

    name: str
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


@dataclass
class RunFile:
    """A run, and what was found in its file."""

    file: str
    text: list[str]
    run: RunConfig
    findings: list[Finding] = field(default_factory=list)

    @classmethod
    def read(cls, file: str, overrides: tuple[str, ...]) -> RunFile:
        """Reads it. Raises `UserError`."""
        run = load_run(file, overrides)
        return cls(file, FilePath(file).read_text().splitlines(), run)

    def add(self, severity: Severity, rule: str, key: str, what: str, fix: str) -> None:
        """A finding at a key, section.key."""
        self.findings.append(Finding(rule, severity, self.file, self._line(key), key, what, fix))

    def _line(self, key: str) -> int | None:
        section, _, name = key.rpartition(".")
        current = ""
        for number, line in enumerate(self.text, 1):
            if header := re.match(r"\s*\[([\w.]+)\]", line):
                current = header[1]
                if current == key:
                    return number
            elif current == section and re.match(rf"\s*{re.escape(name)}\s*=", line):
                return number
        return None


def check(document: Document, run_file: RunFile, cluster: Cluster) -> None:
    """Adds findings to the cluster's document and to the run's file."""
    _shared(run_file, cluster)
    if cluster.most and any(group.most for group in cluster.groups):  # else that is what was found
        _room(document, run_file, cluster)


def _shared(run_file: RunFile, cluster: Cluster) -> None:
    """The head runs no workers, so every run here has at least two nodes."""
    run = run_file.run
    init = [("model.init_from", run.model.init_from)] if run.model.init_from.startswith(("/", ".", "~")) else []
    for key, place in [*run.shared_places, *init]:
        inside = any(place == mount or place.startswith(mount.rstrip("/") + "/") for mount in cluster.mounts)
        if "://" not in place and not inside:
            run_file.add(
                "error",
                "shared-storage",
                key,
                f"{place} is a directory of one machine: the others do not see it",
                "s3://…, or a directory that every node mounts",
            )


def workers_on(run: RunConfig, group: Group) -> int:
    """How many of the run's workers one machine of a group has room for."""
    c = run.cluster
    by_cpu = math.floor(group.cpus / c.cpus_per_worker + 1e-9)
    return min(by_cpu, math.floor(group.gpus / c.gpus_per_worker + 1e-9)) if c.gpus_per_worker else by_cpu


def _room(document: Document, run_file: RunFile, cluster: Cluster) -> None:
    run, c = run_file.run, run_file.run.cluster
    wanted = [group for group in cluster.groups if c.accelerator in ("", group.accelerator)]
    if not wanted:
        have = ", ".join(sorted({group.accelerator for group in cluster.groups} - {""})) or "none is named"
        fix = "labels: {ray.io/accelerator-type: …} of the node type, or another cluster.accelerator"
        run_file.add("error", "fit", "cluster.accelerator", f"no workers with {c.accelerator} ({have})", fix)
        return
    if any(group.machine is None and not group.cpus for group in wanted):  # of unknown size: Ray asks the cloud
        return
    each = {group.name: workers_on(run, group) for group in wanted}
    able = [group for group in wanted if each[group.name] and group.most]
    needs = f"{c.cpus_per_worker:g} CPUs" + (f" and {c.gpus_per_worker:g} GPUs" if c.gpus_per_worker else "")
    if not able:
        have = "; ".join(f"{g.name}: {g.cpus:g} CPUs, {g.gpus:g} GPUs, up to {g.most} machines" for g in wanted)
        key = "cluster.gpus_per_worker" if c.gpus_per_worker else "cluster.cpus_per_worker"
        what = f"a worker needs {needs}, which no machine has ({have})"
        run_file.add("error", "fit", key, what, "ask for less, or add a node type")
        return
    left, room = cluster.most, 0
    for group in sorted(able, key=lambda g: -each[g.name]):
        machines = min(group.most, left)
        left -= machines
        room += machines * each[group.name]
    if room < c.min_workers:
        what = f"room for {room} workers of {needs}, but {run_file.file} has {c.min_workers}"
        machines = math.ceil(c.min_workers / each[able[0].name])
        path = cluster.most_path if cluster.most < machines else able[0].most_path
        document.error("fit", path, what, f"allow {machines} machines of {able[0].name}, or fewer workers")
        return
    if room < c.max_workers:
        what = (
            f"up to {c.max_workers} workers, but there is room for {room}: the autoscaler then starts no machine at all"
        )
        run_file.add("error", "fit", "cluster.workers", what, "raise max_workers of the cluster, or lower this")
    if len(able) > 1 and c.gpus_per_worker:
        names = " and ".join(group.name for group in able)
        what = f"workers may come to lie on {names} mixed: the slowest GPU sets the pace of all"
        fix = f'accelerator = "{able[0].accelerator or "A100"}" in [cluster]'
        run_file.add("warning", "mixed-machines", "cluster", what, fix)
    for group in able:
        _division(document, run_file, group, each[group.name])


def _cpus(most: float) -> str:
    """Advice: so many CPUs a worker, in whole ones where there is one."""
    number = math.floor(most) or math.floor(most * 100) / 100
    return f"cpus_per_worker = {number:g}" if number > 0 else "machines with more CPUs"


def _division(document: Document, run_file: RunFile, group: Group, each: int) -> None:
    """What of the machines is left over, and whether a worker fits into the memory."""
    from gpt2dist.cluster import setups  # knows the model, and so torch

    run, c = run_file.run, run_file.run.cluster
    idle = group.gpus - each * c.gpus_per_worker
    if c.gpus_per_worker and idle >= 1:
        what = (
            f"a machine of {group.name} has CPUs for {each} workers only: {idle:g} of its {group.gpus:g} GPUs are idle"
        )
        fix = _cpus((group.cpus - setups.DATA_CPUS) / group.gpus * c.gpus_per_worker)
        run_file.add("warning", "idle-gpus", "cluster.cpus_per_worker", what, fix)
    elif not c.gpus_per_worker and group.gpus:
        what = f"the run uses no GPUs, but {group.name} has {group.gpus:g}: they are paid for and idle"
        run_file.add("warning", "idle-gpus", "cluster.gpus_per_worker", what, "gpus_per_worker = 1")
    if c.min_workers > each and c.min_workers % each:
        what = f"{c.min_workers} workers, {each} on a machine of {group.name}: the last has {c.min_workers % each}"
        run_file.add("warning", "division", "cluster.workers", what, f"a multiple of {each}")
    if group.cpus - min(each, c.max_workers) * c.cpus_per_worker < setups.DATA_CPUS:
        what = f"the workers take all {group.cpus:g} CPUs of {group.name}: none is left for the stream of samples"
        fix = _cpus((group.cpus - setups.DATA_CPUS) / each)
        run_file.add("warning", "data-cpus", "cluster.cpus_per_worker", what, fix)
    if group.machine and c.gpus_per_worker:
        needs, limit = setups.memory_row(run).total, setups.memory_limit(run, group.machine)
        if needs > limit:
            what = f"a worker needs {needs / 1e9:.1f} GB, and {limit / 1e9:.1f} GB are safe to use on {group.name}"
            run_file.add("error", "memory", "batch.micro_sequences", what, f"see: gpt2dist plan {run_file.file}")
