from __future__ import annotations

import math

from gpt2dist.train.divergence import Divergence


def first_alarm(losses: list[float], spike: float = 1.0, in_a_row: int = 3) -> int | None:
    seen = Divergence(spike, in_a_row)
    return next((step for step, loss in enumerate(losses) if seen.add(loss, applied=True)), None)


def test_a_jump_that_stays_is_found_at_its_third_step() -> None:
    falling = [10 - 0.05 * i for i in range(100)]
    assert first_alarm(falling) is None
    assert first_alarm([*falling[:60], *[9.6] * 5]) == 62
    assert first_alarm([*falling[:60], 9.6, 9.6, 7.0, 9.6, 9.6, 7.0]) is None  # never three in a row
    assert first_alarm([*falling[:60], *[8.0] * 5]) is None  # not a whole nat above the median


def test_what_is_not_finite_counts_from_the_first_step() -> None:
    assert first_alarm([math.nan] * 3) == 2
    assert first_alarm([10.0, math.inf, math.nan, math.inf]) == 3


def test_skipped_steps_count() -> None:
    seen = Divergence(1.0, 2)
    assert [seen.add(5.0, applied) for applied in (True, False, True, False, False)] == [False] * 4 + [True]


def test_what_was_bad_does_not_become_the_measure() -> None:
    seen = after([4.0] * 50, 5)
    assert [seen.add(6.0, applied=True) for _ in range(5)] == [False] * 4 + [True]


def test_losses_before_a_resume_count() -> None:
    assert after([4.0] * 10, 1).add(5.5, applied=True)
    assert not after([4.0] * 9, 1).add(5.5, applied=True)
    assert after([4.0] * 10 + [5.5] * 2, 3).add(5.5, applied=True)  # also those that were bad


def after(losses: list[float], in_a_row: int) -> Divergence:
    seen = Divergence(1.0, in_a_row)
    for loss in losses:
        seen.add(loss, applied=True)
    return seen
