"""Progress on the terminal, read from the run directory: one live line, or on a pipe a line now and then."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpt2dist.config import RunConfig
from gpt2dist.report.words import count
from gpt2dist.storage import StorageError, is_local, location
from gpt2dist.train import rundir

POLL_S, REMOTE_POLL_S = 0.25, 2.0
"""Between two looks at the run directory; each is some requests to an object store."""
EVENT_PARTS = 8
"""Of a log on an object store, where many write: so many last objects may hold news."""
PIPE_INTERVAL_S = 20.0
WAIT_S, WAIT_LOOK_S, WAIT_AGAIN_S = 5.0, 2.0, 60.0
"""Workers are waited for so long before a word is said; between two looks; on a pipe, until the same is said again."""
Observer = Callable[[list[dict[str, Any]], list[dict[str, Any]]], None]
FULL_BYTES = 1 << 20
"""A disk with less room than this is said to be full."""

SENTENCES = {
    "failure": "failed: {cause}",
    "bad_checkpoint": "checkpoint of step {step} is damaged and left out: {reason}",
    "ema_started": "averaged weights (optim.ema_decay) begin with the weights of step {step}",
    "hang": f"worker {{rank}} finished no step in {{seconds:.0f}} s; stacks of all are in {rundir.STACKS}/",
    "save_failed": "step {step} could not be saved ({reason}); trying again later",
    "not_deleted": "step {step} is saved, but older checkpoints could not be deleted: {reason}",
    "eval": "validation loss before training: {val_loss:.4f}",
}
"""Kind of an event, and how it is told; of others see `describe`."""


def follow(
    run: RunConfig,
    console: Console,
    done: Callable[[], bool],
    since: float,
    observe: Observer = lambda *_: None,
    missing: Callable[[], str] = lambda: "",
) -> None:
    """Show a run's progress until `done()`; `since`: Unix time, events that are older and there already are not news.

    `observe` is called with the newest events and metrics at every look. While no worker group is there, `missing`
    is asked what the run waits for.
    """
    view = _LiveLine(run, console) if console.is_terminal else _Lines(run, console)
    poll_s = POLL_S if is_local(location(run.run_dir)) else REMOTE_POLL_S
    first_step: int | None = None  # of the newest attempt; lines of earlier steps are not news
    told = {str(event) for event in _tails(run)[0] if event["time"] <= since}
    was_full = False
    wait = _Wait(missing)
    with view:
        finished = False
        while not finished:
            finished = done()  # asked first, so that what was written last is still shown
            events, metrics = _tails(run)
            observe(events, metrics)
            for event in events:
                # Not by their times: clocks of machines differ, and an object store shows them late.
                if str(event) not in told:
                    told.add(str(event))
                    if text := describe(event):
                        _shown(view.say, text)
                    if event["event"] == "start":
                        first_step = event["step"]
                        wait.over()
                    elif event["event"] in ("launch", "failure", "restart"):
                        first_step = None
                        wait.begin(event["time"])
            if not events:  # the storage is away
                wait.begin(time.time())
            if metrics and first_step is not None and metrics[-1]["step"] >= first_step:
                wait.over()
                _shown(view.show, metrics[-1])
            elif not finished and (news := wait.look()):
                _shown(view.wait, *news)
            full = _is_full(run)
            if full and not was_full:  # then nothing new can be read either
                what = f"the disk of {run.run_dir} is full: training goes on, but nothing can be saved; make room"
                _shown(view.say, what)
            was_full = full
            if not finished:
                _sleep(poll_s, done)


def _shown(show: Callable[..., None], *what: Any) -> None:
    """A terminal that has gone, or whose file's disk is full, is no reason to end a run."""
    with contextlib.suppress(OSError):
        show(*what)


class _Wait:
    """How long no worker group has been there, and why."""

    def __init__(self, missing: Callable[[], str]) -> None:
        self.missing = missing
        self.began: float | None = None
        self.text = ""
        self.next_look = 0.0

    def begin(self, when: float) -> None:
        """No group is there; perhaps that was known before."""
        self.began = self.began or when

    def over(self) -> None:
        """There is one."""
        self.began = None

    def look(self) -> tuple[str, float] | None:
        """(what is waited for, since how many seconds), now and then; once with no text when there is room again."""
        now = time.time()
        if self.began is None or now - self.began < WAIT_S:
            before, self.text = self.text, ""
            return ("", 0.0) if before else None
        if now < self.next_look:
            return None
        self.next_look = now + WAIT_LOOK_S
        before, self.text = self.text, self.missing()
        return (self.text, now - self.began) if self.text or before else None


