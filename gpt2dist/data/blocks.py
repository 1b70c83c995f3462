"""Blocks: the unit in which samples travel to the workers. No Ray here.

A block is some consecutive steps of one rank, in the order in which it will train on them. Block b is rank
b mod world's; the blocks of one row (one a rank) have the same number of samples. Everything follows from
(config, data set, step): any attempt, at any world size, starts at any step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import PADDING, Ids, SampleOrder, accumulation_steps

BLOCK_BYTES = 4_000_000
"""About this many bytes of tokens a block: a Ray task and an object-store transfer each."""
MAX_BLOCK_STEPS = 128
Block = dict[str, npt.NDArray[Any]]
"""{"tokens": uint16 [rows, seq_len + 1], "sample": int64 [rows]}"""


@dataclass(frozen=True)
class StepBatch:
    """What one rank trains on in one step."""

    tokens: npt.NDArray[np.uint16]
    """[micro-batches of this rank, micro_sequences, seq_len + 1]; padding slots are 0."""
    ids: Ids
    """Sample ids: int64 [micro-batches of this rank, micro_sequences]; `PADDING` in padding slots."""


@dataclass(frozen=True)
class BlockPlan:
    """How the steps [start, stop) fall into blocks."""

    start: int
    stop: int
    world_size: int
    steps_per_block: int

    @classmethod
    def of(cls, run: RunConfig, start: int, world_size: int) -> BlockPlan:
        """The plan for what is left of a run from step `start` on; during a warm-up the blocks are smaller."""
        rows = accumulation_steps(run.batch.micro_batches, world_size) * run.batch.micro_sequences
        steps = BLOCK_BYTES // (rows * (run.data.seq_len + 1) * 2)
        return cls(start, run.stop_step, world_size, min(max(1, steps), MAX_BLOCK_STEPS))

    @property
    def num_blocks(self) -> int:
        """Blocks of all ranks together."""
        return -(-(self.stop - self.start) // self.steps_per_block) * self.world_size

    def block(self, index: int) -> tuple[int, range]:
        """(rank, steps) of a block."""
        row, rank = divmod(index, self.world_size)
        first = self.start + row * self.steps_per_block
        return rank, range(first, min(first + self.steps_per_block, self.stop))


class BlockReader:
    """Reads blocks from the token shards; runs inside Ray Data's tasks."""

    def __init__(self, run: RunConfig, plan: BlockPlan) -> None:
        self.run = run
        self.plan = plan

    def __call__(self, batch: dict[str, npt.NDArray[np.int64]]) -> Block:
        """{"id": [1] block index} → {"tokens": uint16 [rows, seq_len + 1], "sample": int64 [rows]}."""
        order, split = _open(self.run)
        rank, steps = self.plan.block(int(batch["id"][0]))
        ids = np.concatenate([order.rank_step(s, rank, self.plan.world_size).reshape(-1) for s in steps])
        tokens = np.zeros((len(ids), self.run.data.seq_len + 1), dtype=np.uint16)
        real = ids != PADDING
        tokens[real] = split.samples(ids[real])
        return {"tokens": tokens, "sample": ids}


def split_blocks(
    blocks: Iterable[Block], run: RunConfig, rank: int, world_size: int, start: int
) -> Iterator[StepBatch]:
    """Cut a rank's blocks into its batches from step `start` on, each checked against the order.

    Raises:
        RuntimeError: the blocks hold other samples than the order says, or end early.
    """
    order = SampleOrder(run, Mixture.open(run))
    step = start
    for block in blocks:
        first = 0
        while first < len(block["sample"]):
            expected = order.rank_step(step, rank, world_size)
            rows = slice(first, first + expected.size)
            if not np.array_equal(block["sample"][rows], expected.reshape(-1)):
                raise RuntimeError(f"data stream: step {step}, rank {rank}: not the samples of this step")
            tokens = np.asarray(block["tokens"][rows])
            yield StepBatch(tokens.reshape(*expected.shape, tokens.shape[-1]), expected)
            first += expected.size
            step += 1
    if step != run.stop_step:
        raise RuntimeError(f"data stream: rank {rank}: ended before step {step} of {run.stop_step}")


def local_blocks(run: RunConfig, rank: int, world_size: int, start: int) -> Iterator[Block]:
    """The same blocks without Ray, read in this process."""
    plan = BlockPlan.of(run, start, world_size)
    reader = BlockReader(run, plan)
    for index in range(rank, plan.num_blocks, world_size):
        yield reader({"id": np.array([index])})


@lru_cache(maxsize=2)
def _open_cached(text: str) -> tuple[SampleOrder, MixedSplit]:
    run = RunConfig.model_validate_json(text)
    data = Mixture.open(run)
    return SampleOrder(run, data), MixedSplit(data, "train", run.data.seq_len, run.data.cache_gb)


def _open(run: RunConfig) -> tuple[SampleOrder, MixedSplit]:
    """Manifest, order and memory maps, kept open between the tasks of one process."""
    return _open_cached(run.model_dump_json())
