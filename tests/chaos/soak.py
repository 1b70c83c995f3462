"""SIGKILL at random moments, again and again: python -m tests.chaos.soak --kills 100 --seed 0

Victims: a worker, a worker that is just writing a checkpoint, the driver (the same command then comes again). At the
end the run is held against one that nothing happened to, without Ray: losses, sha256 of the weights, samples.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import Mixture
from gpt2dist.data.shards import Manifest
from gpt2dist.train import checkpoint, ledger, rundir
from tests.conftest import make_shard, tiny_run
from tests.distributed import jobs
from tests.processes import train_workers
from tests.ranks import run_ranks

WORLD = 2
CYCLE_S = 240.0
"""A run that is not on its way again after so long has not come back."""
LATEST_S = 30.0
"""A kill comes at most this long after the start that follows the one before; the first step needs some seconds."""


@dataclass(frozen=True)
class Report:
    """What came of it."""

    kills: dict[str, int]
    resumes: int
    steps: int
    redone: int
    duplicates: int
    gaps: int
    weights_equal: bool
    losses_equal: bool
    seconds: float


def soak(directory: Path, kills: int, seed: int, latest_s: float = LATEST_S, say: Any = print) -> Report:
    """Kill `kills` times, each at most `latest_s` after a start, then stop the run and compare.

    Raises:
        AssertionError: it does not come back.
    """
    run = _prepare(directory)
    rng = random.Random(seed)
    began = time.monotonic()
    counts: Counter[str] = Counter()
    driver = _start(run, directory)
    try:
        for kill in range(kills):
            _wait(lambda n=kill: len(_events(run, "start")) > n, driver, "no new start")  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, latest_s))
            victim = rng.choice(["worker", "worker", "writer", "driver"])
            if victim == "driver":
                workers = _workers(driver)
                driver.kill()
                driver.wait()
                psutil.wait_procs(workers, timeout=60)
                driver = _start(run, directory)
            else:
                if victim == "writer":
                    _wait(lambda: _writing(run), driver, "no save")
                _kill_a_worker(driver, rng)
            counts[victim] += 1
            say(f"{kill + 1:4d} {victim:6s} after {_steps(run)} steps, {time.monotonic() - began:.0f} s", flush=True)
        _wait(lambda: len(_events(run, "start")) > kills, driver, "no new start")
        resumed = _events(run, "start")[-1]["step"]
        _wait(lambda: _steps(run) > resumed + 5, driver, "no step")
        driver.terminate()
        assert driver.wait(CYCLE_S) == 0
    finally:
        _end(driver)
    return _compare(run, directory, dict(counts), time.monotonic() - began)


def _prepare(directory: Path) -> RunConfig:
    data = directory / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    shards = [make_shard(data, f"train-{i:05d}.npy", rng.integers(0, 50257, 20_000)) for i in range(3)]
    manifest = Manifest(request={}, documents={}, splits={"train": shards, "val": []})
    (data / "manifest.json").write_bytes(manifest.to_bytes())
    run = tiny_run(
        name="killed",
        storage=str(directory),
        data__path=str(data),
        train__steps=1_000_000,
        eval__every_steps=0,
        checkpoint__every_steps=3,
        cluster__max_failures=-1,
    )
    (directory / "run.toml").write_text(run.to_toml())
    return run


def _start(run: RunConfig, directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gpt2dist", "train", str(directory / "run.toml")]
    with (directory / "train.log").open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def _events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in rundir.events_log(run.run_dir).read() if e["event"] == kind]


def _steps(run: RunConfig) -> int:
    rows = rundir.metrics_log(run.run_dir).tail(4096)
    return int(rows[-1]["step"]) + 1 if rows else 0


def _writing(run: RunConfig) -> bool:
    """Whether a rank's file is being written: it has its name only when it is whole."""
    return any((Path(run.run_dir) / "checkpoints").glob("step-*/.rank-*"))


def _wait(condition: Any, driver: subprocess.Popen[bytes], what: str) -> None:
    end = time.monotonic() + CYCLE_S
    while not condition():
        assert driver.poll() is None, f"the driver ended with {driver.returncode}"
        assert time.monotonic() < end, what
        time.sleep(0.005)


def _workers(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return train_workers(psutil.Process(driver.pid).children(recursive=True))


def _kill_a_worker(driver: subprocess.Popen[bytes], rng: random.Random) -> None:
    """A group may have none at the moment, and one may end by itself just before."""
    end = time.monotonic() + CYCLE_S
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            rng.choice(_workers(driver)).kill()
            return
        time.sleep(0.05)
    raise AssertionError("no workers")


def _end(driver: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        for p in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                p.kill()


def _compare(run: RunConfig, directory: Path, kills: dict[str, int], seconds: float) -> Report:
    steps = _steps(run)
    train = run.train.model_copy(update={"stop_at": steps})
    reference = run.model_copy(update={"name": "undisturbed", "train": train})
    run_ranks(jobs.train_runs, WORLD, ([reference],), directory / "rendezvous", 3600)
    losses = [[row["loss"] for row in rundir.metrics_log(r.run_dir).read()] for r in (run, reference)]
    data = Mixture.open(run)
    audit = ledger.audit(run, data, rundir.ledger_log(run.run_dir).read(), steps)
    starts = _events(run, "start")
    return Report(
        kills=kills,
        resumes=len(starts) - 1,
        steps=steps,
        redone=sum(e["redone_steps"] for e in starts),
        duplicates=audit.duplicates,
        gaps=audit.gaps,
        weights_equal=_weights_sha256(run) == _weights_sha256(reference),
        losses_equal=losses[0] == losses[1],
        seconds=seconds,
    )


def _weights_sha256(run: RunConfig) -> str:
    found = checkpoint.newest(run.run_dir)
    assert found is not None
    assert found.index.step == _steps(run)
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.load_weights(found).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Prints a line a kill, and the report as JSON; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="new; keeps all files (default: a temporary one)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the driver is ended too
    with contextlib.ExitStack() as stack:
        if options.directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        else:
            directory = options.directory
            directory.mkdir(parents=True)
        report = soak(directory, options.kills, options.seed)
    print(json.dumps(vars(report) | {"seed": options.seed, "cpus": os.cpu_count()}))
    sys.exit(not (report.weights_equal and report.losses_equal and report.duplicates == report.gaps == 0))


if __name__ == "__main__":
    main()
