"""How well the windowed shuffle mixes, against a full permutation; prints the table of docs/data.md."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from gpt2dist.data.mixture import Component, Mixture
from gpt2dist.data.order import SampleOrder, permutation
from gpt2dist.data.shards import Manifest, Shard
from tests.conftest import tiny_run

SHARDS, SAMPLES, T = 512, 2000, 16
BATCH = 480
"""Samples of a step."""


def quality(ids: np.ndarray) -> tuple[float, float, float, float]:
    """Of one epoch's order, int64 [N]: (travel, correlation, same shard, shards a step).

    travel: mean distance between a sample's place in storage and in the epoch, as a share of N (⅓ if independent);
    correlation: of neighbours' places; same shard: chance that neighbours are of one shard; shards a step: distinct.
    """
    n = len(ids)
    travel = float(np.abs(ids - np.arange(n)).mean() / n)
    correlation = float(np.corrcoef(ids[:-1], ids[1:])[0, 1])
    shard = ids // SAMPLES
    same = float((shard[:-1] == shard[1:]).mean())
    steps = [len(np.unique(shard[i : i + BATCH])) for i in range(0, n - BATCH, BATCH * 20)]
    return travel, correlation, same, float(np.mean(steps))


def main() -> None:
    """One line a window; means over 4 epochs."""
    shards = [
        Shard(file=f"t-{i}.npy", tokens=T * SAMPLES + (i == SHARDS - 1), documents=1, bytes=1, sha256="0" * 64)
        for i in range(SHARDS)
    ]
    data = Mixture([Component("", Manifest(request={}, documents={}, splits={"train": shards}))])
    table = Table("window", "travel", "correlation", "same shard", "shards a step")
    orders: list[tuple[str, list[np.ndarray]]] = []
    for window in (1, 2, 4, 8, 16, 32, 64):
        order = SampleOrder(tiny_run(data__shuffle_window=window), data)
        n = order.num_samples
        orders.append((str(window), [order.samples(e * n, (e + 1) * n) for e in range(4)]))
    orders.append(("full", [permutation(n, "full", e) for e in range(4)]))
    for name, epochs in orders:
        travel, correlation, same, steps = np.mean([quality(ids) for ids in epochs], axis=0)
        table.add_row(name, f"{travel:.3f}", f"{correlation:.3f}", f"{same:.4f}", f"{steps:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
