"""Which samples a step trains on: a pure function of (seed, data set, position).

*Position* p counts the samples consumed since step 0. Epoch p // N visits every one of the N samples once:
the shards are permuted, and samples are permuted inside windows of `shuffle_window` consecutive shards of that
permutation, so storage is read in large pieces. Nothing here is stored: a resume computes it again.

A mixture gives each data set its exact share of every 16384 positions, in a shuffled pattern; each data set then has
its own epochs.

A permutation is the stable sort of Philox-4x64's raw output (Salmon et al. 2011), a stream that numpy
guarantees for ever, which it does not for its own shuffles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gpt2dist.config import BatchSection, RunConfig
from gpt2dist.data.mixture import SHARES, MixedSplit, Mixture
from gpt2dist.data.shards import TokenSplit

Ids = npt.NDArray[np.int64]
PADDING = -1
"""Sample id of a slot that holds no sample."""


def micro_batches(batch: BatchSection, step: int) -> int:
    """M of a step: from `initial_micro_batches` linearly to `micro_batches` over `warmup_steps`, rounded down."""
    if step >= batch.warmup_steps:
        return batch.micro_batches
    growth = batch.micro_batches - batch.initial_micro_batches
    return batch.initial_micro_batches + growth * step // batch.warmup_steps


def consumed(batch: BatchSection, step: int) -> int:
    """Samples that a run has consumed before a step: Σ M(t)·micro over the steps t before it."""
    warmup = min(step, batch.warmup_steps)
    growth = batch.micro_batches - batch.initial_micro_batches
    in_warmup = warmup * batch.initial_micro_batches + _floor_sum(warmup, growth, batch.warmup_steps)
    return (in_warmup + (step - warmup) * batch.micro_batches) * batch.micro_sequences


def _floor_sum(n: int, a: int, m: int) -> int:
    """Σ ⌊a·i / m⌋ over i < n, 0 where n is.

    Counts lattice points under a line, with the axes exchanged as in Euclid's algorithm.
    """
    total, b = 0, 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        top = a % m * n + b % m
        n, a, m, b = top // m, m, a % m, top % m
    return total


def accumulation_steps(micro_batches: int, world_size: int) -> int:
    """Micro-batches that every rank runs in a step: ⌈M / world⌉, the slots left over being padding."""
    return -(-micro_batches // world_size)


def permutation(n: int, *key: int | str) -> Ids:
    """A uniform permutation of range(n) that depends on `key` alone: int64 [n]."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    return np.argsort(philox.random_raw(n), kind="stable").astype(np.int64)


