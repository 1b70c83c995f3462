"""Copies of remote files on this node: each fetched once, checked, and removed again when others need the room.

<cache>/<sha256>         a whole file, its content as its name says; its mtime is when it was used last
<cache>/<sha256>.part    one that is being fetched
<cache>/<sha256>.lock    held while it is fetched or opened
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from upath import UPath

from gpt2dist.config import UserError
from gpt2dist.storage import reading

PIECE_BYTES = 1 << 23


def directory() -> Path:
    """$GPT2DIST_CACHE, by default the platform's directory for caches."""
    return Path(os.environ.get("GPT2DIST_CACHE") or platformdirs.user_cache_dir("gpt2dist")) / "shards"


@contextlib.contextmanager
def local_copy(path: UPath, sha256: str, size: int, limit: int) -> Iterator[Path]:
    """A local file with the content of `path`; inside the context nobody removes it, and a map of it outlives that.

    Processes of one node share the files. `limit`: bytes that all of them may take; one file is always held.

    Raises:
        UserError: the content of `path` has another size or hash.
    """
    root = directory()
    root.mkdir(parents=True, exist_ok=True)
    copy = root / sha256
    with FileLock(f"{copy}.lock"):
        if copy.exists() and copy.stat().st_size == size:
            os.utime(copy)
        else:
            _make_room(root, size, limit)
            _fetch(path, copy, sha256, size)
        yield copy


def _fetch(path: UPath, copy: Path, sha256: str, size: int) -> None:
    part = copy.with_name(f"{copy.name}.part")
    digest, fetched = hashlib.sha256(), 0
    try:
        with reading(path) as source, open(part, "wb") as target:
            while data := source.read(PIECE_BYTES):
                digest.update(data)
                target.write(data)
                fetched += len(data)
            target.flush()
            os.fsync(target.fileno())  # its name says what is in it, also after a power cut
        if fetched != size:
            raise UserError(f"{path}: shard has {fetched:,} bytes, the manifest says {size:,}")
        if digest.hexdigest() != sha256:
            raise UserError(f"{path}: shard is damaged: its sha256 is not the manifest's")
        os.replace(part, copy)
    except FileNotFoundError:
        raise UserError(f"{path}: shard is missing") from None
    finally:
        part.unlink(missing_ok=True)


def _make_room(root: Path, size: int, limit: int) -> None:
    """Remove the files used longest ago, except those that are being fetched or opened."""
    found = []
    for path in root.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.suffix != ".lock":
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, bytes_, path in sorted(found):
        if total + size <= limit:
            return
        with contextlib.suppress(Timeout), FileLock(root / f"{path.stem}.lock", timeout=0):
            path.unlink(missing_ok=True)
            total -= bytes_
