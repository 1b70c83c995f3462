"""Evaluation against transformers, and that every sample counts once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2dist.data.mixture import MixedSplit, Mixture
from gpt2dist.model.evaluate import Score, evaluate
from tests.conftest import ROOT, tiny_run
from tests.unit.runs import save_run
from tests.unit.test_cli import assert_one_line, cli
from tests.unit.test_hf import MODEL
from tests.unit.test_model import random_model

T = 16
SAMPLES = 13  # of 3 a batch: the last one is alone


@pytest.fixture
def data(tmp_path: Path, make_data: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return make_data([500], val=SAMPLES * T + 9)


def test_evaluate_equals_transformers(data: str) -> None:
    run = tiny_run(name="made", model=MODEL, data={"path": data, "seq_len": T}, batch__micro_sequences=3)
    run_dir = save_run(run, random_model())
    assert cli("export", run_dir, "--output", "out").exit_code == 0
    twin = GPT2LMHeadModel.from_pretrained("out").eval()
    ids = torch.from_numpy(np.load(Path(data) / "val-00000.npy").astype(np.int64))
    losses, hits = [], 0
    for i in range(SAMPLES):
        sample = ids[None, i * T : (i + 1) * T + 1]
        with torch.no_grad():
            losses.append(twin(sample, labels=sample).loss.item())
            hits += int((twin(sample[:, :-1]).logits.argmax(-1) == sample[:, 1:]).sum())
    for place in ([run_dir], ["out", "--data", data, "--seq-len", str(T), "--batch", "3"]):
        result = json.loads(cli("evaluate", *place, "--json").stdout)
        assert (result["samples"], result["tokens"], result["split"]) == (SAMPLES, SAMPLES * T, "val")
        assert abs(result["loss"] - np.mean(losses)) <= 1e-5
        assert result["perplexity"] == math.exp(result["loss"])
        assert result["accuracy"] == hits / (SAMPLES * T)
    assert "perplexity" in cli("evaluate", run_dir).stdout
    train = json.loads(cli("evaluate", run_dir, "--split", "train", "--batches", "2", "--json").stdout)
    assert train["samples"] == 6


def test_averaged_weights(data: str) -> None:
    """Saved beside other weights, they are what --ema reads; where there are none it is refused."""
    changes = {"model": MODEL, "data": {"path": data, "seq_len": T}}
    model, average = random_model(), random_model()
    with torch.no_grad():
        average.wpe.weight.mul_(1.5)
    alone = save_run(tiny_run(name="alone", **changes), average)
    both = save_run(tiny_run(name="both", optim__ema_decay=0.9, **changes), model, average=average)
    generate = ("--prompt", "import", "--max-tokens", "8", "--json")
    for command in (("export", "--output", "{}"), ("evaluate", "--json"), ("generate", *generate)):
        results = []
        for run_dir, more in ((alone, ()), (both, ("--ema",)), (both, ())):
            options = [option.format(f"out-{len(results)}") for option in command[1:]]
            result = cli(command[0], run_dir, *options, *more)
            assert result.exit_code == 0, result.output
            exported = Path(f"out-{len(results)}", "model.safetensors")
            results.append(exported.read_bytes() if command[0] == "export" else json.loads(result.stdout))
        assert results[0] == results[1] != results[2]
        assert_one_line(cli(command[0], alone, *options, "--ema"), "step-00000004: --ema: no averaged weights")
        assert_one_line(cli(command[0], "out-0", *options, "--ema"), "out-0: --ema: not a run directory")


def test_shares_of_the_samples_add_up(data: str) -> None:
    model = random_model()
    split = MixedSplit(Mixture.of({data: 1.0}), "val", T)
    ids = np.arange(SAMPLES)

    def score(ids: np.ndarray, batch: int) -> Score:
        return sum(evaluate(model, split, ids, batch), Score())

    whole = score(ids, 3)
    for other in (score(ids, SAMPLES), score(ids[0::2], 3) + score(ids[1::2], 3), score(ids[::-1].copy(), 1)):
        assert (other.tokens, other.correct) == (whole.tokens, whole.correct)
        assert abs(other.loss - whole.loss) <= 1e-6


def test_mistakes(data: str, make_data: Callable[..., str]) -> None:
    run = tiny_run(name="made", model=MODEL)
    save_run(run, random_model())
    cli("export", "runs/made", "--output", "out")
    assert_one_line(cli("evaluate", "out"), "--data: required for a Hugging Face model")
    assert_one_line(cli("evaluate", "runs/made", "--data", ""), "--data: empty; name a directory")
    assert_one_line(cli("evaluate", "out", "--data", "none"), "none: not a prepared data set")
    assert_one_line(
        cli("evaluate", "out", "--data", data, "--seq-len", "64"), "longer than the model's n_positions = 32"
    )
    make_data([100], val=20, name="short")
    assert_one_line(cli("evaluate", "out", "--data", "short"), "val has 20 tokens, less than one sequence of 32 + 1")
    assert_one_line(cli("evaluate", "runs/made", "--data", data, "--step", "5"), "no checkpoint of step 5")


def test_evaluation_in_one_process_needs_no_ray(data: str) -> None:
    run = tiny_run(name="made", model=MODEL, data__path=data, data__seq_len=T)
    code = (
        "import sys; from gpt2dist.cli import main\n"
        f"try: main(['evaluate', {save_run(run, random_model())!r}, '--batches', '1'])\n"
        "except SystemExit as e: assert not e.code\n"
        "print(sorted({'ray', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_perplexity_of_what_is_no_number() -> None:
    assert math.isnan(Score(math.nan, 0, 10).perplexity)
    assert Score(8000.0, 0, 10).perplexity == math.inf
