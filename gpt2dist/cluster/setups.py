"""What a run takes on given machines: which fit, how fast it goes, how long, and what it costs.

All of it is computed from the run file and machines.toml; docs/plan.md says how and with what assumptions.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ValidationError

from gpt2dist.cluster.machines import CPU, Device, Machine, Machines
from gpt2dist.cluster.plan import arithmetic, copied_bytes, memory
from gpt2dist.config import RunConfig, UserError
from gpt2dist.model import gpt2
from gpt2dist.storage import exists, location
from gpt2dist.train import rundir
from gpt2dist.train.fragment import FEW_RANKS, sums_at_owners
from gpt2dist.train.interval import WRITES_APART, expected_goodput, young_daly

MFU = 0.4
"""Where none is given: what others reach on A100s with models of these sizes (docs/plan.md)."""
GIB = 2**30
MARGIN = 1.1
"""Predicted memory is within a tenth of what was measured."""
GPU_CONTEXT_GIB, PROCESS_GIB = 1.0, 0.5
"""What CUDA and NCCL take of a GPU, and Python and its libraries of a host, for each worker."""
HOST_SHARE = 0.7
"""Of a machine's memory; Ray's object store takes the rest."""
SNAPSHOT_GB_PER_S = 10.0
"""At which a worker copies its part of the state to host memory, before it is written in the background."""
DATA_CPUS = 1
"""Of each machine, left to the stream."""
FAILURES_PER_DAY = 419 / 54 / 2048
"""Of one on-demand machine: Llama 3's 419 unexpected interruptions in 54 days on 2,048 machines (Grattafiori et al.
2024, section 3.3.4)."""


@dataclass(frozen=True)
class Assumptions:
    """What cannot be computed."""

    mfu: float = MFU
    mfu_source: str = "assumed"
    preemptions_per_day: float = 1.0
    """Of one spot machine."""
    restart_seconds: float = 300.0
    """From a failure to the first new step, a new machine included."""
    storage_gb_per_s: float = 1.0
    """At which one machine writes its part of a checkpoint."""


@dataclass(frozen=True)
class Candidate:
    """A kind of machine that a run may use."""

    name: str
    """Of the node type in cluster.yaml, or the instance type."""
    instance_type: str
    machine: Machine
    max_machines: int | None = None
    """As cluster.yaml says."""


@dataclass(frozen=True)
class Options:
    """How memory is saved."""

    zero_stage: int
    activation_checkpointing: bool = False
    offload: bool = False
    offload_only: Literal["", "optimizer", "weights"] = ""
    """At stage 3: what alone is offloaded; by default both."""

    def of(self, run: RunConfig, workers: int | None = None) -> RunConfig | None:
        """The run with these; None where config.py refuses them."""
        train = {
            "zero_stage": self.zero_stage,
            "activation_checkpointing": self.activation_checkpointing,
            "offload_optimizer": self.offload and self.offload_only != "weights",
            "offload_param": self.offload and self.offload_only != "optimizer" and self.zero_stage == 3,
        }
        table = run.model_dump()
        table["train"] |= train
        if workers:
            table["cluster"] |= {"workers": workers}
        try:
            return RunConfig.model_validate(table)
        except ValidationError:
            return None

    def __str__(self) -> str:
        more = [", checkpointing"] * self.activation_checkpointing + [", offload"] * self.offload
        only = f" of {self.offload_only} only" if self.offload_only else ""
        return f"ZeRO-{self.zero_stage}" + "".join(more) + only


ALL_OPTIONS = [
    Options(stage, checkpointing, offload)
    for offload, checkpointing, stage in itertools.product((False, True), (False, True), (0, 1, 2, 3))
]


def options_of(run: RunConfig) -> Options:
    """Those of the run file; without offload on CPU workers, where it changes nothing."""
    t = run.train
    own = Options(t.zero_stage, t.activation_checkpointing)
    if not run.cluster.gpus_per_worker or not (t.offload_optimizer or t.offload_param):
        return own
    if t.zero_stage < 3 or t.offload_optimizer == t.offload_param:
        return replace(own, offload=True)
    return replace(own, offload=True, offload_only="optimizer" if t.offload_optimizer else "weights")


def options_for(run: RunConfig) -> list[Options]:
    """All that are worth a try, and the run file's own, which come first."""
    own = options_of(run)
    useful = [o for o in ALL_OPTIONS if o != own and (run.cluster.gpus_per_worker or not o.offload)]
    return [own, *useful]


