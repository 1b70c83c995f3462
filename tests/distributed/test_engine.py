"""ZeRO stages, world sizes and resumes on real gloo processes, through the trainer and without Ray."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.data.order import consumed
from gpt2dist.model import gpt2
from gpt2dist.train import checkpoint, ledger, rundir
from gpt2dist.train.optim import adamw, learning_rate
from tests.conftest import tiny_run
from tests.distributed import jobs

Ranks = Callable[..., list[Any]]
Losses = dict[int, float]


def logged(run: RunConfig, key: str = "loss") -> Losses:
    """Step → value from metrics.jsonl; every step must stand once."""
    rows = rundir.metrics_log(run.run_dir).read()
    assert [r["step"] for r in rows] == list(range(len(rows)))
    return {r["step"]: r[key] for r in rows if key in r}


def newest(run: RunConfig) -> checkpoint.Checkpoint:
    found = checkpoint.newest(run.run_dir)
    assert found is not None
    return found


def largest_difference(a: Losses, b: Losses) -> float:
    assert a.keys() == b.keys()
    return max(abs(a[s] - b[s]) for s in a)


def test_a_start_imports_no_compiler(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """Which takes 2 s of the first step after every start, and 50 MB."""
    same = {"storage": str(tmp_path), "data__path": make_data([3000]), "train__steps": 1}
    runs = [tiny_run(name=f"stage-{stage}", train__zero_stage=stage, **same) for stage in range(4)]
    assert ranks(jobs.have_imported_compiler, 1, runs) == [[False] * 4]


def variants(data: str, storage: Path, precision: str, stages: tuple[int, ...], **changes: Any) -> list[RunConfig]:
    return [
        tiny_run(
            name=f"{precision}-{stage}",
            storage=str(storage),
            data__path=data,
            train__precision=precision,
            train__zero_stage=stage,
            train__steps=20,
            checkpoint__every_steps=0,
            **changes,
        )
        for stage in stages
    ]


def plain_torch_losses(run: RunConfig) -> Losses:
    """The same run in a plain PyTorch loop: no DeepSpeed, no ranks, no dropout."""
    from gpt2dist.data.order import SampleOrder

    data = Mixture.open(run)
    order, split = SampleOrder(run, data), MixedSplit(data, "train", run.data.seq_len)
    model = gpt2.build(gpt2.GPT2Config.from_run(run), run.seed)
    optimizer = adamw(model, run.optim)
    losses = {}
    for step in range(run.train.steps):
        total = 0.0
        micro_batches = order.step(step)
        for ids in micro_batches:
            tokens = torch.from_numpy(split.samples(ids).astype("int64"))
            loss = model(tokens) / len(micro_batches)
            loss.backward()
            total += loss.item()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), run.optim.grad_clip, norm.float())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.optim, step, run.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = total
    return losses


@pytest.mark.timeout(240)
def test_stages_and_world_sizes_give_one_fp32_curve(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    data = make_data([3000, 3000])
    two = variants(data, tmp_path / "w2", "fp32", (0, 1, 2, 3), model__dropout=0.0)
    ranks(jobs.train_runs, 2, two)
    three = variants(data, tmp_path / "w3", "fp32", (2, 3), model__dropout=0.0, cluster__workers=3)
    ranks(jobs.train_runs, 3, three)  # 3 does not divide M = 4: a padding micro-batch
    reference = plain_torch_losses(two[0])
    for run in [*two, *three]:
        assert largest_difference(logged(run), reference) <= 1e-5, run.run_dir


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_growing_batch_gives_one_fp32_curve(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """M = 1 to 5 in 16 steps: at every stage and world size the curve of a plain loop, and no slot is wasted."""
    data = make_data([3000, 3000])
    changes: dict[str, Any] = {"model__dropout": 0.0, "batch__micro_batches": 5, "batch__warmup_steps": 16}
    sizes = [min(5, 1 + 4 * step // 16) for step in range(20)]
    runs: list[RunConfig] = []
    for world_size, stages in {1: (2,), 2: (0, 1, 2, 3), 3: (1, 3)}.items():
        changes["cluster__workers"] = world_size
        part = variants(data, tmp_path / str(world_size), "fp32", stages, **changes)
        if world_size == 2:
            part += variants(data, tmp_path / "offload", "fp32", (1, 3), train__offload_optimizer=True, **changes)
        (ends, *_) = ranks(jobs.train_runs, world_size, part)
        assert [end["slots"] for end in ends] == [[-(-m // world_size) for m in sizes]] * len(part)
        runs += part
    reference = plain_torch_losses(runs[0])
    for run in runs:
        assert largest_difference(logged(run), reference) <= 1e-5, run.run_dir
        lines = rundir.ledger_log(run.run_dir).read()
        result = ledger.audit(run, Mixture.open(run), lines, 20)
        assert (result.clean, result.samples) == (True, 2 * sum(sizes))
        assert newest(run).index.position == 2 * sum(sizes)


@pytest.mark.timeout(240)
def test_stages_agree_in_16_bit(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    data = make_data([3000, 3000])
    kinds = (("bf16", (0, 1, 2, 3)), ("fp16", (1, 2, 3)))
    runs = [run for kind in kinds for run in variants(data, tmp_path, *kind, batch__warmup_steps=12)]
    ends = ranks(jobs.train_runs, 2, runs)
    reference = logged(variants(data, tmp_path, "bf16", (2,))[0])
    for run in runs:
        assert largest_difference(logged(run), reference) <= 2e-2, run.run_dir
        assert largest_difference(logged(run, "val_loss"), logged(runs[0], "val_loss")) <= 2e-2
    fp16 = ends[0][-1]["scalars"]
    assert fp16["loss_scale.cur_scale"] > 1
    assert fp16["optimizer_steps"] == 20


@pytest.mark.timeout(240)
def test_bf16_gradients_are_summed_in_fp32(ranks: Ranks) -> None:
    """The mean over 16 equal micro-batches is each one's gradient, exactly: a sum in bf16 would round."""
    calls: list[tuple[Any, ...]] = []
    for stage in (0, 1, 2, 3):
        for micro_batches in (2, 16):
            changes = {"train__zero_stage": stage, "train__precision": "bf16", "model__dropout": 0.0}
            run = tiny_run(batch__micro_batches=micro_batches, **changes)
            calls.append((run, [0, 1, 2], frozenset(), True))
    for results in ranks(jobs.drive_all, 2, calls):
        for (run, *_), few, many in zip(calls[::2], results[::2], results[1::2], strict=True):
            assert few["applied"] == [True] * 3
            assert few == many, run.train


