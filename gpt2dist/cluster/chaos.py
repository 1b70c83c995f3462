"""Faults on purpose: a run on a private cluster of several nodes, held against one that nothing happens to.

The schedule is drawn from a seed: which fault at which step. Faults are real ones: signals, dead nodes, damaged
files. The verdict: the same losses, every sample once, and what each fault has cost.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gpt2dist.cluster.local import LocalCluster, Node
from gpt2dist.config import RunConfig, UserError
from gpt2dist.data.mixture import Mixture
from gpt2dist.storage import is_local, location, remove_tree
from gpt2dist.train import checkpoint, ledger, rundir

POLL_S = 0.2
QUIET_START, QUIET_END = 0.1, 0.9
"""Faults fall into this part of the steps."""
NOTICE_S = 20.0
"""Of a drained node."""
AWAY_S = 10.0
"""For so long the storage is away, or the disk full."""
IN_FORCE_S = {"drain-node": NOTICE_S}
"""Training goes on meanwhile, and the machine has to go before the end."""
REPLACED_AFTER_S = 5.0
"""A machine that has gone is replaced after so long."""
WORKER_CPUS, NODE_CPUS = 2, 3
"""Logical ones: one worker fits on a node, and Ray Data's tasks beside it."""
RECOVERY_S = 600.0
"""How long a run may take to come back from a fault."""
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
"""In losses, where the number of workers changed; otherwise they have to be equal."""


class ChaosError(Exception):
    """The runs could not be compared; the message says why."""


@dataclass
class Injected:
    """One fault and what followed."""

    fault: str
    step: int
    """Steps done when it was injected."""
    what: str
    seconds: float = math.nan
    """Until the run was further than before it."""


@dataclass
class Verdict:
    """What the comparison found."""

    faults: list[Injected]
    largest_difference: float
    """Between the two runs' losses of a step."""
    allowed: float
    audit: dict[str, int]
    attempts: int
    redone_steps: int
    world_sizes: list[int]
    reference_dir: str
    run_dir: str

    @property
    def passed(self) -> bool:
        """The curve does not know of the faults, and every sample was trained on once."""
        clean = self.audit["duplicates"] == self.audit["gaps"] == 0
        return clean and self.largest_difference <= self.allowed

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {"passed": self.passed, **asdict(self)}


