"""What checkpoints cost: a save, a load, a run with them, a start after a kill. They lie on the disk of TMPDIR."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import StepBatch, local_blocks, split_blocks
from gpt2dist.data.shards import Manifest
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.engine import Engine
from gpt2dist.train.trainer import Trainer, Wishes
from tests.bench.common import PAIRS, Row
from tests.conftest import ROOT, make_shard, tiny_run
from tests.processes import train_workers
from tests.ranks import run_ranks

LARGE = {"n_layer": 7, "n_head": 12, "n_embd": 768}
"""88 M parameters: a checkpoint of 1.06 GB."""
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 128}
"""6.9 M parameters: a checkpoint of 83 MB; for what is not a question of bytes."""
BLOCK = 10
"""Steps; a save of 1 GB is written during two of them."""
_numbers = count()


@contextmanager
def _directory() -> Iterator[Path]:
    """With a data set in it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shard = make_shard(directory, "train-00000.npy", np.random.default_rng(0).integers(0, 50257, 200_000))
        manifest = Manifest(request={}, documents={}, splits={"train": [shard]})
        (directory / "manifest.json").write_bytes(manifest.to_bytes())
        yield directory


def _run(directory: Path, model: dict[str, int], workers: int = 2, **changes: Any) -> RunConfig:
    keys: dict[str, Any] = {
        "name": f"run-{next(_numbers)}",
        "storage": str(directory),
        "model": model,
        "data": {"path": str(directory), "seq_len": 64},
        "batch": {"micro_sequences": 1, "micro_batches": 3},
        "train": {"steps": 100_000, "precision": "fp32", "zero_stage": 2, "peak_tflops": 1.0},
        "optim": {"lr": 6e-4, "warmup_steps": 0},
        "eval": {"every_steps": 0},
        "checkpoint": {"every_minutes": 0.0, "keep": 1},
        "cluster": {"workers": workers},
    }
    return tiny_run(**{**keys, **changes})


def _on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as name:
        return run_ranks(function, world_size, args, Path(name) / "rendezvous", 900)


@contextmanager
def _trainer(run: RunConfig) -> Iterator[Trainer]:
    engine = Engine(run, torch.device("cpu"))
    trainer = Trainer(run, engine)
    trainer.restore()
    try:
        yield trainer
    finally:
        trainer.close()
        engine.close()


# ---------------------------------------------------------------------- the stall of a save


def _step(trainer: Trainer, batches: Iterator[StepBatch], save: bool) -> dict[str, float]:
    """One step, and what follows it; `save`: begin a save. `checkpoint_s` of the result is for both."""
    metrics, wishes = trainer.train_step(batches)
    trainer.times.step(metrics["step_s"])
    trainer._save_in_background(Wishes(save=float(save), busy=wishes.busy, failed=wishes.failed))
    after, trainer.save_seconds = trainer.save_seconds, 0.0
    return metrics | {"checkpoint_s": metrics["checkpoint_s"] + after}


def stalls(run: RunConfig, pairs: int) -> list[tuple[float, float]]:
    """On each rank: seconds that a save in the background holds up the loop, and that a blocking one does; by turns."""
    with _trainer(run) as trainer:
        rank, world = trainer.rank, trainer.world_size
        batches = split_blocks(local_blocks(run, rank, world, 0), run, rank, world, 0)

        def step(save: bool) -> float:
            """Seconds for which saves held up one step and what follows it."""
            return _step(trainer, batches, save)["checkpoint_s"]

        def background() -> float:
            seconds = step(save=True)
            while trainer.saver.busy:
                seconds += step(save=False)
            return seconds

        def blocking() -> float:
            section = run.checkpoint.model_copy(update={"background": False})
            trainer.run = run.model_copy(update={"checkpoint": section})
            seconds = step(save=True)
            trainer.run = run
            return seconds

        step(save=False)
        result = [(background(), blocking()) for _ in range(pairs + 1)]
        return result[1:]  # the first of each does not count


def stall() -> Iterator[Row]:
    """The rank that waits longest counts."""
    with _directory() as directory:
        times = _on_ranks(stalls, 2, _run(directory, LARGE), PAIRS)
    longest = [[max(t[i] for t in pair) for i in (0, 1)] for pair in zip(*times, strict=True)]
    for a, b in longest:
        print(f"  stall {a:.4f} s, blocking save {b:.3f} s", file=sys.stderr)
    yield Row("stall of a save / blocking save, 1.06 GB", [a / b for a, b in longest], 1 / 20, "s ratio", at_most=True)


# ---------------------------------------------------------------------- the cost of a save


def save_costs(run: RunConfig, pairs: int) -> list[tuple[float, float, float]]:
    """On each rank: seconds of BLOCK steps whose first one begins a save, of as many without, by turns.

    And the seconds between two saves that the run then chooses.
    """
    with _trainer(run) as trainer:
        rank, world = trainer.rank, trainer.world_size
        batches = split_blocks(local_blocks(run, rank, world, 0), run, rank, world, 0)

        def block(save: bool) -> float:
            start, before = time.perf_counter(), trainer.saved_step
            for i in range(BLOCK):
                _step(trainer, batches, save and i == 0)
            assert (trainer.saved_step > before) == save, "the save did not end within the block"
            return time.perf_counter() - start

        result = [(block(True), block(False), trainer.times.interval) for _ in range(pairs + 1)]
        return result[1:]


