"""Paths on local disk and object stores alike, and atomic publishing.

A *location* is a string: a local path or a URL that fsspec knows. Requests to S3 are tried again, with growing
pauses, for about a minute (docs/storage.md); what fails for good is a `StorageError` of one line.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar
from urllib.parse import urlsplit

import filelock
from fsspec.asyn import sync
from fsspec.core import url_to_fs
from upath import UPath

from gpt2dist.config import UserError
from gpt2dist.urls import is_http, without_secrets

UPLOAD_BYTES = 32 << 20
"""Of a file that is written in pieces to an object store: a request each."""
SILENCE_S = 60.0
"""Of an HTTP server that sends nothing: then it counts as gone."""

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


class StorageError(UserError):
    """A location that cannot be used: access denied, no such bucket, or unreachable for too long."""


# ---------------------------------------------------------------------- opening locations


def location(text: str) -> UPath:
    """The path of a location. Every location is opened here: what other processes wrote must be seen.

    Raises:
        UserError: there are credentials in it, it names no bucket, or nothing opens locations of its kind.
    """
    try:
        if "://" in text and "@" in urlsplit(text).netloc:
            raise UserError(f"{without_secrets(text)}: give credentials by environment variables, not in the location")
        if text.startswith("file://"):
            raise UserError(f"{text}: write it without file://")
        path = UPath(text, **_options(text))
        if not is_local(path):
            _ = path.fs  # imports its package
    except (ImportError, ValueError) as e:
        raise UserError(f"{text}: cannot be opened: {e}") from None
    return path


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Raises `UserError` where it names no bucket."""
    fs, path = url_to_fs(url, **_options(url))
    return fs, path


def serves_ranges(fs: Any, url: str) -> bool:
    """Whether the HTTP server of `url` sends a part of the file where it is asked for one; fs: of `filesystem`."""

    async def ask() -> bool:
        session = await fs.set_session()
        headers = {**fs.kwargs.get("headers", {}), "Range": "bytes=0-0"}
        async with session.get(fs.encode_url(url), headers=headers) as answer:
            return bool(answer.status == 206)

    return bool(sync(fs.loop, ask))


def is_local(path: UPath) -> bool:
    """Whether `path` lies on a mounted file system."""
    return isinstance(path, Path)


def log_directory(text: str) -> Path:
    """Where a command that writes to a location keeps its log: there, or in a new local directory if that is remote."""
    path = location(text)
    return Path(path) if is_local(path) else Path(tempfile.mkdtemp(prefix="gpt2dist-"))


def _options(url: str) -> dict[str, Any]:
    if is_http(url):
        import aiohttp

        # aiohttp's own 300 s hold for a whole file; here, between two pieces that the server sends. Of a compressed
        # answer a server may take the ranges of what it has compressed.
        timeout = aiohttp.ClientTimeout(None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
        return {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": {"timeout": timeout}}
    if not url.startswith(("s3://", "s3a://")):
        return {}
    if not urlsplit(url).netloc:
        raise UserError(f"{url}: names no bucket: s3://BUCKET/…")
    from gpt2dist import s3  # only where it is used: its libraries are large

    return s3.options()


# ---------------------------------------------------------------------- errors


def _reason(error: BaseException) -> str:
    """Why a location cannot be used at all; empty where the error says something else."""
    from gpt2dist import s3

    return s3.reason(error)


@contextlib.contextmanager
def named(path: UPath) -> Iterator[None]:
    """Errors of an object store become a `StorageError` that names the path."""
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
        with named(path):
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
        with named(path):
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
    with named(path):
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


def _unless_missing(_: Any, __: str, error: tuple[type[BaseException], BaseException, Any]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]


@_operation
def remove_tree(path: UPath) -> None:
    """Delete a directory and all in it; nothing happens where there is none."""
    if is_local(path):
        shutil.rmtree(path, onerror=_unless_missing)  # onexc only from Python 3.12 on
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
    with named(path), path.open("rb") as f:
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
