"""The ledger: which samples each committed step trained on, and the audit that proves it.

`ledger.jsonl` has a line a step: step, positions, hash of the sample ids that the ranks really received, world
size, attempt, and as `data` the name of the order (`resume.order_id`: data set and keys that decide). Lines are
written before the checkpoint that commits them; on a resume, lines of steps that were not committed are dropped, so
every step stands once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpt2dist.config import RunConfig, UserError
from gpt2dist.data.mixture import Mixture
from gpt2dist.data.order import Ids, SampleOrder, consumed, ids_digest, positions
from gpt2dist.train import rundir
from gpt2dist.train.index import Index
from gpt2dist.train.resume import order_id


def entry(run: RunConfig, step: int, ids: Ids, world_size: int, attempt: int, data: str) -> dict[str, Any]:
    """The ledger's line for a step; ids: what all ranks received, any shape, padding included; data: `order_id`."""
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
    """Samples of steps that were trained in another order, or on another data set: their ids cannot be held against
    this one."""

    @property
    def clean(self) -> bool:
        """Every sample exactly once, and proven."""
        return self.duplicates == self.gaps == self.unverifiable == 0

    def __str__(self) -> str:
        verdict = "every sample exactly once"
        if self.duplicates or self.gaps:
            verdict = f"NOT {verdict}"
        elif self.unverifiable:
            verdict = f"NOT proven: {self.unverifiable:,} other samples were of another data set or order"
        attempts = f"{self.attempts} attempt{'s' if self.attempts != 1 else ''}"
        counts = f"{self.samples:,} samples in {self.steps:,} steps and {attempts}"
        return f"{counts}: {self.duplicates} duplicates, {self.gaps} gaps: {verdict}"


def audit_run(run_dir: str, run: RunConfig, index: Index) -> Audit:
    """Audit a run directory up to a checkpoint; run: its configuration, and the data set to hold against it.

    Raises:
        UserError: the data set is not there, or is none that the run was trained on.
    """
    data = Mixture.open(run)
    lines = rundir.ledger_log(run_dir).read()
    known = {index.data_fingerprint, *(line.get("data", "").split("/")[0] for line in lines)}
    if data.fingerprint not in known:
        raise UserError(
            f"{run_dir}: trained on data set {index.data_fingerprint[:16]}, but {data} is {data.fingerprint[:16]}"
        )
    return audit(run, data, lines, index.step)


def audit(run: RunConfig, data: Mixture, lines: list[dict[str, Any]], committed_step: int) -> Audit:
    """Hold the ledger of a run up to `committed_step` against the order, which is computed afresh.

    Of steps in another order than that of `run` and `data` it is only known that there were such steps.
    """

    def size(steps: Iterable[int]) -> int:
        return sum(consumed(run.batch, step + 1) - consumed(run.batch, step) for step in steps)

    order = SampleOrder(run, data)
    lines = [line for line in lines if 0 <= line["step"] < committed_step]
    # What an attempt wrote late, when the next one had begun before that step, was not kept.
    kept = {line["step"]: line["attempt"] for line in sorted(lines, key=lambda line: int(line["attempt"]))}
    lines = [line for line in lines if line["attempt"] == kept[line["step"]]]
    ours = (order_id(run.model_dump(mode="json"), data.fingerprint), data.fingerprint)  # the second: of older versions
    right: set[int] = set()
    elsewhere: dict[int, int] = {}  # samples of each step
    for line in lines:
        step = line["step"]
        if line.get("data", data.fingerprint) not in ours:
            elsewhere.setdefault(step, sum(line["positions"][1::2]) - sum(line["positions"][::2]))
        elif step in right or line["positions"] != _positions(run, step):
            continue
        elif line["samples_sha256"] == ids_digest(order.step(step).reshape(-1)):
            right.add(step)
    elsewhere = {step: samples for step, samples in elsewhere.items() if step not in right}
    twice = Counter(line["step"] for line in lines) - Counter(kept.keys())  # whatever they say, and in whatever order
    last = max(_positions(run, committed_step - 1), default=0) if committed_step else 0
    return Audit(
        samples=size(right),
        duplicates=size(twice.elements()),
        gaps=consumed(run.batch, committed_step) - size(right) - size(elsewhere),
        skipped=sum(end - first for first, end in run.data.skip if first < last),
        steps=committed_step,
        attempts=len({line["attempt"] for line in lines}),
        unverifiable=sum(elsewhere.values()),
    )
