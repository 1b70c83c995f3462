"""`report`: one HTML page about a run, with nothing to load from elsewhere."""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from gpt2dist import __version__
from gpt2dist.config import RunConfig, UserError
from gpt2dist.model import gpt2
from gpt2dist.report import plots
from gpt2dist.report.goodput import MEANING, Category, goodput, title
from gpt2dist.report.history import attempts, read, understood, words
from gpt2dist.report.tables import goodput_line
from gpt2dist.report.words import count, duration, size
from gpt2dist.storage import location, publish
from gpt2dist.train import checkpoint, ledger, rundir

NAME = "report.html"
TEMPLATE = Path(__file__).with_name("page.html")
SHOWN_EVENTS = 1000
COLORS: dict[Category, str] = {
    "productive": "#2a7f62",
    "redone": "#d1495b",
    "start_up": "#e9b44c",
    "data_wait": "#7fb7be",
    "checkpoint_stall": "#7b5ea7",
    "evaluation": "#1f4e79",
    "lost_to_failure": "#8c1c13",
    "idle": "#cccccc",
}
BAD = ("failure", "hang", "save_failed", "bad_checkpoint", "non_finite", "rewind")
"""Events that are shown in red."""


def write(run_dir: str, run: RunConfig) -> str:
    """Write the page of a run into its directory; returns where. run: its configuration.

    Raises:
        UserError: there are no events yet, one is not understood, or the page cannot be written.
    """
    page = render(run_dir, run)
    try:
        publish(location(run_dir) / NAME, page.encode(errors="backslashreplace"))
    except OSError as e:
        raise UserError(f"{run_dir}: {NAME}: cannot be written: {e.strerror or e}") from None
    return f"{run_dir.rstrip('/')}/{NAME}"


def render(run_dir: str, run: RunConfig) -> str:
    """The page as HTML. Raises `UserError` where there are no events yet, or one is not understood."""
    events = read(run_dir)
    with understood(run_dir):
        told = _told(run, events, rundir.metrics_log(run_dir).read())
    model = gpt2.GPT2Config.from_run(run)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=run.name,
        run_dir=run_dir,
        model=f"GPT-2, {model.n_layer} layers × {model.n_embd}, {gpt2.count_parameters(model) / 1e6:,.1f} M parameters",
        audit=_audit(run_dir, run),
        checkpoints=_checkpoints(run_dir),
        config=run.to_toml(),
        now=_utc(time.time()),
        version=__version__,
        **told,
    )


def _told(run: RunConfig, events: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page says of the events and the lines of metrics."""
    needed = ("loss", "tokens_per_s", "mfu", "val_loss")
    metrics = [m for m in lines if all(isinstance({"val_loss": 0.0, **m}.get(key), (int, float)) for key in needed)]
    spent, price = goodput(events, lines), run.cluster.price_per_hour
    cost = spent.cost(price) if price is not None else None
    parts = [
        {
            "name": title(category),
            "color": COLORS[category],
            "time": duration(spent.seconds[category]),
            "percent": 100 * spent.seconds[category] / spent.wall_s if spent.wall_s else 0.0,
            "dollars": f"{cost[category]:,.2f}" if cost else "",
            "meaning": meaning,
        }
        for category, meaning in MEANING.items()
    ]
    shown = [{"when": _utc(e["time"]), "text": text, "bad": e["event"] in BAD} for e in events if (text := words(e))]
    return {
        "state": _state(events, metrics),
        "facts": _facts(run, events, metrics, spent.wall_s, sum(cost.values()) if cost else None),
        "plots": _plots(events, metrics),
        "parts": parts,
        "priced": cost is not None,
        "goodput": goodput_line(spent),
        "events": shown[-SHOWN_EVENTS:],
        "left_out": max(0, len(shown) - SHOWN_EVENTS),
    }


def _plots(events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> dict[str, str] | None:
    if not metrics:
        return None
    began = float(events[0].get("began", events[0]["time"]))
    before = [e["val_loss"] for e in events if e["event"] == "eval"][-1:]
    starts = attempts(events)
    return {
        "loss": plots.loss(metrics, before[0] if before else None, starts),
        "throughput": plots.throughput(metrics, starts),
        "progress": plots.progress(metrics, starts, began),
    }


def _facts(
    run: RunConfig, events: list[dict[str, Any]], metrics: list[dict[str, Any]], wall_s: float, usd: float | None
) -> list[tuple[str, str]]:
    """What stands at the top: label and value."""
    facts = [("steps", f"{metrics[-1]['step'] + 1 if metrics else 0:,} of {run.train.steps:,}")]
    if metrics:
        facts.append(("training loss", f"{metrics[-1]['loss']:.4f}"))
        if val := [m["val_loss"] for m in metrics if "val_loss" in m]:
            facts.append(("validation loss", f"{val[-1]:.4f}"))
        facts.append(("tokens a second, median", f"{statistics.median(m['tokens_per_s'] for m in metrics):,.0f}"))
        facts.append(("MFU, median", f"{statistics.median(m['mfu'] for m in metrics):.1%}"))
    facts.append(("wall clock", duration(wall_s)))
    facts.append(("attempts", str(sum(e["event"] == "start" for e in events))))
    if usd is not None:
        facts.append(("dollars", f"{usd:,.2f}"))
    return facts


def _state(events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> str:
    kinds = ("end", "launch", "restart", "start", "failure", "exit")
    known = [e for e in events if e["event"] in kinds]
    ended = known[-1] if known and known[-1]["event"] == "exit" else None
    before = [e for e in known if e["event"] != "exit"][-1:]  # how the last worker group had ended, if there was one
    if before and before[0]["event"] == "end" and before[0]["reason"] in ("finished", "stopped"):
        return str(before[0]["reason"])
    if ended:
        return "stopped" if ended.get("stopped") else "failed"
    heard = max(events[-1]["time"], metrics[-1].get("time", 0.0) if metrics else 0.0)
    return f"not ended, last heard of {_utc(heard)} UTC"


def _checkpoints(run_dir: str) -> dict[str, Any]:
    """Rows, or why there are none."""
    try:
        rows = [_checkpoint(c, run_dir) for c in checkpoint.committed(run_dir)]
    except (OSError, UserError) as e:  # a copy without its checkpoints
        return {"rows": [], "problem": str(e)}
    return {"rows": rows, "problem": "" if rows else "None."}


def _audit(run_dir: str, run: RunConfig) -> dict[str, Any]:
    try:
        newest = checkpoint.newest(run_dir)
        if newest is None:
            return {"clean": True, "text": "Nothing was saved yet, so there is nothing to audit."}
        result = ledger.audit_run(run_dir, run, newest.index)
    except UserError as e:
        return {"clean": False, "text": f"Not audited: {e}"}
    return {"clean": result.clean, "text": str(result)}


def _checkpoint(found: checkpoint.Checkpoint | checkpoint.BadCheckpoint, run_dir: str) -> dict[str, Any]:
    row = checkpoint.describe(found, run_dir)
    step = f"{row['step']:,}"
    if isinstance(found, checkpoint.BadCheckpoint):
        return {"step": step, "size": "", "made": "", "valid": False, "state": f"damaged: {row['reason']}"}
    return {
        "step": step,
        "size": size(row["bytes"]),
        "made": f"{count('worker', row['world_size'])}, ZeRO-{row['zero_stage']}",
        "valid": row["valid"],
        "state": "valid" if row["valid"] else f"damaged: {row['reason']}",
    }


def _utc(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S")
