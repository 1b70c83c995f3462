"""Steps whose gradients are not finite: nothing changes, they are counted, and too many in a row stop the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2dist.data.mixture import Mixture
from gpt2dist.data.order import SampleOrder
from gpt2dist.train import rundir
from tests.conftest import tiny_run
from tests.distributed import jobs, saves

Ranks = Callable[..., list[Any]]


@pytest.mark.timeout(240)
def test_a_skipped_step_leaves_no_trace(ranks: Ranks) -> None:
    """NaN on one rank of two: at every stage the run goes on bit by bit as one that never had this step."""
    pairs = [(precision, stage) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
    calls: list[tuple[Any, ...]] = []
    for precision, stage in pairs:
        run = tiny_run(train__precision=precision, train__zero_stage=stage)
        calls += [(run, [0, 1, 2, 3, 4], frozenset({2})), (run, [0, 1, 3, 4])]
    for results in ranks(jobs.drive_all, 2, calls):
        for pair, broken, whole in zip(pairs, results[::2], results[1::2], strict=True):
            assert broken["applied"] == [True, True, False, True, True], pair
            assert np.isnan(broken["losses"].pop(2))
            assert not np.isfinite(broken["norms"].pop(2))
            for key in ("losses", "norms", "state", "scalars"):
                assert broken[key] == whole[key], (pair, key)


def test_fp16_recovers_from_too_large_a_loss_scale(ranks: Ranks) -> None:
    runs = [
        tiny_run(
            train__precision="fp16", train__zero_stage=stage, train__initial_loss_scale=2**28, train__max_skipped=2
        )
        for stage in (1, 2, 3)
    ]
    for results in ranks(jobs.drive_all, 2, [(run, list(range(24))) for run in runs]):
        for result in results:
            skipped = result["applied"].count(False)
            assert 4 <= skipped <= 18
            assert result["applied"] == [False] * skipped + [True] * (24 - skipped)
            assert result["scalars"]["optimizer_steps"] == 24 - skipped
            assert result["scalars"]["loss_scale.cur_scale"] == 2 ** (
                28 - skipped + 1
            )  # the first only uses hysteresis


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("precision", "steps"), [("fp32", [5, 6, 7]), ("bf16", [5, 6, 7]), ("fp16", [9, 10, 11])])
def test_too_many_in_a_row_stop_the_run_and_name_the_samples(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path, precision: str, steps: list[int]
) -> None:
    """In fp16 the loss scale falls from 8 to 1 in four steps (the first has no effect) before it counts."""
    run = tiny_run(
        storage=str(tmp_path),
        data__path=make_data([3000, 3000]),
        train__precision=precision,
        train__max_skipped=3,
        train__steps=20,
        train__initial_loss_scale=8,
    )
    messages = ranks(jobs.train_poisoned, 2, run, 5)
    assert messages[0] == messages[1]
    assert f"3 steps in a row, the last being step {steps[-1]} on samples" in messages[0]
    event = rundir.events_log(run.run_dir).read()[-1]
    assert event["event"] == "non_finite"
    assert event["steps"] == steps
    order = SampleOrder(run, Mixture.open(run))
    assert event["samples"] == [sorted(order.step(s).reshape(-1).tolist()) for s in steps]
    lines = rundir.metrics_log(run.run_dir).read()
    assert [line["step"] for line in lines if line.get("skipped")] == list(range(5, steps[-1] + 1))
    assert jobs.committed_step(run) <= steps[-1]


@pytest.mark.timeout(180)
def test_those_before_a_stop_count_and_what_was_saved_stays(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    """Two skipped steps, a stop, one more; and a save that is still being written when the run gives up."""
    changes = {"storage": str(tmp_path), "data__path": make_data([3000]), "eval__every_steps": 0}
    changes |= {"train__max_skipped": 3, "train__nan_at": list(range(5, 12))}
    stopped = tiny_run(train__stop_at=7, **changes)
    slow = tiny_run(name="slow", checkpoint__every_steps=5, **changes)
    calls = [(stopped, saves.none), (tiny_run(**changes), saves.none), (slow, saves.slow_disk)]
    (ends, _) = ranks(saves.train_all, 2, calls)
    assert ends[0] == {"start": 0, "end": "stopped"}
    assert ends[1]["start"] == 7
    for end in ends[1:]:
        assert end["end"].startswith("gradients were not finite in 3 steps in a row, the last being step 7 on samples ")
    assert [e["steps"] for e in rundir.events_log(stopped.run_dir).read() if e["event"] == "non_finite"] == [[5, 6, 7]]
    assert jobs.committed_step(slow) == 5
