from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import Mixture
from gpt2dist.data.order import SampleOrder
from gpt2dist.train import rundir
from gpt2dist.train.ledger import Audit, audit, entry
from gpt2dist.train.resume import order_id
from tests.conftest import tiny_run

Lines = list[dict[str, Any]]


@pytest.fixture
def run(make_data: Callable[..., str]) -> RunConfig:
    return tiny_run(data__path=make_data([500, 300]))  # 49 samples: 12 steps of 8 are two epochs


def ledger_of(run: RunConfig, steps: int = 12) -> Lines:
    data = Mixture.open(run)
    order = SampleOrder(run, data)
    name = order_id(run.model_dump(mode="json"), data.fingerprint)
    return [entry(run, s, order.step(s), 1 + s % 3, 1 + s // 5, name) for s in range(steps)]


def result(run: RunConfig, lines: Lines, committed: int = 12) -> Audit:
    return audit(run, Mixture.open(run), lines, committed)


def test_clean(run: RunConfig) -> None:
    expected = {"samples": 96, "duplicates": 0, "gaps": 0, "skipped": 0, "steps": 12, "attempts": 3, "unverifiable": 0}
    assert asdict(result(run, ledger_of(run))) == expected
    assert result(run, ledger_of(run)).clean


def test_lines_beyond_the_committed_step_do_not_count(run: RunConfig) -> None:
    assert result(run, ledger_of(run), committed=7).samples == 56


def test_gap(run: RunConfig) -> None:
    lines = ledger_of(run)
    del lines[4]
    found = result(run, lines)
    assert (found.gaps, found.duplicates, found.clean) == (8, 0, False)


def test_duplicate(run: RunConfig) -> None:
    lines = ledger_of(run)
    lines.insert(5, lines[4])
    found = result(run, lines)
    assert (found.gaps, found.duplicates, found.clean) == (0, 8, False)


@pytest.mark.parametrize("change", [{"samples_sha256": "0" * 64}, {"positions": [0, 8]}, {"data": "other/order"}])
@pytest.mark.parametrize("place", [4, 5, 12])
def test_two_lines_of_a_step_are_a_duplicate_in_any_order(run: RunConfig, change: dict[str, Any], place: int) -> None:
    lines = ledger_of(run)
    lines.insert(place, lines[4] | change)
    found = result(run, lines)
    assert (found.gaps, found.duplicates, found.samples, found.clean) == (0, 8, 96, False)
    lines.remove(ledger_of(run)[4])
    assert result(run, lines).duplicates == 0
    assert not result(run, lines).clean


@pytest.mark.parametrize("change", [{"step": "4"}, {"attempt": None}, {"positions": 5}, {"data": 5}])
def test_what_a_foreign_line_does_not_say_is_a_gap(run: RunConfig, tmp_path: Path, change: dict[str, Any]) -> None:
    lines = ledger_of(run)
    log = rundir.ledger_log(str(tmp_path))
    log.append(
        *lines[:4], lines[4] | change, *lines[5:], {"step": -1, "attempt": 1, "positions": [], "samples_sha256": ""}
    )
    found = result(run, log.read())
    assert (found.gaps, found.duplicates, found.clean) == (8, 0, False)


def test_what_a_superseded_attempt_wrote_late_was_not_kept(run: RunConfig) -> None:
    lines = ledger_of(run)
    late = [line | {"attempt": 1} for line in lines[5:8]]  # of the second attempt, which began at step 5
    assert result(run, [*lines[:6], *late, *lines[6:]]) == result(run, lines)


def test_other_samples_than_the_order_says(run: RunConfig) -> None:
    lines = ledger_of(run)
    lines[3]["samples_sha256"] = lines[4]["samples_sha256"]
    assert result(run, lines).gaps == 8
    for line in (lines := ledger_of(run.model_copy(update={"seed": 9}))):
        line["data"] = Mixture.open(run).fingerprint  # as older versions named the order
    assert result(run, lines).gaps == 96


def test_steps_on_another_data_set_are_not_proven(run: RunConfig, make_data: Callable[..., str]) -> None:
    other = run.model_copy(update={"data": run.data.model_copy(update={"path": make_data([900], name="other")})})
    lines = ledger_of(run)[:5] + ledger_of(other)[5:]
    found = result(other, lines)
    assert (found.samples, found.unverifiable, found.gaps, found.clean) == (56, 40, 0, False)
    assert result(run, lines).samples == 40  # the steps before, against the data set of that time
    del lines[2]
    lines.append(lines[0])
    assert (result(other, lines).gaps, result(other, lines).duplicates) == (8, 8)


@pytest.mark.parametrize("key", ["seed", "data__shuffle_window", "batch__micro_batches"])
def test_steps_in_another_order_are_not_proven(run: RunConfig, key: str) -> None:
    """With one of the keys that decide changed at step 5: either part is proven with its own configuration."""
    other = tiny_run(data__path=run.data.path, **{key: 2})
    lines = ledger_of(run)[:5] + ledger_of(other)[5:]
    size = other.global_batch
    found = result(other, lines)
    assert (found.samples, found.unverifiable, found.gaps, found.clean) == (7 * size, 5 * 8, 0, False)
    assert "NOT proven: 40 other samples" in str(found)
    assert (result(run, lines).samples, result(run, lines).unverifiable) == (5 * 8, 7 * size)
    lines[7]["samples_sha256"] = lines[8]["samples_sha256"]
    assert result(other, lines).gaps == size


def test_steps_of_a_growing_batch_count_as_many_samples_as_they_have(make_data: Callable[..., str]) -> None:
    grows = tiny_run(data__path=make_data([500, 300]), batch__warmup_steps=8)  # M = 1 1 1 2 2 2 3 3 4 4 …
    lines = ledger_of(grows)
    assert [line["positions"] for line in lines[2:5]] == [[4, 6], [6, 10], [10, 14]]
    clean = result(grows, lines)
    assert (clean.samples, clean.clean) == (2 * (15 + 16), True)
    assert result(grows, lines[:3] + lines[4:]).gaps == 4
    assert result(grows, [*lines[:7], lines[6], *lines[7:]]).duplicates == 6
    assert result(grows, lines, committed=2).samples == 4
    constant = tiny_run(data__path=grows.data.path)
    assert result(constant, lines).samples == 0


def test_wrong_positions(run: RunConfig) -> None:
    lines = ledger_of(run)
    lines[3]["positions"] = [0, 8]
    assert result(run, lines).gaps == 8
