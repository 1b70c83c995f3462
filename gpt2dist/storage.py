"""Paths on local disk and object stores alike, atomic publishing, and JSON-lines logs.

A *location* is a string: a local path or a URL that fsspec knows. Requests to S3 are tried again, with growing
pauses, for about a minute (docs/storage.md); what fails for good is a `StorageError` of one line.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar
from urllib.parse import urlsplit

import filelock
from fsspec.core import url_to_fs
from upath import UPath

from gpt2dist.config import UserError

UPLOAD_BYTES = 32 << 20
"""Of a file that is written in pieces to an object store: a request each."""
SEGMENT_BYTES = 1 << 20
"""Of a log on an object store: a longer object is not written again, the next one begins."""

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class StorageError(UserError):
    """A location that cannot be used: access denied, no such bucket, or unreachable for too long."""


# ---------------------------------------------------------------------- opening locations


def location(text: str) -> UPath:
    """The path of a location. Every location is opened here: what other processes wrote must be seen.

    Raises:
        UserError: there are credentials in it.
    """
    if "://" in text and "@" in urlsplit(text).netloc:
        shown = text.replace(urlsplit(text).netloc.rpartition("@")[0] + "@", "")
        raise UserError(f"{shown}: give credentials by environment variables, not in the location")
    return UPath(text, **_options(text))


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    fs, path = url_to_fs(url, **_options(url))
    return fs, path


def is_local(path: UPath) -> bool:
    """Whether `path` lies on a mounted file system."""
    return isinstance(path, Path)


def log_directory(text: str) -> Path:
    """Where a command that writes to a location keeps its log: there, or in a new local directory if that is remote."""
    path = location(text)
    return Path(path) if is_local(path) else Path(tempfile.mkdtemp(prefix="gpt2dist-"))


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("s3://", "s3a://")):
        return {}
    from gpt2dist import s3  # only where it is used: its libraries are large

    return s3.options()


# ---------------------------------------------------------------------- errors


def _reason(error: BaseException) -> str:
    """Why a location cannot be used at all; empty where the error says something else."""
    from gpt2dist import s3

    return s3.reason(error)


@contextlib.contextmanager
def _named(path: UPath) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if is_local(path) or not (reason := _reason(e)):
            raise
        raise StorageError(f"{path}: {reason}") from None  # the client's own error shows headers


def _operation(function: Callable[P, T]) -> Callable[P, T]:
    """For what works on a path, its first argument: errors of an object store's client become a `StorageError`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        path: Any = args[0]
        with _named(path):
            return function(*args, **kwargs)

    return run


# ---------------------------------------------------------------------- writing


