"""The commands. They parse, call, and print; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import click
from rich.console import Console

from gpt2dist import __version__
from gpt2dist.config import RunConfig, UserError, load_run, parse_toml
from gpt2dist.report.console import make_console


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turns the errors that a user can mend into one line."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as e:
            _fail(str(e), 2)

    return run


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


set_option = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a key.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
address_option = click.option("--address", help="Ray cluster to join; by default RAY_ADDRESS, else a private one.")
run_dir_argument = click.argument("run_dir", type=click.Path())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Pretrain GPT-2 on Ray.

    \b
    Example:
      gpt2dist prepare jobs/smoke.toml
      gpt2dist train jobs/smoke.toml
      gpt2dist generate runs/smoke --prompt "import os"
    """


@main.command()
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
    from gpt2dist.cluster.session import output_to_log, ray_session
    from gpt2dist.data.prepare import is_up_to_date
    from gpt2dist.data.prepare import prepare as run_prepare
    from gpt2dist.report import tables
    from gpt2dist.report.preparing import PrepareView
    from gpt2dist.storage import check_writable, log_directory

    manifest = is_up_to_date(run)
    up_to_date = manifest is not None
    if manifest is None:
        check_writable(run.prepare.output)
        log = log_directory(run.prepare.output) / "prepare.log"
        cpus = run.prepare.cpus or os.cpu_count() or 1
        with output_to_log(log) as terminal:
            console = make_console(None if as_json else terminal)
            with PrepareView(console) as view, ray_session(cpus, 0, address):
                manifest = run_prepare(run, view.update)
    if as_json:
        tokens = {split: manifest.tokens(split) for split in manifest.splits}
        counts = {"documents": manifest.documents, "tokens": tokens, "fingerprint": manifest.fingerprint}
        click.echo(json.dumps(counts))
        return
    console = make_console()
    tables.prepared(console, manifest, run.prepare.output)
    if up_to_date:
        console.print("up to date: nothing to do")


@main.group()
def data() -> None:
    """Verify or inspect a prepared data set."""


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
    from rich.progress import track

    from gpt2dist.data import inspection
    from gpt2dist.data.shards import read_manifest

    manifest = read_manifest(location)
    total = sum(map(len, manifest.splits.values()))
    found = track(
        inspection.verify(location, manifest), "hashing", total, console=make_console(stderr=True), transient=True
    )
    checks = list(found)
    damaged = [check for check in checks if check.problem]
    if as_json:
        click.echo(json.dumps([{"file": c.file, "valid": not c.problem, "reason": c.problem} for c in checks]))
    else:
        for check in damaged:
            click.echo(f"DAMAGED: {location.rstrip('/')}/{check.file}: {check.problem}")
        click.echo(f"{location}: {len(checks) - len(damaged)} of {len(checks)} shards are good")
    if damaged:
        sys.exit(1)


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
    try:
        result = inspection.inspect(location, manifest)
    except OSError as e:
        raise UserError(f"{location}: a shard cannot be read: {e}; see: gpt2dist data verify {location}") from None
    if as_json:
        click.echo(json.dumps(result))
    else:
        tables.inspected(make_console(), manifest, result, location)


@main.command()
@click.argument("run_file", type=click.Path())
@set_option
@json_option
@address_option
@click.option("--dry-run", is_flag=True, help="Print config, batch arithmetic and memory; start nothing.")
@command
def train(run_file: str, overrides: tuple[str, ...], as_json: bool, address: str | None, dry_run: bool) -> None:
    """Train the run of RUN_FILE, or go on with it where it stopped.

    Ctrl-C or SIGTERM saves and ends; a second one ends at once.

    \b
    Example:
      gpt2dist train jobs/smoke.toml --set cluster.workers=1 --set train.stop_at=50
    """
    run = load_run(run_file, overrides)
    if dry_run:
        _dry_run(run, as_json)
        return
    from gpt2dist.cluster.session import output_to_log, ray_session
    from gpt2dist.report import live, tables
    from gpt2dist.storage import log_directory
    from gpt2dist.train import launch

    ready = launch.preflight(run, run_file)
    lock = launch.acquire_lock(run)
    started = time.time()
    if ready.finished:
        console = make_console(stderr=as_json)
        console.print(f"{run.run_dir}: finished at step {ready.resume_step}; nothing to do")
    else:
        log = log_directory(run.run_dir) / "log.txt"
        # Room for Ray Data's tasks beside the workers; with a single CPU left it takes turns and starts slowly.
        cpus = max(os.cpu_count() or 1, math.ceil(run.cluster.workers * run.cluster.cpus_per_worker) + 4)
        gpus = math.ceil(run.cluster.workers * run.cluster.gpus_per_worker)
        failure: launch.TrainingFailed | None = None
        with output_to_log(log) as terminal:
            console = make_console(None if as_json else terminal)  # with --json: to the log
            console.print(f"run {run.run_dir}, log {log}")
            with _stop_signals(console) as stop, ray_session(cpus, gpus, address):
                job = launch.TrainJob(run)
                stop.append(job.request_stop)
                live.follow(run, console, job.done, started)
                try:
                    job.check()
                except launch.TrainingFailed as e:
                    failure = e
        if failure:
            _fail(f"training failed: {failure}; log: {log}", 1)
    if lock:
        lock.release()
    if as_json:
        click.echo(json.dumps(_outcome(run)))
    else:
        tables.finished(make_console(), run, time.time() - started, run_file)


