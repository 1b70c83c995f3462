"""Greedy tokens/s of `generate` against transformers' own, same weights, same threads, interleaved A B A B."""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch

from gpt2dist.model.generate import Generation, Sampling
from gpt2dist.model.gpt2 import GPT2, GPT2Config, build
from tests.unit.test_model import transformers_twin

CONFIG = GPT2Config(n_layer=6, n_head=6, n_embd=384, n_positions=1024)
PROMPT, NEW, PAIRS, THREADS = 32, 128, 7, 2
BAR = 1.5


def seconds_of_ours(model: GPT2, prompts: list[list[int]]) -> float:
    start = time.perf_counter()
    steps = list(Generation(model, prompts, [0] * len(prompts), Sampling(NEW, temperature=0, stop_tokens=frozenset())))
    assert len(steps) == NEW
    return time.perf_counter() - start


def seconds_of_transformers(twin: Any, prompts: list[list[int]]) -> float:
    ids = torch.tensor(prompts)
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


def measure(batch: int) -> dict[str, Any]:
    """One row: the median of the paired ratios, and their spread."""
    torch.set_num_threads(THREADS)
    model = build(CONFIG, 0).eval()
    twin = transformers_twin(model)
    prompts = torch.randint(0, 50257, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    ratios = []
    for pair in range(PAIRS + 1):
        ours = seconds_of_ours(model, prompts)
        ratio = seconds_of_transformers(twin, prompts) / ours
        if pair:  # the first one warms up
            ratios.append(ratio)
    return {
        "name": f"generation / transformers generate, batch {batch}",
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "bar": BAR,
        "unit": "tokens/s ratio",
    }


def main() -> None:
    for batch in (1, 8):
        print(json.dumps(measure(batch)))


if __name__ == "__main__":
    main()
