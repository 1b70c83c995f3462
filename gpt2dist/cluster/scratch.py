"""Directories and tokens for Ray's files, and processes that end with this one."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path


def temporary_directory() -> str:
    """A new directory with a short path (sockets lie in it); those of killed processes are removed."""
    import psutil

    root = Path("/tmp") if os.path.isdir("/tmp") else Path(tempfile.gettempdir())
    for old in root.glob("g2d-[0-9]*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"g2d-{os.getpid()}-", dir=root)


def new_token(directory: str | Path) -> Path:
    """A file with a new token of Ray's kind, which only this user can read."""
    path = Path(directory) / "token"
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return path


def end_with_parent() -> None:
    """In a child, before it runs its command; Linux: it gets a SIGTERM when its parent dies, in whatever way."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
