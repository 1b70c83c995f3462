"""What only CUDA can show; skipped where there is none."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2dist.model import gpt2
from gpt2dist.train import rundir
from gpt2dist.train.fragment import Fragment
from gpt2dist.train.snapshot import Snapshot
from tests.conftest import tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RUNS: list[dict[str, Any]] = [
    {"train__precision": "bf16", "train__zero_stage": 0},
    {"train__precision": "bf16", "train__zero_stage": 1},
    {"train__precision": "fp16", "train__zero_stage": 2},
    {"train__precision": "fp32", "train__zero_stage": 2},
    {"train__precision": "bf16", "train__zero_stage": 3},
    {"train__precision": "bf16", "train__zero_stage": 2, "train__compile": True},
    {"train__precision": "bf16", "train__zero_stage": 2, "train__offload_optimizer": True},
    {"train__precision": "bf16", "train__zero_stage": 3, "train__offload_param": True},
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("changes", RUNS, ids=lambda c: "-".join(map(str, c.values())))
def test_one_gpu_trains_and_resumes(
    changes: dict[str, Any],
    make_data: Callable[..., str],
    gpt2dist: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """Through the command line, Ray and NCCL: saved, resumed, evaluated, and learning."""
    cluster = {"cluster__workers": 1, "cluster__gpus_per_worker": 1}
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), train__steps=40, **cluster, **changes)
    (tmp_path / "run.toml").write_text(run.to_toml())
    for stop in ("20", "40"):
        done = gpt2dist("train", "run.toml", "--set", f"train.stop_at={stop}", timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = rundir.metrics_log(run.run_dir).read()
    assert [row["step"] for row in rows] == list(range(40))
    assert sum(row["loss"] for row in rows[-5:]) < sum(row["loss"] for row in rows[:5]) - 0.5
    assert sum("skipped" in row for row in rows) <= (3 if run.train.precision == "fp16" else 0)
    assert rows[-1]["peak_memory_bytes"] > 16 * 1.6e6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_can_use_the_flash_kernel(dtype: torch.dtype) -> None:
    """With all other kernels forbidden, forward and backward still run."""
    model = gpt2.build(gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=64), 0).to("cuda", dtype)
    tokens = torch.randint(0, 50257, (2, 65), device="cuda")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        loss = model(tokens)
        loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_snapshot_waits_for_its_own_device() -> None:
    """Taken by a thread whose current device is the first, as the saver's is."""
    ones = torch.ones(100_000_000, device="cuda:1")
    snapshot = Snapshot(1, 1)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(snapshot.take, [Fragment("w", "weight", 0, ones)]).result()
        for value in range(2, 6):
            ones.fill_(value)
            torch.cuda.synchronize("cuda:1")
            thread.submit(snapshot.take, [Fragment("w", "weight", 0, ones)]).result()
            assert bool((snapshot._data == value).all())