def _dry_run(run: RunConfig, as_json: bool) -> None:
    from gpt2dist.cluster import plan
    from gpt2dist.report import tables

    numbers, memory = plan.arithmetic(run), plan.memory(run)
    if as_json:
        click.echo(json.dumps({"config": run.model_dump(mode="json"), **numbers, "memory_bytes": memory}))
    else:
        tables.dry_run(make_console(), run, numbers, memory)


def _outcome(run: RunConfig) -> dict[str, Any]:
    from gpt2dist.train import checkpoint, rundir

    newest = checkpoint.newest(run.run_dir)
    metrics = rundir.metrics_log(run.run_dir).read()
    val = [m["val_loss"] for m in metrics if "val_loss" in m]
    return {
        "step": newest.index.step if newest else 0,
        "loss": metrics[-1]["loss"] if metrics else None,
        "val_loss": val[-1] if val else None,
        "skipped": sum("skipped" in m for m in metrics),
        "checkpoint": str(newest.path) if newest else None,
    }


@contextlib.contextmanager
def _stop_signals(console: Console) -> Any:
    """First SIGINT or SIGTERM: call what is in the yielded list (save and end). Second: exit at once."""
    actions: list[Callable[[], None]] = []
    seen: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        seen.append(signum)
        if len(seen) > 1 or not actions:
            os._exit(128 + signum)
        console.print("saving after this step, then ending; once more to end at once")
        for action in actions:
            action()

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield actions
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


@main.command()
@run_dir_argument
@click.option("--prompt", default="", help="Text to go on from; by default the start of a document.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens to write.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(min=0), help="0: likeliest.")
@click.option("--top-k", default=50, show_default=True, type=click.IntRange(min=0), help="0: all tokens.")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(min=1), help="How many texts.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the draws.")
@json_option
@command
def generate(
    run_dir: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    samples: int,
    seed: int,
    as_json: bool,
) -> None:
    """Write text with the newest checkpoint of RUN_DIR.

    \b
    Example:
      gpt2dist generate runs/smoke --prompt "def main(" --max-tokens 40 --samples 2
    """
    import torch

    from gpt2dist.data import tokenizer
    from gpt2dist.model.generate import sample
    from gpt2dist.model.gpt2 import GPT2, GPT2Config
    from gpt2dist.train import checkpoint

    run, newest = _open_run(run_dir)
    encoding = tokenizer.load(run.prepare.vocab_dir)
    model = GPT2(GPT2Config.from_run(run)).eval()
    model.load_state_dict(checkpoint.load_weights(newest), strict=False)  # head.weight is wte.weight
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.tensor([tokenizer.EOT, *encoding.encode_ordinary(prompt)], device=model.wte.weight.device)
    texts = []
    for i in range(samples):
        out = sample(model, ids, max_tokens, temperature=temperature, top_k=top_k, seed=seed + i, stop=tokenizer.EOT)
        texts.append(encoding.decode(out.tolist()))
        if not as_json:
            click.echo(prompt + texts[-1])
            if i + 1 < samples:
                click.echo("-" * 40)
    if as_json:
        click.echo(json.dumps({"step": newest.index.step, "prompt": prompt, "texts": texts}))


@main.command()
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
    from gpt2dist.data.shards import read_manifest
    from gpt2dist.train import ledger, rundir

    run, newest = _open_run(run_dir, overrides)
    manifest = read_manifest(run.data_path)
    if manifest.fingerprint != newest.index.data_fingerprint:
        raise UserError(
            f"{run_dir}: trained on data set {newest.index.data_fingerprint[:16]}, but {run.data_path} is "
            f"{manifest.fingerprint[:16]}"
        )
    lines = rundir.ledger_log(run_dir).read()
    result = ledger.audit(run, manifest, lines, newest.index.step)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        verdict = "every sample exactly once" if result.clean else "NOT every sample exactly once"
        click.echo(
            f"{result.samples:,} samples in {result.steps:,} steps and {result.attempts} attempts: "
            f"{result.duplicates} duplicates, {result.gaps} gaps: {verdict}"
        )
    if not result.clean:
        sys.exit(1)


@main.group()
def checkpoint() -> None:
    """List or verify the checkpoints of a run."""


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
    from gpt2dist.report.tables import size
    from gpt2dist.train import checkpoint as store

    rows = [store.describe(c, run_dir) for c in store.committed(_existing(run_dir))]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        if row["step"] is None:
            click.echo(f"damaged: {row['reason']}")
        else:
            state = "valid" if row["valid"] else f"damaged: {row['reason']}"
            made = f"{row['world_size']} workers, ZeRO-{row['zero_stage']}"
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
    found = list(store.committed(_existing(run_dir)))
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


def _existing(run_dir: str) -> str:
    from gpt2dist import storage

    path = storage.location(run_dir)
    if not (path.is_dir() if storage.is_local(path) else storage.children(path)):
        raise UserError(f"{run_dir}: no such run directory")
    return run_dir


def _open_run(run_dir: str, overrides: tuple[str, ...] = ()) -> tuple[RunConfig, Any]:
    """The configuration of a run directory and its newest checkpoint."""
    from gpt2dist import storage
    from gpt2dist.train import checkpoint as store

    config = storage.location(_existing(run_dir)) / "config.toml"
    try:
        run = parse_toml(storage.read_bytes(config), str(config), overrides)
    except FileNotFoundError:
        raise UserError(f"{config}: no such file") from None
    newest = store.newest(run_dir)
    if newest is None:
        raise UserError(f"{run_dir}: no checkpoint yet")
    return run, newest
