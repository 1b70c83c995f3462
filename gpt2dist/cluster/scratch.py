"""Directories and tokens for Ray's files."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path


def temporary_directory() -> str:
    """A new directory with a short path (sockets lie in it); those of killed processes are removed."""
    root = Path("/tmp") if os.path.isdir("/tmp") else Path(tempfile.gettempdir())
    for old in root.glob("g2d-[0-9]*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"g2d-{os.getpid()}-", dir=root)


def new_token(directory: str | Path) -> Path:
    """A file with a new token of Ray's kind, which only this user can read."""
    path = Path(directory) / "token"
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return path


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
