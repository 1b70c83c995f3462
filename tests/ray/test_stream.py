"""The stream through the real Ray Data: exactly once, the same steps for every world size, from any step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray

from gpt2dist.config import RunConfig
from gpt2dist.data import blocks, stream
from gpt2dist.data.mixture import Mixture
from gpt2dist.data.order import PADDING, SampleOrder
from tests.conftest import tiny_run


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def received(run: RunConfig, world_size: int, start: int) -> dict[int, list[int]]:
    """Step → sorted sample ids that the ranks received through Ray Data."""
    config = stream.ExactStream(run, lambda: start)
    splits = [s["train"] for s in config.configure({"train": None}, world_size)]

    def consume(rank: int) -> list[np.ndarray]:
        return [b.ids.reshape(-1) for b in stream.step_batches(splits[rank], run, rank, world_size, start)]

    with ThreadPoolExecutor(world_size) as threads:
        ranks = list(threads.map(consume, range(world_size)))
    steps = (np.concatenate(ids) for ids in zip(*ranks, strict=True))
    return {step: sorted(ids[ids != PADDING].tolist()) for step, ids in enumerate(steps, start)}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_growing_batch(make_data: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one rank differ in length then; each still reaches its own rank."""
    monkeypatch.setattr(blocks, "MAX_BLOCK_STEPS", 3)
    run = tiny_run(data__path=make_data([1100, 300]), train__steps=40, batch__micro_batches=7, batch__warmup_steps=30)
    order = SampleOrder(run, Mixture.open(run))
    expected = {step: sorted(order.step(step).reshape(-1).tolist()) for step in range(40)}
    for world_size in (2, 3):
        assert received(run, world_size, 0) == expected
    assert received(run, 3, 17) == {step: ids for step, ids in expected.items() if step >= 17}


@pytest.mark.timeout(240)
def test_exactly_once_at_every_world_size(make_data: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_BLOCK_STEPS", 3)
    monkeypatch.setattr(stream, "NUMBERS_PER_TASK", 7)  # several planning tasks, as a long run has
    data = make_data([1100, 300, 900])
    run = tiny_run(data__path=data, data__shuffle_window=2, batch__micro_batches=8, cluster__workers=5)
    n = SampleOrder(run, Mixture.open(run)).num_samples
    run = tiny_run(
        data__path=data,
        data__shuffle_window=2,
        batch__micro_batches=8,
        cluster__workers=5,
        train__steps=-(-2 * n // 16),  # two epochs and the rest of a step
    )
    digests = set()
    for world_size in (1, 2, 3, 5):
        steps = received(run, world_size, 0)
        assert list(steps) == list(range(run.train.steps))
        digests.add(hashlib.sha256(repr(steps).encode()).hexdigest())
        consumed = [i for ids in steps.values() for i in ids]
        assert np.bincount(consumed, minlength=n).min() == 2  # each epoch holds every sample once
        assert len(consumed) - 2 * n < 16
    assert len(digests) == 1
    assert received(run, 3, 5) == {step: ids for step, ids in steps.items() if step >= 5}
