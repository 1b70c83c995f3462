"""What `plan` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt2dist.config import RunConfig
from gpt2dist.report.console import PIPE_WIDTH
from gpt2dist.report.tables import pairs
from gpt2dist.report.words import count, size


def show(console: Console, run: RunConfig, result: Mapping[str, Any]) -> None:
    """The result of `setups.Planner.result` as tables."""
    gpus = run.cluster.gpus_per_worker > 0
    one, kept = size(result["checkpoint_bytes"]), size(result["kept_checkpoint_bytes"])
    rows = {
        "parameters": f"{result['parameters']:,}",
        "the run": f"{run.train.steps:,} steps, {result['tokens'] / 1e9:,.3g} B tokens, {result['flops']:.3g} FLOPs",
        "as written": f"{count('worker', run.cluster.max_workers)}, {result['own_options']}, {run.train.precision}",
        "a checkpoint": f"{one}; at most {kept} of storage for those that are kept",
    }
    pairs(console, run.name, rows)
    _memory(console, run, result)
    _setups(console, "the run as it is written", result["as_written"])
    _setups(console, "the fewest machines with which it fits" + (", by GPU" if gpus else ""), result["smallest"])
    _assumptions(console, run, result)


def _memory(console: Console, run: RunConfig, result: Mapping[str, Any]) -> None:
    on_gpu = run.cluster.gpus_per_worker > 0
    groups = list(result["memory"][0]["groups"]) if result["memory"] else []
    title = f"memory of one of {run.cluster.max_workers} workers, GB (*: as written)"
    whole = _table(title, ["options", *groups, "total", "host", "fits on"])
    narrow = _table(f"{title}; its parts: --json", ["options", "total", "host", "fits on"])
    for row in result["memory"]:
        own = row["name"] == result["own_options"]
        fits = " ".join(row["fits_on"]) or ("none" if on_gpu else "")
        for table, parts in ((whole, groups), (narrow, [])):
            numbers = [*(row["groups"][name] for name in parts), row["total"], row["host"]]
            cells = [row["name"] + (" *" if own else ""), *(f"{n / 1e9:.2f}" for n in numbers), fits]
            table.add_row(*cells, style="bold" if own else None)
    console.print(_first_that_fits(console, whole, narrow))


def _setups(console: Console, title: str, setups: list[Mapping[str, Any]]) -> None:
    needs, prices = ["machines", "workers", "options", "GB / safe"], ["on-demand", "USD", "spot", "USD"]
    whole = _table(title, [*needs, "tokens/s", *prices, "save every", "goodput"])
    narrow = _table(f"{title}; more: --json", ["machines", "options", "tokens/s", *prices])
    problems: dict[str, list[str]] = {}
    for s in sorted(setups, key=lambda s: (not s["fits"], s["on_demand"]["usd"] or 0)):
        machines = f"{s['machines']} × {s['name']}"
        machines += f" ({s['instance_type']})" if s["name"] != s["instance_type"] else ""
        if not s["fits"]:
            problems.setdefault(s["problem"], []).append(machines)
            continue
        memory = f"{s['memory_bytes'] / 1e9:.1f} / {s['memory_limit_bytes'] / 1e9:.1f}"
        speed = f"{s['tokens_per_s']:,.0f}" + (" net" if s["network_bound"] else "")
        costs = [cell for kind in ("on_demand", "spot") for cell in (_time(s[kind]["hours"]), _usd(s[kind]["usd"]))]
        every = _time(s["spot"]["checkpoint_interval_s"] / 3600)
        goodput = f"{s['spot']['goodput']:.1%}"
        whole.add_row(machines, str(s["workers"]), s["options"], memory, speed, *costs, every, goodput)
        narrow.add_row(machines, s["options"], speed, *costs)
    if whole.row_count:
        console.print(_first_that_fits(console, whole, narrow))
    else:
        console.print(title, style="italic")
    for problem, machines_with_it in problems.items():
        console.print(f"does not fit: {problem} ({', '.join(machines_with_it)})")


def _first_that_fits(console: Console, *tables: Table) -> Table:
    """The first that needs no more columns than the terminal has, else the last."""
    unlimited = console.options.update(max_width=PIPE_WIDTH)
    fits = (t for t in tables if console.measure(t, options=unlimited).maximum <= console.width)
    return next(fits, tables[-1])


def _assumptions(console: Console, run: RunConfig, result: Mapping[str, Any]) -> None:
    a = result["assumptions"]
    rows = {
        "MFU": f"{a['mfu']:.3g} ({a['mfu_source']})",
        "safe": "GB of memory for a worker, a tenth and what CUDA and libraries take left free",
        "a machine fails": f"{a['failures_per_day']:.2g} times a day on-demand, {a['preemptions_per_day']:g} on spot",
        "a restart": f"{a['restart_seconds']:g} s",
        "storage": f"{a['storage_gb_per_s']:g} GB/s for each machine",
        "net": "held up by the network; elsewhere it is not, or it is not known",
        "prices": "gpt2dist/cluster/machines.toml, or --machines; -: not known",
    }
    pairs(console, "assumed", rows)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("options", "machines", "fits on") else "right")
    return table


def _time(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} d" if hours < 1e6 else "never"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"


def _usd(usd: float | None) -> str:
    return "-" if usd is None else f"{usd:,.0f}" if usd >= 10 else f"{usd:.2f}"
