"""Greedy tokens/s of `generate` against transformers' own, same weights, same threads, interleaved A B A B."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from gpt2dist.model.generate import Generation, Sampling
from gpt2dist.model.gpt2 import GPT2, GPT2Config, build
from tests.bench.common import Row, interleaved
from tests.bench.reference import ON_GPU
from tests.unit.test_model import transformers_twin

CONFIG = GPT2Config(n_layer=6, n_head=6, n_embd=384, n_positions=1024)
PROMPT, NEW, PAIRS, THREADS = 32, 128, 7, 2


def seconds_of_ours(model: GPT2, prompts: list[list[int]]) -> float:
    start = time.perf_counter()
    steps = list(Generation(model, prompts, [0] * len(prompts), Sampling(NEW, temperature=0, stop_tokens=frozenset())))
    assert len(steps) == NEW
    return time.perf_counter() - start


def seconds_of_transformers(twin: Any, prompts: list[list[int]]) -> float:
    ids = torch.tensor(prompts, device=twin.device)
    start = time.perf_counter()
    out = twin.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert out.shape == (len(prompts), PROMPT + NEW)
    return time.perf_counter() - start


def ratios(batch: int, dtype: torch.dtype) -> list[float]:
    """Of PAIRS pairs, after one that warms up; both sides have weights of that dtype."""
    torch.set_num_threads(THREADS)
    model = build(CONFIG, 0).eval()
    device = "cuda" if ON_GPU else "cpu"
    twin = transformers_twin(model).to(device, dtype)
    model = model.to(device, dtype)
    prompts = torch.randint(0, 50257, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    return interleaved(
        lambda: seconds_of_transformers(twin, prompts), lambda: seconds_of_ours(model, prompts), pairs=PAIRS
    )


def speed() -> Iterator[Row]:
    """One prompt at a time, and eight, with `--precision fp32` and bf16."""
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for batch in (1, 8):
            name = f"generation / transformers generate, {precision}, batch {batch}"
            yield Row(name, ratios(batch, dtype), 1.5, "tokens/s ratio")
