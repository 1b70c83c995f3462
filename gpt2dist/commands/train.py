"""`gpt2dist train`: checks, then a run under the eyes of its user."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console

from gpt2dist import STARTED
from gpt2dist.commands.common import (
    address_option,
    check_in_a_job,
    command,
    fail,
    json_option,
    keys_of,
    set_option,
    to_json,
)
from gpt2dist.commands.data import hash_shards
from gpt2dist.config import RunConfig, UserError, load_run
from gpt2dist.report.console import make_console

IDLE_S = 3.0
"""A worker group that has just ended still has its room for a moment, and its job something to do."""


@click.command()
@click.argument("run_file", type=click.Path())
@set_option
@json_option
@address_option
@click.option("--dry-run", is_flag=True, help="Print config, batch arithmetic and memory; start nothing.")
@command
def train(run_file: str, overrides: tuple[str, ...], as_json: bool, address: str | None, dry_run: bool) -> None:
    """Train the run of RUN_FILE, or go on with it where it stopped.

    Ctrl-C, SIGTERM or SIGHUP saves and ends; a second one ends at once.

    \b
    Example:
      gpt2dist train jobs/smoke.toml --set cluster.workers=1 --set train.stop_at=50
    """
    run = load_run(run_file, overrides)
    if dry_run:
        _dry_run(run, run_file, as_json)
        return
    check_in_a_job(run, run_file)
    told: list[str] = []

    def away(problem: str) -> None:
        if not told:
            click.echo(
                f"waiting for the storage, {run.checkpoint.retry_minutes:g} minutes at most ({problem})", err=True
            )
        told.append(problem)

    from gpt2dist.train.preflight import preflight

    with keys_of(run_file):
        ready = preflight(run, run_file, away)
    from gpt2dist.cluster.session import NO_NODES_FOR_DATA, output_to_log, ray_session  # and with it Ray: takes long
    from gpt2dist.cluster.waiting import Room
    from gpt2dist.report import gauges, live, tables
    from gpt2dist.storage import acquire_lock, log_directory
    from gpt2dist.train import launch

    if run.data.verify and not ready.finished:
        for path in run.data_paths:
            for check in hash_shards(path):
                if check.problem:
                    raise UserError(f"{path.rstrip('/')}/{check.file}: shard is {check.problem}")
    lock = acquire_lock(run.run_dir, "another process is training this run")
    started = time.time()
    if ready.finished:
        console = make_console(stderr=as_json)
        console.print(f"{run.run_dir}: finished at step {ready.resume_step}; nothing to do")
    else:
        log = log_directory(run.run_dir) / "log.txt"
        # Room for Ray Data's tasks beside the workers; with a single CPU left it takes turns and starts slowly.
        cpus = max(os.cpu_count() or 1, math.ceil(run.cluster.max_workers * run.cluster.cpus_per_worker) + 4)
        gpus = math.ceil(run.cluster.max_workers * run.cluster.gpus_per_worker)
        failure: launch.TrainingFailed | None = None
        with output_to_log(log) as terminal:
            console = make_console(None if as_json else terminal)  # with --json: to the log
            console.print(f"run {run.run_dir}, log {log}")
            tables.changed(console, ready.resume_step, ready.changes)
            if ready.short_validation:
                console.print(ready.short_validation)
            if run.long_warmup:
                console.print(run.long_warmup)
            with _stop_signals(console) as on_stop, ray_session(cpus, gpus, address, NO_NODES_FOR_DATA):
                job = launch.TrainJob(run, STARTED, ready.changes)
                on_stop(job.request_stop)
                if url := gauges.scrape_url():
                    console.print(f"metrics at {url}")
                observe = gauges.Gauges(run.name, job.run.run_dir).update
                room = Room(run)
                over = _Over(job, room)
                try:
                    live.follow(run, console, over, started, observe, lambda: job.waits_for or room.missing())
                finally:
                    job.abandon()
                try:
                    job.check()
                except launch.TrainingFailed as e:
                    failure = e
        job.left()
        if failure:
            fail(f"training failed: {failure}; log: {log}", 1)
    if lock:
        lock.release()
    if as_json:
        click.echo(to_json(_outcome(run)))
    else:
        tables.finished(make_console(), run, time.time() - started, run_file, overrides)


class _Over:
    """Whether a run has ended; also where a stop was requested and no worker group has room: then all is saved."""

    def __init__(self, job: Any, room: Any) -> None:
        self.job, self.room = job, room
        self.idle_since: float | None = None

    def __call__(self) -> bool:
        if self.job.done():
            return True
        now = time.monotonic()
        idle = self.job.stopping and self.room.nothing_runs()
        self.idle_since = (self.idle_since or now) if idle else None
        return self.idle_since is not None and now - self.idle_since > IDLE_S


def _dry_run(run: RunConfig, run_file: str, as_json: bool) -> None:
    from gpt2dist.cluster.plan import arithmetic, memory
    from gpt2dist.data.mixture import Mixture
    from gpt2dist.report import tables
    from gpt2dist.storage import StorageError
    from gpt2dist.train import checkpoint, resume, saved

    run = run.for_record()
    numbers, parts = arithmetic(run), memory(run)
    newest, away = None, ""
    try:
        newest = checkpoint.newest(run.run_dir)
    except StorageError as e:  # the arithmetic needs no storage
        away = str(e)
    changed = saved.changes(run, newest, Mixture.open(run)) if newest else []
    if as_json:
        goes_on = newest and {"step": newest.index.step, "changes": [change.to_json() for change in changed]}
        config = {"config": run.model_dump(mode="json")}
        click.echo(json.dumps({**config, **numbers, "memory_bytes": parts, "resume": goes_on}))
    else:
        console = make_console()
        tables.dry_run(console, run, numbers, parts)
        if run.long_warmup:
            console.print(run.long_warmup)
        if newest:
            tables.changed(console, newest.index.step, changed)
        if away:
            console.print(f"whether there is a run to go on with is not known: {away}")
    if reason := resume.refusal(changed, run.data.allow_changed):
        raise UserError(f"{run_file}: {reason}")


def _outcome(run: RunConfig) -> dict[str, Any]:
    from gpt2dist.train import checkpoint, rundir

    newest = checkpoint.newest(run.run_dir)
    metrics = rundir.metrics_log(run.run_dir).read()
    val = [m["val_loss"] for m in metrics if "val_loss" in m]
    return {
        "step": newest.index.step if newest else 0,
        "loss": metrics[-1].get("loss") if metrics else None,
        "val_loss": val[-1] if val else None,
        "skipped": sum("skipped" in m for m in metrics),
        "checkpoint": str(newest.path) if newest else None,
    }


@contextlib.contextmanager
def _stop_signals(console: Console) -> Iterator[Callable[[Callable[[], None]], None]]:
    """First SIGINT, SIGTERM or SIGHUP: what was given to the yielded function (save and end). Second: exit at once."""
    actions: list[Callable[[], None]] = []
    seen: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        seen.append(signum)
        if len(seen) > 1 or not actions:
            os._exit(128 + signum)
        for action in actions:
            action()
        with contextlib.suppress(OSError):  # nobody may be there to read it
            console.print("saving after this step, then ending; once more to end at once")

    def on_stop(action: Callable[[], None]) -> None:
        actions.append(action)
        for number in previous:  # once more: Ray, which has started meanwhile, puts its own in the place of SIGTERM's
            signal.signal(number, handle)

    hang_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]  # of nohup
    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM, *hang_up)}
    try:
        yield on_stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
