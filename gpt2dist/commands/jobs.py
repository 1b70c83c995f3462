"""`gpt2dist submit` and `gpt2dist jobs …`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import click

from gpt2dist.commands.common import command, fail, json_option, set_option
from gpt2dist.config import load_run

RESUBMIT_PAUSE_S = 10.0
"""What is left of a killed driver saves and ends meanwhile."""

address_option = click.option(
    "--address",
    required=True,
    envvar="RAY_API_SERVER_ADDRESS",
    help="URL of the cluster's dashboard, http://HOST:8265; by default RAY_API_SERVER_ADDRESS.",
)
name_argument = click.argument("name", metavar="RUN|JOB")


@click.command()
@click.argument("run_file", type=click.Path())
@set_option
@address_option
@click.option("--follow", is_flag=True, help="Show what the job prints until it ends; Ctrl-C leaves it running.")
@click.option("--prepare", is_flag=True, help="Prepare the data set first.")
@click.option(
    "--retries",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Start the driver again so often when it dies; with --follow also the job.",
)
@click.option("--include", multiple=True, metavar="PATH", help="Pack a file or directory too; may be repeated.")
@json_option
@command
def submit(
    run_file: str,
    overrides: tuple[str, ...],
    address: str,
    follow: bool,
    prepare: bool,
    retries: int,
    include: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train RUN_FILE as a job of a Ray cluster; submitted again, it goes on where it was saved.

    The run file and this package travel to the cluster; its storage and data set must be reachable there. The token of
    the cluster is Ray's: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.

    \b
    Example:
      gpt2dist submit my.toml --address http://127.0.0.1:8265 --follow --retries 3
      gpt2dist jobs stop my-run --address http://127.0.0.1:8265
    """
    run = load_run(run_file, overrides)
    from gpt2dist.cluster.jobs import JobClient, check_places

    check_places(run, run_file)
    client = JobClient(address)
    options: dict[str, Any] = {"include": include, "prepare": prepare, "retries": retries}
    job = client.submit(run, **options)
    click.echo(f"submitted {job.id} to {client.address}", err=as_json)
    if not follow:
        if as_json:
            _print_json(job)
        else:
            click.echo(f"to follow: gpt2dist jobs logs {run.name} --follow --address {client.address}")
        return
    for left in range(retries, -1, -1):
        job = _follow(client, job, as_json)
        if not _driver_died(job) or not left:
            break
        click.echo(f"{job.id}: {job.message or 'its driver died'}; submitting again, {left} left", err=as_json)
        time.sleep(RESUBMIT_PAUSE_S)
        job = client.submit(run, **options)
        click.echo(f"submitted {job.id} to {client.address}", err=as_json)
    _end(job, as_json)


def _driver_died(job: Any) -> bool:
    """Whether the entry point was killed; where it ends by itself, it has used up its own retries."""
    killed = job.exit_code is None or job.exit_code < 0 or job.exit_code > 128
    return job.status == "LOST" or (job.status == "FAILED" and killed)


def _follow(client: Any, job: Any, as_json: bool) -> Any:
    try:
        return client.follow(job.id, lambda text: click.echo(text, nl=False, err=as_json))
    except KeyboardInterrupt:
        name = job.run or job.id  # not the id, which may be another run's name
        click.echo(
            f"\n{job.id} goes on; to end it, saved: gpt2dist jobs stop {name} --address {client.address}", err=True
        )
        sys.exit(0)


def _end(job: Any, as_json: bool) -> None:
    """Print how a job ended; exit code 0, that of its entry point, or 1."""
    if as_json:
        _print_json(job)
    else:
        click.echo(f"{job.id}: {job.status.lower()}")
    if job.status not in ("SUCCEEDED", "STOPPED"):
        fail(f"{job.id}: {job.message or 'failed'}", 2 if job.exit_code == 2 else 1)


def _print_json(value: Any) -> None:
    rows = value if isinstance(value, list) else [value]
    tables = [dataclasses.asdict(row) for row in rows]
    click.echo(json.dumps(tables if isinstance(value, list) else tables[0]))


@click.group()
def jobs() -> None:
    """Runs that were submitted to a Ray cluster: list, status, logs, stop.

    \b
    Example:
      gpt2dist jobs list --address http://127.0.0.1:8265
      gpt2dist jobs logs my-run --follow --address http://127.0.0.1:8265
    """


@jobs.command("list")
@address_option
@json_option
@command
def list_jobs(address: str, as_json: bool) -> None:
    """The jobs that a cluster knows, the oldest first.

    \b
    Example:
      gpt2dist jobs list --address http://127.0.0.1:8265
    """
    from rich.table import Table

    from gpt2dist.cluster.jobs import JobClient
    from gpt2dist.report.console import make_console

    found = JobClient(address).jobs()
    if as_json:
        _print_json(found)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("job", "run", "status", "started", "minutes"):
        table.add_column(column, justify="right" if column == "minutes" else "left")
    for job in found:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else ""
        minutes = f"{((job.ended or time.time()) - job.started) / 60:.1f}" if job.started else ""
        table.add_row(job.id, job.run or "-", job.status.lower(), started, minutes)
    make_console().print(table)


@jobs.command("status")
@name_argument
@address_option
@json_option
@command
def status(name: str, address: str, as_json: bool) -> None:
    """How the newest attempt of a run stands, or a job.

    \b
    Example:
      gpt2dist jobs status my-run --address http://127.0.0.1:8265
    """
    from gpt2dist.cluster.jobs import JobClient

    job = JobClient(address).find(name)
    if as_json:
        _print_json(job)
    else:
        click.echo(f"{job.id}: {job.status.lower()}" + (f": {job.message}" if job.message else ""))


@jobs.command("logs")
@name_argument
@address_option
@click.option("--follow", is_flag=True, help="Go on until the job ends; Ctrl-C leaves it running.")
@command
def logs(name: str, address: str, follow: bool) -> None:
    """What the newest attempt of a run has printed, or a job.

    \b
    Example:
      gpt2dist jobs logs my-run --follow --address http://127.0.0.1:8265
    """
    from gpt2dist.cluster.jobs import JobClient

    client = JobClient(address)
    job = client.find(name)
    if follow:
        _end(_follow(client, job, as_json=False), as_json=False)
    else:
        click.echo(client.logs(job.id), nl=False)


@jobs.command("stop")
@name_argument
@address_option
@json_option
@command
def stop(name: str, address: str, as_json: bool) -> None:
    """End the newest attempt of a run, saved, and wait for it.

    \b
    Example:
      gpt2dist jobs stop my-run --address http://127.0.0.1:8265
    """
    from gpt2dist.cluster.jobs import JobClient

    client = JobClient(address)
    job = client.find(name)
    if not job.is_over:
        before = len(client.logs(job.id))
        job = client.stop(job.id)
        click.echo(client.logs(job.id)[before:], nl=False, err=as_json)
    if as_json:
        _print_json(job)
    else:
        click.echo(f"{job.id}: {job.status.lower()}")
