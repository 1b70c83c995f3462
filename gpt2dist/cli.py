"""The commands. They parse, call, and print; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from gpt2dist import STARTED, __version__
from gpt2dist.commands.cluster import cluster
from gpt2dist.commands.common import (
    command,
    existing,
    fail,
    json_option,
    read_config,
    run_dir_argument,
    set_option,
)
from gpt2dist.commands.jobs import jobs, submit
from gpt2dist.commands.plan import plan
from gpt2dist.commands.report import goodput, report
from gpt2dist.config import ClusterSection, RunConfig, UserError, load_run
from gpt2dist.report.console import make_console

address_option = click.option("--address", help="Ray cluster to join; by default RAY_ADDRESS, else a private one.")
precision_option = click.option(
    "--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]), help="Arithmetic."
)
step_option = click.option("--step", type=click.IntRange(min=0), help="Checkpoint of this step; by default the newest.")
ema_option = click.option("--ema", is_flag=True, help="With the averaged weights (optim.ema_decay).")
model_argument = click.argument("location", metavar="RUN_DIR|HF_DIR")


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


main.add_command(cluster)
main.add_command(plan)
main.add_command(submit)
main.add_command(jobs)
main.add_command(goodput)
main.add_command(report)


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
    _check_in_a_job(run, run_file)
    from gpt2dist.cluster.session import output_to_log, ray_session
    from gpt2dist.data.prepare import is_up_to_date
    from gpt2dist.data.prepare import prepare as run_prepare
    from gpt2dist.report import tables
    from gpt2dist.report.preparing import PrepareView
    from gpt2dist.storage import acquire_lock, check_writable, log_directory

    manifest = is_up_to_date(run)
    up_to_date = manifest is not None
    if manifest is None:
        check_writable(run.prepare.output)
        lock = acquire_lock(run.prepare.output, "another process is preparing this data set")
        log = log_directory(run.prepare.output) / "prepare.log"
        cpus = run.prepare.cpus or os.cpu_count() or 1
        with output_to_log(log) as terminal:
            console = make_console(None if as_json else terminal)
            with PrepareView(console) as view, ray_session(cpus, 0, address):
                manifest = run_prepare(run, view.update)
        if lock:
            lock.release()
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
    checks = _hash_shards(location)
    damaged = [check for check in checks if check.problem]
    if as_json:
        click.echo(json.dumps([{"file": c.file, "valid": not c.problem, "reason": c.problem} for c in checks]))
    else:
        for check in damaged:
            click.echo(f"DAMAGED: {location.rstrip('/')}/{check.file}: {check.problem}")
        click.echo(f"{location}: {len(checks) - len(damaged)} of {len(checks)} shards are good")
    if damaged:
        sys.exit(1)


def _hash_shards(location: str) -> list[Any]:
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
        _dry_run(run, run_file, as_json)
        return
    _check_in_a_job(run, run_file)
    from gpt2dist.cluster.session import NO_NODES_FOR_DATA, output_to_log, ray_session
    from gpt2dist.cluster.waiting import Room
    from gpt2dist.report import gauges, live, tables
    from gpt2dist.storage import acquire_lock, log_directory
    from gpt2dist.train import launch

    ready = launch.preflight(run, run_file)
    if run.data.verify and not ready.finished:
        for path in run.data_paths:
            for check in _hash_shards(path):
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
            with _stop_signals(console) as on_stop, ray_session(cpus, gpus, address, NO_NODES_FOR_DATA):
                job = launch.TrainJob(run, STARTED, ready.changes)
                on_stop(job.request_stop)
                if url := gauges.scrape_url():
                    console.print(f"metrics at {url}")
                observe = gauges.Gauges(run.name, job.run.run_dir).update
                live.follow(run, console, job.done, started, observe, Room(run).missing)
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
        click.echo(json.dumps(_outcome(run)))
    else:
        tables.finished(make_console(), run, time.time() - started, run_file)


def _check_in_a_job(run: RunConfig, run_file: str) -> None:
    from gpt2dist.cluster.jobs import IN_A_JOB, check_places

    if IN_A_JOB in os.environ:
        check_places(run, run_file)


def _dry_run(run: RunConfig, run_file: str, as_json: bool) -> None:
    from gpt2dist.cluster.plan import arithmetic, memory
    from gpt2dist.report import tables
    from gpt2dist.storage import StorageError
    from gpt2dist.train import checkpoint

    numbers, parts = arithmetic(run), memory(run)
    newest, away = None, ""
    try:
        newest = checkpoint.newest(run.run_dir)
    except StorageError as e:  # the arithmetic needs no storage
        away = str(e)
    changed, reason = _changes(run, newest) if newest else ([], "")
    if as_json:
        resume = newest and {"step": newest.index.step, "changes": [change.to_json() for change in changed]}
        config = {"config": run.model_dump(mode="json")}
        click.echo(json.dumps({**config, **numbers, "memory_bytes": parts, "resume": resume}))
    else:
        console = make_console()
        tables.dry_run(console, run, numbers, parts)
        if newest:
            tables.changed(console, newest.index.step, changed)
        if away:
            console.print(f"whether there is a run to go on with is not known: {away}")
    if reason:
        raise UserError(f"{run_file}: {reason}")


def _changes(run: RunConfig, newest: Any) -> tuple[list[Any], str]:
    """What the run file changes, and why it cannot go on with that."""
    from gpt2dist.data.mixture import Mixture
    from gpt2dist.train import launch, resume

    changed = launch.compare(run, newest, Mixture.open(run))
    return changed, resume.refusal(changed, run.data.allow_changed)


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
def _stop_signals(console: Console) -> Iterator[Callable[[Callable[[], None]], None]]:
    """First SIGINT or SIGTERM: do what was given to the yielded function (save and end). Second: exit at once."""
    actions: list[Callable[[], None]] = []
    seen: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        seen.append(signum)
        if len(seen) > 1 or not actions:
            os._exit(128 + signum)
        console.print("saving after this step, then ending; once more to end at once")
        for action in actions:
            action()

    def on_stop(action: Callable[[], None]) -> None:
        actions.append(action)
        for number in previous:  # once more: Ray, which has started meanwhile, puts its own in the place of SIGTERM's
            signal.signal(number, handle)

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield on_stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


@main.command()
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
    from gpt2dist.report import curves, tables
    from gpt2dist.report.goodput import of_run as goodput_of
    from gpt2dist.train import launch

    launch.preflight(run, run_file)
    console = make_console(stderr=as_json)
    try:
        verdict = arena.compare(run, [f.strip() for f in faults.split(",")], seed, console.print)
    except (arena.ChaosError, NodeFailed) as e:
        fail(str(e), 1)
    picture = Path(f"{verdict.run_dir}.png")
    curves.draw(picture, verdict.reference_dir, verdict.run_dir, [(f.step, f.fault) for f in verdict.faults])
    spent = goodput_of(verdict.run_dir)
    if as_json:
        click.echo(json.dumps(verdict.to_json() | {"picture": str(picture), "goodput": spent.to_json(None)}))
    else:
        tables.verdict(console, verdict.to_json())
        console.print(tables.goodput_line(spent))
        console.print(f"the two curves: {picture}")
    if not verdict.passed:
        sys.exit(1)


@main.command()
@model_argument
@click.option("--prompt", "prompts", multiple=True, help="Text to go on from; may be repeated.")
@click.option("--prompt-file", help="File with a prompt a line; -: standard input.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens to write.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(min=0), help="0: likeliest.")
@click.option("--top-k", default=50, show_default=True, type=click.IntRange(min=0), help="0: all tokens.")
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True), help="1: all.")
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@click.option("--stop-token", multiple=True, type=click.IntRange(0, 50256), help="End before this token id, likewise.")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(min=1), help="Texts for each prompt.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the first; +1 for each more."
)
@click.option("--batch", default=16, show_default=True, type=click.IntRange(min=1), help="Texts computed together.")
@ema_option
@precision_option
@json_option
@command
def generate(
    location: str,
    prompts: tuple[str, ...],
    prompt_file: str | None,
    stop: tuple[str, ...],
    stop_token: tuple[int, ...],
    samples: int,
    seed: int,
    batch: int,
    ema: bool,
    precision: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Write text with the newest checkpoint of a run, or with a Hugging Face GPT-2.

    Without a prompt it begins a document. Texts appear as they are written; each ends at <|endoftext|>.

    \b
    Example:
      gpt2dist generate runs/smoke --prompt "def main(" --prompt "class " --max-tokens 40 --samples 2
    """
    from gpt2dist.data import tokenizer
    from gpt2dist.model.generate import Sampling, continue_texts
    from gpt2dist.train.saved import open_model

    lines = _prompt_lines(prompt_file) if prompt_file else []
    starts = [p for p in [*prompts, *lines] or [""] for _ in range(samples)]
    seeds = [seed + i % samples for i in range(len(starts))]
    sampling = Sampling(stop=stop, stop_tokens=frozenset({tokenizer.EOT, *stop_token}), **options)
    saved = open_model(location, ema=ema)
    encoding = tokenizer.load(saved.vocab_dir)
    model = saved.load(precision)
    texts = [""] * len(starts)
    shown = -1
    for i, piece in continue_texts(model, encoding, starts, seeds, sampling, batch):
        texts[i] += piece
        if not as_json:
            if i != shown:
                click.echo(("\n" + "-" * 40 + "\n" if i else "") + starts[i], nl=False)
                shown = i
            click.echo(piece, nl=False)
    if as_json:
        rows = [{"prompt": p, "seed": s, "text": t} for p, s, t in zip(starts, seeds, texts, strict=True)]
        click.echo(json.dumps({"step": saved.step, "samples": rows}))
    else:
        click.echo()


