"""The pictures of a report, as SVG text that stands inside a page; and a PNG of two runs."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from gpt2dist.report.history import Attempt, Cause
from gpt2dist.report.words import count
from gpt2dist.train import rundir

POINTS = 2000
"""Of a line at most; with more, each place keeps its least and its largest value."""
LABELS = 24
"""With more attempts their marks have no words."""
LINE, FAINT, ACCENT = "#1f4e79", "#9db8d2", "#d1495b"
COLORS: dict[Cause, str] = {
    "command": "#888888",
    "failed": ACCENT,
    "killed": ACCENT,
    "preempted": "#e08e0b",
    "resized": "#2a9d8f",
    "rewound": "#7b5ea7",
}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "sans-serif", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
Floats = npt.NDArray[np.float64]


def rolling_mean(values: Floats, window: int) -> Floats:
    """Of each `window` values in a row, NaN where one is not finite: [n] → [n − window + 1]."""
    return np.convolve(np.where(np.isfinite(values), values, np.nan), np.ones(window) / window, "valid")


def loss(metrics: list[dict[str, Any]], before: float | None, attempts: list[Attempt]) -> str:
    """Training and validation loss by step; before: the validation loss before the first step."""
    steps, values = _columns(metrics, "loss")
    val_steps, val = _columns([m for m in metrics if "val_loss" in m], "val_loss")
    if before is not None:
        val_steps, val = np.concatenate([[-1.0], val_steps]), np.concatenate([[before], val])
    with rc_context({**STYLE, "svg.hashsalt": "loss"}):
        figure, axes = _axes(3.4)
        window = len(steps) // 100
        if window > 1:
            axes.plot(*thin(steps, values), color=FAINT, linewidth=0.7, label="training")
            mean = rolling_mean(values, window)
            axes.plot(
                *thin(steps[window // 2 :][: len(mean)], mean),
                color=LINE,
                linewidth=1.4,
                label=f"mean of {window} steps",
            )
        else:
            axes.plot(steps, values, color=LINE, linewidth=1.2, label="training")
        if len(val):
            axes.plot(val_steps, val, color="#e07a1f", marker="o", markersize=3, linewidth=0.8, label="validation")
        _mark(axes, attempts)
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        axes.legend(loc="upper right")
        return _svg(figure)


def throughput(metrics: list[dict[str, Any]], attempts: list[Attempt]) -> str:
    """Tokens a second by step."""
    with rc_context({**STYLE, "svg.hashsalt": "throughput"}):
        figure, axes = _axes(2.2)
        axes.plot(*thin(*_columns(metrics, "tokens_per_s")), color=LINE, linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _mark(axes, attempts, named=False)
        axes.set(xlabel="step", ylabel="tokens a second")
        return _svg(figure)


def progress(metrics: list[dict[str, Any]], attempts: list[Attempt], began: float) -> str:
    """Steps by time of the day's clock: flat where nothing was done, and apart what had to be done again."""
    lines = [m for m in metrics if {"time", "attempt"} <= m.keys()]
    seconds = max([m["time"] - began for m in lines] + [s["end"] - began for a in attempts for s in a.redone] + [0.0])
    unit, name = next(
        (u, n) for u, n in ((86400, "days"), (3600, "hours"), (60, "minutes")) if seconds >= 3 * u or u == 60
    )
    with rc_context({**STYLE, "svg.hashsalt": "progress"}):
        figure, axes = _axes(2.2)
        for number in dict.fromkeys(m["attempt"] for m in lines):
            steps, times = _columns([m for m in lines if m["attempt"] == number], "time")
            x, y = thin((times - began) / unit, steps)
            axes.plot(x, y, color=LINE, linewidth=1.4)
        label: str | None = "done again"
        for attempt in attempts:
            step = attempt.step
            for spent in attempt.redone:
                span = [(spent[key] - began) / unit for key in ("begin", "end")]
                axes.plot(span, [step, step + spent["steps"]], color=ACCENT, linewidth=1.4, label=label)
                step, label = step + spent["steps"], None
        axes.set_xlim(left=0)
        axes.set(xlabel=f"{name} since the first command began", ylabel="step")
        if label is None:
            axes.legend(loc="upper left")
        return _svg(figure)


def two_runs(path: Path, undisturbed: str, disturbed: str, faults: list[tuple[int, str]]) -> None:
    """Write a PNG: loss by step of two run directories, the faults as (step, name) at their places."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    for run_dir, color, width, label in (
        (undisturbed, "#9ecae1", 6.0, "nothing happened to it"),
        (disturbed, "#08306b", 1.2, "with faults"),
    ):
        rows = rundir.metrics_log(run_dir).read()
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=color, linewidth=width, label=label)
    top = axes.get_ylim()[1]
    for step, fault in faults:
        axes.axvline(step, color="#d62728", linewidth=0.8, linestyle=":")
        axes.text(step, top, f" {fault}", rotation=90, va="top", ha="right", fontsize=8, color="#d62728")
    axes.set(xlabel="step", ylabel="training loss (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def thin(x: Floats, y: Floats, points: int = POINTS) -> tuple[Floats, Floats]:
    """A line of at most `points` points that looks the same: of each piece the least and the largest value."""
    if len(x) <= points:
        return x, y
    kept: list[int] = []
    for piece in np.array_split(np.arange(len(x)), points // 2):
        finite = piece[np.isfinite(y[piece])]
        if len(finite):
            kept += sorted({int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])})
    return x[kept], y[kept]


def _columns(rows: Iterable[dict[str, Any]], key: str) -> tuple[Floats, Floats]:
    pairs = [(row["step"], math.nan if row[key] is None else row[key]) for row in rows]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _mark(axes: Axes, attempts: list[Attempt], named: bool = True) -> None:
    """A line where each attempt but the first begins, in the colour of what came before."""
    size = attempts[0].world_size if attempts else 0
    for attempt in attempts[1:]:
        color = COLORS[attempt.cause]
        axes.axvline(attempt.step, color=color, linewidth=0.9, linestyle=":")
        if named and len(attempts) <= LABELS:
            other = f", {count('worker', attempt.world_size)}" if attempt.world_size != size else ""
            style: Any = {"color": color, "fontsize": 7.5, "rotation": 90, "rotation_mode": "anchor", "ha": "right"}
            place: Any = {"transform": axes.get_xaxis_transform(), "va": "bottom"}  # x: step; y: part of the height
            axes.text(attempt.step, 0.99, f"{attempt.cause}{other} ", **style, **place)
        size = attempt.world_size


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
