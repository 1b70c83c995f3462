"""The ledger: which samples each committed step trained on, and the audit that proves it.

`ledger.jsonl` has a line a step: step, positions, hash of the sample ids that the ranks really received,
world size, attempt, fingerprint of the data set. Lines are written before the checkpoint that commits them; on a
resume, lines of steps that were not committed are dropped, so every step stands once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import Mixture
from gpt2dist.data.order import Ids, SampleOrder, consumed, ids_digest, positions


def entry(run: RunConfig, step: int, ids: Ids, world_size: int, attempt: int, data: str) -> dict[str, Any]:
    """The ledger's line for a step; ids: what all ranks received, any shape, padding included; data: fingerprint."""
    return {
        "step": step,
        "positions": _positions(run, step),
        "samples_sha256": ids_digest(ids.reshape(-1)),
        "world_size": world_size,
        "attempt": attempt,
        "data": data,
    }


def _positions(run: RunConfig, step: int) -> list[int]:
    """[first, end, first, end, …] of a step; more than one range only where samples were left out on purpose."""
    parts = positions(consumed(run.batch, step), consumed(run.batch, step + 1), run.data.skip)
    return [bound for part in parts for bound in part]


@dataclass(frozen=True)
class Audit:
    """What a ledger proves."""

    samples: int
    """Samples that the committed steps trained on."""
    duplicates: int
    """Positions that more than one line claims."""
    gaps: int
    """Positions below the last committed step that no line claims, or whose samples were other ones."""
    skipped: int
    """Samples left out on purpose."""
    steps: int
    """Committed steps."""
    attempts: int
    """Starts of the worker group that committed a step."""
    unverifiable: int
    """Samples of steps that were trained on another data set: their ids cannot be held against its order."""

    @property
    def clean(self) -> bool:
        """Every sample exactly once, and proven."""
        return self.duplicates == self.gaps == self.unverifiable == 0

    def to_json(self) -> dict[str, int]:
        """For --json."""
        return asdict(self)


def audit(run: RunConfig, data: Mixture, lines: list[dict[str, Any]], committed_step: int) -> Audit:
    """Hold the ledger of a run up to `committed_step` against the order, which is computed afresh.

    Of steps on another data set than `data` only the positions can be checked.
    """

    def size(steps: Iterable[int]) -> int:
        return sum(consumed(run.batch, step + 1) - consumed(run.batch, step) for step in steps)

    order = SampleOrder(run, data)
    lines = [line for line in lines if line["step"] < committed_step]
    fingerprint = data.fingerprint
    right: set[int] = set()
    elsewhere: set[int] = set()
    duplicates = 0
    for line in lines:
        step = line["step"]
        if step in right or step in elsewhere:
            duplicates += size([step])
        elif line["positions"] != _positions(run, step):
            continue
        elif line.get("data", fingerprint) != fingerprint:
            elsewhere.add(step)
        elif line["samples_sha256"] == ids_digest(order.step(step).reshape(-1)):
            right.add(step)
    last = max(_positions(run, committed_step - 1), default=0) if committed_step else 0
    return Audit(
        samples=size(right),
        duplicates=duplicates,
        gaps=consumed(run.batch, committed_step) - size(right) - size(elsewhere),
        skipped=sum(end - first for first, end in run.data.skip if first < last),
        steps=committed_step,
        attempts=len({line["attempt"] for line in lines}),
        unverifiable=size(elsewhere),
    )
