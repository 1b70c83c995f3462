"""A loss that has jumped, or is not finite, for some steps in a row; and what the group does about it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import numpy as np

from gpt2dist.config import RunConfig
from gpt2dist.data.documents import documents_of
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import SampleOrder, consumed, positions
from gpt2dist.train import checkpoint, rundir

WINDOW = 100
"""Steps whose median a loss is held against."""
FEWEST = 10
"""Steps that must have been before a jump can be told."""
LATEST_BYTES, LINE_BYTES = 1 << 17, 1024
"""Of metrics.jsonl: well over as many steps as a loss is held against; more than a line has."""
NAMED_DOCUMENTS = 1000
"""Of a divergence, in events.jsonl."""


class Diverged(Exception):
    """`train.max_skipped` steps in a row had non-finite gradients, or no rewind helps; the message says which."""


def is_applied(row: dict[str, Any]) -> bool:
    """Of a line of metrics: false where its gradients were not finite and fp16's loss scale is not to blame."""
    return "skipped" not in row or "rescaled" in row


class Divergence:
    """Sees every step's loss in order; the same on all ranks, since the loss is."""

    def __init__(self, spike: float, in_a_row: int) -> None:
        """spike: in nats. What was before is taken in by `add` as well."""
        self.spike, self.in_a_row = spike, in_a_row
        self._good = deque[float](maxlen=WINDOW)
        self.bad = 0
        """Bad steps in a row, up to the newest one: their state may have to be left."""

    def add(self, loss: float, applied: bool) -> bool:
        """Take in a step; `applied`: its gradients were finite. True: this is the last of `in_a_row` bad steps."""
        if applied and math.isfinite(loss) and not self._jumped(loss):
            self._good.append(loss)
            self.bad = 0
        else:
            self.bad += 1
        return self.bad >= self.in_a_row

    def _jumped(self, loss: float) -> bool:
        return len(self._good) >= FEWEST and loss > statistics.median(self._good) + self.spike


class Guard:
    """When a group goes back to an earlier checkpoint, or gives up; events.jsonl then has the samples."""

    def __init__(self, run: RunConfig, data: Mixture, record: rundir.Record, attempt: int) -> None:
        """Takes in the steps before this attempt. A collective."""
        self.run, self.data, self.record, self.attempt = run, data, record, attempt
        train = run.train
        self._divergence = Divergence(train.spike, train.rewind_after)
        self._skipped: list[int] = []  # the newest steps, where none of them was applied
        latest = max(LATEST_BYTES, LINE_BYTES * (WINDOW + max(train.rewind_after, train.max_skipped)))
        before = record.metrics.tail(latest, parts=2) if record.rank == 0 else []
        for row in record.agree([row for row in before if {"step", "loss"} <= row.keys()]):
            self.alarm(row)

    @property
    def bad(self) -> int:
        """Bad steps in a row, up to the newest one; 0 where `train.rewind` is off."""
        return self._divergence.bad

    def alarm(self, metrics: dict[str, Any]) -> bool:
        """Take in a step. True: the group has to go back or give up, see `answer`."""
        train = self.run.train
        if train.rewind:
            return self._divergence.add(metrics["loss"], is_applied(metrics))
        if "skipped" not in metrics:
            self._skipped.clear()
        elif not is_applied(metrics):
            self._skipped.append(metrics["step"])
        return len(self._skipped) >= train.max_skipped

    def answer(self, step: int) -> None:
        """After an alarm at the end of `step` steps: returns where the next group has to begin before the bad ones.

        A collective.

        Raises:
            Diverged: that would not help, or `train.rewind` is off.
        """
        if not self.run.train.rewind:
            self._give_up()
        self._rewind(step)

    def _rewind(self, step: int) -> None:
        """Log the bad ones, so that the next group leaves out their samples; or raises `Diverged`. A collective."""
        run, record, first = self.run, self.record, step - self.bad
        why_not = ""
        if record.rank == 0:
            why_not = self._no_rewind(first)
            record.flush()
            numbers = consumed(run.batch, first), consumed(run.batch, step)
            ids = SampleOrder(run, self.data).samples(*numbers)
            split = MixedSplit(self.data, "train", run.data.seq_len, run.data.cache_gb)
            record.event(
                "diverged" if why_not else "rewind",
                attempt=self.attempt,
                steps=[first, step],
                losses=[row["loss"] for row in record.metrics.tail(LINE_BYTES * (step - first + 1), 2)[first - step :]],
                positions=list(positions(*numbers, run.data.skip)),
                samples=ids.tolist(),
                documents=documents_of(split, ids, NAMED_DOCUMENTS),
            )
            record.events.sync()
        if why_not := record.agree(why_not):  # all ranks leave only when it is on storage
            raise Diverged(
                f"the loss diverged in steps {first} to {step - 1}, and {why_not} (their samples are in events.jsonl)"
            )

    def _no_rewind(self, first: int) -> str:
        """Why the group does not go back to before step `first`; nothing where it does."""
        if (done := len(rundir.rewinds(self.record.events.read()))) >= self.run.train.max_rewinds:
            return f"{done} rewinds have not helped"
        if rundir.saved_step(self.run.run_dir, first) and not checkpoint.is_there_up_to(self.run.run_dir, first):
            return "no checkpoint before them is left to go back to"
        return ""

    def _give_up(self) -> None:
        """Raises `Diverged` with the samples of the steps whose gradients were not finite. A collective."""
        steps, order = self._skipped, SampleOrder(self.run, self.data)
        samples = [np.sort(order.step(step), axis=None).tolist() for step in steps]
        first = ", ".join(map(str, samples[-1][:8])) + (", …" if len(samples[-1]) > 8 else "")
        cause = (
            f"gradients were not finite in {len(steps)} steps in a row, the last being step {steps[-1]} on samples "
            f"{first} (all of them are in events.jsonl)"
        )
        self.record.event("non_finite", steps=steps, samples=samples, cause=cause)
        raise Diverged(cause)
