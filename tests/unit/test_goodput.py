"""Where the time of a run went: hand-made logs, with the seconds of each category known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gpt2dist.cli import main
from gpt2dist.logs import in_time
from gpt2dist.report import history, page
from gpt2dist.report.goodput import Goodput, goodput, of_run
from gpt2dist.train import rundir
from gpt2dist.train.interval import expected_goodput
from gpt2dist.train.savetimes import running_seconds
from gpt2dist.train.spent import by_attempt
from tests.conftest import tiny_run

Lines = list[dict[str, Any]]
T0 = 1_800_000_000.0


class Log:
    """Writes what a run would; `now` is its clock, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.attempt = 0
        self.events: Lines = []
        self.metrics: Lines = []

    def event(self, kind: str, after: float = 0.0, **fields: Any) -> None:
        self.now += after
        self.events.append({"time": T0 + self.now, "event": kind, **fields})

    def launch(self, startup: float = 4.0) -> None:
        """A command begins now; Ray runs `startup` seconds later."""
        began = T0 + self.now
        self.event("launch", startup, began=began)

    def start(self, step: int, after: float, workers: int = 2) -> None:
        """As `restore._open_attempt` does it: lines of steps that were not committed go, their sums stay."""
        self.attempt += 1
        dropped = [m for m in self.metrics if m["step"] >= step]
        self.metrics = [m for m in self.metrics if m["step"] < step]
        redone = [asdict(spent) for spent in by_attempt(dropped)]
        self.event("start", after, attempt=self.attempt, step=step, world_size=workers, redone=redone)

    def steps(self, first: int, stop: int, *, wait: float = 0.0, save: float = 0.0, val: float = 0.0) -> None:
        """Steps of 1 s, each with so many seconds of data wait in it, of stall before it, and of evaluation after."""
        for step in range(first, stop):
            self.now += save + 1.0
            line = {"step": step, "attempt": self.attempt, "time": T0 + self.now, "step_s": 1.0, "data_wait_s": wait}
            self.metrics.append(line | {"checkpoint_s": save} | ({"eval_s": val} if val else {}))
            self.now += val

    def commit(self, step: int, stall: float = 0.1, seconds: float = 0.2) -> None:
        self.event("commit", step=step, stall_s=stall, seconds=seconds)

    def finish(self, after: float, reason: str = "finished") -> None:
        """The state was saved meanwhile."""
        self.event("end", after, reason=reason, step=self.metrics[-1]["step"] + 1)

    def result(self) -> Goodput:
        return goodput(self.events, self.metrics)


def check(log: Log, **expected: float) -> Goodput:
    """All categories that are not named are empty, and the sum is the wall clock."""
    result = log.result()
    assert result.wall_s == pytest.approx(log.now)
    assert {c: s for c, s in result.seconds.items() if abs(s) > 1e-6} == pytest.approx(expected)
    assert sum(result.seconds.values()) == pytest.approx(result.wall_s)
    assert min(result.seconds.values()) >= 0
    return result


def test_one_command_that_nothing_happens_to() -> None:
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.event("eval", after=3 + 2, seconds=2)
    log.now += 1  # the first batch
    log.steps(0, 1)
    log.steps(1, 10, wait=0.25, save=0.5)
    log.commit(9)
    log.steps(10, 11, val=3)
    log.now += 0.125  # garbage collection and the like
    log.steps(11, 12)
    log.finish(after=2)
    log.event("exit", after=1.5)
    result = check(
        log,
        start_up=4 + 6 + 3 + 1,
        evaluation=2 + 3,
        productive=3 + 9 * 0.75,
        data_wait=9 * 0.25,
        checkpoint_stall=9 * 0.5 + 2,
        idle=0.125 + 1.5,
    )
    assert (result.commands, result.attempts, result.failures, result.paused_s) == (1, 1, 0, 0)
    assert result.share == result.seconds["productive"] / result.wall_s
    assert result.allowed is None


