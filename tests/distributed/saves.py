"""What the ranks of test_saves.py and test_damage.py run: training while something is wrong with the storage."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import StepBatch, local_blocks, split_blocks
from gpt2dist.train import checkpoint, savetimes, snapshot
from gpt2dist.train.checkpoint import NoneLeft
from gpt2dist.train.divergence import Diverged
from gpt2dist.train.engine import Engine
from gpt2dist.train.trainer import NotSaved, Trainer

Fault = Callable[[Trainer, int], None]
"""Called before every step, on every rank."""


def _limit(bytes_: int) -> None:
    """No file may become larger than this; the next write says "File too large"."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))


def rank_1_cannot_write(trainer: Trainer, step: int) -> None:
    """Before its first save until step 9."""
    if trainer.rank == 1 and step in (3, 9):
        _limit(4096 if step == 3 else resource.RLIM_INFINITY)


def rank_1_never_writes_again(trainer: Trainer, step: int) -> None:
    """After the save of step 8."""
    if trainer.rank == 1 and step == 10:
        _limit(4096)


def index_cannot_be_written(trainer: Trainer, step: int) -> None:
    """A directory is in its place, in the directories of steps 4 to 6, for long enough to be met."""
    if step in (5, 6):
        time.sleep(0.5)
    if trainer.rank == 0 and step in (3, 7):
        for save in (4, 5, 6):
            path = Path(checkpoint.step_directory(trainer.run.run_dir, save)) / "index.json"
            path.mkdir(parents=True) if step == 3 else path.rmdir()


def slow_disk(trainer: Trainer, step: int) -> None:
    """From the first step on a file takes a second before its first byte is written."""
    if step:
        return

    @contextlib.contextmanager
    def slow(path: Any) -> Iterator[Any]:
        time.sleep(1.0)
        with writing(path) as f:
            yield f

    writing, snapshot.writing = snapshot.writing, slow


def old_ones_cannot_be_deleted(trainer: Trainer, step: int) -> None:
    """From the first save on."""
    if trainer.rank == 0 and step == 0:

        def fails(*_: Any) -> list[int]:
            raise PermissionError("not permitted")

        checkpoint.prune = fails


def profile_cannot_be_written(trainer: Trainer, step: int) -> None:
    """A file lies where its directory would be."""
    if trainer.rank == 0 and step == 0:
        Path(trainer.run.run_dir, "profile").write_text("")


def nothing_can_be_written(trainer: Trainer, step: int) -> None:
    """On no rank, before the last step."""
    if step == trainer.run.train.steps - 1:
        _limit(4096)


def slow_steps_and_evaluations(trainer: Trainer, step: int) -> None:
    """Two seconds each."""
    time.sleep(2)
    trainer.evaluate = lambda: time.sleep(2) or 0.0  # type: ignore[func-returns-value, method-assign]


def none(trainer: Trainer, step: int) -> None:
    """Nothing happens."""


def train_all(calls: list[tuple[RunConfig, Fault]]) -> list[dict[str, Any]]:
    """Each run with its fault, one after the other; see `train`."""
    savetimes.FIRST_PAUSE_S = 0.01
    return [train(*call) for call in calls]


def train(run: RunConfig, fault: Fault = none) -> dict[str, Any]:
    """{"start", "end"} of one run; `end` is the message where it could not go on."""
    writing, prune = snapshot.writing, checkpoint.prune
    engine = Engine(run, torch.device("cpu"))
    trainer = Trainer(run, engine)
    try:
        try:
            trainer.restore()
        except NoneLeft as e:
            return {"start": None, "end": str(e)}
        start = trainer.step
        try:
            return {"start": start, "end": trainer.train(_batches(trainer, fault))}
        except (NotSaved, Diverged) as e:
            return {"start": start, "end": str(e)}
    finally:
        _limit(resource.RLIM_INFINITY)
        snapshot.writing, checkpoint.prune = writing, prune
        trainer.close()
        engine.close()


def _batches(trainer: Trainer, fault: Fault) -> Iterator[StepBatch]:
    run, rank, world = trainer.run, trainer.rank, trainer.world_size
    blocks = local_blocks(run, rank, world, trainer.step)
    for batch in split_blocks(blocks, run, rank, world, trainer.step):
        fault(trainer, trainer.step)
        yield batch


def train_where_nothing_is_shared(run: RunConfig) -> dict[str, Any]:
    """Each rank with a run directory of its own, as on machines without shared storage."""
    rank = int(os.environ["RANK"])
    return train(run.model_copy(update={"storage": f"{run.storage}/machine-{rank}"}))


def fail_while_a_write_hangs(run: str, rendezvous: str) -> None:
    """One rank: the write of its first save never ends, and its data stream fails soon after that."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)

    def fault(trainer: Trainer, step: int) -> None:
        snapshot.writing = lambda _: threading.Event().wait()
        if step == trainer.run.checkpoint.every_steps + 3:
            raise RuntimeError("a shard is damaged")

    train(RunConfig.model_validate_json(run), fault)


def known_seconds(run: RunConfig) -> tuple[float, float]:
    """What a new attempt thinks that a save and an evaluation take."""
    engine = Engine(run, torch.device("cpu"))
    trainer = Trainer(run, engine)
    trainer.restore()
    found = trainer.saver.estimate(trainer.saver.bytes), trainer.eval_seconds
    trainer.close()
    engine.close()
    return found
