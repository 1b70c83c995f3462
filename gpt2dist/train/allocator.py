"""How a worker on the CPU gets memory for tensors from the system."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h


def keep_memory() -> None:
    """What tensors have freed stays with the process for the next ones, as on CUDA; call before the first large one.

    A step frees and takes as much as it needs of memory, and pages from the system have to be cleared each time. For
    the same reason large tensors lie in huge pages. Does nothing where the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)  # also keeps the 64 MB heaps of threads other than the first one
