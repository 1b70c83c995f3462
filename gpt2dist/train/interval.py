"""How often to save, and what it leaves of a run's time: formulas of failures and checkpoints.

Failures come at random with a mean time between them (MTBF) of M. A checkpoint costs δ seconds in which nobody trains.

J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.
"""

from __future__ import annotations

import math

WRITES_APART = 10
"""Saves that are written in the background begin at least this many times as long apart as one takes to be written."""


def young_daly(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of training between two checkpoints that waste the least: √(2·M·δ) (Young 1974; Daly 2006).

    save_seconds: δ, for which a save holds up the training; mtbf_seconds: M of the whole run, above 0 (`inf`: no
    failures). Where δ ≥ 2·M the formula ends, and M is the answer (Daly 2006, the last case of his estimate).
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    return math.sqrt(2 * mtbf_seconds * save_seconds)


def expected_goodput(
    interval: float, save_stall: float, restart_seconds: float, mtbf: float, write_seconds: float = 0.0
) -> float:
    """Share of the time that goes into training that is kept, between 0 and 1 (Daly 2006, his complete cost function).

    The time that τ seconds of training take is M·e^(R/M)·(e^((τ+δ)/M) − 1): the whole stretch is done again after
    each failure in it, and each restart may fail as well.

    interval: τ, seconds of training between two saves; save_stall: δ; restart_seconds: R, from a failure to the first
    new step; mtbf: M; write_seconds: from a snapshot to its commit, while training goes on. What a failure costs more
    because of it is on average as long, and counts as part of R. All in seconds.
    """
    if math.isinf(mtbf):
        return interval / (interval + save_stall)
    stretch, restart = (interval + save_stall) / mtbf, (restart_seconds + write_seconds) / mtbf
    if stretch + restart > 700:  # e^709 is the largest that a float holds
        return 0.0
    return interval / (mtbf * math.exp(restart) * math.expm1(stretch))