# ---------------------------------------------------------------------- memory


GROUPS = {
    "weights": ("weights", "16-bit copy", "master weights", "gathered weights", "averaged weights"),
    "gradients": ("gradients",),
    "moments": ("Adam moments",),
    "activations": ("activations", "logits", "gradient of the table"),
}
"""Columns of the table, and the parts of `plan.memory` in them; the rest are `buffers`."""


def grouped(parts: dict[str, int]) -> dict[str, int]:
    """Bytes of each column of the table."""
    groups = {name: sum(parts.get(part, 0) for part in members) for name, members in GROUPS.items()}
    return groups | {"buffers": sum(parts.values()) - sum(groups.values())}


@dataclass(frozen=True)
class MemoryRow:
    """Memory of one worker with some options."""

    options: Options
    parts: dict[str, int]
    """Bytes on the device, as `plan.memory` says."""
    host_bytes: int
    """Offloaded to the host."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """For --json and the table."""
        sizes = {"parts": self.parts, "groups": grouped(self.parts), "total": self.total, "host": self.host_bytes}
        return {**vars(self.options), "name": str(self.options), **sizes}


def memory_row(run: RunConfig) -> MemoryRow:
    """Of the run as it is."""
    parts = memory(run)
    kept = memory(run.model_copy(update={"train": run.train.model_copy(update=_NO_OFFLOAD)}))
    moved = sum(max(0, size - parts.get(name, 0)) for name, size in kept.items())
    if not run.cluster.gpus_per_worker:
        return MemoryRow(options_of(run), parts, 0)
    moved = moved if run.train.offload_optimizer or run.train.offload_param else 0
    if run.train.offload_optimizer and run.train.zero_stage < 3:  # summed on the device, then copied
        moved += 4 * -(-arithmetic(run)["parameters_padded"] // run.cluster.max_workers)
    return MemoryRow(options_of(run), parts, moved + copied_bytes(run))


_NO_OFFLOAD = {"offload_optimizer": False, "offload_param": False}


def memory_table(run: RunConfig) -> list[MemoryRow]:
    """Every ZeRO stage with and without activation checkpointing and offload, where config.py allows it, and the run's.

    Offload changes nothing on CPU workers, and is left out there.
    """
    order = {options: i for i, options in enumerate(ALL_OPTIONS)}
    wanted = sorted(options_for(run), key=lambda o: (o.zero_stage, order.get(o, len(order))))
    return [memory_row(variant) for options in wanted if (variant := options.of(run))]


# ---------------------------------------------------------------------- fitting


def workers_per_machine(run: RunConfig, machine: Machine) -> int:
    """How many workers of the run a machine has CPUs and GPUs for."""
    c = run.cluster
    by_cpu = int((machine.vcpus - DATA_CPUS) / c.cpus_per_worker)
    return min(by_cpu, int(machine.gpus / c.gpus_per_worker)) if c.gpus_per_worker else by_cpu


def workers_together(run: RunConfig, machine: Machine) -> int:
    """How many workers of the run come to lie on one machine: Ray fills one before it takes the next."""
    return min(workers_per_machine(run, machine), run.cluster.max_workers)


def memory_limit(run: RunConfig, machine: Machine) -> int:
    """Bytes that `plan.memory` may come to for one worker on a machine."""
    c = run.cluster
    if c.gpus_per_worker:
        return gpu_limit(machine.gpu_memory_gib * c.gpus_per_worker)
    room = HOST_SHARE * machine.memory_gib / max(1, workers_together(run, machine)) - PROCESS_GIB
    return max(0, int(room * GIB / MARGIN))


def gpu_limit(gib: float) -> int:
    """Bytes that `plan.memory` may come to in so much GPU memory."""
    return max(0, int((gib - GPU_CONTEXT_GIB) * GIB / MARGIN))


def why_not(run: RunConfig, candidate: Candidate, machines: int, row: MemoryRow) -> str:
    """What keeps a run off a number of machines; empty where it fits."""
    machine, c = candidate.machine, run.cluster
    each = workers_together(run, machine)
    if c.gpus_per_worker and not machine.gpus:
        return "has no GPUs"
    if c.accelerator and c.accelerator.partition("-")[0] != machine.gpu.partition("-")[0]:
        return f"has {machine.gpu}, cluster.accelerator = {c.accelerator}"
    if each == 0:
        return f"{machine.vcpus} vCPUs are too few for a worker of {c.cpus_per_worker:g} and the stream"
    if candidate.max_machines is not None and machines > candidate.max_machines:
        return f"{machines} machines needed, max_workers = {candidate.max_machines}"
    limit = memory_limit(run, machine)
    if row.total > limit:
        return f"needs {row.total / 1e9:.1f} GB, {limit / 1e9:.1f} GB are safe to use"
    on_host, host = each * (row.host_bytes + int(PROCESS_GIB * GIB)), int(HOST_SHARE * machine.memory_gib * GIB)
    if on_host > host:
        return f"needs {on_host / 1e9:.0f} GB of host memory, {host / 1e9:.0f} GB are safe to use"
    return ""


# ---------------------------------------------------------------------- speed


def compute_seconds(run: RunConfig, device: Device, mfu: float) -> float:
    """Of one step, on the worker with the most micro-batches."""
    config = gpt2.GPT2Config.from_run(run)
    tokens = run.batch.micro_sequences * run.data.seq_len
    flops = gpt2.flops_per_token(config, run.data.seq_len)
    if run.train.activation_checkpointing:  # the forward pass of the blocks once more
        blocks = sum(math.prod(s) for name, s in gpt2.parameter_shapes(config).items() if name.startswith("h."))
        flops += 2 * blocks + 4 * config.n_layer * config.n_embd * run.data.seq_len
    peak = device.peak_flops(run.train.precision)
    if not run.cluster.gpus_per_worker:
        own = run.train.peak_tflops
        peak = own * 1e12 if own else peak * run.cluster.cpus_per_worker
    return float(arithmetic(run)["accumulation_steps"] * tokens * flops / (peak * mfu))


def network_seconds(run: RunConfig, machine: Machine, machines: int) -> float:
    """The least that a step's communication takes between machines (Rajbhandari et al. 2020, section 7).

    Of B bytes all machines together hold, each sends (m − 1)/m·B to gather or to reduce-scatter them, twice that for an
    all-reduce. Gradients travel in fp32: once a step below stage 2, from there on after every micro-batch; at stages 0
    to 2 as an all-reduce, which is what DeepSpeed does there, or at 1 and 2 straight to their owners (train/zero.py).
    """
    if machines < 2 or machine.network_gbps is None:
        return 0.0
    n = gpt2.count_parameters(gpt2.GPT2Config.from_run(run), published=False)
    low, stage = 4 if run.train.precision == "fp32" else 2, run.train.zero_stage
    times = arithmetic(run)["accumulation_steps"] if stage >= 2 else 1
    to_owners = stage in (1, 2) and sums_at_owners(
        "cuda" if run.cluster.gpus_per_worker else "cpu", run.cluster.max_workers
    )
    gradients = (low if to_owners and stage == 2 else 4) * n * times * (1 if stage == 3 or to_owners else 2)
    gathered_again = stage == 3 and n > 10**9  # DeepSpeed's max_live_parameters
    weights = low * n * (2 * times if gathered_again else 1) if stage else 0
    return (machines - 1) / machines * (gradients + weights) / (machine.network_gbps / 8 * 1e9)


def measured_mfu(run_dir: str) -> tuple[float, str]:
    """The median over the steps of a run but its first tenth, and where it is from.

    Raises:
        UserError: there are no metrics.
    """
    lines = rundir.metrics_log(run_dir).read() if exists(location(run_dir)) else []
    values = [line["mfu"] for line in lines[-(-len(lines) // 10) :] if "mfu" in line]
    if not values:
        raise UserError(f"--measured {run_dir}: no metrics.jsonl with steps in it")
    return statistics.median(values), f"measured by {run_dir}, {len(values)} steps"


# ---------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """A run on machines of which some fail."""

    mtbf_s: float
    """Mean time between failures of any of the machines."""
    checkpoint_interval_s: float
    """Seconds of training between two saves that waste the least (Young/Daly)."""
    goodput: float
    """Expected share of the time that is training that is kept."""
    hours: float
    """Wall clock."""
    usd: float | None
    """Machines, and the head node where it is known; None without a price."""


@dataclass(frozen=True)
class Setup:
    """A run on a number of machines of one kind."""

    name: str
    instance_type: str
    machines: int
    workers: int
    options: Options
    memory_bytes: int
    memory_limit_bytes: int
    problem: str
    """Why it does not fit; empty where it does."""
    step_s: float
    network_s: float
    """The least that communication takes of a step; where it is all of it, the network is what holds the run up."""
    tokens_per_s: float
    stall_s: float
    """For which a save holds up the training."""
    write_s: float
    """Until a save is on storage."""
    on_demand: Cost
    spot: Cost

    @property
    def fits(self) -> bool:
        """Whether the run can be started on it."""
        return not self.problem

    @property
    def usd_per_hour(self) -> float:
        """On-demand; infinite without a price."""
        return math.inf if self.on_demand.usd is None else self.on_demand.usd / self.on_demand.hours

    @property
    def network_bound(self) -> bool:
        """Whether communication takes longer than computing."""
        return self.network_s >= self.step_s

    def to_json(self) -> dict[str, Any]:
        """For --json and the table."""
        values = {k: v for k, v in vars(self).items() if k not in ("options", "on_demand", "spot")}
        options = {**vars(self.options), "options": str(self.options)}
        kinds = {"on_demand": vars(self.on_demand), "spot": vars(self.spot)}
        return {**values, **options, "fits": self.fits, "network_bound": self.network_bound, **kinds}


@dataclass(frozen=True)
class Planner:
    """Computes set-ups of a run; `head`: the machine that runs beside them on-demand, if it is known."""

    run: RunConfig
    known: Machines
    assumed: Assumptions = field(default_factory=Assumptions)
    head: Machine | None = None

    def setup(self, candidate: Candidate, machines: int, run: RunConfig | None = None) -> Setup:
        """The run, or a variant of it, on so many machines."""
        run = run or self.run
        numbers, row = arithmetic(run), memory_row(run)
        machine = candidate.machine
        compute = compute_seconds(run, self.known.device_of(machine), self.assumed.mfu)
        network = network_seconds(run, machine, machines)
        step = max(compute, network)
        write = numbers["checkpoint_bytes"] / (machines * self.assumed.storage_gb_per_s * 1e9)
        snapshot = numbers["checkpoint_bytes"] / (run.cluster.max_workers * SNAPSHOT_GB_PER_S * 1e9)
        stall = snapshot if run.checkpoint.background else write
        work = numbers["tokens"] / numbers["tokens_per_step"] * step
        rates = {"on_demand": FAILURES_PER_DAY, "spot": self.assumed.preemptions_per_day}
        prices = {"on_demand": machine.on_demand_usd_per_hour, "spot": machine.spot_usd_per_hour}
        costs = {kind: self._cost(work, stall, write, machines, rates[kind], prices[kind]) for kind in rates}
        return Setup(
            name=candidate.name,
            instance_type=candidate.instance_type,
            machines=machines,
            workers=run.cluster.max_workers,
            options=row.options,
            memory_bytes=row.total,
            memory_limit_bytes=memory_limit(run, machine),
            problem=why_not(run, candidate, machines, row),
            step_s=step,
            network_s=network,
            tokens_per_s=numbers["tokens_per_step"] / step,
            stall_s=stall,
            write_s=write,
            **costs,
        )

    def _cost(
        self, work_s: float, stall_s: float, write_s: float, machines: int, rate: float, price: float | None
    ) -> Cost:
        mtbf = 86400 / (rate * machines) if rate else math.inf
        interval = min(max(young_daly(stall_s, mtbf), WRITES_APART * write_s), work_s)
        late = write_s if write_s > stall_s else 0.0
        goodput = expected_goodput(interval, stall_s, self.assumed.restart_seconds, mtbf, late)
        hours = work_s / 3600 / goodput if goodput else math.inf
        head = (self.head.on_demand_usd_per_hour or 0.0) if self.head else 0.0
        usd = None if price is None else hours * (machines * price + head)
        return Cost(mtbf, interval, goodput, hours, usd)

    def as_written(self, candidates: Iterable[Candidate]) -> list[Setup]:
        """The run file's workers and options on each kind of machine; of [min, max] as many as there can be."""
        return [self._as_written(candidate) for candidate in candidates]

    def _as_written(self, candidate: Candidate) -> Setup:
        cluster, each = self.run.cluster, max(1, workers_per_machine(self.run, candidate.machine))
        machines, most = -(-cluster.max_workers // each), candidate.max_machines
        if most is not None and machines > most and cluster.min_workers <= each * most:
            return self.setup(candidate, most, options_of(self.run).of(self.run, each * most))
        return self.setup(candidate, machines)

    def smallest(self, candidate: Candidate) -> Setup | None:
        """The fewest machines of a kind, all of whose workers are used, with the options that are fastest there.

        `cluster.accelerator` is left aside: this is about what else there is.
        """
        each, micro_batches = workers_per_machine(self.run, candidate.machine), self.run.batch.micro_batches
        if not each:
            return None
        most = -(-micro_batches // each)
        most = most if candidate.max_machines is None else min(most, candidate.max_machines)

        def fitting(machines: int) -> list[Setup]:
            variants = self._variants(min(each * machines, micro_batches))
            return [setup for variant in variants if (setup := self.setup(candidate, machines, variant)).fits]

        # From more than a few workers on, one more never needs more memory: so the first that fits is found by halving.
        one_by_one = min(-(-(FEW_RANKS + 1) // each), most)
        found = next((machines for machines in range(1, one_by_one + 1) if fitting(machines)), None)
        if found is None:
            others = range(one_by_one + 1, most + 1)
            place = bisect.bisect_left(others, True, key=lambda machines: bool(fitting(machines)))
            if place == len(others):
                return None
            found = others[place]
        # Offload last: its transfers are not in `step_s`.
        return min(fitting(found), key=lambda s: (s.options.offload, s.step_s))

    def result(self, candidates: list[Candidate]) -> dict[str, Any]:
        """All that `gpt2dist plan` shows, as JSON has it."""
        small: dict[str, Setup] = {}
        for candidate in candidates:
            if setup := self.smallest(candidate):
                kind = candidate.machine.gpu or candidate.name
                small[kind] = min(small.get(kind, setup), setup, key=lambda s: (s.workers, s.usd_per_hour))
        return {
            **arithmetic(self.run),
            "own_options": str(options_of(self.run)),
            "assumptions": {**vars(self.assumed), "failures_per_day": FAILURES_PER_DAY},
            "memory": [{**row.to_json(), "fits_on": self._fits_on(row)} for row in memory_table(self.run)],
            "as_written": [setup.to_json() for setup in self.as_written(candidates)],
            "smallest": [setup.to_json() for setup in small.values()],
            "kept_checkpoint_bytes": self._kept() * arithmetic(self.run)["checkpoint_bytes"],
        }

    def _fits_on(self, row: MemoryRow) -> list[str]:
        """Names of the GPUs on which a worker has room."""
        share = self.run.cluster.gpus_per_worker
        rooms = {
            name: gpu_limit(device.memory_gib * share) for name, device in self.known.devices.items() if name != CPU
        }
        return [name for name, room in rooms.items() if row.total <= room] if share else []

    def _kept(self) -> int:
        """Checkpoints on storage at the end of the run, with the one that is being written."""
        c, steps = self.run.checkpoint, self.run.train.steps
        return c.keep + 1 + (steps // c.keep_every if c.keep_every else 0)

    def _variants(self, workers: int) -> Iterator[RunConfig]:
        run = self.run.model_copy(update={"cluster": self.run.cluster.model_copy(update={"accelerator": ""})})
        for options in options_for(run):  # the run file's own ones win a tie
            if variant := options.of(run, workers):
                yield variant


def common_machines(run: RunConfig, known: Machines) -> list[Candidate]:
    """Of each number of each GPU the cheapest machine that has room for a worker; without GPUs all machines."""
    wanted = [
        Candidate(name, name, m)
        for name, m in known.machines.items()
        if bool(m.gpus) == bool(run.cluster.gpus_per_worker) and workers_per_machine(run, m)
    ]
    if not run.cluster.gpus_per_worker:
        return wanted
    wanted.sort(key=lambda c: c.machine.on_demand_usd_per_hour or math.inf)
    cheapest: dict[tuple[str, int], Candidate] = {}
    for candidate in wanted:
        key = candidate.machine.gpu, workers_per_machine(run, candidate.machine)
        cheapest.setdefault(key, candidate)
    return list(cheapest.values())
