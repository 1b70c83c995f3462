"""One Ray Train worker: build the engine, restore, take the stream, train."""

from __future__ import annotations

import contextlib
import time
import traceback

import ray.train
import ray.train.torch

from gpt2dist.config import RunConfig
from gpt2dist.data.stream import step_batches
from gpt2dist.train.notice import Notice

DATASET = "train"
GIVEN_UP = "given up: "
"""Begins what a worker returns where no restart would help; the cause follows."""


class WorkerFailed(Exception):
    """What ended a worker: when, which rank, and why; the traceback goes to the log."""

    def __init__(self, rank: int, when: float, cause: str, trace: str) -> None:
        super().__init__(rank, when, cause, trace)
        self.rank, self.when, self.cause, self.trace = rank, when, cause, trace

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.cause}\n{self.trace}"


def train_worker(config: dict[str, str]) -> str:
    """Ray Train's entry point; config: {"run": the run as JSON}. Returns `Trainer.train`'s end, or why it gave up.

    Raises:
        WorkerFailed: whatever went wrong, with its time, so that the first failure can be told from the rest.
    """
    run = RunConfig.model_validate_json(config["run"])
    try:
        return _train(run)
    except Exception as e:
        rank = ray.train.get_context().get_world_rank()
        cause = root_cause(e)
        raise WorkerFailed(rank, time.time(), f"{type(cause).__name__}: {cause}", traceback.format_exc()) from None


def root_cause(error: BaseException) -> BaseException:
    """The exception at the bottom: Ray wraps what a task or an actor raised, sometimes more than once."""
    while not isinstance(error, WorkerFailed):
        inner = getattr(error, "cause", None) or getattr(error, "health_check_failure", None) or error.__cause__
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def _train(run: RunConfig) -> str:
    # Here, because the driver imports this module too, and DeepSpeed looks for devices when it is imported.
    from gpt2dist.train.checkpoint import NoneLeft
    from gpt2dist.train.divergence import Diverged
    from gpt2dist.train.engine import Engine
    from gpt2dist.train.trainer import NotSaved, Trainer

    engine = Engine(run, ray.train.torch.get_device())
    with contextlib.closing(engine):
        trainer = Trainer(run, engine, preemption_notice)
        with contextlib.closing(trainer):
            if trainer.is_outdated():
                return "rewound"
            try:
                trainer.restore()
            except NoneLeft as e:
                return f"{GIVEN_UP}{e}"
            shard = ray.train.get_dataset_shard(DATASET)
            batches = step_batches(shard, run, engine.rank, engine.world_size, trainer.step)
            try:
                return trainer.train(batches)
            except (Diverged, NotSaved) as e:  # a restart would only come to the same point again
                return f"{GIVEN_UP}{e}"


def preemption_notice() -> Notice | None:
    """Whether Ray drains a node of this group. A collective."""
    info = ray.train.get_preemption_info()
    if info is None:
        return None
    deadline = None if info.deadline_ms is None else info.deadline_ms / 1000
    return Notice(deadline, tuple(info.preempted_ranks), tuple(info.preempted_node_ids))
