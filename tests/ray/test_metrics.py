"""A run's metrics as Prometheus scrapes them from the node's metrics port, held against the run directory."""

from __future__ import annotations

import re
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gpt2dist.cluster.local import LocalCluster
from gpt2dist.config import RunConfig
from gpt2dist.report import gauges
from gpt2dist.report.goodput import goodput
from gpt2dist.train import rundir
from tests.conftest import tiny_run
from tests.processes import train_workers
from tests.ray.test_train import CLI, events, steps_done, wait_for, write

Samples = dict[tuple[str, str], float]
"""(name without Ray's prefix and ours, label `part`) → value."""


def scrape(url: str, run: str) -> Samples:
    """Our samples of this run."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^ray_gpt2dist_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags["run"] == run:
            found[name, tags.get("part", "")] = float(value)
    return found


def tells_a_step(run: RunConfig, found: Samples) -> bool:
    """Whether all that was scraped of a step is what metrics.jsonl says of it; an export may fall between two steps."""
    line = next((m for m in rundir.metrics_log(run.run_dir).read() if m["step"] + 1 == found.get(("steps", ""))), None)
    if line is None:
        return False
    same = {(name, ""): line[name] for name in gauges.OF_A_LINE if name != "val_loss"}
    same |= {(gauges.STEP_PART, part): line[f"{part}_s"] for part in gauges.PARTS}
    return {key: found[key] for key in same} == pytest.approx(same, rel=1e-9)


def tells_goodput(run: RunConfig, found: Samples) -> bool:
    """Whether it is the goodput at one of the times up to now: it is computed now and then."""
    log, metrics = rundir.events_log(run.run_dir).read(), rundir.metrics_log(run.run_dir).read()
    ends = [line["time"] for line in (*log, *metrics)]
    told = [
        goodput([e for e in log if e["time"] <= end], [m for m in metrics if m["time"] <= end]).share for end in ends
    ]
    return found["goodput", ""] > 0 and any(found["goodput", ""] == pytest.approx(share, rel=1e-9) for share in told)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_scraped_values_are_those_of_the_run(
    make_data: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a head without a dashboard; a worker is killed meanwhile."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    run = tiny_run(
        storage=str(tmp_path),
        data__path=make_data([30_000]),
        train__steps=100_000,
        eval__every_steps=10,
        checkpoint__every_steps=10,
        cluster__max_failures=2,
    )
    printed = tmp_path / "printed"
    with LocalCluster(head_cpus=6) as cluster, printed.open("wb") as out:
        command = [*CLI, "train", str(write(run, tmp_path))]
        driver = subprocess.Popen(command, stdout=out, stderr=out, env=cluster.env)
        try:
            wait_for(lambda: steps_done(run) >= 15)
            (url,) = re.findall(r"^metrics at (\S+)$", printed.read_text(), re.MULTILINE)
            names = {*gauges.OF_A_LINE, gauges.STEP_PART, *gauges.OF_THE_RUN}
            wait_for(lambda: {name for name, _ in scrape(url, run.name)} == names, 60)
            wait_for(lambda: tells_a_step(run, scrape(url, run.name)), 20)

            found = scrape(url, run.name)
            assert (found["workers", ""], found["attempts", ""], found["failures", ""]) == (2, 1, 0)
            metrics = rundir.metrics_log(run.run_dir).read()
            assert found["val_loss", ""] in [m["val_loss"] for m in metrics if "val_loss" in m]
            (commit,) = [e for e in events(run, "commit") if e["step"] == found["checkpoint_step", ""]]
            assert found["checkpoint_age_s", ""] == pytest.approx(time.time() - commit["time"], abs=5)
            wait_for(lambda: tells_goodput(run, scrape(url, run.name)), 40)

            family = psutil.Process(cluster.head.process.pid).children(recursive=True)
            train_workers(family)[0].kill()
            wait_for(lambda: events(run, "failure"))
            wait_for(lambda: scrape(url, run.name)["tokens_per_s", ""] == 0, 20)
            wait_for(lambda: scrape(url, run.name)["attempts", ""] == 2)
            wait_for(lambda: tells_a_step(run, scrape(url, run.name)))
            wait_for(lambda: scrape(url, run.name)["failures", ""] == 1, 40)
        finally:
            driver.terminate()
            driver.wait(60)
        wait_for(lambda: not scrape(url, run.name), 20)  # a run that has ended shows no figures
