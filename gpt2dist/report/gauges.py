"""A run's figures as metrics of Ray, for Prometheus: the metrics agent of the driver's node exports them over HTTP.

They are set where the driver follows metrics.jsonl and events.jsonl, so they say what these files say. Names as
scraped; docs/cluster.md says where.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.metrics import Gauge

from gpt2dist.config import UserError
from gpt2dist.report import goodput
from gpt2dist.storage import StorageError

PREFIX = "gpt2dist_"
OF_A_LINE = {
    "loss": "Training loss of the newest step.",
    "val_loss": "Validation loss of the newest evaluation.",
    "lr": "Learning rate of the newest step.",
    "grad_norm": "Norm of the newest step's gradient, before clipping.",
    "tokens_per_s": "Tokens a second, of all workers.",
    "mfu": "Model FLOPs utilization, 0 to 1.",
    "step_s": "Seconds of the newest step.",
    "peak_memory_bytes": "The largest peak of memory over the workers.",
}
"""Key of a line in metrics.jsonl, and name of the metric."""
SPEEDS = ("tokens_per_s", "mfu")
"""0 while no worker group trains."""
PARTS = ("data_wait", "forward_backward", "optimizer", "checkpoint")
"""Values of the label `part` of `STEP_PART`: what the newest step spent, and saves since the line before."""
STEP_PART = "step_part_s"
OF_THE_RUN = {
    "steps": "Steps done.",
    "workers": "Workers of the newest attempt.",
    "attempts": "Starts of the worker group, of all commands.",
    "failures": "Failures of the worker group, of all commands.",
    "goodput": "Productive share of the time in which the run was to go on, 0 to 1; steps that are not saved are none.",
    "checkpoint_step": "Step of the newest checkpoint.",
    "checkpoint_age_s": "Seconds of work that are not saved: since the newest checkpoint, or since the command began.",
}
GOODPUT_S, GOODPUT_SHARE = 10.0, 0.01
"""Goodput needs the whole logs: it is computed that often at most, and takes this share of the time at most."""


def scrape_url() -> str:
    """Where this node's metrics are served; Ray must be initialized. Empty if nowhere."""
    own = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == own and node.get("MetricsExportPort"):
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return ""


class Gauges:
    """The metrics of one run, with its name as the label `run`. Ray must be initialized."""

    def __init__(self, run_name: str, run_dir: str) -> None:
        self.run_dir = run_dir
        described = {**OF_A_LINE, STEP_PART: "Seconds of the newest step, by part.", **OF_THE_RUN}
        self._tags = {"run": run_name}
        self._gauges = {
            name: Gauge(f"{PREFIX}{name}", text, ("run", "part") if name == STEP_PART else ("run",))
            for name, text in described.items()
        }
        self._values: dict[tuple[str, str], float] = {}  # (name, part)
        self._next_goodput = 0.0
        self._turned = 0.0  # when the newest worker group came or went
        self._saved_at = time.time()

    def update(self, events: Iterable[dict[str, Any]], metrics: list[dict[str, Any]]) -> None:
        """Set all of them from the newest events and the newest lines of metrics, oldest first."""
        for event in events:
            kind = event["event"]
            if kind in ("launch", "restart", "start", "failure", "end"):
                self._turned = max(self._turned, event["time"])
            if kind == "start":
                self._set("workers", event["world_size"])
                self._set("attempts", event["attempt"])
                self._set("steps", event["step"])
                if event["step"] < self._values.get(("checkpoint_step", ""), 0):  # a later one is damaged, or was left
                    self._set("checkpoint_step", event["step"])
            elif kind == "eval":
                self._set("val_loss", event["val_loss"])
            elif kind == "commit":
                self._set("checkpoint_step", event["step"])
                self._saved_at = max(self._saved_at, event["time"])
        if metrics:
            self._line(metrics[-1], at_work=metrics[-1].get("time", 0.0) > self._turned)
            self._set("steps", metrics[-1]["step"] + 1)
        for line in metrics:
            if "val_loss" in line:
                self._set("val_loss", line["val_loss"])
        self._set("checkpoint_age_s", time.time() - self._saved_at)
        self._goodput()
        for (name, part), value in self._values.items():  # all of them: Ray exports what was set since it did last
            self._gauges[name].set(value, {**self._tags, **({"part": part} if part else {})})

    def _line(self, line: dict[str, Any], at_work: bool) -> None:
        for name in OF_A_LINE:
            if line.get(name) is not None:
                self._set(name, line[name] if at_work or name not in SPEEDS else 0.0)
        for part in PARTS:
            self._set(STEP_PART, line.get(f"{part}_s", 0.0), part=part)

    def _goodput(self) -> None:
        start = time.monotonic()
        if start < self._next_goodput:
            return
        try:
            found = goodput.of_run(self.run_dir)
        except (OSError, StorageError, UserError):  # away, the workers' concern; or a foreign line
            return
        self._set("goodput", found.share)
        self._set("failures", found.failures)
        end = time.monotonic()
        self._next_goodput = end + max(GOODPUT_S, (end - start) / GOODPUT_SHARE)

    def _set(self, name: str, value: float, part: str = "") -> None:
        self._values[name, part] = value
