"""What `plan` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from gpt2dist.config import RunConfig
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
    table = _table(
        f"memory of one of {run.cluster.max_workers} workers, GB", ["options", *groups, "total", "host", "fits on"]
    )
    for row in result["memory"]:
        numbers = [*(row["groups"][name] for name in groups), row["total"], row["host"]]
        fits = ", ".join(row["fits_on"]) or ("none" if on_gpu else "")
        own = row["name"] == result["own_options"]
        name = row["name"] + (" (as written)" if own else "")
        table.add_row(name, *(f"{n / 1e9:.2f}" for n in numbers), fits, style="bold" if own else None)
    console.print(table)


def _setups(console: Console, title: str, setups: list[Mapping[str, Any]]) -> None:
    columns = [
        "machines",
        "workers",
        "options",
        "GB / safe",
        "tokens/s",
        "on-demand",
        "USD",
        "spot",
        "USD",
        "save every",
        "goodput",
    ]
    table = _table(title, columns)
    for s in sorted(setups, key=lambda s: (not s["fits"], s["on_demand"]["usd"] or 0)):
        machine = s["name"] if s["name"] == s["instance_type"] else f"{s['name']} ({s['instance_type']})"
        memory = f"{s['memory_bytes'] / 1e9:.1f} / {s['memory_limit_bytes'] / 1e9:.1f}"
        cells = [f"{s['machines']} × {machine}", str(s["workers"]), s["options"], memory]
        if s["fits"]:
            spot = s["spot"]
            every = f"{_time(spot['checkpoint_interval_s'] / 3600)}"
            costs = [cell for kind in ("on_demand", "spot") for cell in (_time(s[kind]["hours"]), _usd(s[kind]["usd"]))]
            bound = " net" if s["network_bound"] else ""
            cells += [f"{s['tokens_per_s']:,.0f}{bound}", *costs, every, f"{spot['goodput']:.1%}"]
        else:
            cells += ["does not fit: " + s["problem"]]
        table.add_row(*cells)
    console.print(table)


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
