from __future__ import annotations

from math import cos, pi, prod
from typing import Any

import pytest
import torch

from gpt2dist.config import OptimSection
from gpt2dist.model.gpt2 import GPT2Config, build
from gpt2dist.train.optim import MuonAdamW, adamw, ema_decay, learning_rate
from gpt2dist.train.trainer import dropout_seed


def test_warmup_and_cosine() -> None:
    o = OptimSection(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(o, s, 110) for s in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize(
    ("changes", "expected"),  # step → rate, of 110 steps after 10 of warm-up
    [
        (
            {"schedule": "cosine"},
            {10: 1.0, 35: 0.55 + 0.45 * 0.5**0.5, 60: 0.55, 109: 0.1 + 0.45 * (1 - cos(pi / 100))},
        ),
        ({"schedule": "linear"}, {10: 1.0, 35: 0.775, 60: 0.55, 109: 0.1 + 0.9 / 100}),
        ({"schedule": "wsd", "decay_steps": 20}, {10: 1.0, 60: 1.0, 90: 1.0, 100: 0.55, 109: 0.1 + 0.9 / 20}),
        ({"schedule": "wsd"}, {10: 1.0, 99: 1.0, 100: 1.0 - 0.9 / 11, 109: 0.1 + 0.9 / 11}),
        ({"schedule": "constant"}, {10: 1.0, 60: 1.0, 109: 1.0}),
    ],
)
def test_schedules_follow_their_formulas(changes: dict[str, Any], expected: dict[int, float]) -> None:
    o = OptimSection(lr=1.0, min_lr=0.1, warmup_steps=10, **changes)
    for step, rate in {0: 0.1, 4: 0.5, 9: 1.0, **expected}.items():
        assert learning_rate(o, step, 110) == pytest.approx(rate), step
    for step in (110, 1000):
        assert learning_rate(o, step, 110) == pytest.approx(1.0 if o.schedule == "constant" else 0.1)


def test_the_average_forgets_the_first_weights_soon() -> None:
    """After 200 steps the initial weights count for less than 1e-9 of the average, which 0.999 alone leaves 0.8 of."""
    o = OptimSection(ema_decay=0.999)
    decays = [ema_decay(o, n) for n in range(1, 20_000)]
    assert decays[0] == 2 / 11
    assert decays[-1] == 0.999
    assert decays == sorted(decays)
    assert prod(decays[:200]) < 1e-9


def test_only_matrices_decay() -> None:
    model = build(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=4), 0)
    optimizer = adamw(model, OptimSection(weight_decay=0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert "wte.weight" in decayed
    assert "h.0.mlp.c_fc.weight" in decayed
    assert {"ln_f.weight", "h.0.ln_1.bias", "h.0.attn.c_attn.bias"} <= plain
    assert decayed | plain == set(names.values())
    assert not decayed & plain


def test_muon_makes_orthogonal_updates_of_the_blocks_matrices_and_learns() -> None:
    """Updates of size lr·0.2·√max(shape) (Liu et al. 2025); Newton–Schulz leaves singular values near 1."""
    model = build(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=16), 0)
    optimizer = MuonAdamW(model, OptimSection(name="muon", lr=0.01, min_lr=0.0, weight_decay=0.0))
    tokens = torch.randint(0, 50257, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(20):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, p in model.named_parameters() if step == 0 else []:
            change = (p.detach() - before[name]) / 0.01
            if name.startswith("h.") and p.ndim == 2:
                values = torch.linalg.svdvals(change) / (0.2 * max(p.shape) ** 0.5)
                assert values.median() > 0.5, name
                assert values.max() < 1.5, name
            else:  # AdamW's first step has the gradient's sign, and its size is lr
                assert change.abs().max() < 1.001, name
    assert losses[-1] < losses[0] - 2
    states = [set(optimizer.state[p]) for p in model.parameters()]
    assert states.count({"momentum_buffer"}) == 8
    assert states.count({"step", "exp_avg", "exp_avg_sq"}) == len(states) - 8


def test_dropout_seeds_differ() -> None:
    seeds = {dropout_seed(a, b, c) for a in range(3) for b in range(20) for c in range(20)}
    assert len(seeds) == 1200
    assert all(0 <= s < 2**63 for s in seeds)
