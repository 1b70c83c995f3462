"""`gpt2dist goodput` and `gpt2dist report`: what became of a run."""

from __future__ import annotations

import json

import click

from gpt2dist.commands.common import command, json_option, read_config, run_dir_argument, set_option, to_json
from gpt2dist.report.console import make_console


@click.command()
@run_dir_argument
@set_option
@json_option
@command
def goodput(run_dir: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Where the time of RUN_DIR went: every second of all its commands and attempts, and what it cost.

    Goodput counts only steps that were kept. Also while the run goes on. Dollars need cluster.price_per_hour.

    \b
    Example:
      gpt2dist goodput runs/smoke
      gpt2dist goodput runs/smoke --set cluster.price_per_hour=2.5 --json
    """
    from gpt2dist.report import history, tables
    from gpt2dist.report.goodput import goodput as account
    from gpt2dist.train import rundir

    price = read_config(run_dir, overrides).cluster.price_per_hour
    events = history.read(run_dir)
    with history.understood(run_dir):
        result = account(events, rundir.metrics_log(run_dir).each())
    if as_json:
        click.echo(to_json(result.to_json(price)))
    else:
        tables.time_spent(make_console(), run_dir, result, price)


@click.command()
@run_dir_argument
@set_option
@json_option
@command
def report(run_dir: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write RUN_DIR's report.html: loss curve, throughput, where the time went, events, checkpoints, audit.

    One page that needs no network. Also while the run goes on.

    \b
    Example:
      gpt2dist report runs/smoke
    """
    from gpt2dist.report import page

    written = page.write(run_dir, read_config(run_dir, overrides))
    click.echo(json.dumps({"report": written}) if as_json else written)