def _tails(run: RunConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The last events and metrics; nothing while the storage is away, which is the workers' concern."""
    try:
        return rundir.events_log(run.run_dir).tail(parts=EVENT_PARTS), rundir.metrics_log(run.run_dir).tail(4096)
    except (OSError, StorageError):
        return [], []


def _is_full(run: RunConfig) -> bool:
    try:
        return is_local(location(run.run_dir)) and shutil.disk_usage(run.run_dir).free < FULL_BYTES
    except OSError:  # away
        return False


def _sleep(seconds: float, done: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not done():
        time.sleep(min(POLL_S, seconds))


def describe(event: dict[str, Any]) -> str | None:
    """An event in words; None for those that a person need not see."""
    kind = event["event"]
    if kind == "start":
        redone = f", {count('step', event['redone_steps'])} to redo" if event["redone_steps"] else ""
        where = f"from step {event['step']}" if event["step"] else "from the start"
        return f"attempt {event['attempt']}: {count('worker', event['world_size'])}, {where}{redone}"
    if kind == "preemption":
        if event["action"] == "late":
            return f"a machine was taken away at once; what follows step {event['saved_step']} will be done again"
        return f"a machine with {_workers(event['ranks'])} will be taken away {_when(event)}: {_reaction(event)}"
    if kind == "resize":
        return f"going on with {count('worker', event['workers'])}"
    if kind == "rewind":
        first, end = event["steps"]
        left_out = sum(b - a for a, b in event["positions"])
        return f"the loss diverged in steps {first} to {end - 1}: going back, and leaving their {left_out} samples out"
    return SENTENCES[kind].format_map(event) if kind in SENTENCES else None


def _workers(ranks: list[int]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _when(preemption: dict[str, Any]) -> str:
    left = preemption["seconds_left"]
    return "soon" if left is None else f"in {left:.0f} s"


def _reaction(preemption: dict[str, Any]) -> str:
    if preemption["action"] == "save":
        return "saving now, and once more at the end"
    if preemption["action"] == "leave":
        return "saving, then going on without it"
    return (
        f"too soon for a save, which takes about {preemption['save_takes_s']:.0f} s; what follows step "
        f"{preemption['saved_step']} will be done again"
    )


def _line(metrics: dict[str, Any], steps: int) -> str:
    loss = f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {metrics['tokens_per_s']:,.0f} tok/s"
    val = f"  val {metrics['val_loss']:.4f}" if "val_loss" in metrics else ""
    return f"step {metrics['step'] + 1}/{steps}  {loss}{val}"


class _LiveLine:
    def __init__(self, run: RunConfig, console: Console) -> None:
        self.steps = run.stop_step
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console)
        self.task = self.progress.add_task("starting Ray and the workers", total=self.steps)
        self.val = ""

    def __enter__(self) -> None:
        self.progress.start()

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.progress.console.print(text)

    def wait(self, text: str, seconds: float) -> None:
        self.progress.update(self.task, description=f"{text}; {seconds:.0f} s" if text else "starting the workers")

    def show(self, m: dict[str, Any]) -> None:
        if "val_loss" in m:
            self.val = f"  val {m['val_loss']:.4f}"
        text = f"loss {m['loss']:.4f}{self.val}  lr {m['lr']:.2e}  {m['tokens_per_s']:,.0f} tok/s"
        self.progress.update(self.task, completed=m["step"] + 1, description=text)


class _Lines:
    def __init__(self, run: RunConfig, console: Console) -> None:
        self.steps, self.console = run.stop_step, console
        self.shown, self.first, self.last = -1, (0, 0.0), 0.0
        self.waits_for, self.say_again = "", 0.0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        self.shown = -1
        self.console.print(text)

    def wait(self, text: str, seconds: float) -> None:
        if text == self.waits_for and seconds < self.say_again:
            return
        self.say(f"{text}; {seconds:.0f} s" if text else "the wait is over")
        self.waits_for, self.say_again = text, seconds + WAIT_AGAIN_S

    def show(self, m: dict[str, Any]) -> None:
        step, now = m["step"], time.monotonic()
        if step == self.shown:
            return
        if self.shown < 0:
            self.first = (step, now)
        elif "val_loss" not in m and step + 1 < self.steps and now - self.last < PIPE_INTERVAL_S:
            return
        done, seconds = step - self.first[0], now - self.first[1]
        left = seconds / done * (self.steps - step - 1) if done else 0.0
        eta = f"  ETA {int(left) // 60}:{int(left) % 60:02d}" if left else ""
        self.console.print(_line(m, self.steps) + eta)
        self.shown, self.last = step, now
