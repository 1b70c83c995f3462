"""`gpt2dist chaos`: a run that is broken on purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gpt2dist.commands.common import command, fail, json_option, keys_of, set_option, to_json
from gpt2dist.config import load_run
from gpt2dist.report.console import make_console


@click.command()
@click.argument("run_file", type=click.Path())
@click.option(
    "--faults", default="kill-worker,kill-driver,drain-node", show_default=True, help="Which, separated by commas."
)
@click.option("--seed", default=0, show_default=True, help="Of the steps at which they come, and of the victims.")
@set_option
@json_option
@command
def chaos(run_file: str, faults: str, seed: int, overrides: tuple[str, ...], as_json: bool) -> None:
    """Break a run on purpose, and hold it against one that nothing happens to.

    Trains RUN_FILE twice on a private cluster of this machine with a node for each worker. Faults: kill-worker,
    kill-driver, kill-node, drain-node, stall-worker, bad-checkpoint, storage-away, disk-full, nan; each as often
    as it is named. Exit code 1 if the losses differ or a sample was lost or repeated.

    \b
    Example:
      gpt2dist chaos jobs/smoke.toml --faults kill-worker,kill-driver,drain-node --seed 1
    """
    run = load_run(run_file, overrides)
    from gpt2dist.cluster import chaos as arena
    from gpt2dist.cluster.local import NodeFailed
    from gpt2dist.report import tables
    from gpt2dist.report.goodput import of_run as goodput_of
    from gpt2dist.train.preflight import preflight

    with keys_of(run_file):
        preflight(run, run_file)
    console = make_console(stderr=as_json)
    try:
        verdict = arena.compare(run, [f.strip() for f in faults.split(",")], seed, console.print)
    except (arena.ChaosError, NodeFailed) as e:
        fail(str(e), 1)
    from gpt2dist.report import plots  # matplotlib, only for what came to an end

    picture = Path(f"{verdict.run_dir}.png")
    plots.two_runs(picture, verdict.reference_dir, verdict.run_dir, [(f.step, f.fault) for f in verdict.faults])
    spent = goodput_of(verdict.run_dir)
    if as_json:
        click.echo(to_json(verdict.to_json() | {"picture": str(picture), "goodput": spent.to_json(None)}))
    else:
        tables.verdict(console, verdict.to_json())
        console.print(tables.goodput_line(spent))
        console.print(f"the two curves: {picture}")
    if not verdict.passed:
        sys.exit(1)
