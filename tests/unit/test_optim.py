from __future__ import annotations

import pytest

from gpt2dist.config import OptimSection
from gpt2dist.model.gpt2 import GPT2Config, build
from gpt2dist.train.optim import adamw, learning_rate
from gpt2dist.train.trainer import dropout_seed


def test_warmup_and_cosine() -> None:
    o = OptimSection(lr=1.0, min_lr=0.1, warmup_steps=10)
    rates = [learning_rate(o, s, 110) for s in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    constant = OptimSection(lr=1.0, warmup_steps=2, schedule="constant")
    assert [learning_rate(constant, s, 50) for s in (0, 1, 2, 49)] == [0.5, 1.0, 1.0, 1.0]


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


def test_dropout_seeds_differ() -> None:
    seeds = {dropout_seed(a, b, c) for a in range(3) for b in range(20) for c in range(20)}
    assert len(seeds) == 1200
    assert all(0 <= s < 2**63 for s in seeds)
