"""Append-only logs of JSON lines, on local disk and object stores alike."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from upath import UPath

from gpt2dist.storage import StorageError, children, file_size, is_local, named, publish, read_bytes

SEGMENT_BYTES = 1 << 20
"""Of a log on an object store: a longer object is not written again, the next one begins."""

Keep = Callable[[dict[str, Any]], bool]
Parse = Callable[[bytes], dict[str, Any] | None]
Fields = Mapping[str, Callable[[Any], bool]]
"""Keys, and whether a value can be theirs."""
YEAR_10000 = 253_402_300_800
logger = logging.getLogger(__name__)


class JsonLines:
    """An append-only log, one JSON object a line.

    Floats are written as Python's repr, so equal bits print equal. A torn last line (the writer was
    killed) is not a record, nor is a line without the keys that every record of the log has, or with a value that
    cannot be theirs: `read` leaves it out and `cut` removes it.

    Objects cannot be appended to. There the log is x.jsonl, x.1.jsonl, x.2.jsonl, … in this order; a writer keeps
    the text of its own last one in memory and puts it whole. Two processes that append have different objects, and
    who appends after another begins a new one.
    """

    def __init__(
        self, path: UPath, flush_s: float = 0.0, keys: Fields | None = None, optional: Fields | None = None
    ) -> None:
        """`flush_s`: on an object store, records may wait this many seconds until they are written.

        keys: that every record has; optional: that some have.
        """
        self.path = path
        self._parse = functools.partial(_record, keys=keys or {}, optional=optional or {})
        self.flush_s = flush_s
        self._segment: UPath | None = None  # the object that this writer puts again and again
        self._text = ""
        self._put_length = 0  # of the text that the object has
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
                _append_text(self._local_end(), text)
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
        segment, text = self._segment, self._text
        if segment is None or self._others_follow(segment):
            segment, text = self._new_segment(), text[self._put_length :]
        publish(segment, text.encode())
        self._waiting, self._flushed = False, time.monotonic()
        self._segment, self._text, self._put_length = segment, text, len(text)
        if len(text) >= SEGMENT_BYTES:
            self._segment, self._text, self._put_length = None, "", 0

    def _others_follow(self, segment: UPath) -> bool:
        """Whether another process has begun a later object: what is appended now belongs after it."""
        return any(path.name != segment.name for path in self._parts()[-1:])

    def sync(self) -> None:
        """Force what was appended to the disk, or the object store."""
        self.flush()
        if is_local(self.path) and self._local_end().exists():
            with open(self._local_end(), "rb") as f:
                os.fsync(f.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All whole records; an empty list where there is no file."""
        return [record for part in self._records_by_part() for record in part]

    def in_time(self) -> list[dict[str, Any]]:
        """All whole records in the order of their `time`: see `in_time`."""
        return in_time(self._records_by_part())

    def _records_by_part(self) -> list[list[dict[str, Any]]]:
        if is_local(self.path):
            return [_records(path.read_bytes(), self._parse) for path in self._parts()]
        return [_records(data, self._parse) for _, data in self._contents()]

    def tail(self, max_bytes: int = 1 << 16, parts: int = 1) -> list[dict[str, Any]]:
        """The last whole records, as many as lie in `max_bytes`.

        parts: of a log in several objects, so much of each of so many last ones.
        """
        found: list[list[dict[str, Any]]] = []
        for path in reversed(self._parts()):
            with contextlib.suppress(OSError):  # it was cut between the look at its size and the read
                with named(path):
                    records = _last_records(path, max_bytes, self._parse)
                if records:
                    found.append(records)
            if len(found) == parts:
                break
        return [record for records in reversed(found) for record in records]

    def each(self) -> Iterator[dict[str, Any]]:
        """The same as `read`, without holding them all."""
        for path in self._parts():
            with path.open("rb") if is_local(path) else io.BytesIO(read_bytes(path)) as f:
                yield from (record for line in f if (record := self._parse(line)) is not None)

    def cut(self, keep: Keep) -> list[dict[str, Any]]:
        """Drop what comes after the last record for which `keep` holds; returns the dropped records.

        However long the log is, only its end is read. On an object store each object by itself is cut atomically,
        the last one first, and the log goes on in it.
        """
        dropped: list[dict[str, Any]] = []
        for i, path in enumerate(reversed(self._parts())):
            cut_part = _cut_file if is_local(path) else _cut_object
            found, gone, left = cut_part(path, keep, self._parse)
            dropped = gone + dropped
            if i == 0 and not is_local(path) and len(left) < SEGMENT_BYTES:
                self._segment, self._text, self._waiting, self._put_length = path, left, False, len(left)
            if found:
                break
        return dropped

    def _segments(self) -> list[tuple[int, UPath]]:
        """(number, object), in order."""
        pattern = rf"{re.escape(self.path.stem)}(?:\.(\d+))?{re.escape(self.path.suffix)}"
        found = ((re.fullmatch(pattern, path.name), path) for path in children(self.path.parent))
        return sorted((int(match[1] or 0), path) for match, path in found if match)

    def _parts(self) -> list[UPath]:
        """In order; on disk more than one where the log was copied from an object store."""
        return [path for _, path in self._segments()]

    def _local_end(self) -> UPath:
        if self._segment is None:
            self._segment = next(reversed(self._parts()), self.path)
        return self._segment

    def _contents(self) -> list[tuple[UPath, bytes]]:
        paths = self._parts()
        with ThreadPoolExecutor(16) as threads:
            return list(zip(paths, threads.map(read_bytes, paths), strict=True))

    def _new_segment(self) -> UPath:
        """An object of this writer's own, made empty."""
        number = max((number for number, _ in self._segments()), default=-1) + 1
        while True:
            name = f"{self.path.stem}.{number}{self.path.suffix}" if number else self.path.name
            path = self.path.with_name(name)
            with named(path), contextlib.suppress(FileExistsError):
                path.fs.pipe_file(path.path, b"", mode="create")
                return path
            number += 1


