"""`gpt2dist generate`, `evaluate` and `export`: what a trained model is for."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gpt2dist.commands.common import FiniteRange, address_option, command, fail, json_option, to_json
from gpt2dist.config import ClusterSection, UserError, absolute
from gpt2dist.report.console import make_console

precision_option = click.option(
    "--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]), help="Arithmetic."
)
step_option = click.option("--step", type=click.IntRange(min=0), help="Checkpoint of this step; by default the newest.")
ema_option = click.option("--ema", is_flag=True, help="With the averaged weights (optim.ema_decay).")
model_argument = click.argument("location", metavar="RUN_DIR|HF_DIR")


def _temperature(_: click.Context, __: click.Parameter, value: float) -> float:
    if value != 0 and not 1e-6 <= value <= 1e6:  # nan neither
        raise click.BadParameter(f"{value:g} is neither 0 nor from 1e-6 to 1e6.")
    return value


def _not_empty(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    if "" in values:
        raise click.BadParameter("an empty string stands everywhere.")
    return values


@click.command()
@model_argument
@click.option("--prompt", "prompts", multiple=True, help="Text to go on from; may be repeated.")
@click.option("--prompt-file", help="File with a prompt a line; -: standard input.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Tokens to write.")
@click.option("--temperature", default=0.8, show_default=True, callback=_temperature, help="0: likeliest.")
@click.option("--top-k", default=50, show_default=True, type=click.IntRange(min=0), help="0: all tokens.")
@click.option("--top-p", default=1.0, show_default=True, type=FiniteRange(0, 1, min_open=True), help="1: all.")
@click.option("--stop", multiple=True, callback=_not_empty, help="End before this string; may be repeated.")
@click.option("--stop-token", multiple=True, type=click.IntRange(0, 50256), help="End before this token id, likewise.")
@click.option("--samples", default=1, show_default=True, type=click.IntRange(min=1), help="Texts for each prompt.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of the first; +1 for each more."
)
@click.option("--batch", default=16, show_default=True, type=click.IntRange(min=1), help="Texts computed together.")
@step_option
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
    step: int | None,
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
    from gpt2dist.model.generate import NotFinite, Sampling, continue_texts
    from gpt2dist.train.saved import open_model

    lines = [] if prompt_file is None else _prompt_lines(prompt_file)
    if prompt_file and not lines and not prompts:
        raise UserError(f"--prompt-file: {prompt_file}: no prompts in it")
    starts = [p for p in [*prompts, *lines] or [""] for _ in range(samples)]
    seeds = [(seed + i % samples) % 2**63 for i in range(len(starts))]
    sampling = Sampling(stop=stop, stop_tokens=frozenset({tokenizer.EOT, *stop_token}), **options)
    saved = open_model(location, step, ema=ema)
    encoding = tokenizer.load(saved.vocab_dir)
    model = saved.load(precision)
    texts = [""] * len(starts)
    shown = -1
    try:
        with _fitting(batch):
            for i, piece in continue_texts(model, encoding, starts, seeds, sampling, batch):
                texts[i] += piece
                if not as_json:
                    if i != shown:
                        click.echo(("\n" + "-" * 40 + "\n" if i else "") + starts[i], nl=False)
                        shown = i
                    click.echo(piece, nl=False)
    except NotFinite:
        if shown >= 0:
            click.echo()  # ends the line of a text
        raise UserError(f"{location}: the model's logits are not finite") from None
    if as_json:
        rows = [{"prompt": p, "seed": s, "text": t} for p, s, t in zip(starts, seeds, texts, strict=True)]
        click.echo(json.dumps({"step": saved.step, "samples": rows}))
    else:
        click.echo()


@contextlib.contextmanager
def _fitting(batch: int) -> Iterator[None]:
    """Raises `UserError` in place of torch's errors where so many at once do not fit into memory."""
    try:
        yield
    except RuntimeError as e:
        if "can't allocate memory" in str(e) or "out of memory" in str(e):
            raise UserError(f"--batch {batch}: does not fit into memory") from None
        raise


def _prompt_lines(file: str) -> list[str]:
    try:
        if not file:
            raise UserError("--prompt-file: empty; name a file")
        if file == "-" and sys.stdin is None:  # a service without one
            raise UserError("--prompt-file: -: there is no standard input")
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
        return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt-file: {file}: cannot be read: {e}") from None


@click.command()
@model_argument
@click.option("--data", metavar="DIR", help="A prepared data set; by default the run's own.")
@click.option("--split", default="val", show_default=True, type=click.Choice(["val", "train"]), help="Which part.")
@click.option("--batches", type=click.IntRange(min=1), help="Of a fixed random order; by default the whole split.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Sequences computed together; by default the run's micro_sequences, else 4096 tokens' worth.",
)
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
    request = evaluation.Evaluation.of(saved, absolute(location), ema=ema, precision=precision, **options)
    try:
        tokens = request.open()
    except UserError as e:
        raise UserError(f"--data: {e}" if options["data"] else str(e)) from None
    ids, console = request.ids(tokens), make_console(stderr=True)
    if workers or address:
        score = _evaluate_on_ray(request, saved, workers or 1, address, as_json)
    else:
        found = scores(saved.load(precision), tokens, ids, request.batch)
        batches = -(-len(ids) // request.batch)
        with _fitting(request.batch):
            score = sum(track(found, "evaluating", batches, console=console, transient=True), Score())
    values = {"loss": score.loss, "perplexity": score.perplexity, "accuracy": score.accuracy}
    data = ", ".join(request.paths)
    if as_json:
        what = {"step": saved.step, "data": data, "split": request.split, "samples": len(ids), "tokens": score.tokens}
        click.echo(to_json(what | values))
    else:
        counts = {"sequences": f"{len(ids):,} of {tokens.num_samples:,}", "tokens": f"{score.tokens:,}"}
        rows = counts | {key: f"{value:.4f}" for key, value in values.items()}
        tables.pairs(make_console(), f"{location}, {request.split} of {data}", rows)


def _evaluate_on_ray(request: Any, saved: Any, workers: int, address: str | None, as_json: bool) -> Any:
    import tempfile

    from gpt2dist.cluster.session import output_to_log, ray_session
    from gpt2dist.report.words import count
    from gpt2dist.train import evaluation
    from gpt2dist.train.launch import TrainingFailed

    cluster = saved.run.cluster if saved.run else ClusterSection()
    cpus, gpus = cluster.cpus_per_worker, cluster.gpus_per_worker
    log = Path(tempfile.mkdtemp(prefix="gpt2dist-evaluate-")) / "log.txt"
    room = max(os.cpu_count() or 1, math.ceil(workers * cpus))
    with output_to_log(log) as terminal:
        console = make_console(None if as_json else terminal)
        with (
            console.status(f"evaluating on {count('worker', workers)}, log {log}"),
            ray_session(room, math.ceil(workers * gpus), address),
        ):
            try:
                return evaluation.on_ray(request, workers, cpus, gpus)
            except TrainingFailed as e:
                failure = e
    fail(f"evaluation failed: {failure}; log: {log}", 1)


@click.command()
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