def overhead() -> Iterator[Row]:
    """At the default interval: of the time from one save to the next, with that save and without."""
    ratios = []
    with _directory() as directory:
        run = _run(directory, LARGE, checkpoint={"every_minutes": "auto", "keep": 1})
        for with_save, without, interval in _on_ranks(save_costs, 2, run, PAIRS)[0]:
            print(f"  {with_save:.2f} s, {without:.2f} without a save; one every {interval:.0f} s", file=sys.stderr)
            ratios.append(1 + (with_save - without) / interval)
    yield Row("wall clock with checkpoints / without, 1.06 GB", ratios, 1.035, "s ratio", at_most=True)


# ---------------------------------------------------------------------- a load


def save_one(run: RunConfig) -> None:
    """A run directory with one checkpoint."""
    with _trainer(run) as trainer:
        rank, world = trainer.rank, trainer.world_size
        trainer.train(split_blocks(local_blocks(run, rank, world, 0), run, rank, world, 0))


def loads(runs: list[RunConfig], rounds: int) -> list[list[float]]:
    """Seconds in which this group loads the checkpoint of each run, every round all of them."""
    engine = Engine(runs[0], torch.device("cpu"))

    def load(run: RunConfig) -> float:
        engine.gather_objects(None)  # all ranks at once
        start = time.perf_counter()
        found = checkpoint.open_step(run.run_dir, 1)
        checkpoint.load(found, engine.fragments(owned=False))
        engine.state_changed()
        engine.gather_objects(None)
        return time.perf_counter() - start

    result = [[load(run) for run in runs] for _ in range(rounds + 1)]
    engine.close()
    return result[1:]


def load(stage: int) -> Iterator[Row]:
    """One, two and three workers load what one, two and three saved; what as many saved is the measure."""
    worlds = (1, 2, 3)
    with _directory() as directory:
        train = {"steps": 10, "stop_at": 1, "precision": "fp32", "zero_stage": stage, "peak_tflops": 1.0}
        saved = {world: _run(directory, LARGE, world, train=train) for world in worlds}
        for world, run in saved.items():
            _on_ranks(save_one, world, run)
        for now in worlds:
            times = _on_ranks(loads, now, list(saved.values()), PAIRS)[0]
            print(f"  {now} load what {worlds} saved: {times}", file=sys.stderr)
            for i, world in enumerate(worlds):
                if world != now:
                    ratios = [row[i] / row[now - 1] for row in times]
                    name = f"load what {world} saved / what {now} saved, {now} workers, stage {stage}"
                    yield Row(name, ratios, 1.2, "s ratio", at_most=True)


# ---------------------------------------------------------------------- a start


def _train(run: RunConfig, *options: str) -> subprocess.Popen[bytes]:
    path = Path(f"{run.run_dir}.toml")
    path.write_text(run.to_toml())
    command = [sys.executable, "-m", "gpt2dist", "train", str(path), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def _first_step(run: RunConfig, after: float, patience: float = 240) -> float:
    """Unix time of the first step that was done after `after`."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        for row in rundir.metrics_log(run.run_dir).tail():
            if row["time"] > after:
                return float(row["time"])
        time.sleep(0.02)
    raise RuntimeError(f"{run.run_dir}: no step in {patience:.0f} s")


def _workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return train_workers(psutil.Process(process.pid).children(recursive=True))


def _start_kill_start(directory: Path, model: dict[str, int]) -> tuple[float, float, float]:
    """Seconds to the first new step: of the command on a new run; after SIGKILL of a worker; of the command again."""
    run = _run(directory, model, checkpoint={"every_steps": 5, "keep": 1})
    process = None
    try:
        begin = time.time()
        process = _train(run)
        cold = _first_step(run, begin) - begin
        while not [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "commit"]:
            time.sleep(0.05)
        killed = time.time()
        _workers(process)[-1].kill()
        while not [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "failure"]:
            time.sleep(0.02)
        warm = _first_step(run, rundir.events_log(run.run_dir).read()[-1]["time"]) - killed
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        begin = time.time()
        process = _train(run)
        again = _first_step(run, begin) - begin
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
    finally:
        if process is not None:
            process.kill()
            process.wait()
    shutil.rmtree(run.run_dir)
    return cold, warm, again


def restart() -> Iterator[Row]:
    """A killed worker, and the command given again, ÷ the same on a new run. G2D_PAIRS: another number than five."""
    pairs = int(os.environ.get("G2D_PAIRS", PAIRS))
    for name, model in (("83 MB", SMALL), ("1.06 GB", LARGE)):
        with _directory() as directory:
            times = []
            for _ in range(pairs):
                times.append(_start_kill_start(directory, model))
                cold, warm, again = times[-1]
                print(f"  {name}: {cold:.1f} s, {warm:.1f} s after a kill, {again:.1f} s again", file=sys.stderr)
        for i, what in ((1, "kill of a worker to first new step"), (2, "same command again to first new step")):
            ratios = [row[i] / row[0] for row in times]
            yield Row(f"{what} / cold start, {name}", ratios, 1.2, "s ratio", at_most=True)
