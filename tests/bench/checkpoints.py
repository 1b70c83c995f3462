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
from gpt2dist.data.blocks import local_blocks, split_blocks
from gpt2dist.data.shards import Manifest
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.engine import Engine
from gpt2dist.train.trainer import Trainer, Wishes
from tests.bench.common import PAIRS, Row
from tests.conftest import ROOT, make_shard, tiny_run
from tests.ranks import run_ranks

LARGE = {"n_layer": 7, "n_head": 12, "n_embd": 768}
"""88 M parameters: a checkpoint of 1.06 GB."""
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 128}
"""6.9 M parameters: a checkpoint of 83 MB; for what is not a question of bytes."""
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
        return run_ranks(function, world_size, args, Path(name) / "rendezvous", 450)


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


def stalls(run: RunConfig, pairs: int) -> list[tuple[float, float]]:
    """On each rank: seconds that a save in the background holds up the loop, and that a blocking one does; by turns."""
    with _trainer(run) as trainer:
        rank, world = trainer.rank, trainer.world_size
        batches = split_blocks(local_blocks(run, rank, world, 0), run, rank, world, 0)

        def step(save: bool) -> float:
            """One step, and what follows it; seconds of the save in both."""
            metrics, wishes = trainer.train_step(batches)
            trainer._save_in_background(Wishes(save=float(save), busy=wishes.busy, failed=wishes.failed))
            after, trainer.save_seconds = trainer.save_seconds, 0.0
            return float(metrics["checkpoint_s"]) + after

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
        engine.barrier()
        start = time.perf_counter()
        found = checkpoint.open_step(run.run_dir, 1)
        checkpoint.load(found, engine.fragments(owned=False))
        engine.state_changed()
        engine.barrier()
        return time.perf_counter() - start

    result = [[load(run) for run in runs] for _ in range(rounds + 1)]
    engine.close()
    return result[1:]


def load(stage: int) -> Iterator[Row]:
    """Checkpoints of one, two and three workers, loaded by two; that of two, loaded by one, two and three."""
    with _directory() as directory:
        train = {"steps": 10, "stop_at": 1, "precision": "fp32", "zero_stage": stage, "peak_tflops": 1.0}
        saved = {world: _run(directory, LARGE, world, train=train) for world in (1, 2, 3)}
        for world, run in saved.items():
            _on_ranks(save_one, world, run)
        times = _on_ranks(loads, 2, [saved[2], saved[1], saved[3]], PAIRS)[0]
        print(f"  loads by 2 of what 2, 1, 3 saved: {times}", file=sys.stderr)
        for i, world in ((1, 1), (2, 3)):
            ratios = [row[i] / row[0] for row in times]
            name = f"load by 2 workers what {world} saved / what 2 saved, stage {stage}"
            yield Row(name, ratios, 1.2, "s ratio", at_most=True)
        readers: dict[int, list[float]] = {1: [], 2: [], 3: []}
        for _ in range(PAIRS):
            for world, seconds in readers.items():
                seconds.append(_on_ranks(loads, world, [saved[2]], 1)[0][0][0])
        print(f"  loads of what 2 saved by 1, 2, 3: {list(readers.values())}", file=sys.stderr)
    for world in (1, 3):
        ratios = [a / b for a, b in zip(readers[world], readers[2], strict=True)]
        yield Row(f"load what 2 workers saved by {world} / by 2, stage {stage}", ratios, 1.2, "s ratio", at_most=True)


# ---------------------------------------------------------------------- a whole run


def _train(run: RunConfig, *options: str) -> subprocess.Popen[bytes]:
    path = Path(f"{run.run_dir}.toml")
    path.write_text(run.to_toml())
    command = [sys.executable, "-m", "gpt2dist", "train", str(path), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def _step_seconds(directory: Path, steps: int, every_minutes: float | str) -> tuple[float, int]:
    """Seconds a step, from the fifth to the last one, of a whole run; and how many saves fell into that time."""
    section = {"every_minutes": every_minutes, "keep": 1}
    train = {"steps": steps, "precision": "fp32", "zero_stage": 2, "peak_tflops": 1.0}
    run = _run(directory, LARGE, checkpoint=section, train=train)
    if _train(run).wait(timeout=900):
        raise RuntimeError(f"{run.run_dir}: training failed")
    rows = rundir.metrics_log(run.run_dir).read()
    saves = [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "commit"]
    between = [e for e in saves if rows[4]["time"] < e["time"] < rows[-1]["time"]]
    shutil.rmtree(run.run_dir)
    return (rows[-1]["time"] - rows[4]["time"]) / (len(rows) - 5), len(between)


def overhead() -> Iterator[Row]:
    """At the default interval. G2D_STEPS, G2D_PAIRS: other lengths than a few minutes a run, and five pairs."""
    steps, pairs = int(os.environ.get("G2D_STEPS", 150)), int(os.environ.get("G2D_PAIRS", PAIRS))
    ratios = []
    with _directory() as directory:
        for pair in range(pairs):
            order = (("auto", 0.0), (0.0, "auto"))[pair % 2]
            found = {every: _step_seconds(directory, steps, every) for every in order}
            (with_saves, saves), (without, _) = found["auto"], found[0.0]
            print(f"  {saves} saves: {with_saves:.4f} s a step, {without:.4f} without", file=sys.stderr, flush=True)
            ratios.append(with_saves / without)
    yield Row("wall clock with checkpoints / without, 1.06 GB", ratios, 1.035, "s ratio", at_most=True)


# ---------------------------------------------------------------------- a start


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
    below = psutil.Process(process.pid).children(recursive=True)
    return [p for p in below if "RayTrainWorker" in " ".join(p.cmdline())]


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
    """A killed worker, and the command given again, ÷ the same command on a run that is new; G2D_PAIRS as above."""
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
