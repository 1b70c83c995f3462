"""The stream: Ray Data carries each rank's blocks to it, from an exact position, in an exact order.

With `preserve_order`, `streaming_split(equal=True)` deals blocks of equal size round-robin, so block b reaches
rank b mod world. Ray Data keeps no position that could be resumed (ray#37633); ours is the step. Each sample
carries its id, and the worker refuses a batch whose ids are not the expected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import DataIterator
from ray.train import DataConfig

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import BlockPlan, BlockReader, StepBatch, split_blocks

NUMBERS_PER_TASK = 1024
"""Ray plans the first tasks of a dataset all at once, at 2 ms each: a block number a task would take minutes to
start a long run. A streaming repartition then makes them one task a block."""


class ExactStream(DataConfig):  # type: ignore[misc]
    """Ray Train asks this for the ranks' iterators at every start of the worker group."""

    def __init__(self, run: RunConfig, start_step: Callable[[], int]) -> None:
        """`start_step` tells, when the workers have loaded their checkpoint, at which step they are."""
        super().__init__()
        self.run = run
        self.start_step = start_step

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any = None,
        worker_node_ids: Any = None,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        """One iterator a rank, from the position of `start_step`, whatever datasets were given."""
        plan = BlockPlan.of(self.run, self.start_step(), world_size)
        numbers = ray.data.range(plan.num_blocks, override_num_blocks=-(-plan.num_blocks // NUMBERS_PER_TASK))
        blocks = numbers.repartition(target_num_rows_per_block=1).map_batches(
            BlockReader(self.run, plan), batch_size=None, num_cpus=0.5
        )
        blocks.context.execution_options = self.default_ingest_options()
        blocks.context.execution_options.preserve_order = True
        blocks.context.raise_original_map_exception = True  # a damaged shard is named, not "UDF failed"
        (name,) = datasets
        return [{name: split} for split in blocks.streaming_split(world_size, equal=True)]


def placeholder() -> ray.data.Dataset:
    """Ray Train wants a dataset by name; `ExactStream` replaces it by the real one."""
    return ray.data.range(1)


def step_batches(iterator: DataIterator, run: RunConfig, rank: int, world_size: int, start: int) -> Iterator[StepBatch]:
    """This rank's batches from step `start` on, checked against the order.

    Raises:
        RuntimeError: the stream delivered other samples than the order says, or ended early.
    """
    blocks = iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
    return split_blocks(blocks, run, rank, world_size, start)
