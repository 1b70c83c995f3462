"""`gpt2dist chaos` on real clusters: seeded faults, the same losses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.cluster import chaos
from gpt2dist.config import UserError
from gpt2dist.train import rundir
from tests.chaos.soak import soak
from tests.conftest import tiny_run
from tests.ray.test_train import Run, write

CHANGES: dict[str, Any] = {
    "eval__every_steps": 50,
    "checkpoint__every_steps": 10,
    "cluster__cpus_per_worker": 1,
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("workers", "faults", "steps"),
    [
        (2, ["kill-worker", "kill-driver", "bad-checkpoint", "disk-full", "storage-away", "nan"], 200),
        ([1, 2], ["drain-node", "kill-node", "stall-worker"], 1200),
    ],
)
def test_faults_change_nothing(
    make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path, workers: Any, faults: list[str], steps: int
) -> None:
    """Of the first schedule a worker is killed while the storage is away."""
    changes = {**CHANGES, "train__steps": steps, "cluster__workers": workers}
    run = tiny_run(storage=str(tmp_path), data__path=make_data([30_000]), **changes)
    write(run, tmp_path)
    done = gpt2dist("chaos", "run.toml", "--faults", ",".join(faults), "--seed", "1", "--json", timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["passed"]
    assert sorted(f["fault"] for f in verdict["faults"]) == sorted(faults)
    assert verdict["audit"]["samples"] == steps * run.global_batch
    assert Path(verdict["picture"]).stat().st_size > 10_000


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_dozen_kills(tmp_path: Path) -> None:
    """tests/chaos/soak.py does more of it."""
    report = soak(tmp_path, kills=12, seed=0, latest_s=15.0)
    assert sum(report.kills.values()) == report.resumes == 12
    assert len(report.kills) == 3
    assert (report.duplicates, report.gaps) == (0, 0)
    assert report.weights_equal
    assert report.losses_equal


def test_the_schedule_depends_on_the_seed_alone() -> None:
    faults = ["kill-worker", "kill-node", "kill-node"]
    first = chaos.schedule(faults, 100, 1)
    assert first == chaos.schedule(faults, 100, 1)
    assert sorted(fault for _, fault in first) == sorted(faults)
    assert [step for step, _ in first] == sorted(step for step, _ in first)
    assert all(10 <= step < 90 for step, _ in first)
    assert len({tuple(chaos.schedule(faults, 100, seed)) for seed in range(10)}) > 5


def test_two_faults_of_one_step_that_count_as_one_are_refused(tmp_path: Path) -> None:
    short = tiny_run(storage=str(tmp_path), train__steps=3)
    with pytest.raises(UserError, match="--faults: 4 of them do not fit into 3 steps: raise train.steps"):
        chaos.with_faults(short, ["nan"] * 4, 0)
    assert chaos.with_faults(short, ["nan"] * 3, 0)[0].train.nan_at == [0, 1, 2]


def test_how_long_a_run_has_to_be_for_its_faults(tmp_path: Path) -> None:
    run = tiny_run(storage=str(tmp_path), train__steps=100)
    rundir.metrics_log(run.run_dir).append(*({"step": step, "step_s": 0.1} for step in range(100)))
    assert chaos.steps_needed(run, [(50, "kill-worker"), (90, "storage-away")]) == 100
    assert chaos.steps_needed(run, [(50, "kill-worker"), (60, "drain-node")]) == 750  # 1.5 × 20 s ÷ 4 s
    assert chaos.longer(run, 750).stop_step == 750
    part = chaos.longer(tiny_run(train__steps=100, train__stop_at=50), 90)
    assert (part.train.steps, part.stop_step) == (100, 90)


def test_what_cannot_be_broken_is_refused(make_data: Callable[..., str], tmp_path: Path) -> None:
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]))
    with pytest.raises(UserError, match="--faults: kill-moon: no such fault; there are: kill-worker, "):
        chaos.compare(run, ["kill-moon"], 0, print)
    with pytest.raises(UserError, match="chaos damages files"):
        chaos.compare(tiny_run(storage="s3://bucket/runs", data__path=run.data.path), ["kill-worker"], 0, print)
    gpu = tiny_run(storage=str(tmp_path), data__path=run.data.path, cluster__gpus_per_worker=1)
    with pytest.raises(UserError, match="cluster.gpus_per_worker.*--set cluster.gpus_per_worker=0"):
        chaos.compare(gpu, ["kill-worker"], 0, print)
    (tmp_path / "run-chaos").mkdir()
    with pytest.raises(UserError, match="run-chaos: is there already"):
        chaos.compare(run, ["kill-worker"], 0, print)


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [(1.0, 1.5, 0.5), (math.nan, math.nan, 0.0), (math.nan, 1.0, math.inf), (1.0, math.nan, math.inf)],
)
def test_a_loss_that_is_no_number_in_one_run_only_differs(a: float, b: float, difference: float) -> None:
    assert chaos._difference(a, b) == difference


def test_a_verdict_sees_another_curve_and_lost_samples() -> None:
    verdict = chaos.Verdict([], 0.0, 0.0, {"duplicates": 0, "gaps": 0}, 1, 0, [2], "a", "b")
    assert verdict.passed
    changes: list[dict[str, Any]] = [
        {"largest_difference": 1e-7},
        {"audit": {"duplicates": 8, "gaps": 0}},
        {"audit": {"duplicates": 0, "gaps": 8}},
    ]
    for change in changes:
        assert not chaos.Verdict(**{**vars(verdict), **change}).passed
