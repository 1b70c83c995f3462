"""Paths on local disk and object stores alike, atomic publishing, and JSON-lines logs.

A *location* is a string: a local path or a URL that fsspec knows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from upath import UPath

from gpt2dist.config import UserError


def is_local(path: UPath) -> bool:
    """Whether `path` lies on a mounted file system."""
    return isinstance(path, Path)


def publish(path: UPath, data: bytes) -> None:
    """Write a whole file so that a reader sees the old content, the new, or nothing, never a part.

    Object stores put objects atomically; on a file system the bytes are synced and renamed into place.
    """
    if not is_local(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def stage(path: UPath) -> Path:
    """A name for a local file, to be written and then published as `path`: for files too large for `publish`."""
    name = f".{path.name}.{uuid.uuid4().hex[:8]}"
    if not is_local(path):
        return Path(tempfile.gettempdir()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(path.with_name(name))


def publish_file(temporary: Path, path: UPath) -> None:
    """Like `publish`, of a file that `stage` named."""
    if not is_local(path):
        path.fs.put_file(str(temporary), path.path)
        temporary.unlink()
        return
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def children(path: UPath) -> list[UPath]:
    """What lies in a directory; nothing where there is none."""
    try:
        return sorted(path.iterdir(), key=str)
    except (FileNotFoundError, NotADirectoryError):
        return []


def forget_listings(path: UPath) -> None:
    """Object stores' clients remember directories: other processes have written there since."""
    if not is_local(path):
        path.fs.invalidate_cache()


def remove_tree(path: UPath) -> None:
    """Delete a directory and all in it; nothing happens where there is none."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


def sha256_of(path: UPath) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(location: str) -> None:
    """Raises `UserError` where no file can be created below `location`."""
    path = UPath(location)
    probe = path / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        raise UserError(f"storage: cannot write to {location}: {e.strerror or e}") from None


class JsonLines:
    """An append-only log, one JSON object a line.

    Floats are written as Python's repr, so equal bits print equal. A torn last line (the writer was
    killed) is not a record: `read` leaves it out and `keep` removes it.
    """

    def __init__(self, path: UPath) -> None:
        self.path = path

    def append(self, *records: dict[str, Any]) -> None:
        """Add records; the data has left the process when this returns."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(text)

    def sync(self) -> None:
        """Force what was appended to the disk."""
        if is_local(self.path) and self.path.exists():
            with open(self.path, "rb") as f:
                os.fsync(f.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole records; an empty list where there is no file."""
        return list(self._records())

    def tail(self, max_bytes: int = 1 << 16) -> list[dict[str, Any]]:
        """The last whole records, as many as lie in `max_bytes`."""
        try:
            with self.path.open("rb") as f:
                end = f.seek(0, os.SEEK_END)
                f.seek(max(0, end - max_bytes))
                lines = f.read().split(b"\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[1 if end > max_bytes else 0 : -1]]

    def keep(self, condition: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Drop the records that do not meet `condition`, atomically; returns the dropped ones."""
        records = self.read()
        kept = [record for record in records if condition(record)]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        if self.path.exists() and self.path.read_text(encoding="utf-8") != text:
            publish(self.path, text.encode())
        return [record for record in records if not condition(record)]

    def _records(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    yield json.loads(line)