def test_stopped_while_it_waits_for_machines() -> None:
    """On purpose, and all is saved: neither a failure, nor is the pause after it lost."""
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 8)
    log.commit(8)
    log.finish(after=1, reason="preempted")
    log.event("restart", after=2)
    log.event("exit", after=50, stopped=True)
    log.now += 3600
    log.launch(4)
    log.event("exit", after=20, stopped=True)
    result = check(log, start_up=4 + 6 + 2 + 50 + 4 + 20, productive=8, checkpoint_stall=1, idle=3600)
    assert (result.failures, result.paused_s) == (0, 3600)


def test_stopped_in_the_pause_after_a_failure() -> None:
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 8)
    log.commit(8)
    log.event("failure", after=2)
    log.event("exit", after=5, stopped=True)
    log.now += 3600
    log.launch(4)
    log.start(8, after=6)
    log.steps(8, 10)
    result = check(log, start_up=20, productive=8, redone=2, lost_to_failure=7, idle=3600)
    assert (result.failures, result.paused_s) == (1, 3600)


def test_a_hang_is_time_too_while_it_lasts() -> None:
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 8)
    log.commit(8)
    log.event("hang", after=600)
    check(log, start_up=10, productive=8, idle=600)


def test_killed_worker() -> None:
    """The group dies in step 8, of which nothing is known; steps 5 to 7 had not been saved."""
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 5)
    log.commit(5)
    log.steps(5, 8, wait=0.5, save=0.25, val=2)
    log.event("failure", after=1.5)
    log.event("restart", after=5)  # the back-off
    log.start(5, after=7)
    log.now += 1
    log.steps(5, 20)
    log.now += 0.5
    log.commit(20, stall=0.5, seconds=0.5)
    log.finish(after=0)
    log.event("exit", after=1)
    result = check(
        log,
        start_up=4 + 6 + 7 + 1,
        productive=5 + 15,
        redone=3 * 0.5,
        data_wait=3 * 0.5,
        checkpoint_stall=3 * 0.25 + 0.5,
        evaluation=3 * 2,
        lost_to_failure=1.5 + 5,
        idle=1,
    )
    assert (result.commands, result.attempts, result.failures) == (1, 2, 1)
    allowed = result.allowed
    assert allowed is not None
    assert (allowed.mtbf_s, allowed.restart_s) == (log.now, 1.5 + 5 + 7 + 1)
    assert (allowed.stall_s, allowed.write_s) == pytest.approx((0.3, 0.35))
    assert allowed.share == expected_goodput(allowed.interval_s, 0.3, 14.5, log.now, 0.35)


def test_killed_driver_and_a_pause() -> None:
    """No event tells of a kill: the time from the last step until the next command is lost. A pause is not."""
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 10)
    log.commit(8)
    log.now += 30  # dead
    log.launch(4)
    log.start(8, after=6)
    log.steps(8, 12)
    log.finish(after=1, reason="stopped")
    log.event("exit", after=2)
    log.now += 1000
    log.launch(4)
    log.start(12, after=6)
    log.steps(12, 20)
    log.finish(after=1)
    log.event("exit", after=2)
    result = check(
        log,
        start_up=3 * 10,
        productive=8 + 4 + 8,
        redone=2,
        checkpoint_stall=2,
        lost_to_failure=30,
        idle=2 + 1000 + 2,
    )
    assert (result.commands, result.attempts, result.failures, result.paused_s) == (3, 3, 1, 1000)
    assert result.share == pytest.approx(20 / (result.wall_s - 1000))


def test_killed_while_starting_up_and_again_before_a_save() -> None:
    log = Log()
    log.launch(4)
    log.now += 20  # killed before any worker is there
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 3)
    log.event("failure", after=1)
    log.event("restart")
    log.start(0, after=6)
    log.steps(0, 2)
    log.now += 10  # killed
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 4)
    log.finish(after=1)
    log.event("exit", after=1)
    result = check(
        log,
        start_up=10 + 6 + 10,
        lost_to_failure=(4 + 20) + 1 + 10,
        redone=3 + 2,
        productive=4,
        checkpoint_stall=1,
        idle=1,
    )
    assert (result.failures, result.attempts) == (3, 3)


