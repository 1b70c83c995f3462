"""`gpt2dist plan`."""

from __future__ import annotations

import sys

import click

from gpt2dist.commands.common import FiniteRange, command, json_option, set_option, to_json
from gpt2dist.config import UserError, load_run
from gpt2dist.report.console import make_console


@click.command()
@click.argument("run_file", type=click.Path())
@set_option
@json_option
@click.option(
    "--cluster", metavar="FILE", help="A cluster.yaml of `ray up`: only its node types, as many as it allows."
)
@click.option("--machine", "machines", multiple=True, metavar="TYPE", help="Only this instance type; may be repeated.")
@click.option(
    "--machines", "table", metavar="FILE", help="More instance types and prices, or other ones (docs/plan.md)."
)
@click.option("--mfu", type=FiniteRange(0, 1, min_open=True), help="Share of the peak that is reached; else 0.4.")
@click.option("--measured", metavar="RUN_DIR", help="Take the MFU that this run has reached.")
@click.option(
    "--preemptions-per-day",
    default=1.0,
    show_default=True,
    type=FiniteRange(0, 1e6),
    help="How often one spot machine is taken away.",
)
@click.option(
    "--restart-seconds",
    default=300.0,
    show_default=True,
    type=FiniteRange(0, 1e9),
    help="From a failure to the first new step.",
)
@click.option(
    "--storage-gb-per-s",
    default=1.0,
    show_default=True,
    type=FiniteRange(1e-6, 1e6),
    help="At which a machine writes its part of a checkpoint.",
)
@command
def plan(
    run_file: str,
    overrides: tuple[str, ...],
    as_json: bool,
    cluster: str | None,
    machines: tuple[str, ...],
    table: str | None,
    mfu: float | None,
    measured: str | None,
    **assumed: float,
) -> None:
    """What RUN_FILE needs and costs: memory by ZeRO stage, machines, hours, dollars, checkpoint interval.

    Starts nothing. Exit code 1 if the run as it is written fits none of the machines.

    \b
    Example:
      gpt2dist plan jobs/gpt2_124m.toml
      gpt2dist plan jobs/gpt2_1558m.toml --cluster cluster.yaml --measured runs/trial --preemptions-per-day 0.5
    """
    run = load_run(run_file, overrides)
    from gpt2dist.cluster import setups
    from gpt2dist.cluster.machines import load_machines
    from gpt2dist.cluster.nodes import node_types
    from gpt2dist.report import planned

    if cluster and machines:
        raise UserError("give --cluster or --machine, not both")
    if mfu and measured:
        raise UserError("give --mfu or --measured, not both")
    known, head = load_machines(table), None
    if cluster:
        candidates, head = node_types(cluster, known)
    elif machines:
        candidates = [setups.Candidate(name, name, known.machine(name)) for name in machines]
    else:
        candidates = setups.common_machines(run, known)
    value, source = setups.measured_mfu(measured) if measured else (mfu or setups.MFU, "--mfu" if mfu else "assumed")
    assumptions = setups.Assumptions(value, source, **assumed)
    result = setups.Planner(run, known, assumptions, head).result(candidates)
    if as_json:
        click.echo(to_json({"config": run.for_record().model_dump(mode="json"), **result}))
    else:
        planned.show(make_console(), run, result)
    if not any(setup["fits"] for setup in result["as_written"]):
        sys.exit(1)