def positions(start: int, stop: int, skip: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Where the run's samples number [start, stop) lie when the positions of `skip` are left out: ranges, in order.

    skip: disjoint ranges [first, end), ascending.
    """
    left_out = 0
    for first, end in skip:
        upto = min(stop, first - left_out)
        if start < upto:
            yield start + left_out, upto + left_out
            start = upto
        left_out += end - first
    if start < stop:
        yield start + left_out, stop + left_out


class SampleOrder:
    """The sample order of one run's training data, and how it falls on ranks."""

    def __init__(self, run: RunConfig, data: Mixture) -> None:
        self.seed = run.seed
        self.batch = run.batch
        self.skip = run.data.skip
        self.shares = np.array([c.share for c in data.components], dtype=np.int64)
        split = MixedSplit(data, "train", run.data.seq_len)
        self.num_samples = split.num_samples
        self.sizes, self.offsets = split.sizes, split.offsets
        self.sources = [_SourceOrder(run, part, k) for k, part in enumerate(split.parts)]

    def samples(self, start: int, stop: int) -> Ids:
        """Sample ids that the run consumes as number [start, stop): int64 [stop - start]."""
        parts = [self._samples(*part) for part in positions(start, stop, self.skip)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _samples(self, start: int, stop: int) -> Ids:
        """Sample ids at positions [start, stop): int64 [stop - start]."""
        if len(self.sources) == 1:
            return self.sources[0].samples(start, stop)
        ids = np.empty(stop - start, dtype=np.int64)
        at = start
        while at < stop:
            round_, first = divmod(at, SHARES)
            last = min(SHARES, first + stop - at)
            pattern = self._pattern(round_)
            out = ids[at - start : at - start + last - first]
            for k, source in enumerate(self.sources):
                mine = pattern[first:last] == k
                begin = round_ * int(self.shares[k]) + int(np.count_nonzero(pattern[:first] == k))
                out[mine] = self.offsets[k] + source.samples(begin, begin + int(np.count_nonzero(mine)))
            at += last - first
        return ids

    def epochs(self, samples: int) -> list[float]:
        """How often the run has been through each data set after so many samples."""
        position = max((end for _, end in positions(0, samples, self.skip)), default=0)
        if len(self.sources) == 1:
            return [position / self.num_samples]
        rounds, rest = divmod(position, SHARES)
        seen = rounds * self.shares + np.bincount(self._pattern(rounds)[:rest], minlength=len(self.sources))
        return [float(epochs) for epochs in seen / self.sizes]

    def step(self, step: int) -> Ids:
        """Sample ids of a step: int64 [M, micro], row j being micro-batch j."""
        ids = self.samples(consumed(self.batch, step), consumed(self.batch, step + 1))
        return ids.reshape(-1, self.batch.micro_sequences)

    def rank_step(self, step: int, rank: int, world_size: int) -> Ids:
        """Sample ids that a rank trains on in a step: int64 [⌈M / world⌉, micro].

        Micro-batch j goes to rank j mod world; slots that are left over hold `PADDING`.
        """
        ids = self.step(step)
        out = np.full((accumulation_steps(len(ids), world_size), ids.shape[1]), PADDING, dtype=np.int64)
        mine = ids[rank::world_size]
        out[: len(mine)] = mine
        return out

    @lru_cache(maxsize=4)  # noqa: B019 — one order lives as long as its process
    def _pattern(self, round_: int) -> Ids:
        """Which data set has each of `SHARES` consecutive positions: each its share, shuffled."""
        return mixture_pattern(self.shares, self.seed, round_)


class _SourceOrder:
    """The order of one data set's samples, by how many of them were consumed."""

    def __init__(self, run: RunConfig, tokens: TokenSplit, index: int) -> None:
        # Data sets of the same shape are not to be shuffled alike.
        self.key = (run.seed, index) if index else (run.seed,)
        self.window = run.data.shuffle_window
        self.num_samples = tokens.num_samples(run.data.seq_len)
        # First sample of each shard: a sample belongs to the shard in which it starts.
        first = -(-tokens.starts // run.data.seq_len)
        self._first = np.minimum(first, self.num_samples).astype(np.int64)
        # Caches of this data set's own: one for all would not hold what many of them need by turns.
        self._shard_order = lru_cache(4)(self._compute_shard_order)
        self._window_bounds = lru_cache(4)(self._compute_window_bounds)
        self._window_samples = lru_cache(4)(self._compute_window_samples)

    def samples(self, start: int, stop: int) -> Ids:
        """Samples [start, stop) of those that the run consumes of this data set: int64 [stop - start]."""
        parts: list[Ids] = []
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            bounds = self._window_bounds(epoch)
            window = int(np.searchsorted(bounds, offset, side="right")) - 1
            end = min(stop - start + offset, int(bounds[window + 1]))
            ids = self._window_samples(epoch, window)
            parts.append(ids[offset - int(bounds[window]) : end - int(bounds[window])])
            start += end - offset
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _compute_shard_order(self, epoch: int) -> Ids:
        return permutation(len(self._first) - 1, "shards", *self.key, epoch)

    def _compute_window_bounds(self, epoch: int) -> Ids:
        """Position in the epoch at which each window starts, and N at the end."""
        order = self._shard_order(epoch)
        sizes = (self._first[1:] - self._first[:-1])[order]
        per_window = np.add.reduceat(sizes, np.arange(0, len(sizes), self.window))
        return np.cumsum([0, *per_window], dtype=np.int64)

    def _compute_window_samples(self, epoch: int, window: int) -> Ids:
        shards = self._shard_order(epoch)[window * self.window : (window + 1) * self.window]
        ids = np.concatenate([np.arange(self._first[s], self._first[s + 1]) for s in shards])
        return ids[permutation(len(ids), "samples", *self.key, epoch, window)]


def mixture_pattern(shares: Ids, seed: int, round_: int) -> Ids:
    """Data sets of positions [round_ · SHARES, (round_ + 1) · SHARES), data set k `shares[k]` times: int64 [SHARES]."""
    return np.repeat(np.arange(len(shares)), shares)[permutation(int(shares.sum()), "mixture", seed, round_)]


def eval_ids(run: RunConfig, data: Mixture) -> Ids:
    """Samples of the validation splits that every evaluation reads: int64 [micro-batches ≤ eval.batches, micro].

    Mixed as in training; no sample twice, so a small split may give fewer micro-batches.
    """
    split = MixedSplit(data, "val", run.data.seq_len)
    micro = run.batch.micro_sequences
    count = min(run.eval.batches, split.num_samples // micro)
    if len(split.parts) == 1:
        return permutation(split.num_samples, "eval")[: count * micro].reshape(count, micro)
    shares = np.array([c.share for c in data.components])
    rounds = range(-(-max(count, 1) * micro // SHARES))
    component = np.concatenate([mixture_pattern(shares, 0, r) for r in rounds])
    for k, n in enumerate(split.sizes):  # up to the micro-batch with the first sample that it does not have
        mine = np.flatnonzero(component == k)
        if len(mine) > n:
            count = min(count, int(mine[n]) // micro)
    component = component[: count * micro]
    ids = np.empty(len(component), dtype=np.int64)
    for k, n in enumerate(split.sizes):
        mine = component == k
        ids[mine] = split.offsets[k] + permutation(int(n), "eval", k)[: np.count_nonzero(mine)]
    return ids.reshape(-1, micro)


def stack_steps(steps: Sequence[Ids]) -> Ids:
    """Ids of some steps, which may differ in length, one a row: int64 [steps, longest], filled up with `PADDING`."""
    out = np.full((len(steps), max(ids.size for ids in steps)), PADDING, dtype=np.int64)
    for row, ids in zip(out, steps, strict=True):
        row[: ids.size] = ids.reshape(-1)
    return out


def ids_digest(ids: Ids) -> str:
    """sha256 of a step's sample ids, sorted, as little-endian int64; the same for every world size."""
    return hashlib.sha256(np.sort(ids[ids != PADDING]).astype("<i8").tobytes()).hexdigest()
