"""The formulas against a simulation of a run that fails at random."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpt2dist.train.interval import expected_goodput, young_daly


def simulate(interval: float, stall: float, restart: float, mtbf: float, write: float, work: float) -> float:
    """Share of the time that was training, of a run of `work` seconds whose failures are exponential.

    A save begins after each `interval` of training and holds it up for `stall`; it counts `write` seconds later.
    """
    rng = np.random.default_rng(1)
    now, kept, done = 0.0, 0.0, 0.0
    failure = rng.exponential(mtbf)
    pending: tuple[float, float] | None = None  # when it is committed, and the work in it
    while kept < work:
        end = now + interval + stall
        if failure < end:
            if pending and pending[0] <= failure:
                kept = pending[1]
            now, pending, done = failure, None, kept
            while True:  # a restart may be hit, too
                failure = now + rng.exponential(mtbf)
                if failure > now + restart:
                    now += restart
                    break
                now = failure
            continue
        if pending and pending[0] <= end:
            kept = pending[1]
        now, done = end, done + interval
        if write:
            pending = (now + write, done)
        else:
            kept = done
    return kept / now


@pytest.mark.parametrize(
    ("interval", "stall", "restart", "mtbf", "write"),
    [
        (600, 5, 60, 3600, 0),
        (600, 30, 120, 1800, 0),
        (60, 5, 60, 3600, 0),
        (3000, 10, 60, 3600, 0),
        (600, 1, 60, 3600, 90),
    ],
)
def test_goodput_is_that_of_a_simulated_run(
    interval: float, stall: float, restart: float, mtbf: float, write: float
) -> None:
    simulated = simulate(interval, stall, restart, mtbf, write, work=4000 * 3600)
    assert expected_goodput(interval, stall, restart, mtbf, write) == pytest.approx(simulated, rel=0.02)


@pytest.mark.parametrize(("stall", "mtbf"), [(5.0, 3600.0), (60.0, 7200.0), (0.5, 600.0)])
def test_interval_is_the_best_one(stall: float, mtbf: float) -> None:
    """No other interval keeps more than a thousandth more of the time."""
    chosen = young_daly(stall, mtbf)
    goodputs = [expected_goodput(chosen * 1.05**k, stall, 30.0, mtbf) for k in range(-60, 60)]
    assert max(goodputs) - expected_goodput(chosen, stall, 30.0, mtbf) < 1e-3


def test_edges() -> None:
    assert young_daly(50.0, 3600.0) == 600.0
    assert young_daly(300.0, 100.0) == 100.0  # saving takes longer than the machines live
    assert math.isinf(young_daly(5.0, math.inf))
    assert expected_goodput(99.0, 1.0, 60.0, math.inf) == 0.99
    assert expected_goodput(1e9, 1.0, 60.0, 60.0) == 0.0
    assert expected_goodput(1.0, 1.0, 1e9, 60.0) == 0.0
