"""Goodput ÷ what Young and Daly allow, of the demo's model whose workers are killed every two minutes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from gpt2dist.config import load_run
from gpt2dist.data.shards import Manifest
from gpt2dist.report.goodput import of_run
from gpt2dist.report.tables import goodput_line
from gpt2dist.train import rundir
from tests.bench.common import Row
from tests.conftest import ROOT, make_shard
from tests.processes import train_workers

MTBF_S = 120.0
KILLS = 3


def rows() -> Iterator[Row]:
    """One run of about seven minutes, with the automatic interval that knows how often failures come."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rng = np.random.default_rng(0)
        shards = [make_shard(directory, f"{split}.npy", rng.integers(0, 50257, 200_000)) for split in ("train", "val")]
        manifest = Manifest(request={}, documents={}, splits={"train": shards[:1], "val": shards[1:]})
        (directory / "manifest.json").write_bytes(manifest.to_bytes())
        changes: dict[str, int | float | str] = {
            "train.steps": 1_000_000,
            "cluster.workers": 2,
            "checkpoint.every_steps": 0,
        }
        changes |= {"checkpoint.mtbf_hours": MTBF_S / 3600, "storage": name, "data.path": name}
        overrides = tuple(f"{key}={value}" for key, value in changes.items())
        run_file = ROOT / "jobs" / "demo.toml"
        _train(str(run_file), overrides, load_run(run_file, overrides).run_dir)
        found = of_run(load_run(run_file, overrides).run_dir)
    assert found.allowed is not None
    print(goodput_line(found), file=sys.stderr)
    yield Row("goodput / Young/Daly", [found.share / found.allowed.share], 0.90, "share / share")


def _train(run_file: str, overrides: tuple[str, ...], run_dir: str) -> None:
    """Kill a random worker `MTBF_S` after the first step of each attempt; then Ctrl-C, as long after the last one."""
    options = [option for change in overrides for option in ("--set", change)]
    command = [sys.executable, "-m", "gpt2dist", "train", run_file, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    rng = random.Random(1)
    try:
        for kill in range(KILLS + 1):
            while not _at_work(run_dir, kill + 1):
                assert process.poll() is None, "the run ended by itself"
                time.sleep(0.5)
            time.sleep(MTBF_S)
            if kill < KILLS:
                rng.choice(_workers(process.pid)).kill()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()


def _at_work(run_dir: str, attempt: int) -> bool:
    last = rundir.metrics_log(run_dir).tail(4096)
    return bool(last) and last[-1]["attempt"] >= attempt


def _workers(pid: int) -> list[psutil.Process]:
    return train_workers(psutil.Process(pid).children(recursive=True))