def test_older_checkpoint_than_the_newest() -> None:
    """A damaged checkpoint: steps that counted as kept are done again, those of two attempts at once."""
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 10)
    log.commit(5)
    log.commit(10)
    log.event("failure", after=1)
    log.event("restart")
    log.start(10, after=6)
    log.steps(10, 12)
    log.event("failure", after=1)
    log.event("restart")
    log.event("bad_checkpoint", step=10)
    log.start(5, after=6)
    log.steps(5, 12)
    log.finish(after=1)
    log.event("exit")
    check(log, start_up=10 + 6 + 6, productive=5 + 7, redone=5 + 2, lost_to_failure=2, checkpoint_stall=1)


@pytest.mark.parametrize("reason", ["preempted", "resized"])
def test_group_that_saves_and_makes_room(reason: str) -> None:
    """Nothing is lost: what follows is the start of the next group, on other workers."""
    log = Log()
    log.launch(4)
    log.start(0, after=6, workers=1)
    log.steps(0, 5)
    log.finish(after=1, reason=reason)
    if reason == "preempted":  # a resize of Ray's happens within one fit
        log.event("restart", after=2)
    else:
        log.event("resize", after=2)
    log.start(5, after=6, workers=3)
    log.steps(5, 9)
    log.finish(after=1)
    log.event("exit", after=1)
    result = check(log, start_up=10 + 2 + 6, productive=9, checkpoint_stall=2, idle=1)
    assert result.failures == 0
    assert result.worker_seconds["start_up"] == 10 * 1 + 8 * 3
    assert result.worker_seconds["productive"] == 5 * 1 + 4 * 3


def test_preempted_without_a_save() -> None:
    """Ray takes the group down at the deadline, without a failure of ours."""
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 5)
    log.commit(3)
    log.event("preemption", action="lost")
    log.steps(5, 6)
    log.event("restart", after=9)
    log.start(3, after=6)
    log.steps(3, 8)
    log.finish(after=1)
    log.event("exit", after=1)
    result = check(log, start_up=10 + 6, productive=3 + 5, redone=3, lost_to_failure=9, checkpoint_stall=1, idle=1)
    assert result.failures == 1


def test_command_that_fails_for_good() -> None:
    """It is on its way out until `exit`; from then on nobody is paid, but the run stands still because it failed."""
    log = Log()
    log.launch(4)
    log.start(0, after=6, workers=2)
    log.steps(0, 5)
    log.event("failure", after=1)
    log.event("exit", after=2)
    log.now += 60
    log.launch(4)
    log.start(0, after=6, workers=2)
    log.steps(0, 4)
    log.event("non_finite", cause="…")
    log.event("exit", after=3)
    result = check(log, start_up=20, redone=5 + 4, lost_to_failure=1 + 2 + 60 + 3)
    assert (result.failures, result.paused_s) == (2, 0)
    assert result.worker_seconds["lost_to_failure"] == 2 * (1 + 2 + 3)
    assert result.cost(3600.0)["lost_to_failure"] == pytest.approx(2 * (1 + 2 + 3))


def test_run_that_goes_on() -> None:
    """What is not saved yet does not count as kept."""
    log = Log()
    log.launch(4)
    check(log, start_up=4)
    log.start(0, after=6)
    check(log, start_up=10)
    log.steps(0, 8)
    log.commit(6)
    check(log, start_up=10, productive=6, redone=2)
    log.commit(8)
    check(log, start_up=10, productive=8)


def eventful() -> Log:
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.event("eval", after=2, seconds=1)
    log.steps(0, 20, val=0.5)
    log.commit(10)
    log.event("failure", after=1)
    log.event("restart")
    log.start(10, after=6)
    log.steps(10, 20)
    log.finish(after=1, reason="stopped")
    log.event("exit", after=1)
    log.now += 10
    log.launch(4)
    log.start(20, after=6)
    log.steps(20, 25, wait=0.5)
    log.now += 10
    log.launch(4)
    log.start(20, after=6)
    log.steps(20, 30, save=0.5)
    log.finish(after=1)
    log.event("exit", after=1)
    return log