def in_time(parts: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Records in the order of their `time`; those of one part stay as they were written, also where a clock went back.

    parts: of a log on an object store, where each writer has its own.
    """
    timed: list[tuple[float, dict[str, Any]]] = []
    for part in parts:
        latest = -math.inf
        for record in part:
            latest = max(latest, record["time"])
            timed.append((latest, record))
    return [record for _, record in sorted(timed, key=lambda pair: pair[0])]


def whole(value: Any) -> bool:
    """A whole number."""
    return type(value) is int


def finite(value: Any) -> bool:
    """A number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def moment(value: Any) -> bool:
    """A Unix time that has a date."""
    return finite(value) and 0 <= value < YEAR_10000


def text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def ranges(value: Any) -> bool:
    """[first, end, first, end, …]"""
    return isinstance(value, list) and all(map(whole, value)) and len(value) % 2 == 0


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


def _cut_file(path: UPath, keep: Keep, parse: Parse) -> tuple[bool, list[dict[str, Any]], str]:
    """Whether there was a record to keep, the dropped ones, and nothing."""
    size, block = path.stat().st_size, 1 << 16
    with path.open("rb+") as f:
        while True:
            start = f.seek(max(0, size - block))
            start += len(f.readline()) if start else 0  # of a line that began before
            end, gone = _kept_end(f.read(), keep, parse)
            if end or not start:
                break
            block *= 8
        if start + end < size:
            f.truncate(start + end)
    return end > 0, gone, ""


def _cut_object(path: UPath, keep: Keep, parse: Parse) -> tuple[bool, list[dict[str, Any]], str]:
    """The same, and the text that is left."""
    data = read_bytes(path)
    end, gone = _kept_end(data, keep, parse)
    if end < len(data):
        publish(path, data[:end])
    return end > 0, gone, data[:end].decode()


def _kept_end(data: bytes, keep: Keep, parse: Parse) -> tuple[int, list[dict[str, Any]]]:
    """Where the last record ends for which `keep` holds (0: there is none), and the records after it."""
    lines = data.splitlines(keepends=True)
    end = len(data)
    gone: list[dict[str, Any]] = []
    for line in reversed(lines):
        record = parse(line)
        if record is not None and keep(record):
            return end, gone[::-1]
        gone += [record] if record is not None else []
        end -= len(line)
    return 0, gone[::-1]


def _records(data: bytes, parse: Parse) -> list[dict[str, Any]]:
    return [record for line in data.splitlines(keepends=True) if (record := parse(line)) is not None]


def _record(line: bytes, keys: Fields, optional: Fields) -> dict[str, Any] | None:
    """None for a torn line, or a foreign one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    for key, fits in keys.items():
        if key not in record or not fits(record[key]):
            return None
    for key, fits in optional.items():
        if key in record and not fits(record[key]):
            return None
    return record


def _last_records(path: UPath, max_bytes: int, parse: Parse) -> list[dict[str, Any]]:
    """Of more bytes where these hold no whole record: a rewind names a thousand documents."""
    while True:
        found, is_all = _records_at_end(path, max_bytes, parse)
        if found or is_all:
            return found
        max_bytes *= 8


def _records_at_end(path: UPath, max_bytes: int, parse: Parse) -> tuple[list[dict[str, Any]], bool]:
    if is_local(path):
        with path.open("rb") as f:
            end = f.seek(0, os.SEEK_END)
            f.seek(max(0, end - max_bytes))
            data = f.read()
    else:
        end = file_size(path)
        data = path.fs.cat_file(path.path, start=max(0, end - max_bytes), end=end) if end else b""
    lines = data.split(b"\n")[1 if end > max_bytes else 0 : -1]
    return [record for line in lines if (record := parse(line + b"\n")) is not None], end <= max_bytes
