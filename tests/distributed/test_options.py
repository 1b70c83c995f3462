"""Each engine option trains as the plain engine does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import tiny_run
from tests.distributed import jobs

Ranks = Callable[..., list[Any]]
STEPS = [0, 1, 2, 3, 4]
PLAIN = {"overlap_comm": False, "bucket_mb": 1e6}  # not allocated: no more than the model has
# (stages, options, largest difference of a loss; 0 is bitwise, weights and moments too)
OPTIONS: list[tuple[tuple[int, ...], dict[str, Any], float]] = [
    ((1, 2, 3), {"overlap_comm": True}, 0.0),
    ((1, 2, 3), {"bucket_mb": 0.5}, 0.0),
    ((1, 2), {"offload_optimizer": True}, 0.0),
    ((3,), {"offload_optimizer": True}, 1e-6),  # it takes the gradient norm in another order
    ((3,), {"offload_param": True}, 0.0),
    ((3,), {"offload_optimizer": True, "offload_param": True}, 1e-6),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_options_change_no_loss(ranks: Ranks, precision: str) -> None:
    cases = [(stage, options, bar) for stage in (1, 2, 3) for stages, options, bar in OPTIONS if stage in stages]
    calls = []
    for stage, options, _ in cases:
        for settings in (PLAIN, PLAIN | options):
            changes = {f"train__{key}": value for key, value in settings.items()}
            calls.append((tiny_run(train__precision=precision, train__zero_stage=stage, **changes), STEPS))
    for results in ranks(jobs.drive_all, 2, calls, timeout=200):
        for case, plain, changed in zip(cases, results[::2], results[1::2], strict=True):
            assert all(changed["applied"])
            assert changed["losses"] == pytest.approx(plain["losses"], abs=case[2], rel=0), case
            assert case[2] or changed["state"] == plain["state"], case


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_blocks_follow_the_eager_losses_and_repeat(ranks: Ranks, stage: int) -> None:
    runs = [tiny_run(train__zero_stage=stage, train__compile=on, model__dropout=0.0) for on in (False, True)]
    eager, compiled = ranks(jobs.drive_all, 2, [(run, STEPS) for run in runs], timeout=300)[0]
    assert compiled["losses"] == pytest.approx(eager["losses"], abs=1e-5, rel=0)
    with_dropout = (tiny_run(train__zero_stage=stage, train__compile=True), STEPS[:2])
    once, again = (ranks(jobs.drive_all, 2, [with_dropout], timeout=300)[0][0] for _ in range(2))
    assert once == again


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_block_is_compiled_as_a_whole_and_once_for_all(ranks: Ranks, stage: int) -> None:
    """At stage 3 DeepSpeed's hooks of each layer would cut it into dozens of graphs, anew for each block."""
    run = tiny_run(train__zero_stage=stage, train__compile=True, model={"n_layer": 6, "n_head": 2, "n_embd": 32})
    assert ranks(jobs.compiled_graphs, 1, run) == [1]
