"""Fixtures: a private HOME, small data sets made without Ray, run files, and groups of real processes."""

from __future__ import annotations

import atexit
import copy
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# Before Ray is imported anywhere: it writes ~/.ray/auth_token, and reads these.
_home = tempfile.mkdtemp(prefix="g2d-home-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ.update(HOME=_home, RAY_USAGE_STATS_ENABLED="0", RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2", OMP_NUM_THREADS="1")
os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"  # of the processes that tests start
os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(__file__).parent.parent / "build" / "torch_extensions")  # compile once
os.environ.pop("RAY_ADDRESS", None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # `pytest &` ignores Ctrl-C, and so would what tests start

from gpt2dist.config import RunConfig, validate  # noqa: E402
from gpt2dist.data.shards import Manifest, Shard  # noqa: E402

ROOT = Path(__file__).parent.parent

# The same examples in every run; to search further: HYPOTHESIS_PROFILE=search.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def make_shard(directory: Path, name: str, tokens: np.ndarray[Any, Any]) -> Shard:
    """Write one token shard and describe it."""
    buffer = io.BytesIO()
    np.save(buffer, tokens.astype("<u2"))
    data = buffer.getvalue()
    (directory / name).write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    return Shard(file=name, tokens=len(tokens), documents=1, bytes=len(data), sha256=sha)


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., str]:
    """Makes a prepared data set of random tokens: make_data([tokens of each shard], val=tokens)."""

    def make(train: list[int], val: int = 2000, name: str = "data") -> str:
        directory = tmp_path / name
        directory.mkdir()
        rng = np.random.default_rng(0)
        shards = [make_shard(directory, f"train-{i:05d}.npy", rng.integers(0, 50257, n)) for i, n in enumerate(train)]
        val_shards = [make_shard(directory, "val-00000.npy", rng.integers(0, 50257, val))] if val else []
        manifest = Manifest(request={}, documents={}, splits={"train": shards, "val": val_shards})
        (directory / "manifest.json").write_bytes(manifest.to_bytes())
        return str(directory)

    return make


TINY: dict[str, Any] = {
    "name": "run",
    "seed": 3,
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1},
    "data": {"seq_len": 16},
    "batch": {"micro_sequences": 2, "micro_batches": 4},
    "train": {"steps": 12, "precision": "fp32", "zero_stage": 2, "peak_tflops": 1.0},
    "optim": {"lr": 3e-3, "warmup_steps": 4, "grad_clip": 0.5},
    "eval": {"every_steps": 6, "batches": 3},
    "checkpoint": {"every_steps": 4},
    "cluster": {"workers": 2},
}


def tiny_run(**changes: Any) -> RunConfig:
    """A small run; changes as section__key=value or key=value."""
    table = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY.items()}
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = table
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = copy.deepcopy(value)
    return validate(RunConfig, table, "test")


@pytest.fixture
def gpt2dist(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a directory of its own: gpt2dist("train", "run.toml", timeout=120)."""

    def run(*args: str, timeout: float = 180, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gpt2dist", *args]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs a function of tests/ranks.py on real processes over gloo: ranks(function, world_size, *args)."""
    from tests.ranks import run_ranks

    counter = iter(range(1000))

    def run(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 200) -> list[Any]:
        return run_ranks(function, world_size, args, tmp_path / f"rendezvous-{next(counter)}", timeout)

    return run