def _prompt_lines(file: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt-file: {file}: cannot be read: {e}") from None


@main.command()
@model_argument
@click.option("--data", metavar="DIR", help="A prepared data set; by default the run's own.")
@click.option("--split", default="val", show_default=True, type=click.Choice(["val", "train"]), help="Which part.")
@click.option("--batches", type=click.IntRange(min=1), help="Of a fixed random order; by default the whole split.")
@click.option("--batch", type=click.IntRange(min=1), help="Sequences computed together.")
@click.option("--seq-len", type=click.IntRange(min=1), help="By default the run's, else the model's n_positions.")
@click.option("--workers", type=click.IntRange(min=1), help="Share the work among Ray Train workers.")
@address_option
@step_option
@ema_option
@precision_option
@json_option
@command
def evaluate(
    location: str,
    workers: int | None,
    address: str | None,
    step: int | None,
    ema: bool,
    precision: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Loss, perplexity and next-token accuracy on held-out data.

    Every sample of the split counts once. With --workers or --address as a Ray Train job, else in this process.

    \b
    Example:
      gpt2dist evaluate runs/smoke
      gpt2dist evaluate models/gpt2 --data data/stdlib --batches 20
      gpt2dist evaluate runs/smoke --workers 2
    """
    from rich.progress import track

    from gpt2dist.model.evaluate import Score
    from gpt2dist.model.evaluate import evaluate as scores
    from gpt2dist.report import tables
    from gpt2dist.train import evaluation
    from gpt2dist.train.saved import open_model

    saved = open_model(location, step, ema=ema)
    place = location if "://" in location else os.path.abspath(location)
    request = evaluation.Evaluation.of(saved, place, ema=ema, precision=precision, **options)
    tokens = request.open()
    ids, console = request.ids(tokens), make_console(stderr=True)
    if workers or address:
        score = _evaluate_on_ray(request, saved, workers or 1, address, as_json)
    else:
        found = scores(saved.load(precision), tokens, ids, request.batch)
        batches = -(-len(ids) // request.batch)
        score = sum(track(found, "evaluating", batches, console=console, transient=True), Score())
    values = {"loss": score.loss, "perplexity": score.perplexity, "accuracy": score.accuracy}
    data = ", ".join(request.paths)
    if as_json:
        what = {"step": saved.step, "data": data, "split": request.split, "samples": len(ids), "tokens": score.tokens}
        click.echo(json.dumps(what | values))
    else:
        counts = {"sequences": f"{len(ids):,} of {tokens.num_samples:,}", "tokens": f"{score.tokens:,}"}
        rows = counts | {key: f"{value:.4f}" for key, value in values.items()}
        tables.pairs(make_console(), f"{location}, {request.split} of {data}", rows)


def _evaluate_on_ray(request: Any, saved: Any, workers: int, address: str | None, as_json: bool) -> Any:
    import tempfile

    from gpt2dist.cluster.session import output_to_log, ray_session
    from gpt2dist.train import evaluation
    from gpt2dist.train.launch import TrainingFailed

    cluster = saved.run.cluster if saved.run else ClusterSection()
    cpus, gpus = cluster.cpus_per_worker, cluster.gpus_per_worker
    log = Path(tempfile.mkdtemp(prefix="gpt2dist-evaluate-")) / "log.txt"
    room = max(os.cpu_count() or 1, math.ceil(workers * cpus))
    with output_to_log(log) as terminal:
        console = make_console(None if as_json else terminal)
        with (
            console.status(f"evaluating on {workers} workers, log {log}"),
            ray_session(room, math.ceil(workers * gpus), address),
        ):
            try:
                return evaluation.on_ray(request, workers, cpus, gpus)
            except TrainingFailed as e:
                failure = e
    fail(f"evaluation failed: {failure}; log: {log}", 1)


@main.command()
@model_argument
@click.option("--output", required=True, metavar="DIR", help="Local directory or s3:// location; must hold no model.")
@step_option
@ema_option
@json_option
@command
def export(location: str, output: str, step: int | None, ema: bool, as_json: bool) -> None:
    """Write a checkpoint as a Hugging Face model directory, with its tokenizer.

    transformers' GPT2LMHeadModel and AutoTokenizer open it with from_pretrained, offline.

    \b
    Example:
      gpt2dist export runs/smoke --output models/smoke
    """
    from gpt2dist.model import hf
    from gpt2dist.train.saved import open_model

    saved = open_model(location, step, ema=ema)
    hf.export(output, saved.config, saved.weights, saved.vocab_dir)
    if as_json:
        click.echo(json.dumps({"step": saved.step, "output": output}))
    else:
        click.echo(f"{output}: " + (location if saved.step is None else f"step {saved.step} of {location}"))


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
    from gpt2dist.train import ledger

    run, newest = _open_run(run_dir, overrides)
    result = ledger.audit_run(run_dir, run, newest.index)
    click.echo(json.dumps(result.to_json()) if as_json else str(result))
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

    rows = [store.describe(c, run_dir) for c in store.committed(existing(run_dir))]
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        if "bytes" not in row:  # its index cannot be read
            click.echo(f"step {row['step']:>8}  damaged: {row['reason']}")
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
    found = list(store.committed(existing(run_dir)))
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


def _open_run(run_dir: str, overrides: tuple[str, ...] = ()) -> tuple[RunConfig, Any]:
    """The configuration of a run directory and its newest checkpoint."""
    from gpt2dist.train.saved import find_checkpoint

    return read_config(run_dir, overrides), find_checkpoint(run_dir)
