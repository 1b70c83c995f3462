from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from gpt2dist.train.allocator import keep_memory

keep_memory()
# Sizes as of a step; the sum of them all exceeds what the C library keeps by itself.
sizes = [50_000_000, 3_000_000, 20_000_000, 8_000_000]

def step():
    tensors = [torch.ones(n) for n in sizes]
    del tensors

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_step_takes_no_memory_from_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 20  # 68,000 without it, where huge pages are not used
