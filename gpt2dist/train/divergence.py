"""A loss that has jumped, or is not finite, for some steps in a row."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 100
"""Steps whose median a loss is held against."""
FEWEST = 10
"""Steps that must have been before a jump can be told."""


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
