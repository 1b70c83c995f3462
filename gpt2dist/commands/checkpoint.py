"""`gpt2dist checkpoint` and `gpt2dist audit`: what a run has saved, and what it was trained on."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import click

from gpt2dist.commands.common import command, existing, json_option, read_config, run_dir_argument, set_option
from gpt2dist.report.console import make_console


@click.command()
@run_dir_argument
@set_option
@json_option
@command
def audit(run_dir: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Prove from RUN_DIR's ledger that every sample was trained on exactly once; exit code 1 if not.

    \b
    Example:
      gpt2dist audit runs/smoke
    """
    from gpt2dist.train import ledger
    from gpt2dist.train.saved import find_checkpoint

    run = read_config(run_dir, overrides)
    result = ledger.audit_run(run_dir, run, find_checkpoint(run_dir).index)
    click.echo(json.dumps(asdict(result)) if as_json else str(result))
    if not result.clean:
        sys.exit(1)


@click.group()
def checkpoint() -> None:
    """List or verify the checkpoints of a run.

    \b
    Example:
      gpt2dist checkpoint ls runs/smoke
      gpt2dist checkpoint verify runs/smoke
    """


@checkpoint.command("ls")
@run_dir_argument
@json_option
@command
def checkpoint_ls(run_dir: str, as_json: bool) -> None:
    """List RUN_DIR's checkpoints, newest first. `valid`: the index is sound and the files have their sizes.

    \b
    Example:
      gpt2dist checkpoint ls runs/smoke --json
    """
    from gpt2dist.report.words import count, size
    from gpt2dist.train import checkpoint as store

    rows = [store.describe(c, run_dir) for c in _committed(run_dir)]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        if "bytes" not in row:  # its index cannot be read
            click.echo(f"step {row['step']:>8}  damaged: {row['reason']}")
        else:
            state = "valid" if row["valid"] else f"damaged: {row['reason']}"
            made = f"{count('worker', row['world_size'])}, ZeRO-{row['zero_stage']}"
            click.echo(f"step {row['step']:>8}  {size(row['bytes']):>9}  {made}  {state}  {row['path']}")
    if not rows:
        click.echo(f"{run_dir}: no checkpoints")


@checkpoint.command("verify")
@run_dir_argument
@json_option
@command
def checkpoint_verify(run_dir: str, as_json: bool) -> None:
    """Compute the hash of every file of RUN_DIR's checkpoints; exit code 1 if one differs.

    \b
    Example:
      gpt2dist checkpoint verify runs/smoke
    """
    from rich.progress import track

    from gpt2dist.train import checkpoint as store

    rows = []
    found = _committed(run_dir)
    for c in track(found, "hashing", console=make_console(stderr=True), transient=True):
        row = store.describe(c, run_dir)
        if isinstance(c, store.Checkpoint) and row["valid"]:
            try:
                store.verify(c)
            except store.BadCheckpoint as e:
                row |= {"valid": False, "reason": str(e)}
        rows.append(row)
    if as_json:
        click.echo(json.dumps(rows))
    else:
        for row in rows:
            click.echo(f"step {row['step']}: " + ("good" if row["valid"] else f"DAMAGED: {row['reason']}"))
        if not rows:
            click.echo(f"{run_dir}: no checkpoints")
    if not all(row["valid"] for row in rows):
        sys.exit(1)


def _committed(run_dir: str) -> list[Any]:
    """What is committed in a run directory. Raises `UserError` if it is none."""
    from gpt2dist.train import checkpoint as store

    found = list(store.committed(existing(run_dir)))
    if not found:
        read_config(run_dir)
    return found
