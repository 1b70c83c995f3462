"""Processes of a run, to be found and killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


def train_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that are workers of Ray Train; one that has ended meanwhile is none."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one of these
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found