def test_one_rank_sums_in_fp32_too(ranks: Ranks) -> None:
    """Stage 1 hands its sum over micro-batches to DeepSpeed's communication, stage 2 adds up afterwards."""
    runs = [tiny_run(train__zero_stage=stage, train__precision="bf16", model__dropout=0.0) for stage in (1, 2)]
    stage_1, stage_2 = ranks(jobs.drive_all, 1, [(run, [0, 1, 2]) for run in runs])[0]
    assert stage_1 == stage_2


@pytest.mark.timeout(240)
def test_other_world_sizes_change_no_bit_in_bf16(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """At stage 2 with up to four ranks; five sum by an all-reduce. Each leg resumes what another world size saved."""
    data, more = make_data([3000, 3000]), {"batch__micro_batches": 5}
    whole = variants(data, tmp_path / "whole", "bf16", (2,), **more)[0]
    five = variants(data, tmp_path / "five", "bf16", (2,), cluster__workers=5, **more)[0]
    ranks(jobs.train_runs, 2, [whole])
    ranks(jobs.train_runs, 5, [five])
    for workers, stop in ((2, 5), (1, 10), (3, 15), (4, None)):
        changes = {"cluster__workers": workers, "train__stop_at": stop, **more}
        legs = variants(data, tmp_path / "legs", "bf16", (2,), **changes)[0]
        ranks(jobs.train_runs, workers, [legs])
    for key in ("loss", "grad_norm", "val_loss"):
        assert logged(legs, key) == logged(whole, key)
    before, after = (checkpoint.load_weights(newest(run), "weight") for run in (whole, legs))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert largest_difference(logged(five), logged(whole)) <= 1e-3


@pytest.mark.timeout(240)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bitwise_at_the_same_world_size(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path, precision: str
) -> None:
    data = make_data([3000, 3000])
    changes = {"optim__ema_decay": 0.9, "batch__warmup_steps": 14}  # stopped in the middle of the warm-up
    whole = variants(data, tmp_path / "whole", precision, (0, 1, 2, 3), checkpoint__keep=5, **changes)
    halves = variants(data, tmp_path / "half", precision, (0, 1, 2, 3), train__stop_at=7, **changes)
    rest = variants(data, tmp_path / "half", precision, (0, 1, 2, 3), **changes)
    # By stage: DeepSpeed's stage 3 replaces F.linear for the rest of a process, and other bits come out.
    first = sorted([*whole, *halves], key=lambda run: run.train.zero_stage)
    ranks(jobs.train_runs, 2, first)
    ends = ranks(jobs.train_runs, 2, rest)  # new processes
    assert [end["start"] for end in ends[0]] == [7, 7, 7, 7]
    for a, b in zip(whole, rest, strict=True):
        assert logged(a) == logged(b)
        assert logged(a, "val_loss") == logged(b, "val_loss")
        assert logged(a, "grad_norm") == logged(b, "grad_norm")
        first, second = (checkpoint.newest(r.run_dir) for r in (a, b))
        assert first is not None
        assert second is not None
        assert [f.sha256 for f in first.index.files] == [f.sha256 for f in second.index.files]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_muon_resumes_bitwise(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """Also from two ranks' fragments on three ranks, but there not bitwise: torch orthogonalizes in bf16."""
    data = make_data([3000, 3000])
    whole = variants(data, tmp_path / "whole", "bf16", (0,), optim__name="muon")[0]
    half = variants(data, tmp_path / "half", "bf16", (0,), optim__name="muon", train__stop_at=7)[0]
    rest = variants(data, tmp_path / "half", "bf16", (0,), optim__name="muon")[0]
    three = variants(data, tmp_path / "three", "bf16", (0,), optim__name="muon", cluster__workers=3)[0]
    ranks(jobs.train_runs, 2, [whole, half])
    shutil.copytree(half.run_dir, three.run_dir)
    ranks(jobs.train_runs, 2, [rest])
    ranks(jobs.train_runs, 3, [three])
    assert logged(rest) == logged(whole)
    assert largest_difference(logged(three), logged(whole)) < 2e-2
    saved, again = (checkpoint.newest(run.run_dir) for run in (whole, rest))
    assert saved is not None
    assert again is not None
    assert [f.sha256 for f in saved.index.files] == [f.sha256 for f in again.index.files]
    assert ("h.0.attn.c_attn.weight", "exp_avg_sq") not in {(f.parameter, f.kind) for f in saved.index.fragments}


@pytest.mark.timeout(240)
def test_resume_at_other_world_sizes_and_stages(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    data = make_data([3000, 3000])
    more = {"optim__ema_decay": 0.9, "batch__warmup_steps": 14}
    whole = variants(data, tmp_path / "whole", "fp32", (2,), **more)[0]
    ranks(jobs.train_runs, 2, [whole])
    # (workers, stage) of each leg of one run: saved by one, loaded by the next.
    legs = [(2, 2, 4), (1, 3, 7), (3, 1, 10), (2, 0, 13), (3, 3, 16), (2, 2, None)]
    for workers, stage, stop in legs:
        changes = {"cluster__workers": workers, "train__zero_stage": stage, "name": "reshaped", "train__stop_at": stop}
        changes |= more
        run = tiny_run(storage=str(tmp_path), data__path=data, train__steps=20, checkpoint__every_steps=0, **changes)
        ranks(jobs.train_runs, workers, [run])
    assert largest_difference(logged(run), logged(whole)) <= 1e-5
    for kind in ("weight", "ema"):
        before, after = (checkpoint.load_weights(newest(r), kind) for r in (whole, run))
        assert max(float((before[n] - after[n]).abs().max()) for n in before) <= 1e-5, kind
    lines = rundir.ledger_log(run.run_dir).read()
    result = ledger.audit(run, Mixture.open(run), lines, jobs.committed_step(run))
    assert result.clean
    assert result.samples == consumed(run.batch, 20)
    assert result.attempts == len(legs)
    assert {line["world_size"] for line in lines} == {1, 2, 3}


@pytest.mark.timeout(240)
def test_averaged_weights_are_the_average(ranks: Ranks) -> None:
    """At every stage, over the masters, and untouched by a skipped step. The decay grows to 0.4 in step 5."""
    average = {"optim__ema_decay": 0.4}
    kinds = [(precision, stage) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]
    calls = [(tiny_run(train__precision=p, train__zero_stage=s, **average), 6) for p, s in kinds]
    calls.append((tiny_run(train__zero_stage=0, optim__name="muon", **average), 6))
    results = ranks(jobs.drive_averages, 2, calls)
    for (run, _), *parts in zip(calls, *results, strict=True):
        for difference, moved, _elements in parts:
            assert difference <= 1e-7, run.train
            assert moved >= 1e-4
        assert sum(elements for *_, elements in parts) == results[0][0][2] + results[1][0][2]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_average_that_begins_later(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """It begins with the weights of the checkpoint, and the events say so once."""
    changes: dict[str, Any] = {"storage": str(tmp_path), "data__path": make_data([3000]), "checkpoint__keep": 9}
    changes |= {"cluster__workers": 1, "train__zero_stage": 1}
    ranks(jobs.train_runs, 1, [tiny_run(train__stop_at=4, **changes)])
    for stop in (5, 6):
        run = tiny_run(train__stop_at=stop, optim__ema_decay=0.3, **changes)
        ranks(jobs.train_runs, 1, [run])
    (event,) = [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "ema_started"]
    assert event["step"] == 4
    saved = [c for c in checkpoint.committed(run.run_dir) if isinstance(c, checkpoint.Checkpoint)]
    assert [(c.index.step, c.index.has_ema) for c in saved] == [(6, True), (5, True), (4, False)]
    six, five, four = (checkpoint.load_weights(c) for c in saved)
    for name, average in checkpoint.load_weights(saved[0], "ema").items():
        expected = 0.3 * (0.3 * four[name].double() + 0.7 * five[name].double()) + 0.7 * six[name].double()
        assert float((average - expected).abs().max()) <= 1e-7


@pytest.mark.timeout(240)
def test_initial_weights_are_the_seeds_alone(ranks: Ranks, tmp_path: Path) -> None:
    """One sha256 at every stage, precision and world size: that of the reference model."""
    runs = variants("", tmp_path, "bf16", (0, 1, 2, 3)) + variants("", tmp_path, "fp32", (2, 3))
    model = gpt2.build(gpt2.GPT2Config.from_run(runs[0]), runs[0].seed)
    weights = sorted((name, p.detach().numpy().tobytes()) for name, p in model.named_parameters())
    for world_size in (1, 2, 3):
        for digests in ranks(jobs.initial_digests, world_size, runs):
            assert digests == [jobs.weights_digest(weights)] * len(runs), world_size


@pytest.mark.timeout(240)
def test_no_rank_of_stage_3_ever_holds_the_whole_model(ranks: Ranks, tmp_path: Path) -> None:
    """Peak memory of the start with 101 M parameters in fp32 and four ranks.

    Bytes a parameter: a quarter of 16 for weights, master weights and moments, and for a moment a few copies of the
    token embeddings, which are a quarter of this model. Measured: 8.1. The whole model would be 4 more.
    """
    run = variants("", tmp_path, "fp32", (3,), model__n_layer=24, model__n_embd=512, model__n_head=8)[0]
    elements = sum(map(math.prod, gpt2.parameter_shapes(gpt2.GPT2Config.from_run(run)).values()))
    assert max(ranks(jobs.startup_peak, 4, run)) < 10 * elements


@pytest.mark.timeout(120)
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    data = make_data([3000])
    run = tiny_run(storage=str(tmp_path), data__path=data, cluster__workers=1, train__stop_at=8)
    ranks(jobs.train_runs, 1, [run])
    before = logged(run)
    victim = checkpoint.step_directory(run.run_dir, 8) / "rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (end,) = ranks(jobs.train_runs, 1, [run])
    assert end[0]["start"] == 4
    assert logged(run) == before
    (event,) = [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "bad_checkpoint"]
    assert str(victim) in event["reason"]
    assert checkpoint.newest(run.run_dir) is not None
    with pytest.raises(StopIteration):  # the damaged one was replaced by a good one
        next(c for c in checkpoint.committed(run.run_dir) if _is_bad(c))


def _is_bad(found: checkpoint.Checkpoint | checkpoint.BadCheckpoint) -> bool:
    if isinstance(found, checkpoint.BadCheckpoint):
        return True
    try:
        checkpoint.verify(found)
    except checkpoint.BadCheckpoint:
        return True
    return False


def test_metrics_have_the_promised_keys(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    changes = {"train__steps": 3, "train__profile_steps": [1, 2], "checkpoint__every_steps": 2}
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), **changes)
    ranks(jobs.train_runs, 2, [run])
    rows = [json.loads(line) for line in rundir.metrics_log(run.run_dir).path.read_text().splitlines()]
    keys = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "data_wait_s", "step_s", "peak_memory_bytes"}
    for row in rows:
        assert keys <= row.keys()
        assert row["tokens_per_s"] == pytest.approx(run.global_batch * run.data.seq_len / row["step_s"])
        parts = row["data_wait_s"] + row["forward_backward_s"] + row["optimizer_s"]
        assert 0.5 * row["step_s"] < parts <= row["step_s"]
        assert row["peak_memory_bytes"] > 16 * 1.6e6 / 2  # 1.6 M parameters on two ranks
    assert [row["checkpoint_s"] > 0 for row in rows] == [False, False, True]  # since the line before
    assert "val_loss" in rows[-1]
    trace = json.loads(gzip.decompress((Path(run.run_dir) / "profile" / "steps-1-2.json.gz").read_bytes()))
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_norm_of_many_elements() -> None:
    from gpt2dist.train.zero import norm  # imports DeepSpeed

    x = torch.randn(5_000_007, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert abs(norm(x).item() / x.double().norm().item() - 1) < 1e-7
    assert abs(x.norm().item() / x.double().norm().item() - 1) > 1e-6  # why it is there
