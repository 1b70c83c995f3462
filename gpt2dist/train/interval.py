"""How often to save: the interval that loses least between saving and redoing (Young 1974; Daly 2006)."""

from __future__ import annotations

import math


def young_daly(save_seconds: float, mtbf_seconds: float) -> float:
    """√(2 · cost of a save · mean time between failures), in seconds (Young 1974, eq. 9)."""
    return math.sqrt(2 * save_seconds * mtbf_seconds)