@pytest.mark.parametrize("skew", [-0.5, 0.5])
def test_logs_of_an_object_store_and_clocks_that_differ(skew: float) -> None:
    """Each writer's events stand together; the workers' clock is behind the driver's, or ahead of it."""
    log, right = eventful(), eventful().result()
    drivers = ("launch", "failure", "restart", "exit")
    for line in [*log.metrics, *(e for e in log.events if e["event"] not in drivers)]:
        line["time"] += skew
        for spent in line.get("redone", []):
            spent["begin"] += skew
            spent["end"] += skew
    log.events = in_time([e for e in log.events if (e["event"] in drivers) is driver] for driver in (True, False))
    result = log.result()
    assert result.wall_s == pytest.approx(log.now)
    assert result.seconds == pytest.approx(right.seconds, abs=4 * abs(skew))
    assert result.seconds["productive"] == pytest.approx(right.seconds["productive"])
    assert (result.commands, result.attempts, result.failures) == (3, 4, 2)


@pytest.mark.parametrize("back", [30, 3600])
def test_a_clock_that_is_set_back(tmp_path: Path, back: float) -> None:
    """What was written later happened later; the time that the clock shows twice is counted once."""
    log = Log()
    log.launch(0)
    log.start(0, after=5)
    log.steps(0, 10)
    log.now -= back
    log.steps(10, 20)
    log.commit(20)
    log.finish(after=1)
    log.event("exit")
    run = tiny_run(storage=str(tmp_path))
    rundir.events_log(run.run_dir).append(*log.events)
    rundir.metrics_log(run.run_dir).append(*log.metrics)
    result = of_run(run.run_dir)
    assert sum(result.seconds.values()) == pytest.approx(result.wall_s) == pytest.approx(15)
    assert (result.seconds["productive"], result.share) == (pytest.approx(10), pytest.approx(2 / 3))
    assert (result.failures, result.seconds["redone"], result.paused_s) == (0, 0, 0)
    events = history.read(run.run_dir)
    assert page._state(events, log.metrics) == "finished"
    assert [attempt.cause for attempt in history.attempts(events)] == ["command"]
    assert running_seconds(events) == 1


@given(st.data())
def test_sums_to_the_wall_clock_whatever_the_logs_say(data: st.DataObject) -> None:
    """Events that were lost, clocks that were set: no time is counted twice, and none below zero."""
    log = eventful()
    lines = [*log.events, *log.metrics]
    lost = data.draw(st.sets(st.integers(0, len(lines) - 1), max_size=8))
    shifts = data.draw(st.lists(st.floats(-20, 20), min_size=len(lines), max_size=len(lines)))
    for line, shift in zip(lines, shifts, strict=True):
        line["time"] += shift
    left = [line for i, line in enumerate(lines) if i not in lost]
    result = goodput([e for e in left if "event" in e], [m for m in left if "event" not in m])
    assert sum(result.seconds.values()) == pytest.approx(result.wall_s)
    assert min(result.seconds.values()) >= 0
    assert 0 <= result.share <= 1


def test_nothing_at_all() -> None:
    result = goodput([], [])
    assert (result.wall_s, result.share) == (0, 0)


