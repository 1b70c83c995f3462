"""Peaks: of the arithmetic, which MFU is measured against, and of memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

from gpt2dist.config import RunConfig
from gpt2dist.model.linear import product_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PRODUCTS, PRODUCTS_S = 3, 0.1
"""How many matrix products the peak is the best of, at least, and how long they take together."""


def peak_flops(run: RunConfig, device: torch.device) -> float:
    """FLOP/s of one worker: train.peak_tflops, or the best of some matrix products of the type that the model does.

    A product of two n×n matrices takes 2·n³ FLOPs; n is large enough for all threads to have a part of it, which at
    1024 they do not. All workers measure at once, as they will work.
    """
    if run.train.peak_tflops is not None:
        return run.train.peak_tflops * 1e12
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device).to(product_dtype(DTYPES[run.train.precision], device))
    seconds: list[float] = []
    while len(seconds) < PRODUCTS or sum(seconds) < PRODUCTS_S:
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MemoryPeak:
    """Most memory used since it was made, in bytes: on CUDA by tensors, on the CPU by the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0 if device.type == "cuda" else _process_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        """The peak so far; takes no synchronization with the device."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _process_peak() - self._before


def _process_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux, where getrusage counts the process that started this one, too
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
