"""`gpt2dist cluster …`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from gpt2dist.commands.common import FiniteRange, command, fail, json_option, set_option
from gpt2dist.config import UserError


@click.group()
def cluster() -> None:
    """Check a cluster's files; watch for spot notices; run a small cluster on this machine.

    \b
    Example:
      gpt2dist cluster check cluster.yaml --run jobs/gpt2_124m.toml
      gpt2dist cluster local --nodes 2
    """


@cluster.command("check")
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--run", "run_file", metavar="RUN.toml", help="A run that shall train there.")
@set_option
@json_option
@command
def check(files: tuple[str, ...], run_file: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Find mistakes in cluster files of `ray up` and in KubeRay manifests, before anything is started.

    Exit code 1 if there is an error, 0 if there are warnings at most, 2 if a file cannot be read. Needs no network.

    \b
    Example:
      gpt2dist cluster check cluster.yaml --run jobs/gpt2_124m.toml
      gpt2dist cluster check jobs/kuberay/*.yaml --json
    """
    from gpt2dist.cluster.check import check_files
    from gpt2dist.report.words import count

    if overrides and not run_file:
        raise UserError("--set changes keys of the run: give it with --run")
    report = check_files(list(files), run_file, overrides)
    if as_json:
        findings = [dataclasses.asdict(finding) for finding in report.findings]
        click.echo(json.dumps({"findings": findings, "errors": report.errors, "todo": report.todo}))
    else:
        for finding in report.findings:
            place = f"{finding.file}:{finding.line}" if finding.line else finding.file
            click.echo(f"{place}: {finding.severity}: {finding.key}: {finding.what}")
            click.echo(f"    → {finding.fix}")
        warnings = len(report.findings) - report.errors
        counts = f"{count('error', report.errors)}, {count('warning', warnings)}"
        click.echo(f"{count('file', len(files))}: {counts}")
        for line in report.todo:
            click.echo(f"before ray up: {line}")
    if report.errors:
        sys.exit(1)


@cluster.command("spot-watch")
@click.option("--cloud", default="aws", show_default=True, type=click.Choice(["aws", "gcp", "azure"]), help="Whose.")
@click.option("--address", default="auto", show_default=True, help="Ray cluster, host:port; auto: this machine's.")
@click.option("--node-ip", help="This machine's address as Ray knows it; by default found out.")
@click.option("--metadata-url", metavar="URL", help="Metadata service; by default the cloud's own.")
@click.option(
    "--interval", default=1.0, show_default=True, type=FiniteRange(0.1, 60), help="Seconds between questions."
)
@click.option("--once", is_flag=True, help="Ask once, print the answer, drain nothing; exit code 1 without an answer.")
@json_option
@command
def spot_watch(
    cloud: str,
    address: str,
    node_ip: str | None,
    metadata_url: str | None,
    interval: float,
    once: bool,
    as_json: bool,
) -> None:
    """Wait for the cloud's notice that it takes this spot machine back, then drain it from Ray.

    Runs on each worker until it is killed; cluster.yaml starts it. A second one on the same machine ends at once.

    \b
    Example:
      gpt2dist cluster spot-watch --cloud aws --once
    """
    from gpt2dist.cluster import spot

    source = spot.CLOUDS[cloud](metadata_url)
    if once:
        _ask_once(source, as_json)
        return
    lock = FileLock(Path(tempfile.gettempdir()) / f"gpt2dist-spot-watch-{os.getuid()}-{node_ip or 'here'}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        click.echo("spot-watch runs here already")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    spot.log.info("asking %s every %g s", source.url, interval)

    async def run() -> None:
        drainer = spot.Drainer(address, node_ip)
        await drainer.prepare()
        await spot.watch(source, drainer.drain, interval)

    asyncio.run(run())


def _ask_once(source: Any, as_json: bool) -> None:
    from gpt2dist.cluster import spot

    try:
        notice = asyncio.run(spot.ask_once(source))
    except Exception as e:
        fail(f"{source.url}: {type(e).__name__}: {e}", 1)
    if as_json:
        click.echo(json.dumps({"notice": notice and {"what": notice.what, "deadline": notice.deadline}}))
    else:
        click.echo(f"{notice.what} in {notice.deadline - time.time():.0f} s" if notice else "no notice")


@cluster.command("local")
@click.option("--nodes", default=2, show_default=True, type=click.IntRange(min=1), help="Beside the head.")
@click.option("--cpus", default=2, show_default=True, type=click.IntRange(min=1), help="Logical CPUs of each.")
@command
def local(nodes: int, cpus: int) -> None:
    """Run a Ray cluster of several nodes on this machine until Ctrl-C, to try things out.

    Real `ray start` processes on loopback, in a private directory, with a token of their own.

    \b
    Example:
      gpt2dist cluster local --nodes 3
    """
    from gpt2dist.cluster.local import LocalCluster, NodeFailed

    stopped: list[int] = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda signum, _: stopped.append(signum))
    try:
        with LocalCluster() as started:
            for n in range(nodes):
                click.echo(f"starting node {n + 1} of {nodes}", err=True)
                started.add_node(cpus)
            click.echo("in another terminal:\n")
            for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
                click.echo(f"  export {name}={started.env[name]}")
            click.echo("  gpt2dist train jobs/smoke.toml\n\nCtrl-C ends all nodes")
            while not stopped and started.head.alive():
                time.sleep(0.5)
    except NodeFailed as e:
        fail(str(e), 1)
