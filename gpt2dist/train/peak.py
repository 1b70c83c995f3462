"""The peak that MFU is measured against."""

from __future__ import annotations

import time

import torch

from gpt2dist.config import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def peak_flops(run: RunConfig, device: torch.device) -> float:
    """FLOP/s of one worker: train.peak_tflops, or the best of some matrix products in the run's precision.

    A product of two n×n matrices takes 2·n³ FLOPs. All workers measure at once, as they will work.
    """
    if run.train.peak_tflops is not None:
        return run.train.peak_tflops * 1e12
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(DTYPES[run.train.precision])
    best = float("inf")
    for _ in range(8):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
