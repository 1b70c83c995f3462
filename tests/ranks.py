"""Groups of real processes over gloo: a file rendezvous (no port races), a hard time limit, no one left behind."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    function: Callable[..., Any], world_size: int, args: tuple[Any, ...], rendezvous: Path, timeout: float
) -> list[Any]:
    """function(*args) on every rank of a new process group; returns the results in order of rank."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.jobs", "torch._dynamo"])  # imported once, not by every rank
    results = context.Queue()
    processes = [
        context.Process(target=_entry, args=(function, rank, world_size, args, str(rendezvous), results))
        for rank in range(world_size)
    ]
    for p in processes:
        p.start()
    try:
        deadline = time.monotonic() + timeout
        collected: dict[int, Any] = {}
        while len(collected) < world_size:
            rank, ok, value = results.get(timeout=max(0.1, deadline - time.monotonic()))
            assert ok, f"rank {rank}:\n{value}"
            collected[rank] = value
        for p in processes:
            p.join(max(0.1, deadline - time.monotonic()))
            assert p.exitcode == 0, f"a rank ended with exit code {p.exitcode} after a correct run"
        return [collected[rank] for rank in range(world_size)]
    finally:
        for p in processes:
            if p.is_alive():
                p.kill()
            p.join()


def _entry(
    function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], rendezvous: str, results: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        value = function(*args)
        dist.barrier()
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()
