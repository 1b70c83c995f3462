"""A loss that has jumped, or is not finite, for some steps in a row."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 100
"""Steps whose median a loss is held against."""
FEWEST = 10
"""Steps that must have been before a jump can be told."""


class Divergence:
    """Sees every step's loss in order; the same on all ranks, since the loss is."""

    def __init__(self, spike: float, in_a_row: int, losses: Iterable[float] = ()) -> None:
        """spike: in nats; losses: of the steps before, the newest last."""
        self.spike, self.in_a_row = spike, in_a_row
        self._good = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)
        self._bad = 0

    @property
    def suspicious(self) -> bool:
        """Whether the newest step was bad: its state may have to be left."""
        return self._bad > 0

    def add(self, loss: float, applied: bool) -> bool:
        """Take in a step; `applied`: its gradients were finite. True: this is the last of `in_a_row` bad steps."""
        if applied and math.isfinite(loss) and not self._jumped(loss):
            self._good.append(loss)
            self._bad = 0
        else:
            self._bad += 1
        return self._bad >= self.in_a_row

    def _jumped(self, loss: float) -> bool:
        return len(self._good) >= FEWEST and loss > statistics.median(self._good) + self.spike
