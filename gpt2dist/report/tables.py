"""Tables that commands print."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt2dist.config import RunConfig, UserError
from gpt2dist.data.shards import Manifest
from gpt2dist.report.goodput import MEANING, Goodput, goodput, title
from gpt2dist.report.history import understood
from gpt2dist.report.words import count, duration, size
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.resume import WORDS, Change


def pairs(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """A two-column table."""
    if title:
        console.print(title, style="bold")
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


def prepared(console: Console, manifest: Manifest, location: str) -> None:
    """What `prepare` made."""
    counts = manifest.documents
    rows = {"documents": f"{counts['kept']:,} kept, {counts['skipped']:,} left out"}
    for split, shards in manifest.splits.items():
        tokens = sum(s.tokens for s in shards)
        rows[split] = f"{tokens:,} tokens in {count('shard', len(shards))} ({size(sum(s.bytes for s in shards))})"
    rows["fingerprint"] = manifest.fingerprint[:16]
    pairs(console, f"data set {location}", rows)
    source_mix(console, manifest)


def source_mix(console: Console, manifest: Manifest) -> None:
    """Documents and tokens of each source: in, kept, and left out by reason."""
    table = Table(box=None, pad_edge=False)
    for column in ("source", "", "documents", "tokens"):
        table.add_column(column, justify="right" if column in ("documents", "tokens") else "left")
    for source in manifest.sources:
        left_out = {reason: tally for reason, tally in sorted(source.dropped.items()) if tally.documents}
        for i, (what, tally) in enumerate({"read": source.read, "kept": source.kept, **left_out}.items()):
            table.add_row("" if i else source.name, what, f"{tally.documents:,}", f"{tally.tokens:,}")
    console.print(table)


def passed_over(console: Console, files: Mapping[str, int]) -> None:
    """Files in the sources' directories that are of no kind that can be read, and directories that a glob names."""
    if files:
        kinds = sorted(files.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in kinds[:8])
        more = ", …" if len(kinds) > 8 else ""
        console.print(f"passed over: {sum(files.values()):,} of other kinds ({named}{more})")


