from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gpt2dist.train.allocator import JEMALLOC, cpu_worker_environment

FAULTS = """
import resource, threading, torch

# Sizes as of a step; the sum of them all exceeds what the C library keeps by itself.
sizes = [100_000_000, 3_000_000, 20_000_000, 8_000_000]

def step():
    tensors = [torch.ones(n) for n in sizes]
    del tensors

def train():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=train)  # as in Ray Train: the C library's allocator treats the first thread better
thread.start()
thread.join()
"""


@pytest.mark.skipif(not JEMALLOC.exists(), reason="Ray brings no jemalloc here")
def test_a_step_takes_no_memory_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    env = {**os.environ, **cpu_worker_environment()}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) < 50  # thousands without it


def test_a_preloaded_library_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libtheirs.so")
    assert "LD_PRELOAD" not in cpu_worker_environment()


def test_a_worker_on_cpus_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that has some; DeepSpeed would take them."""
    program = "from deepspeed.accelerator import get_accelerator; print(get_accelerator().device_name())"
    env = {**os.environ, **cpu_worker_environment()}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "cpu"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
