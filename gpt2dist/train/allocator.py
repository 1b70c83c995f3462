"""What processes of workers on CPUs begin with: how tensors get memory from the system, and no GPU in sight."""

from __future__ import annotations

import os
from pathlib import Path

import ray

JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"
"""jemalloc, which Ray brings along on Linux. It has to be there before a process begins."""


def cpu_worker_environment() -> dict[str, str]:
    """Environment variables with which what tensors have freed stays with the process for the next ones, as on CUDA.

    A step frees and takes as much as it needs of memory, and pages from the system have to be cleared each time. For
    the same reason large tensors lie in huge pages. A LD_PRELOAD that is there stays as it is. On a machine with a GPU
    DeepSpeed would choose that, whatever the run file says.
    """
    always = {"THP_MEM_ALLOC_ENABLE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if not JEMALLOC.exists() or os.environ.get("LD_PRELOAD"):
        return always
    # In one arena what one thread has freed serves the others, too.
    keep = "narenas:1,oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
    return always | {"LD_PRELOAD": str(JEMALLOC), "MALLOC_CONF": keep}
