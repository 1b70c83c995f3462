"""The content of .gz and .zst files, up to where they are damaged."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa

READ_BYTES = 1 << 16
FETCHED_BYTES = 1 << 17
"""More than pyarrow takes from the file at a time."""


class WindowTooLarge(OSError):
    """A .zst file that takes more memory than pyarrow allows; it may well be whole."""

    def __init__(self) -> None:
        super().__init__("its zstd window is over 128 MiB; compress it again without --long or --ultra")


class Decompressed(io.RawIOBase):
    """A compressed file's content; all that comes before damage is delivered, then the error is raised.

    pyarrow raises it without what it had decompressed in the same call. So the file is decompressed once more, and
    near the damage byte by byte.
    """

    def __init__(self, open_file: Callable[[], Any], codec: str) -> None:
        """open_file: opens it at its beginning; codec: `gzip` or `zstd`."""
        self._open_file, self._codec = open_file, codec
        self._delivered = 0
        self._left = b""  # before the damage, not yet delivered
        self._error: OSError | None = None
        self._open()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer; 0 at the end.

        Raises:
            WindowTooLarge: of .zst.
            OSError: it cannot be read; where `is_damage`, nothing can follow.
        """
        into = memoryview(buffer).cast("B")[:READ_BYTES]
        if self._error is None:
            try:
                count = int(self._stream.readinto(into))
            except OSError as e:
                if not is_damage(e):
                    raise
                if "requires too much memory" in str(e):
                    raise WindowTooLarge from None
                self._left, self._error = self._before_damage(), e
            else:
                self._delivered += count
                return count
        if not self._left:
            raise self._error
        count = min(len(into), len(self._left))
        into[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        """Close the file too."""
        if not self.closed:
            self._stream.close()
        super().close()

    def _open(self, slow_from: int | None = None) -> None:
        self._file = _File(self._open_file(), slow_from)
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._file, "r"), self._codec)

    def _before_damage(self) -> bytes:
        at = self._file.position
        self._stream.close()
        self._open(slow_from=max(0, at - FETCHED_BYTES))
        left = bytearray()
        try:
            for first in range(0, self._delivered, READ_BYTES):
                self._stream.read(min(READ_BYTES, self._delivered - first))
            while byte := self._stream.read(1):
                left += byte
        except OSError as e:
            if not is_damage(e):
                raise
        return bytes(left)


class _File:
    """What pyarrow needs of a file; from `slow_from` on it gets a byte at a time."""

    closed = False

    def __init__(self, file: Any, slow_from: int | None) -> None:
        self._file, self._slow_from, self.position = file, slow_from, 0

    def read(self, count: int) -> bytes:
        if self._slow_from is not None:
            count = min(count, max(1, self._slow_from - self.position))
        data: bytes = self._file.read(count)
        self.position += len(data)
        return data

    def close(self) -> None:
        self._file.close()


def is_damage(error: OSError) -> bool:
    """Whether pyarrow says so of the content; an error of the system has a number or a class of its own."""
    return type(error) is OSError and error.errno is None