def test_command(tmp_path: Path) -> None:
    run = tiny_run(storage=str(tmp_path))

    def cli(*args: str) -> Any:
        return CliRunner().invoke(main, ["goodput", run.run_dir, *args])

    assert (cli().exit_code, cli().stderr) == (2, f"error: {run.run_dir}: no such run directory\n")
    Path(run.run_dir).mkdir()
    (Path(run.run_dir) / "config.toml").write_text(run.to_toml())
    assert "no events yet" in cli().stderr
    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 70)
    log.commit(70)
    log.event("failure", after=10)
    log.event("restart")
    log.start(70, after=10)
    log.steps(70, 90)
    log.finish(after=0)
    log.event("exit")
    rundir.events_log(run.run_dir).append(*log.events)
    rundir.metrics_log(run.run_dir).append(*log.metrics)
    found = json.loads(cli("--json").stdout)
    assert found["goodput"] == pytest.approx(90 / 120)
    assert found["seconds"]["start_up"] == pytest.approx(20)
    assert (found["wall_s"], found["attempts"], found["failures"], found["cost"]) == (pytest.approx(120), 2, 1, None)
    assert 0 < found["allowed"]["share"] < 1
    priced = json.loads(cli("--json", "--set", "cluster.price_per_hour=3").stdout)
    assert priced["cost"]["total"] == pytest.approx(2 * 3 * 120 / 3600)
    text = cli("--set", "cluster.price_per_hour=3").stdout
    for part in ("2:00 of wall clock, 1 command, 2 attempts, 1 failure", "75.0%", "0.20", "Goodput 75.0%"):
        assert part in text
    assert "Young/Daly allow" in text


def test_foreign_lines(tmp_path: Path) -> None:
    run = tiny_run(storage=str(tmp_path))
    Path(run.run_dir).mkdir()
    (Path(run.run_dir) / "config.toml").write_text(run.to_toml())
    events, metrics = (Path(run.run_dir) / f"{name}.jsonl" for name in ("events", "metrics"))

    def cli(*args: str) -> Any:
        return CliRunner().invoke(main, ["goodput", run.run_dir, *args])

    log = Log()
    log.launch(4)
    log.start(0, after=6)
    log.steps(0, 20)
    rundir.metrics_log(run.run_dir).append(*log.metrics)
    assert (cli().exit_code, cli().stderr) == (
        2,
        f"error: {run.run_dir}/events.jsonl: missing or without events, though metrics.jsonl has steps\n",
    )
    log.commit(20)
    log.finish(after=0)
    log.event("exit")
    rundir.events_log(run.run_dir).append(*log.events)
    whole = cli("--json").stdout
    assert json.loads(whole)["goodput"] == pytest.approx(20 / 30)
    right = log.metrics[-1]
    for line in [{}, {**right, "step": "x"}, {**right, "step_s": None}, {"step": 99, "time": T0}, {"step": 99}]:
        with metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
    for number in ("NaN", "Infinity", "1" + "0" * 400):
        with metrics.open("a") as file:
            file.write(json.dumps({**right, "time": 0}).replace('"time": 0', f'"time": {number}') + "\n")
            file.write(json.dumps({**right, "step_s": 0}).replace('"step_s": 0', f'"step_s": {number}') + "\n")
    before = events.read_text()
    with events.open("a") as file:
        file.write('[1]\n5\n{"event": 1, "time": 2}\n{"event": "x", "time": null}\n{"event": "x", "time": NaN}\n')
        file.write('{"event": "x", "time": 1e20}\n{"event": "start", "time": 1, "attempt": "x", "step": 4}\n')
    assert cli("--json").stdout == whole
    for line, problem in (
        ({"event": "start", "attempt": 2, "step": 20}, "no 'world_size'"),
        ({"event": "end", "step": 20}, "no 'reason'"),
        ({"event": "eval", "seconds": "x"}, "unsupported operand"),
        ({"event": "commit", "step": 20, "seconds": 1.0, "stall_s": math.nan}, "not finite"),
        ({"event": "start", "attempt": 2, "step": 20, "world_size": 2, "redone": [{"steps": 1}]}, "missing"),
    ):
        events.write_text(before)
        rundir.events_log(run.run_dir).append(
            {"time": T0 + 39, "event": "launch"}, {"time": T0 + 40, "event": "failure"}, {"time": T0 + 41, **line}
        )
        for args in ((), ("--json",)):
            assert cli(*args).exit_code == 2, line
            assert cli(*args).stderr.startswith(f"error: {run.run_dir}/events.jsonl: a line is not understood (")
            assert problem in cli(*args).stderr
            assert cli(*args).stderr.count("\n") == 1