def inspected(console: Console, manifest: Manifest, result: Mapping[str, Any], location: str) -> None:
    """What `data inspect` found."""
    prepared(console, manifest, location)
    table = Table(title="length of documents", title_justify="left", box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    most = max((row["documents"] for row in result["lengths"]), default=1)
    for row in result["lengths"]:
        bar = "█" * max(1, round(30 * row["documents"] / most))
        table.add_row(f"{row['from']:,} - {row['below'] - 1:,}", f"{row['documents']:,}", bar)
    console.print(table)
    console.print("first document:")
    console.print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", result["sample"]))  # no escape sequences


def dry_run(console: Console, run: RunConfig, numbers: Mapping[str, Any], memory: Mapping[str, int]) -> None:
    """The resolved config, the batch arithmetic, and the memory of each part."""
    console.print(run.to_toml())
    m, world, gas = numbers["micro_batches"], numbers["workers"], numbers["accumulation_steps"]
    padding = numbers["padding_micro_batches"]
    batch = run.batch
    warmup = f"; in the first {batch.warmup_steps:,} steps growing from {batch.initial_micro_batches} micro-batches"
    pairs(
        console,
        "computed",
        {
            "parameters": f"{numbers['parameters']:,} (+ {numbers['parameters_padded'] - numbers['parameters']:,} "
            "of vocabulary padding)",
            "FLOPs per token": f"{numbers['flops_per_token']:,}",
            "a step": f"{m} micro-batches × {run.batch.micro_sequences} sequences × {run.data.seq_len} tokens = "
            f"{numbers['tokens_per_step']:,} tokens" + (warmup if batch.warmup_steps else ""),
            "a worker": f"{gas} micro-batches a step on each of {world}" + (f", {padding} padding" if padding else ""),
            "the run": f"{run.train.steps:,} steps, {numbers['tokens']:,} tokens, {numbers['flops']:.3g} FLOPs",
            "a checkpoint": size(numbers["checkpoint_bytes"]),
        },
    )
    total = {"total": sum(memory.values())}
    pairs(
        console,
        f"memory of one worker, ZeRO-{run.train.zero_stage}, {run.train.precision} (computed)",
        {name: size(value) for name, value in {**memory, **total}.items()},
    )


def changed(console: Console, step: int, changes: Sequence[Change]) -> None:
    """What a run file changes in a run that goes on."""
    if changes:
        console.print(f"going on from step {step:,} with changes:")
    for change in changes:
        console.print(f"  {change} ({WORDS[change.effect]})")


def verdict(console: Console, v: Mapping[str, Any]) -> None:
    """What `chaos` found."""
    table = Table(box=None, pad_edge=False)
    for column in ("step", "fault", "what happened", "until further than before"):
        table.add_column(column, justify="right" if column == "step" else "left")
    for fault in v["faults"]:
        table.add_row(str(fault["step"]), fault["fault"], fault["what"], f"{fault['seconds']:.1f} s")
    console.print(table)
    apart, allowed, audit = v["largest_difference"], v["allowed"], v["audit"]
    same = "equal in every step" if apart == 0 else f"differ by {apart:.2g} at most"
    sizes = " → ".join(map(str, v["world_sizes"]))
    rows = {
        "losses": f"{same} ({allowed:g} allowed; workers: {sizes})",
        "samples": f"{audit['samples']:,} once, {audit['duplicates']} twice, {audit['gaps']} never",
        "worker groups": f"{v['attempts']}, {count('step', v['redone_steps'])} done again",
        "verdict": "PASSED" if v["passed"] else "FAILED",
    }
    pairs(console, "", rows)


def finished(console: Console, run: RunConfig, seconds: float, run_file: str, overrides: Sequence[str] = ()) -> None:
    """The end of a run: losses, where the checkpoint is, how to go on; overrides: of --set."""
    metrics = rundir.metrics_log(run.run_dir).read()
    events = rundir.events_log(run.run_dir).in_time()
    rows: dict[str, str] = {}
    if losses := [m["loss"] for m in metrics if "loss" in m]:
        rows["training loss"] = " → ".join(f"{loss:.4f}" for loss in (losses[0], *losses[1:][-1:]))
    before = [e["val_loss"] for e in events if e["event"] == "eval" and "val_loss" in e][-1:]
    during = [m["val_loss"] for m in metrics if "val_loss" in m]
    if values := before + during:
        rows["validation loss"] = " → ".join(f"{value:.4f}" for value in (values[0], *values[1:][-1:]))
        rows["validation loss"] += "" if during else " before training"
    newest = checkpoint.newest(run.run_dir)
    step = newest.index.step if newest else 0
    rows["steps"] = f"{step:,} of {run.train.steps:,}; this command took {int(seconds) // 60}:{int(seconds) % 60:02d}"
    for epochs in [e.get("epochs", {}) for e in events if e["event"] == "end"][-1:]:
        rows["epochs"] = ", ".join(f"{n:.2f} of {path}" for path, n in epochs.items())
    if skipped := sum("skipped" in m for m in metrics):
        rows["skipped steps"] = f"{skipped:,} (gradients not finite)"
    if sum(e["event"] == "start" for e in events) > 1:
        with contextlib.suppress(UserError), understood(run.run_dir):
            spent = goodput(events, metrics)
            time = duration(spent.wall_s - spent.paused_s)
            rows["goodput"] = f"{spent.share:.1%} of {time} in {spent.attempts} attempts"
    if newest:
        rows["checkpoint"] = f"{newest.path} ({size(newest.bytes)})"
    if step < run.train.steps:
        stopped = run.train.stop_at and step >= run.train.stop_at
        given = [text for text in overrides if not (stopped and text.split("=")[0].strip() == "train.stop_at")]
        words = [run_file, *(word for text in given for word in ("--set", text))]
        rows["to go on"] = f"gpt2dist train {shlex.join(words)}" + (" --set train.stop_at=STEP" if stopped else "")
    else:
        rows["to go on"] = f'gpt2dist generate {shlex.quote(run.run_dir)} --prompt "import "'
    pairs(console, "", rows)


def time_spent(console: Console, run_dir: str, g: Goodput, price_per_hour: float | None) -> None:
    """Where the time of a run went, and what it has cost."""
    counts = ", ".join(map(count, ("command", "attempt", "failure"), (g.commands, g.attempts, g.failures)))
    console.print(f"{run_dir}: {duration(g.wall_s)} of wall clock, {counts}", style="bold")
    cost = g.cost(price_per_hour) if price_per_hour is not None else None
    table = Table(box=None, pad_edge=False)
    for column in ("", "time", "share", *(["dollars"] if cost else [])):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("")
    for category, meaning in MEANING.items():
        seconds = g.seconds[category]
        share = f"{seconds / g.wall_s:.1%}" if g.wall_s else ""
        dollars = [f"{cost[category]:,.2f}"] if cost else []
        table.add_row(title(category), duration(seconds), share, *dollars, meaning)
    if cost:
        total = f"{sum(cost.values()):,.2f}"
        table.add_row("total", duration(g.wall_s), "", total, f"at {price_per_hour:g} an hour of a worker")
    console.print(table)
    console.print(goodput_line(g))


def goodput_line(g: Goodput) -> str:
    """Goodput beside what the formula allows."""
    line = f"Goodput {g.share:.1%}"
    if g.paused_s:
        line += f" of the time without {duration(g.paused_s)} of pauses"
    if g.allowed:
        a = g.allowed
        line += f"; Young/Daly allow {a.share:.1%} with a failure every {duration(a.mtbf_s)}, "
        line += f"{duration(a.restart_s)} to restart and a save every {duration(a.interval_s)}"
    return line
