from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2dist.config import BatchSection
from gpt2dist.data import blocks
from gpt2dist.data.blocks import local_blocks, split_blocks
from gpt2dist.data.mixture import Component, Mixture
from gpt2dist.data.order import (
    PADDING,
    SampleOrder,
    consumed,
    ids_digest,
    micro_batches,
    permutation,
    positions,
    stack_steps,
)
from gpt2dist.data.shards import Manifest, Shard, TokenSplit, read_manifest
from tests.conftest import tiny_run


def order_of(tokens: list[int], **changes: object) -> SampleOrder:
    shards = [
        Shard(file=f"train-{i}.npy", tokens=n, documents=1, bytes=n, sha256="0" * 64) for i, n in enumerate(tokens)
    ]
    manifest = Manifest(request={}, documents={}, splits={"train": shards})
    return SampleOrder(tiny_run(**changes), Mixture([Component("", manifest)]))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 400), min_size=1, max_size=9).filter(lambda t: sum(t) > 20),
    window=st.integers(1, 10),
    seed=st.integers(0, 3),
)
def test_every_epoch_holds_every_sample_once(tokens: list[int], window: int, seed: int) -> None:
    order = order_of(tokens, seed=seed, data__shuffle_window=window)
    n = order.num_samples
    assert n == (sum(tokens) - 1) // 16
    for epoch in range(2):
        ids = order.samples(epoch * n, (epoch + 1) * n)
        assert sorted(ids) == list(range(n))
    # any cut of positions gives the same sequence
    whole = order.samples(0, 2 * n)
    pieces = [order.samples(p, min(p + 7, 2 * n)) for p in range(0, 2 * n, 7)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_epochs_and_seeds_differ_and_the_order_is_pinned() -> None:
    order = order_of([3000, 3000, 3000])
    n = order.num_samples
    first = order.samples(0, n)
    assert not np.array_equal(first, order.samples(n, 2 * n))
    assert not np.array_equal(first, order_of([3000, 3000, 3000], seed=4).samples(0, n))
    # A run that is resumed by a later version must go on with the same samples.
    assert first[:8].tolist() == PINNED
    assert permutation(5, "x").tolist() == PINNED_PERMUTATION


def test_a_window_keeps_reads_local() -> None:
    order = order_of([1600] * 20, data__shuffle_window=2)
    ids = order.samples(0, order.num_samples)
    shards_seen = [set(ids[i : i + 200] // 100) for i in range(0, len(ids), 200)]
    assert max(len(s) for s in shards_seen) <= 4  # two windows at most, of two shards each


def test_permutation_is_uniform() -> None:
    counts = np.zeros((5, 5))
    for k in range(4000):
        counts[np.arange(5), permutation(5, "u", k)] += 1
    assert abs(counts / 4000 - 0.2).max() < 0.03


@given(
    first=st.integers(1, 40),
    growth=st.integers(0, 40),
    warmup=st.integers(0, 200),
    micro=st.integers(1, 8),
    step=st.integers(0, 500),
)
def test_the_batch_grows_and_positions_follow_on(first: int, growth: int, warmup: int, micro: int, step: int) -> None:
    sizes = {"initial_micro_batches": first, "micro_batches": first + growth}
    if not warmup:
        del sizes["initial_micro_batches"]
    batch = BatchSection(micro_sequences=micro, warmup_steps=warmup, **sizes)
    counts = [micro_batches(batch, s) for s in range(step + 1)]
    assert consumed(batch, step) == micro * sum(counts[:-1])
    assert counts == sorted(counts)
    assert counts[0] == (first if warmup else first + growth)
    assert micro_batches(batch, warmup) == first + growth
    huge = batch.model_copy(update={"warmup_steps": 10**15})
    assert 0 <= consumed(huge, step) - step * micro * huge.initial_micro_batches <= step * micro * growth
    line = [first + growth * s / warmup for s in range(min(warmup, step + 1))]
    assert all(m <= exact < m + 1 for m, exact in zip(counts, line, strict=False))


def test_a_growing_batch_takes_the_same_samples_in_the_same_order() -> None:
    grows = order_of([3000, 2000], batch__micro_batches=5, batch__warmup_steps=9)
    steps = [grows.step(s) for s in range(20)]
    assert [len(ids) for ids in steps] == [1, 1, 1, 2, 2, 3, 3, 4, 4, *[5] * 11]
    assert np.array_equal(np.concatenate(steps).reshape(-1), grows.samples(0, 2 * (21 + 55)))
    stacked = stack_steps(steps[2:5])
    assert stacked.shape == (3, 4)
    assert stacked[0].tolist() == [*steps[2].reshape(-1), PADDING, PADDING]


@pytest.mark.parametrize("warmup", [0, 25])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_step_without_loss(world_size: int, warmup: int) -> None:
    order = order_of([3000, 2000], batch__warmup_steps=warmup)
    for step in range(40):
        parts = np.stack([order.rank_step(step, r, world_size) for r in range(world_size)])
        assert sorted(parts[parts != PADDING]) == sorted(order.step(step).reshape(-1))
        assert ids_digest(parts.reshape(-1)) == ids_digest(order.step(step).reshape(-1))


@pytest.mark.parametrize("warmup", [0, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_blocks_bring_the_right_tokens_from_any_step(
    make_data: Callable[..., str], monkeypatch: pytest.MonkeyPatch, world_size: int, warmup: int
) -> None:
    monkeypatch.setattr(blocks, "MAX_BLOCK_STEPS", 7)
    run = tiny_run(data__path=make_data([700, 45, 900]), train__steps=60, batch__warmup_steps=warmup)
    data = Mixture.open(run)
    (part,) = data.components
    stream = np.concatenate([np.load(f"{part.path}/{s.file}") for s in part.manifest.splits["train"]])
    order = SampleOrder(run, data)
    for start in (0, 37):
        for rank in range(world_size):
            parts = local_blocks(run, rank, world_size, start)
            batches = list(split_blocks(parts, run, rank, world_size, start))
            assert len(batches) == 60 - start
            for step, batch in enumerate(batches, start):
                assert np.array_equal(batch.ids, order.rank_step(step, rank, world_size))
                for i, row in zip(batch.ids.reshape(-1), batch.tokens.reshape(-1, 17), strict=True):
                    expected = np.zeros(17) if i == PADDING else stream[i * 16 : i * 16 + 17]
                    assert np.array_equal(row, expected)


def test_wrong_samples_are_refused(make_data: Callable[..., str]) -> None:
    run = tiny_run(data__path=make_data([3000]))
    parts = list(local_blocks(run, 0, 2, 0))
    parts[0]["sample"][[0, 1]] = parts[0]["sample"][[1, 0]]
    with pytest.raises(RuntimeError, match="step 0, rank 0: not the samples"):
        next(split_blocks(parts, run, 0, 2, 0))
    with pytest.raises(RuntimeError, match="ended before step 0 of 12"):
        list(split_blocks([], run, 0, 2, 0))


def test_samples_overlap_by_one_token(make_data: Callable[..., str]) -> None:
    location = make_data([100])
    split = TokenSplit(location, read_manifest(location), "train")
    a, b = split.samples(np.array([0, 1]), 16)
    assert a[-1] == b[0]
    assert split.num_samples(16) == 6
    assert split.num_samples(100) == 0


PINNED = [546, 429, 407, 40, 478, 284, 91, 555]
PINNED_PERMUTATION = [2, 0, 3, 4, 1]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=5), st.integers(0, 80), st.integers(0, 40))
def test_positions_leave_out_what_is_skipped(ranges: list[tuple[int, int]], start: int, count: int) -> None:
    """Against leaving the positions out one by one."""
    skip: list[tuple[int, int]] = []
    for first, length in sorted(ranges):
        first = max(first, skip[-1][1] if skip else 0)
        skip.append((first, first + length))
    left = [p for p in range(400) if not any(first <= p < end for first, end in skip)]
    found = [p for first, end in positions(start, start + count, skip) for p in range(first, end)]
    assert found == left[start : start + count]