@_operation
def publish(path: UPath, data: bytes) -> None:
    """Write a whole file so that a reader sees the old content, the new, or nothing, never a part.

    Object stores put objects atomically; on a file system the bytes are synced and renamed into place.
    """
    if not is_local(path):
        path.fs.pipe_file(path.path, data)
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
        with _named(path):
            try:
                path.fs.put_file(str(temporary), path.path)
            finally:
                temporary.unlink()
        return
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: UPath) -> Iterator[BinaryIO]:
    """A file to be written in pieces; it appears, whole, when the block ends, and not at all if that raises."""
    if is_local(path):
        temporary = stage(path)
        try:
            with open(temporary, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return
    with _named(path):
        remote = path.fs.open(path.path, "wb", block_size=UPLOAD_BYTES)
        try:
            yield remote
        except BaseException:
            with contextlib.suppress(Exception):  # the error that brought us here counts
                remote.discard()
            remote.closed = True  # or its end would complete the upload
            raise
        remote.close()


@_operation
def remove(path: UPath) -> None:
    """Delete a file; nothing happens where there is none."""
    path.unlink(missing_ok=True)


@_operation
def remove_tree(path: UPath) -> None:
    """Delete a directory and all in it; nothing happens where there is none."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


def check_writable(text: str) -> None:
    """Raises `UserError` where no file can be created below a location."""
    path = location(text)
    probe = path / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        if is_local(path):  # elsewhere this would make a missing bucket
            path.mkdir(parents=True, exist_ok=True)
        publish(probe, b"")
        remove(probe)
    except OSError as e:
        raise UserError(f"storage: cannot write to {text}: {e.strerror or e}") from None


def acquire_lock(text: str, busy: str) -> filelock.BaseFileLock | None:
    """Keep other processes off a directory on a file system; the lock goes when the process does.

    Raises:
        UserError: another one holds it, which `busy` says.
    """
    if not is_local(location(text)):
        return None
    lock = filelock.FileLock(f"{text}/.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{text}: {busy}") from None
    return lock


# ---------------------------------------------------------------------- reading


@_operation
def exists(path: UPath) -> bool:
    """Whether there is a file or directory."""
    return bool(path.exists())


@_operation
def read_bytes(path: UPath) -> bytes:
    """The whole content. Raises `FileNotFoundError`."""
    return bytes(path.read_bytes())


@_operation
def read_range(path: UPath, begin: int, end: int) -> bytearray:
    """The bytes [begin, end); fewer where the file ends. Raises `FileNotFoundError`."""
    if not is_local(path):
        return bytearray(path.fs.cat_file(path.path, start=begin, end=end))
    data = bytearray(end - begin)
    done = 0
    with path.open("rb", buffering=0) as f:
        f.seek(begin)
        while read := f.readinto(memoryview(data)[done:]):
            done += read
    return data[:done] if done < len(data) else data


@_operation
def file_size(path: UPath) -> int:
    """Bytes of a file. Raises `FileNotFoundError`."""
    return int(path.stat().st_size)


@contextlib.contextmanager
def reading(path: UPath) -> Iterator[BinaryIO]:
    """An open file, to be read in pieces. Raises `FileNotFoundError`."""
    with _named(path), path.open("rb") as f:
        yield f


@_operation
def children(path: UPath) -> list[UPath]:
    """What lies in a directory; nothing where there is none."""
    try:
        if is_local(path):
            return sorted(path.iterdir(), key=str)
        found = {name.rstrip("/") for name in path.fs.ls(path.path, detail=False)} - {path.path.rstrip("/")}
        return [path / name.rpartition("/")[2] for name in sorted(found)]
    except (FileNotFoundError, NotADirectoryError) as e:
        if not is_local(path) and _reason(e):
            raise
        return []


@_operation
def file_sizes(path: UPath) -> dict[str, int]:
    """Name → bytes of the files in a directory; one listing, however many there are."""
    if is_local(path):
        return {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.is_file()}
    found = path.fs.ls(path.path, detail=True)
    return {info["name"].rpartition("/")[2]: info["size"] for info in found if info["type"] == "file"}


@_operation
def plain_files(path: UPath) -> dict[str, int]:
    """Name → bytes of the regular files in a directory: no links, which may lead anywhere, no pipes or devices.

    Nothing where there is no directory, or only a link to one.
    """
    try:
        if not is_local(path):
            return file_sizes(path)
        if path.is_symlink():
            return {}
        return {e.name: e.stat().st_size for e in os.scandir(path) if e.is_file(follow_symlinks=False)}
    except (FileNotFoundError, NotADirectoryError) as e:
        if not is_local(path) and _reason(e):
            raise
        return {}


def sha256_of(path: UPath) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with reading(path) as f:
        while chunk := f.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------- logs


class JsonLines:
    """An append-only log, one JSON object a line.

    Floats are written as Python's repr, so equal bits print equal. A torn last line (the writer was
    killed) is not a record: `read` leaves it out and `keep` removes it.

    Objects cannot be appended to. There the log is x.jsonl, x.1.jsonl, x.2.jsonl, … in this order; a writer keeps
    the text of its own last one in memory and puts it whole. Two processes that append have different objects.
    """

    def __init__(self, path: UPath, flush_s: float = 0.0) -> None:
        """`flush_s`: on an object store, records may wait this many seconds until they are written."""
        self.path = path
        self.flush_s = flush_s
        self._segment: UPath | None = None  # the object that this writer puts again and again
        self._text = ""
        self._waiting = False
        self._flushed = -flush_s
        self._unwritten: list[dict[str, Any]] = []  # of `try_append`
        self._lock = threading.RLock()  # checkpoints are committed in a thread of their own
        self._short_lock = threading.Lock()  # of what is never held while something is written
        self._thread = ThreadPoolExecutor(1, "log")
        self._writing: Future[None] | None = None

    def append(self, *records: dict[str, Any]) -> None:
        """Add records; the data has left the process when this returns, or `flush_s` later.

        All of them, or with an exception none. What `try_append` could not write goes before them.
        """
        with self._lock:
            with self._short_lock:
                waiting = list(self._unwritten)
            text = "".join(json.dumps(record) + "\n" for record in [*waiting, *records])
            if is_local(self.path):
                _append_text(self.path, text)
            else:
                before = self._text, self._waiting
                self._text += text
                self._waiting = True
                try:
                    if time.monotonic() - self._flushed >= self.flush_s:
                        self._put()
                except BaseException:
                    self._text, self._waiting = before
                    raise
            with self._short_lock:
                del self._unwritten[: len(waiting)]

    def try_append(self, *records: dict[str, Any]) -> None:
        """Add records without an exception; what cannot be written now is written with the next ones.

        On an object store it is written in the background: that may be away for long, and nobody should wait.
        """
        with self._short_lock:
            self._unwritten += records
        if is_local(self.path):
            self._try_to_write()
        elif self._writing is None or self._writing.done():
            self._writing = self._thread.submit(self._try_to_write)

    def _try_to_write(self) -> None:
        try:
            while self._unwritten:
                self.append()
        except (OSError, StorageError) as e:
            logger.warning("%s: not written yet: %s", self.path, e)

    def flush(self) -> None:
        """Write the records that wait."""
        with self._lock:
            if self._unwritten:
                self.append()
            self._put()

    def _put(self) -> None:
        if not self._waiting:
            return
        if self._segment is None:
            self._segment = self._new_segment()
        publish(self._segment, self._text.encode())
        self._waiting, self._flushed = False, time.monotonic()
        if len(self._text) >= SEGMENT_BYTES:
            self._segment, self._text = None, ""

    def sync(self) -> None:
        """Force what was appended to the disk, or the object store."""
        self.flush()
        if is_local(self.path) and self.path.exists():
            with open(self.path, "rb") as f:
                os.fsync(f.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole records; an empty list where there is no file."""
        if is_local(self.path):
            with contextlib.suppress(FileNotFoundError):
                return _records(self.path.read_bytes())
            return []
        return [record for _, data in self._contents() for record in _records(data)]

    def tail(self, max_bytes: int = 1 << 16) -> list[dict[str, Any]]:
        """The last whole records, as many as lie in `max_bytes`; on an object store, those of the last object."""
        if is_local(self.path):
            with contextlib.suppress(FileNotFoundError):
                return _last_records(self.path, max_bytes)
            return []
        for _, path in reversed(self._segments()):
            with contextlib.suppress(OSError):  # it was cut between the look at its size and the read
                with _named(path):
                    records = _last_records(path, max_bytes)
                if records:
                    return records
        return []

    def keep(self, condition: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Drop the records that do not meet `condition`, atomically; returns the dropped ones.

        On an object store each object by itself is cut atomically, the last one first, and the log goes on in it.
        """
        if is_local(self.path):
            data = self.path.read_bytes() if self.path.exists() else b""
            return self._keep(self.path, data, condition)[1]
        dropped: list[dict[str, Any]] = []
        for i, (path, data) in enumerate(reversed(self._contents())):
            left, gone = self._keep(path, data, condition)
            dropped = gone + dropped
            if i == 0 and len(left) < SEGMENT_BYTES:
                self._segment, self._text, self._waiting = path, left, False
        return dropped

    def _keep(
        self, path: UPath, data: bytes, condition: Callable[[dict[str, Any]], bool]
    ) -> tuple[str, list[dict[str, Any]]]:
        records = _records(data)
        left = "".join(json.dumps(record) + "\n" for record in records if condition(record))
        if left.encode() != data:
            publish(path, left.encode())
        return left, [record for record in records if not condition(record)]

    def _segments(self) -> list[tuple[int, UPath]]:
        """(number, object), in order."""
        pattern = rf"{re.escape(self.path.stem)}(?:\.(\d+))?{re.escape(self.path.suffix)}"
        found = ((re.fullmatch(pattern, path.name), path) for path in children(self.path.parent))
        return sorted((int(match[1] or 0), path) for match, path in found if match)

    def _contents(self) -> list[tuple[UPath, bytes]]:
        paths = [path for _, path in self._segments()]
        with ThreadPoolExecutor(16) as threads:
            return list(zip(paths, threads.map(read_bytes, paths), strict=True))

    def _new_segment(self) -> UPath:
        """An object of this writer's own, made empty."""
        number = max((number for number, _ in self._segments()), default=-1) + 1
        while True:
            name = f"{self.path.stem}.{number}{self.path.suffix}" if number else self.path.name
            path = self.path.with_name(name)
            with _named(path), contextlib.suppress(FileExistsError):
                path.fs.pipe_file(path.path, b"", mode="create")
                return path
            number += 1


def _append_text(path: UPath, text: str) -> None:
    """In one write; after a torn line, which a machine that lost power may have left, on a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as f:
        end = f.seek(0, os.SEEK_END)
        torn = False
        if end:
            f.seek(end - 1)
            torn = f.read(1) != b"\n"
        data = (b"\n" if torn else b"") + text.encode()
        try:
            while data:
                data = data[f.write(data) :]
        except OSError:  # the disk is full: no part of a record
            f.truncate(end)
            raise


def _records(data: bytes) -> list[dict[str, Any]]:
    return [record for line in data.splitlines(keepends=True) if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """None for a torn line."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _last_records(path: UPath, max_bytes: int) -> list[dict[str, Any]]:
    if is_local(path):
        with path.open("rb") as f:
            end = f.seek(0, os.SEEK_END)
            f.seek(max(0, end - max_bytes))
            data = f.read()
    else:
        end = file_size(path)
        data = path.fs.cat_file(path.path, start=max(0, end - max_bytes), end=end) if end else b""
    lines = data.split(b"\n")[1 if end > max_bytes else 0 : -1]
    return [record for line in lines if (record := _record(line + b"\n")) is not None]
