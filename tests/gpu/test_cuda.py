"""What only CUDA can show; skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2dist.cluster import plan
from gpt2dist.config import RunConfig
from gpt2dist.model import gpt2
from gpt2dist.model.loss import linear_cross_entropy
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.fragment import Fragment
from gpt2dist.train.snapshot import Snapshot
from tests.conftest import ROOT, tiny_run
from tests.processes import train_workers
from tests.ray.test_train import Run, assert_audit, events, steps_done, training, wait_for, write
from tests.unit.test_generate import generated, prompts_of
from tests.unit.test_model import transformers_twin

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


ON_GPU: dict[str, Any] = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 128, "dropout": 0.1},
    "data": {"seq_len": 512},
    "batch": {"micro_sequences": 4, "micro_batches": 3},
    "train": {"steps": 40, "precision": "bf16", "zero_stage": 2, "peak_tflops": 1.0},
    "cluster": {"workers": 1, "gpus_per_worker": 1},
}
"""Large enough for kernels whose order of additions may change."""


def _train(gpt2dist: Run, run: RunConfig, *args: str) -> None:
    directory = Path(run.storage)
    done = gpt2dist("train", str(write(run, directory)), *args, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def _rows(run: RunConfig, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(row.get(key) for key in keys) for row in rundir.metrics_log(run.run_dir).read()]


def _hashes(run: RunConfig) -> list[list[str]]:
    found = checkpoint.open_step(run.run_dir, run.train.steps)
    return [file.sha256 for file in found.index.files]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__compile": True},
        {"train__zero_stage": 3, "model__document_mask": True},
        {"train__zero_stage": 0, "optim__name": "muon"},
        {"train__precision": "fp16", "train__zero_stage": 1, "train__activation_checkpointing": True},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "bf16",
)
def test_killed_run_resumes_bit_for_bit(
    changes: dict[str, Any], make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path
) -> None:
    """The worker killed, then the driver: losses, norms and the saved state are those of an undisturbed run."""
    long = {"train__steps": 400, "checkpoint__every_steps": 20, "eval__every_steps": 100}
    same = {**ON_GPU, **long, **changes, "storage": str(tmp_path), "data__path": make_data([120_000], val=20_000)}
    undisturbed, run = tiny_run(name="undisturbed", **same), tiny_run(name="killed", **same)
    with ThreadPoolExecutor(1) as beside:
        alone = beside.submit(_train, gpt2dist, undisturbed)
        with training(write(run, tmp_path)) as process:
            wait_for(lambda: steps_done(run) >= 30)
            _worker(process).kill()
            wait_for(lambda: len(events(run, "start")) == 2 and steps_done(run) >= events(run, "start")[1]["step"] + 20)
            process.descendants()  # type: ignore[attr-defined]
            process.kill()
        _train(gpt2dist, run)
        alone.result()
    assert len(events(run, "start")) == 3
    assert _rows(run, "step", "loss", "grad_norm", "val_loss") == _rows(
        undisturbed, "step", "loss", "grad_norm", "val_loss"
    )
    assert _hashes(run) == _hashes(undisturbed)
    assert_audit(gpt2dist, run, run.train.steps)


def _worker(process: subprocess.Popen[str]) -> psutil.Process:
    (worker,) = train_workers(psutil.Process(process.pid).children(recursive=True))
    return worker


@pytest.mark.timeout(600)
def test_runs_move_between_cpu_and_gpu(make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path) -> None:
    """Begun on the CPU with two workers at stage 1, ended on one GPU at stage 3, and the other way round."""
    data = make_data([120_000], val=20_000)
    cpu = {"cluster__workers": 2, "cluster__gpus_per_worker": 0, "train__zero_stage": 1}
    gpu = {"cluster__workers": 1, "cluster__gpus_per_worker": 1, "train__zero_stage": 3}
    same = {**ON_GPU, "model__dropout": 0.0, "train__precision": "fp32", "data__seq_len": 64, "train__steps": 16}
    same |= {"storage": str(tmp_path), "data__path": data}
    reference = tiny_run(name="cpu", **{**same, **cpu})

    def move(name: str, first: dict[str, Any], second: dict[str, Any]) -> RunConfig:
        _train(gpt2dist, tiny_run(name=name, **{**same, **first}), "--set", "train.stop_at=8")
        run = tiny_run(name=name, **{**same, **second})
        _train(gpt2dist, run)
        return run

    with ThreadPoolExecutor(3) as side_by_side:
        alone = side_by_side.submit(_train, gpt2dist, reference)
        moved = [side_by_side.submit(move, "up", cpu, gpu), side_by_side.submit(move, "down", gpu, cpu)]
        alone.result()
    for run in (done.result() for done in moved):
        assert len(events(run, "start")) == 2
        for ours, theirs in zip(_rows(run, "loss", "grad_norm"), _rows(reference, "loss", "grad_norm"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        assert_audit(gpt2dist, run, 16)


@pytest.mark.timeout(600)
def test_evaluation_and_generation_on_the_gpu(make_data: Callable[..., str], gpt2dist: Run, tmp_path: Path) -> None:
    run = tiny_run(**{**ON_GPU, "storage": str(tmp_path), "data__path": make_data([120_000], val=20_000)})
    _train(gpt2dist, run)
    done = gpt2dist("evaluate", run.run_dir, "--data", run.data.path, "--json", timeout=200)
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout)
    done = gpt2dist("evaluate", run.run_dir, "--workers", "1", "--json", timeout=200)
    assert done.returncode == 0, done.stderr
    by_worker = json.loads(done.stdout)
    assert by_worker["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    model = gpt2.build(gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=128), 0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # so that the largest logit stands out
    prompts = prompts_of(20, 20)
    twin = transformers_twin(model)
    expected = twin.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=60, eos_token_id=None)
    ours = generated(model.to("cuda"), prompts, max_tokens=60, temperature=0)
    assert ours == expected[:, 20:].tolist()


SHAPE: dict[str, Any] = {
    "model": {"n_layer": 8, "n_head": 12, "n_embd": 768},
    "data": {"seq_len": 1024},
    "batch": {"micro_sequences": 8, "micro_batches": 2},
}
FEW_TOKENS = {"data__seq_len": 64, "batch__micro_sequences": 1}
"""Here the most is needed where gradients are reduced."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "changes",
    [
        {"train__zero_stage": 0},
        {"train__zero_stage": 1},
        {"train__zero_stage": 2},
        {"train__zero_stage": 3},
        {"train__zero_stage": 1, **FEW_TOKENS},
        {"train__zero_stage": 2, **FEW_TOKENS},
        {"train__zero_stage": 3, **FEW_TOKENS},
        {"train__zero_stage": 2, "train__precision": "fp32"},
        {"train__zero_stage": 2, "train__activation_checkpointing": True},
        {"train__zero_stage": 2, "train__offload_optimizer": True},
        {"train__zero_stage": 3, "train__offload_optimizer": True, "train__offload_param": True},
        {"train__zero_stage": 2, "train__compile": True},
    ],
    ids=lambda c: "-".join(f"{key.rpartition('__')[2]}{value}" for key, value in c.items()),
)
def test_peak_memory_is_what_plan_says(changes: dict[str, Any], make_data: Callable[..., str], tmp_path: Path) -> None:
    fixed = {"train__steps": 3, "eval__every_steps": 0, "checkpoint__every_steps": 0, "storage": str(tmp_path)}
    run = tiny_run(**{**ON_GPU, **SHAPE, "data__path": make_data([120_000]), **fixed, **changes})
    command = [sys.executable, "-m", "tests.bench.bare", run.model_dump_json(), str(tmp_path / "rendezvous")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    ((peak,),) = _rows(run, "peak_memory_bytes")[-1:]
    ratio = peak / sum(plan.memory(run).values())
    print(f"peak {peak / 2**20:.0f} MiB, {ratio:.3f} of the prediction")
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_the_plain_form(dtype: torch.dtype, compiled: bool) -> None:
    """One chunk and a half of positions; two chunks; few."""
    torch.manual_seed(0)
    for n in (3000, 4096, 5):
        x = torch.randn(n, 64, dtype=torch.float64, device="cuda")
        w = torch.randn(512, 64, dtype=torch.float64, device="cuda") / 4
        targets = torch.randint(500, (n,), device="cuda")
        ours = [t.to(dtype).requires_grad_() for t in (x, w)]
        plain = [t.detach().double().requires_grad_() for t in ours]
        expected = F.cross_entropy(F.linear(*plain)[:, :500], targets)
        (expected * 0.01).backward()
        result = linear_cross_entropy(*ours, targets, 500, compiled=compiled)
        (result * 0.01).backward()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert result.item() == pytest.approx(expected.item(), rel=tolerance)
        for a, b in zip(ours, plain, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert (a.grad.double() - b.grad).norm() <= tolerance * b.grad.norm()
        assert ours[1].grad is not None
        assert not ours[1].grad[500:].any()


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