@dataclass
class Arena:
    """A cluster, a run on it, and the hands that break things."""

    cluster: LocalCluster
    run: RunConfig
    directory: Path
    say: Callable[[str], None]
    driver: subprocess.Popen[bytes] | None = None
    undo: list[tuple[float, Callable[[], object]]] = field(default_factory=list)
    """What has to be done at which time."""

    # ------------------------------------------------------------------ the run

    def start(self) -> None:
        """`gpt2dist train`, its output in a file."""
        run_file = self.directory / f"{self.run.name}.toml"
        run_file.write_text(self.run.to_toml())
        command = [sys.executable, "-m", "gpt2dist", "train", str(run_file)]
        with (self.directory / f"{self.run.name}.log").open("ab") as out:
            self.driver = subprocess.Popen(command, stdout=out, stderr=out, env=dict(self.cluster.env))

    def progress(self) -> tuple[int, int]:
        """(steps done, attempt that did the last of them), as the metrics know it."""
        rows = rundir.metrics_log(self.run.run_dir).tail(4096)
        return (rows[-1]["step"] + 1, rows[-1]["attempt"]) if rows else (0, 0)

    def tend(self) -> None:
        """Do what has become due, and start a driver anew that was killed."""
        now = time.monotonic()
        for due in [item for item in self.undo if item[0] <= now]:
            self.undo.remove(due)
            due[1]()
        if self.driver is not None and self.driver.poll() is not None and self.driver.returncode < 0:
            self.start()

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something in so many seconds."""
        self.undo.append((time.monotonic() + seconds, action))

    def ended(self) -> bool:
        """Whether the command has ended by itself. Raises `ChaosError` if it failed."""
        assert self.driver is not None
        code = self.driver.poll()
        if code is not None and code > 0:
            log = self.directory / f"{self.run.name}.log"
            lines = log.read_text(errors="replace").strip().splitlines()
            raise ChaosError(f"`train` ended with exit code {code}: {lines[-1] if lines else ''} (log: {log})")
        return code == 0

    # ------------------------------------------------------------------ victims

    def workers(self) -> list[psutil.Process]:
        """The training processes, on all nodes."""
        found = []
        for node in self.nodes():
            with contextlib.suppress(psutil.NoSuchProcess):
                for p in psutil.Process(node.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if "RayTrainWorker" in " ".join(p.cmdline()):
                            found.append(p)
        return found

    def nodes(self) -> list[Node]:
        """Those that run, without the head."""
        return [node for node in self.cluster.nodes if node.alive()]

    def busy_nodes(self) -> list[Node]:
        """Those on which there is a worker."""
        parents = {p.pid for worker in self.workers() for p in worker.parents()}
        return [node for node in self.nodes() if node.process.pid in parents]

    def replace(self) -> None:
        """A new machine."""
        self.cluster.add_node(NODE_CPUS)


# ---------------------------------------------------------------------- the faults


def kill_worker(arena: Arena, rng: random.Random) -> str:
    """SIGKILL to one worker."""
    victim = rng.choice(arena.workers())
    victim.kill()
    return f"worker process {victim.pid} killed"


def kill_driver(arena: Arena, rng: random.Random) -> str:
    """SIGKILL to the command; the same command is given again at once."""
    assert arena.driver is not None
    arena.driver.kill()
    arena.driver.wait()
    return f"driver process {arena.driver.pid} killed"


def kill_node(arena: Arena, rng: random.Random) -> str:
    """SIGKILL to everything on one machine."""
    victim = rng.choice(arena.busy_nodes())
    victim.kill()
    arena.later(REPLACED_AFTER_S, arena.replace)
    return f"{victim.name} killed; replaced after {REPLACED_AFTER_S:.0f} s"


def drain_node(arena: Arena, rng: random.Random) -> str:
    """A notice, and after it the machine goes."""
    victim = rng.choice(arena.busy_nodes())
    arena.cluster.drain(victim, NOTICE_S)
    arena.later(NOTICE_S, victim.kill)
    arena.later(NOTICE_S + REPLACED_AFTER_S, arena.replace)
    return f"{victim.name} drained with {NOTICE_S:.0f} s of notice"


def stall_worker(arena: Arena, rng: random.Random) -> str:
    """SIGSTOP to one worker, for good."""
    victim = rng.choice(arena.workers())
    victim.send_signal(signal.SIGSTOP)
    return f"worker process {victim.pid} stopped"


def bad_checkpoint(arena: Arena, rng: random.Random) -> str:
    """One bit of the newest checkpoint flipped, or a file of it cut; then a worker is killed, so that it is needed."""
    found = checkpoint.newest(arena.run.run_dir)
    if found is None:
        return kill_worker(arena, rng)
    path = Path(found.path / rng.choice(found.index.files).file)
    size = path.stat().st_size
    if rng.random() < 0.5:
        os.truncate(path, size // 2)
        what = "cut to half"
    else:
        with path.open("r+b") as f:
            f.seek(at := rng.randrange(size))
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << rng.randrange(8)]))
        what = "one bit flipped"
    return f"{found.path.name}/{path.name} {what}; {kill_worker(arena, rng)}"


def storage_away(arena: Arena, rng: random.Random) -> str:
    """Nothing can be written where checkpoints lie."""
    place = Path(location(arena.run.run_dir)) / "checkpoints"
    away = place.with_name("checkpoints.away")
    place.rename(away)
    place.write_text("in the way")

    def back() -> None:
        place.unlink()
        away.rename(place)

    arena.later(AWAY_S, back)
    return f"no checkpoint can be written or read for {AWAY_S:.0f} s"


def disk_full(arena: Arena, rng: random.Random) -> str:
    """The workers can write files of a few kB at most."""
    for p in arena.workers():
        p.rlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

        def back(p: psutil.Process = p) -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                p.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        arena.later(AWAY_S, back)
    return f"the disk is full for {AWAY_S:.0f} s"


HARMLESS = ("storage-away", "disk-full")
"""Faults that do not end the worker group."""
NAN = "nan"
"""Gradients that are not finite, in one step of both runs: it is skipped, and counted."""
FAULTS: dict[str, Callable[[Arena, random.Random], str]] = {
    "kill-worker": kill_worker,
    "kill-driver": kill_driver,
    "kill-node": kill_node,
    "drain-node": drain_node,
    "stall-worker": stall_worker,
    "bad-checkpoint": bad_checkpoint,
    "storage-away": storage_away,
    "disk-full": disk_full,
}


# ---------------------------------------------------------------------- the comparison


def schedule(faults: list[str], steps: int, seed: int) -> list[tuple[int, str]]:
    """(step, fault), ascending; the same for the same seed."""
    rng = random.Random(f"schedule/{seed}")
    low, high = round(QUIET_START * steps), round(QUIET_END * steps)
    at = sorted(rng.sample(range(low, high), len(faults))) if high - low >= len(faults) else [low] * len(faults)
    shuffled = rng.sample(faults, len(faults))
    return list(zip(at, shuffled, strict=True))


def compare(run: RunConfig, faults: list[str], seed: int, say: Callable[[str], None]) -> Verdict:
    """Train `run` twice on a private cluster, once with the faults; `say` is told what happens.

    Raises:
        UserError: an unknown fault, or a run that cannot be broken in this way.
        ChaosError: one of the runs ended with an error.
    """
    unknown = [fault for fault in faults if fault not in (*FAULTS, NAN)]
    if unknown:
        raise UserError(f"--faults: {unknown[0]}: no such fault; there are: {', '.join([*FAULTS, NAN])}")
    if not is_local(location(run.run_dir)):
        raise UserError(f"storage = {run.storage}: chaos damages files, so it wants a local directory of its own")
    if run.cluster.gpus_per_worker or run.cluster.accelerator:
        raise UserError(
            "cluster.gpus_per_worker, cluster.accelerator: chaos makes nodes of CPUs on this machine; "
            "--set cluster.gpus_per_worker=0 --set cluster.accelerator="
        )
    for part in ("undisturbed", "chaos"):
        if location(path := prepared(run, part).run_dir).exists():
            raise UserError(f"{path}: is there already; remove it, or choose another name")
    run, plan = with_faults(run, faults, seed)
    reference = undisturbed(run, say)
    if (steps := steps_needed(reference, plan)) > run.stop_step:
        say(f"its steps are too short for the faults: once more, with {steps:,} steps in place of {run.stop_step:,}")
        remove_tree(location(reference.run_dir))
        run, plan = with_faults(longer(run, steps), faults, seed)
        reference = undisturbed(run, say)
        if (steps := steps_needed(reference, plan)) > run.stop_step:
            raise ChaosError(f"the steps are too short for the faults: set train.steps to {steps:,} or more")
    broken = prepared(run, "chaos")
    with arena(broken, say) as a:
        say(f"the run with faults, in {broken.run_dir}")
        injected = inject(a, plan, random.Random(f"victims/{seed}"))
    skipped = [
        Injected(NAN, step, f"gradients of step {step} made NaN, in both runs", 0.0) for step in run.train.nan_at
    ]
    return judge(reference, broken, sorted([*injected, *skipped], key=lambda i: i.step))


def with_faults(run: RunConfig, faults: list[str], seed: int) -> tuple[RunConfig, list[tuple[int, str]]]:
    """The run with its bad gradients (`train.nan_at`), and the (step, fault) of what comes from outside.

    Raises:
        UserError: there are too few steps, so that several would be spoilt at once, which is one fault.
    """
    plan = schedule(faults, run.stop_step, seed)
    spoilt = [step for step, fault in plan if fault == NAN]
    if len(set(spoilt)) < len(spoilt):
        raise UserError(f"--faults: {len(faults)} of them do not fit into {run.stop_step} steps: raise train.steps")
    run = run.model_copy(update={"train": run.train.model_copy(update={"nan_at": spoilt})})
    return run, [(step, fault) for step, fault in plan if fault != NAN]


def longer(run: RunConfig, steps: int) -> RunConfig:
    """The run with that many steps."""
    length = {"stop_at": steps, "steps": max(steps, run.train.steps)} if run.train.stop_at else {"steps": steps}
    return run.model_copy(update={"train": run.train.model_copy(update=length)})


def undisturbed(run: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """Train the run in peace; returns it as it ran.

    Raises:
        ChaosError: it ended with an error.
    """
    reference = prepared(run, "undisturbed")
    with arena(reference, say) as quiet:
        say(f"the undisturbed run, in {reference.run_dir}")
        quiet.start()
        while not quiet.ended():
            if quiet.driver and (quiet.driver.poll() or 0) < 0:
                raise ChaosError(f"`train` was killed by signal {-quiet.driver.returncode}; memory?")
            time.sleep(POLL_S)
    return reference


def steps_needed(reference: RunConfig, plan: list[tuple[int, str]]) -> int:
    """Steps of a run in which all faults have their time: those that it has where these take as long as faults last."""
    took = [row["step_s"] for row in rundir.metrics_log(reference.run_dir).read()]
    needed, steps = 0.0, len(took)
    for step, fault in reversed(plan):
        needed += IN_FORCE_S.get(fault, 0.0)
        if (left := sum(took[step:])) < needed:
            steps = max(steps, math.ceil(len(took) * 1.5 * needed / left))
    return steps


def prepared(run: RunConfig, suffix: str) -> RunConfig:
    """The run under a name of its own, patient with failures and quick to see them."""
    changes = {"max_failures": -1, "resize_interval_s": 5.0, "hang_timeout_s": 20.0, "cpus_per_worker": WORKER_CPUS}
    cluster = run.cluster.model_copy(update=changes)
    return run.absolute().for_record().model_copy(update={"name": f"{run.name}-{suffix}", "cluster": cluster})


@contextlib.contextmanager
def arena(run: RunConfig, say: Callable[[str], None]) -> Iterator[Arena]:
    """A cluster with a node for each worker, and room on it for Ray Data."""
    directory = Path(run.storage).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    with LocalCluster() as cluster:
        cluster.env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // run.cluster.max_workers))
        for _ in range(run.cluster.max_workers):
            cluster.add_node(NODE_CPUS)
        a = Arena(cluster, run, directory, say)
        try:
            yield a
        finally:
            for _, action in a.undo:
                with contextlib.suppress(Exception):
                    action()
            if a.driver is not None and a.driver.poll() is None:
                a.driver.kill()
                a.driver.wait()


def inject(a: Arena, plan: list[tuple[int, str]], rng: random.Random) -> list[Injected]:
    """Run to the end, with each fault at its step, or as soon as the run has come back from the one before."""
    done: list[Injected] = []
    waiting = list(plan)
    since, furthest, attempt = 0.0, 0, 0
    a.start()
    while not a.ended():
        a.tend()
        steps, now = a.progress()
        if done and math.isnan(done[-1].seconds):
            if steps > furthest and (now > attempt or done[-1].fault in HARMLESS):
                done[-1].seconds = time.monotonic() - since
                a.say(f"  further than before after {done[-1].seconds:.1f} s")
            elif time.monotonic() - since > RECOVERY_S:
                raise ChaosError(f"{done[-1].fault} at step {done[-1].step}: the run did not come back")
        elif waiting and steps >= waiting[0][0] and a.workers():
            _, fault = waiting.pop(0)
            (furthest, attempt), since = a.progress(), time.monotonic()
            done.append(Injected(fault, furthest, FAULTS[fault](a, rng)))
            a.say(f"step {furthest}: {done[-1].what}")
        time.sleep(POLL_S)
    if done and math.isnan(done[-1].seconds):
        done[-1].seconds = time.monotonic() - since
    if waiting:
        raise ChaosError(f"the run was over before {', '.join(fault for _, fault in waiting)}: give it more steps")
    return done


def _difference(a: float, b: float) -> float:
    """Infinite where only one of them is a number; a step with NaN on purpose is NaN in both."""
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return 0.0 if a == b else abs(a - b)


def judge(reference: RunConfig, broken: RunConfig, faults: list[Injected]) -> Verdict:
    """Compare what the two runs have written."""
    losses = [{row["step"]: row["loss"] for row in rundir.metrics_log(r.run_dir).read()} for r in (reference, broken)]
    differences = [_difference(loss, losses[1].get(step, math.inf)) for step, loss in losses[0].items()]
    events = rundir.events_log(broken.run_dir).read()
    starts = [e for e in events if e["event"] == "start"]
    resolved = rundir.with_rewinds(broken, events)
    found = checkpoint.newest(broken.run_dir)
    lines = rundir.ledger_log(broken.run_dir).read()
    audit = ledger.audit(resolved, Mixture.open(resolved), lines, found.index.step if found else 0)
    sizes = [e["world_size"] for e in starts]
    return Verdict(
        faults=faults,
        largest_difference=max(differences, default=math.inf),
        allowed=0.0 if len(set(sizes)) == 1 else TOLERANCE[broken.train.precision],
        audit=asdict(audit),
        attempts=len(starts),
        redone_steps=sum(e["redone_steps"] for e in starts),
        world_sizes=sizes,
        reference_dir=reference.run_dir,
        run_dir=broken.run_dir,
    )
