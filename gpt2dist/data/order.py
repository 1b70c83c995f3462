"""Which samples a step trains on: a pure function of (seed, data set, position).

*Position* p counts the samples consumed since step 0. Epoch p // N visits every one of the N samples once:
the shards are permuted, and samples are permuted inside windows of `shuffle_window` consecutive shards of that
permutation, so storage is read in large pieces. Nothing here is stored: a resume computes it again.

A permutation is the stable sort of Philox-4x64's raw output (Salmon et al. 2011), a stream that numpy
guarantees for ever, which it does not for its own shuffles.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gpt2dist.config import RunConfig
from gpt2dist.data.shards import Manifest, Split, TokenSplit

Ids = npt.NDArray[np.int64]
PADDING = -1
"""Sample id of a slot that holds no sample."""


def accumulation_steps(micro_batches: int, world_size: int) -> int:
    """Micro-batches that every rank runs in a step: ⌈M / world⌉, the slots left over being padding."""
    return -(-micro_batches // world_size)


def permutation(n: int, *key: int | str) -> Ids:
    """A uniform permutation of range(n) that depends on `key` alone: int64 [n]."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    return np.argsort(philox.random_raw(n), kind="stable").astype(np.int64)


class SampleOrder:
    """The sample order of one run's training split, and how it falls on ranks."""

    def __init__(self, run: RunConfig, manifest: Manifest, split: Split = "train") -> None:
        self.seed = run.seed
        self.window = run.data.shuffle_window
        self.micro = run.batch.micro_sequences
        self.micro_batches = run.batch.micro_batches
        tokens = TokenSplit(run.data_path, manifest, split)
        self.num_samples = tokens.num_samples(run.data.seq_len)
        # First sample of each shard: a sample belongs to the shard in which it starts.
        first = -(-tokens.starts // run.data.seq_len)
        self._first = np.minimum(first, self.num_samples).astype(np.int64)

    def samples(self, start: int, stop: int) -> Ids:
        """Sample ids at positions [start, stop): int64 [stop - start]."""
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

    def step(self, step: int) -> Ids:
        """Sample ids of a step: int64 [M, micro], row j being micro-batch j."""
        size = self.micro_batches * self.micro
        return self.samples(step * size, (step + 1) * size).reshape(self.micro_batches, self.micro)

    def rank_step(self, step: int, rank: int, world_size: int) -> Ids:
        """Sample ids that a rank trains on in a step: int64 [⌈M / world⌉, micro].

        Micro-batch j goes to rank j mod world; slots that are left over hold `PADDING`.
        """
        mine = self.step(step)[rank::world_size]
        out = np.full((accumulation_steps(self.micro_batches, world_size), self.micro), PADDING, dtype=np.int64)
        out[: len(mine)] = mine
        return out

    @lru_cache(maxsize=4)  # noqa: B019 — one order lives as long as its process
    def _shard_order(self, epoch: int) -> Ids:
        return permutation(len(self._first) - 1, "shards", self.seed, epoch)

    @lru_cache(maxsize=4)  # noqa: B019
    def _window_bounds(self, epoch: int) -> Ids:
        """Position in the epoch at which each window starts, and N at the end."""
        order = self._shard_order(epoch)
        sizes = (self._first[1:] - self._first[:-1])[order]
        per_window = np.add.reduceat(sizes, np.arange(0, len(sizes), self.window))
        return np.cumsum([0, *per_window], dtype=np.int64)

    @lru_cache(maxsize=4)  # noqa: B019
    def _window_samples(self, epoch: int, window: int) -> Ids:
        shards = self._shard_order(epoch)[window * self.window : (window + 1) * self.window]
        ids = np.concatenate([np.arange(self._first[s], self._first[s + 1]) for s in shards])
        return ids[permutation(len(ids), "samples", self.seed, epoch, window)]


def ids_digest(ids: Ids) -> str:
    """sha256 of a step's sample ids, sorted, as little-endian int64; the same for every world size."""
    return hashlib.sha256(np.sort(ids[ids != PADDING]).astype("<i8").tobytes()).hexdigest()
