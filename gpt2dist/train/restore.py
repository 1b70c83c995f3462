"""The start of an attempt: the newest good checkpoint is loaded, and what was not committed is dropped."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import Mixture
from gpt2dist.model import gpt2, hf
from gpt2dist.storage import StorageError
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.checkpoint import BadCheckpoint, Checkpoint, Misfit, NoneLeft
from gpt2dist.train.engine import Engine
from gpt2dist.train.fragment import EMA
from gpt2dist.train.index import Index
from gpt2dist.train.resume import changes, order_id
from gpt2dist.train.rundir import Record
from gpt2dist.train.spent import by_attempt


def is_outdated(run: RunConfig, record: Record) -> bool:
    """Whether a rewind has left out samples of which this group was not told. A collective.

    Ray may be about to resize a group when that logs a rewind; it then starts the next one by itself.
    """
    return bool(record.agree(record.rank == 0 and rundir.with_rewinds(run, record.events.read()) != run))


def start(run: RunConfig, engine: Engine, data: Mixture, record: Record) -> tuple[int, int]:
    """Load the newest checkpoint that is whole, and open a new attempt. A collective.

    Returns the checkpoint's step, -1 where the run has none yet, and the attempt's number.

    Raises:
        NoneLeft: there are some, but all are damaged.
        OSError, StorageError: they are away, or cannot be read now: that is no damage.
    """
    steps: list[int] = []
    left: list[int] = []  # saved after a divergence had begun; deleted when an earlier one is loaded
    if record.rank == 0:
        left = checkpoint.left_behind(run.run_dir, record.events.read())
        steps = [step for step in checkpoint.steps(run.run_dir) if step not in left]
    bad: dict[int, str] = {}
    for step in record.agree(steps):
        problem = _load(run, engine, data, record, step)
        if not problem:
            return step, _open_attempt(run, engine, record, step, {*bad, *left})
        bad[step] = problem
        record.event("bad_checkpoint", step=step, reason=problem)
    if bad:  # to begin again would be another run
        checkpoint.steps(run.run_dir)  # raises where they went away meanwhile
        raise NoneLeft(run.run_dir, next(iter(bad.values())))
    if run.model.init_from:
        engine.set_weights(hf.read_weights(run.model.init_from))
    return -1, _open_attempt(run, engine, record, 0, left)


def _load(run: RunConfig, engine: Engine, data: Mixture, record: Record, step: int) -> str:
    """Load a checkpoint; what is wrong with it, if so: the engine then holds a part of it. A collective."""
    problem, found = "", None
    try:
        found = _open(run, engine, step)
        fragments = engine.fragments(owned=False)
        checkpoint.load(found, [f for f in fragments if f.kind != EMA or found.index.has_ema])
    except (BadCheckpoint, Misfit) as e:
        problem = str(e)
    if problems := [p for p in record.gather(problem) if p]:
        return _damage(run, engine, record, step, problems[0])
    assert found is not None
    engine.state_changed()
    engine.load_scalars(found.index.scalars)
    if run.optim.ema_decay and not found.index.has_ema:
        engine.start_ema()
        record.event("ema_started", step=step)
    _log_change(run, data, record, found.index)
    return ""


def _open(run: RunConfig, engine: Engine, step: int) -> Checkpoint:
    """A checkpoint of this model; its files are not looked at. Raises `BadCheckpoint`, `Misfit`."""
    found = checkpoint.open_step(run.run_dir, step)
    checkpoint.check_fits(found, gpt2.parameter_shapes(engine.model_config), run.name)
    return found


def _damage(run: RunConfig, engine: Engine, record: Record, step: int, problem: str) -> str:
    """What rank 0 finds wrong with a checkpoint that some rank could not load: it may delete it. A collective.

    Raises:
        StorageError: nothing: the other machine sees another storage, or an older view of it.
    """
    seen = problem
    if record.rank == 0:
        try:
            checkpoint.verify(_open(run, engine, step))
            seen = ""
        except (BadCheckpoint, Misfit) as e:
            seen = str(e)
    if not (seen := record.agree(seen)):
        raise StorageError(f"{problem}; but another machine finds it whole: is the storage shared, and up to date?")
    return str(seen)


def _log_change(run: RunConfig, data: Mixture, record: Record, index: Index) -> None:
    """An event where steps train on other samples than the checkpoint's run would have."""
    before, now = index.data_fingerprint, data.fingerprint
    if order_id(index.config, before) == order_id(run.model_dump(mode="json"), now):
        return
    found = changes(index.config, run, index.position, before, now)
    order = [change.to_json() for change in found if change.effect == "order"]
    record.event("data_changed", step=index.step, before=before, now=now, changes=order)


def _open_attempt(run: RunConfig, engine: Engine, record: Record, step: int, bad: Collection[int]) -> int:
    """Drop what earlier attempts left but did not commit, and log the start of a new one; returns its number.

    bad: steps of checkpoints that are damaged or left behind. A collective.
    """
    attempt = 0
    if record.rank == 0:
        checkpoint.clear(run.run_dir, step, bad)
        attempt = 1 + max((e["attempt"] for e in rundir.starts(record.events.read())), default=0)
        record.ledger.cut(lambda line: bool(line["step"] < step))
        redone = record.metrics.cut(lambda line: bool(line["step"] < step))
        event = {
            "time": time.time(),
            "event": "start",
            "attempt": attempt,
            "step": step,
            "world_size": engine.world_size,
            "zero_stage": run.train.zero_stage,
            "redone_steps": len(redone),
            "redone_s": sum(line.get("step_s", 0.0) + line.get("eval_s", 0.0) for line in redone),
            "redone": [asdict(spent) for spent in by_attempt(redone)],
        }
        record.events.append(event)  # without it the stream would not know where to begin
    return int(record.agree(attempt))
