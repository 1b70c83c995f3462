"""`gpt2dist prepare` and `gpt2dist data`: from documents to token shards."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import click

from gpt2dist.commands.common import (
    address_option,
    check_in_a_job,
    command,
    interrupted,
    json_option,
    keys_of,
    set_option,
)
from gpt2dist.config import UserError, load_run
from gpt2dist.report.console import make_console


@click.command()
@click.argument("run_file", type=click.Path())
@set_option
@json_option
@address_option
@command
def prepare(run_file: str, overrides: tuple[str, ...], as_json: bool, address: str | None) -> None:
    """Tokenize the documents of RUN_FILE's [prepare] into token shards.

    \b
    Example:
      gpt2dist prepare jobs/smoke.toml --set 'prepare.sources=["texts/*.jsonl"]'
    """
    run = load_run(run_file, overrides)
    check_in_a_job(run, run_file)
    from gpt2dist.cluster.session import output_to_log, ray_session
    from gpt2dist.data.prepare import clean_up, look
    from gpt2dist.data.prepare import prepare as run_prepare
    from gpt2dist.report import tables
    from gpt2dist.report.preparing import PrepareView
    from gpt2dist.storage import acquire_lock, check_writable, log_directory

    with keys_of(run_file):
        files, manifest = look(run)
    up_to_date = manifest is not None
    if manifest is not None:
        with contextlib.suppress(OSError, UserError):  # what a killed preparation left does no harm
            clean_up(run.prepare)
    else:
        check_writable(run.prepare.output)
        lock = acquire_lock(run.prepare.output, "another process is preparing this data set")
        log = log_directory(run.prepare.output) / "prepare.log"
        cpus = run.prepare.cpus or os.cpu_count() or 1
        try:
            with output_to_log(log) as terminal:
                console = make_console(None if as_json else terminal)
                console.print(f"log {log}")
                with keys_of(run_file), PrepareView(console) as view, ray_session(cpus, 0, address):
                    manifest = run_prepare(run, view.update, files=files)
        except KeyboardInterrupt:
            interrupted("; the same command goes on with what is left")
        if lock:
            lock.release()
    if as_json:
        tokens = {split: manifest.tokens(split) for split in manifest.splits}
        counts = {"documents": manifest.documents, "tokens": tokens, "fingerprint": manifest.fingerprint}
        click.echo(json.dumps({**counts, "passed_over": files.passed_over}))
        return
    console = make_console()
    tables.prepared(console, manifest, run.prepare.output)
    tables.passed_over(console, files.passed_over)
    if up_to_date:
        console.print("up to date: nothing to do")


@click.group()
def data() -> None:
    """Verify or inspect a prepared data set.

    \b
    Example:
      gpt2dist data verify data/stdlib
      gpt2dist data inspect data/stdlib
    """


@data.command("verify")
@click.argument("location", metavar="DIR")
@json_option
@command
def data_verify(location: str, as_json: bool) -> None:
    """Compare size and sha256 of every shard of DIR with its manifest; exit code 1 if one differs.

    \b
    Example:
      gpt2dist data verify data/stdlib
    """
    checks = hash_shards(location)
    damaged = [check for check in checks if check.problem]
    if as_json:
        click.echo(json.dumps([{"file": c.file, "valid": not c.problem, "reason": c.problem} for c in checks]))
    else:
        for check in damaged:
            click.echo(f"DAMAGED: {location.rstrip('/')}/{check.file}: {check.problem}")
        click.echo(f"{location}: {len(checks) - len(damaged)} of {len(checks)} shards are good")
    if damaged:
        sys.exit(1)


def hash_shards(location: str) -> list[Any]:
    """The outcome of `inspection.verify`, with a progress bar meanwhile."""
    from rich.progress import track

    from gpt2dist.data import inspection
    from gpt2dist.data.shards import read_manifest

    manifest = read_manifest(location)
    total = sum(map(len, manifest.splits.values()))
    checks = inspection.verify(location, manifest)
    console = make_console(stderr=True)
    return list(track(checks, "hashing", total, console=console, transient=True, disable=not console.is_terminal))


@data.command("inspect")
@click.argument("location", metavar="DIR")
@json_option
@command
def data_inspect(location: str, as_json: bool) -> None:
    """Show what the data set DIR holds: counts, lengths, sources, the first document.

    \b
    Example:
      gpt2dist data inspect data/stdlib
    """
    from gpt2dist.data import inspection
    from gpt2dist.data.shards import read_manifest
    from gpt2dist.report import tables

    manifest = read_manifest(location)
    if not manifest.documents:
        raise UserError(f"{location}: its manifest does not count documents: there is nothing to show")
    try:
        result = inspection.inspect(location, manifest)
    except OSError as e:
        raise UserError(f"{location}: a shard cannot be read: {e}; see: gpt2dist data verify {location}") from None
    if as_json:
        click.echo(json.dumps(result))
    else:
        tables.inspected(make_console(), manifest, result, location)
