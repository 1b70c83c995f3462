"""The life of a save on one rank, and when saves are due. With several ranks: tests/distributed/test_saves.py."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from upath import UPath

from gpt2dist.config import CheckpointSection
from gpt2dist.train import savetimes
from gpt2dist.train.fragment import Fragment
from gpt2dist.train.index import SavedFile
from gpt2dist.train.interval import WRITES_APART, young_daly
from gpt2dist.train.notice import MARGIN_S, Notice, plan
from gpt2dist.train.saver import GUESS_BYTES_PER_S, Outcome, Saver, Written
from gpt2dist.train.savetimes import FIRST_PAUSE_S, LONGEST_PAUSE_S, SaveTimes, running_seconds
from gpt2dist.train.snapshot import Snapshot
from tests.disks import Disk, small_disk


class Alone:
    """One rank that holds one tensor."""

    rank = 0

    def __init__(self, elements: int = 10) -> None:
        self.tensor = torch.arange(float(elements))

    def fragments(self, *, owned: bool) -> list[Fragment]:
        assert owned
        return [Fragment("a", "weight", 0, self.tensor)]

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values

    def gather_objects(self, item: Any) -> list[Any]:
        return [item]


@pytest.fixture
def saver() -> Iterator[Saver]:
    saver = Saver(Alone(), attempt=1)
    yield saver
    saver.close()


def step(saver: Saver) -> Outcome | None:
    """What happens after a training step."""
    busy, failed = saver.status()
    return saver.advance(busy, failed)


def until_it_ends(saver: Saver) -> Outcome:
    outcome = saver.finish(lambda: None)
    assert outcome is not None
    return outcome


# ---------------------------------------------------------------------- one save


def test_a_save_goes_on_while_steps_are_taken(saver: Saver, tmp_path: Path) -> None:
    may_commit, committed = threading.Event(), []

    def commit(written: Written) -> None:
        assert may_commit.wait(10)
        committed.append(written)

    directory = UPath(tmp_path) / "step"
    saver.begin(5, directory, commit)
    assert saver.hold() >= 0
    saver.ranks.tensor += 1  # type: ignore[attr-defined]  # training goes on
    while not saver._save.written:  # type: ignore[union-attr]
        assert step(saver) is None
    assert saver.busy
    assert step(saver) is None  # rank 0 is still committing
    may_commit.set()
    outcome = until_it_ends(saver)
    assert not saver.busy
    assert (outcome.step, outcome.problem) == (5, "")
    assert 0 < outcome.stall < outcome.seconds
    ((written,)) = committed
    assert written.directory == directory
    assert [(f.parameter, f.start, f.length) for f in written.fragments] == [("a", 0, 10)]
    saved = torch.frombuffer(bytearray((directory / "rank-00000.safetensors").read_bytes()[-40:]), dtype=torch.float32)
    assert torch.equal(saved, torch.arange(10.0))  # as it was when the save began
    assert 0 < saver.estimate(0) == outcome.work < outcome.seconds
    assert saver.finish(lambda: None) is None  # nothing in flight


def test_long_steps_do_not_make_saves_long(saver: Saver, tmp_path: Path) -> None:
    """Between the end of the writing and its commit there may be a step of a minute."""
    saver.begin(5, UPath(tmp_path) / "step", lambda written: None)
    outcome = None
    while outcome is None:
        time.sleep(0.3)  # a step
        outcome = step(saver)
    assert outcome.seconds > 0.6
    assert saver.estimate(0) < 0.3


def test_the_state_is_held_until_it_is_copied(saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = saver._snapshot.take

    def slow(fragments: list[Fragment]) -> None:
        time.sleep(0.3)
        take(fragments)

    monkeypatch.setattr(saver._snapshot, "take", slow)
    saver.begin(5, UPath(tmp_path) / "5", lambda written: None)
    assert 0.2 < saver.hold() < 5
    saver.ranks.tensor += 1  # type: ignore[attr-defined]
    assert saver.hold() < 0.1
    assert until_it_ends(saver).stall > 0.2
    assert saver.hold() == 0  # nothing in flight
    data = (tmp_path / "5" / "rank-00000.safetensors").read_bytes()[-40:]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), torch.arange(10.0))


def test_a_save_that_cannot_be_written(saver: Saver, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saver.begin(5, UPath(tmp_path) / "file" / "step", lambda written: pytest.fail("must not be committed"))
    outcome = until_it_ends(saver)
    assert outcome.problem.startswith("NotADirectoryError: ")
    assert saver.estimate(100e6) == 2 + 100e6 / GUESS_BYTES_PER_S  # what failed says nothing of how long saves take
    saver.begin(6, UPath(tmp_path) / "step", lambda written: None)
    assert until_it_ends(saver).problem == ""


def test_a_save_that_cannot_be_committed_takes_no_room(saver: Saver, tmp_path: Path) -> None:
    def commit(written: Written) -> None:
        raise OSError(28, "No space left on device")

    saver.begin(5, UPath(tmp_path) / "5", commit)
    assert "No space left on device" in until_it_ends(saver).problem
    assert (tmp_path / "5" / "rank-00000.safetensors").exists()
    saver.begin(6, UPath(tmp_path) / "6", lambda written: None)
    assert until_it_ends(saver).problem == ""
    assert not (tmp_path / "5" / "rank-00000.safetensors").exists()
    saver.begin(7, UPath(tmp_path) / "7", lambda written: None)
    until_it_ends(saver)
    assert (tmp_path / "6" / "rank-00000.safetensors").exists()  # it is part of a checkpoint


def test_a_defect_is_no_failure_of_the_storage(saver: Saver, tmp_path: Path) -> None:
    def commit(written: Written) -> None:
        raise RuntimeError("attempt 1 was superseded by attempt 2")

    saver.begin(5, UPath(tmp_path) / "5", commit)
    with pytest.raises(RuntimeError, match="superseded"):
        saver.finish(lambda: None)


def test_waiting_counts_as_progress_only_while_bytes_are_written(saver: Saver, tmp_path: Path) -> None:
    """What the watchdog sees of a storage that hangs for ever."""
    may_commit, calls = threading.Event(), []
    saver.begin(5, UPath(tmp_path) / "5", lambda written: bool(may_commit.wait(10)))
    waits = 0

    def progress() -> None:
        calls.append(waits)

    def status() -> list[float]:
        nonlocal waits
        waits += 1
        if waits == 4:
            may_commit.set()
        return Saver.status(saver)

    saver.status = status  # type: ignore[method-assign]
    saver.finish(progress)
    assert calls[0] == 1
    assert len(calls) < waits


# ---------------------------------------------------------------------- one rank's file


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", 4) as disk:
        yield disk


def test_a_disk_that_fills_up_leaves_nothing(disk: Disk) -> None:
    elements = 300_000
    snapshot = Snapshot(0, attempt=1)
    snapshot.take(Alone(elements).fragments(owned=True))
    directory = UPath(disk.path) / "step"
    disk.fill(leave=500_000)
    with pytest.raises(OSError, match="No space left"):
        snapshot.write(directory)
    assert list(directory.iterdir()) == []
    assert disk.free >= 480_000
    disk.make_room()
    saved = snapshot.write(directory)
    assert isinstance(saved, SavedFile)
    assert [p.name for p in directory.iterdir()] == [saved.file]
    assert (directory / saved.file).stat().st_size == saved.bytes == snapshot.bytes
    snapshot.discard()  # nobody has committed it
    assert list(directory.iterdir()) == []
    shutil.rmtree(directory)
    snapshot.discard()


def test_each_attempt_has_its_own_names() -> None:
    names = [Snapshot(3, attempt).file for attempt in (1, 2, 12)]
    assert names == ["rank-00003.safetensors", "rank-00003.2.safetensors", "rank-00003.12.safetensors"]


# ---------------------------------------------------------------------- when


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(savetimes, "time", clock)
    return clock


def times(saver: Saver, events: list[dict[str, Any]] | None = None, **config: Any) -> SaveTimes:
    return SaveTimes(CheckpointSection(**config), saver, events or [])


def good(stall: float = 0.1, seconds: float = 1.0) -> Outcome:
    return Outcome(step=1, seconds=seconds, work=seconds, stall=stall, bytes=100, problem="")


def bad() -> Outcome:
    return Outcome(step=1, seconds=1.0, work=1.0, stall=0.1, bytes=100, problem="OSError: full")


def test_by_steps(saver: Saver, clock: Clock) -> None:
    t = times(saver, every_steps=3)
    due = []
    for n in range(1, 10):
        clock.now += 3600
        if t.due(n):
            due.append(n)
            t.begun()
    assert due == [3, 6, 9]


def test_what_is_kept_for_ever_is_saved(saver: Saver, clock: Clock) -> None:
    """The job files have keep_every with the automatic interval, which knows nothing of steps."""
    t = times(saver, keep_every=4)
    assert [n for n in range(1, 10) if t.due(n) and not t.begun()] == [4, 8]


def test_a_save_that_was_put_off_stays_due(saver: Saver, clock: Clock) -> None:
    t = times(saver, every_steps=3)
    assert [t.due(n) for n in range(1, 6)] == [False, False, True, True, True]
    t.begun()
    assert not t.due(5)


def test_by_minutes(saver: Saver, clock: Clock) -> None:
    t = times(saver, every_minutes=0.5)
    clock.now += 29
    assert not t.due(1)
    clock.now += 1
    assert t.due(2)
    t.begun()
    t.ended(good())
    clock.now += 29
    assert not t.due(3)
    clock.now += 1
    assert t.due(4)


def test_by_both(saver: Saver, clock: Clock) -> None:
    t = times(saver, every_steps=10, every_minutes=1.0)
    clock.now += 60
    assert t.due(7)
    t.begun()
    assert t.due(10)
    t.begun()
    clock.now += 59
    assert not t.due(11)  # a minute since the last one, whatever made it begin


def test_never_by_itself(saver: Saver, clock: Clock) -> None:
    t = times(saver, every_minutes=0.0)
    clock.now += 1e6
    assert not t.due(1)
    t.ask()
    assert t.due(2)


def test_pauses_after_failures(saver: Saver, clock: Clock) -> None:
    """5 s, 10 s, … 5 min; a save asked for by a notice waits for none of them."""
    t = times(saver, every_steps=1000)
    waited = []
    for _ in range(9):
        t.ended(bad())
        start = clock.now
        while not t.due(1):
            clock.now += 1
        waited.append(clock.now - start)
        t.begun()
    expected = [min(FIRST_PAUSE_S * 2**i, LONGEST_PAUSE_S) for i in range(9)]
    assert waited == expected
    assert waited[-1] == 300
    t.ended(bad())
    assert not t.due(1)
    t.ask()
    assert t.due(1)
    t.begun()
    t.ended(good())
    assert not t.due(1)
    t.ended(bad())
    clock.now += FIRST_PAUSE_S  # begins anew
    assert t.due(1)


def test_automatic_interval_before_anything_was_measured(saver: Saver, clock: Clock) -> None:
    saver._snapshot._data = torch.empty(25_000_000, device="meta")  # 100 MB
    t = times(saver, mtbf_hours=6.0)
    write = 2.0 + saver.bytes / GUESS_BYTES_PER_S
    assert t.interval == pytest.approx(max(young_daly(write / 20, 6 * 3600), WRITES_APART * write))
    assert 60 < t.interval < 120


def test_automatic_interval_from_what_was_measured(saver: Saver, clock: Clock) -> None:
    t = times(saver, mtbf_hours=1.0)
    clock.now += 7200
    saver._work_s.extend([3.0, 1.0, 600.0])  # one hung: for a notice it counts, not here
    assert saver.estimate(0) == 600.0
    reasoning = t.ended(good(stall=0.4))
    assert reasoning is not None
    mtbf = 7200 + 3600  # no failure in two hours, one supposed in the next
    assert reasoning == {
        "seconds": young_daly(0.4, mtbf),
        "young_daly_s": young_daly(0.4, mtbf),
        "stall_s": 0.4,
        "slowdown_s": 0.0,
        "write_s": 3.0,
        "mtbf_s": mtbf,
        "failures": 0,
    }
    assert t.interval == reasoning["seconds"]
    assert t.ended(good(stall=0.4)) is None  # no news
    saver._work_s.clear()
    saver._work_s.append(60.0)  # slow storage: ten times apart
    reasoning = t.ended(good(stall=0.4))
    assert reasoning is not None
    assert t.interval == reasoning["seconds"] == 600


def test_steps_that_are_slower_while_a_save_is_written_are_part_of_its_cost(saver: Saver, tmp_path: Path) -> None:
    t = times(saver)
    t.step(9.0)
    for _ in range(20):
        t.step(1.0)
    saver.begin(5, UPath(tmp_path) / "5", lambda written: None)
    for seconds in (1.5, 1.25, 1.0):
        t.step(seconds)
    outcome = until_it_ends(saver)
    reasoning = t.ended(outcome)
    assert reasoning is not None
    assert reasoning["slowdown_s"] == 0.75
    assert reasoning["young_daly_s"] == pytest.approx(young_daly(outcome.stall + 0.75, reasoning["mtbf_s"]))
    for _ in range(4):  # the middle one of the last five counts
        t.ended(outcome)
    assert t._interval()["slowdown_s"] == 0


def test_failures_make_the_interval_shorter(saver: Saver, clock: Clock) -> None:
    log: list[dict[str, Any]] = [{"event": "launch", "time": 0.0}, {"event": "start", "time": 10.0}]
    intervals = []
    for n in range(3):
        t = times(saver, log, mtbf_hours=1.0)
        t.ended(good(stall=0.5))
        intervals.append(t._interval()["young_daly_s"])
        log += [{"event": "failure", "time": 600.0 * (n + 1)}, {"event": "start", "time": 600.0 * (n + 1) + 1}]
    assert intervals[0] > intervals[1] > intervals[2]
    assert intervals[2] == pytest.approx(young_daly(0.5, (3600 + 590 + 599) / 3))


def test_seconds_under_way() -> None:
    """From the first start of a launch to each end; not while nobody trains."""
    events = [
        {"event": "launch", "time": 0.0},
        {"event": "start", "time": 5.0},
        {"event": "commit", "time": 25.0},
        {"event": "failure", "time": 30.0},
        {"event": "start", "time": 40.0},
        {"event": "end", "time": 45.0},
        {"event": "launch", "time": 1000.0},
        {"event": "start", "time": 1005.0},
        {"event": "commit", "time": 1006.0},
    ]
    assert running_seconds(events) == 25 + 5 + 1
    assert running_seconds([]) == 0


def test_a_clock_that_is_set_while_a_run_is_under_way() -> None:
    events = [{"event": "launch", "time": 60.0}, {"event": "start", "time": 70.0}, {"event": "commit", "time": 1.8e9}]
    assert running_seconds(events) == 86_400


# ---------------------------------------------------------------------- notices


def test_what_is_still_worth_doing() -> None:
    def at(deadline: float | None, save: float, step: float = 1.0) -> tuple[str, float]:
        what = plan(Notice(deadline, (1,)), now=100.0, save_seconds=save, step_seconds=step)
        return what.action, what.leave_at

    assert at(None, 2) == ("leave", 100)  # unknown: better now
    assert at(220, 4) == ("save", 220 - MARGIN_S - 1 - 6)  # save, train, save again in time
    assert at(120, 4) == ("save", 112)
    assert at(112, 4) == ("leave", 100)  # no time for two
    assert at(105.5, 4)[0] == "leave"
    assert at(104.9, 4)[0] == "lost"  # a step and a save take five seconds
    assert at(99, 0.1)[0] == "lost"  # too late
    for deadline in range(100, 200):
        for save in (0.1, 1, 5, 20, 50):
            action, leave_at = at(deadline, save)
            if action == "save":  # the first save is over, and the last one fits
                assert 100 + save <= leave_at
                assert leave_at + 1 + save < deadline
