"""Files of fp32 slices, in the safetensors format, local or remote: only what is needed is read, and all of it checked.

The format: 8 bytes, the little-endian length of the header; the header, JSON: tensor → dtype, shape, [begin, end)
in what follows; the numbers. What is in a file is known before it is opened (from a checkpoint's index), so the header
is made here, not parsed. A file is hashed in pieces, so that a part of it can be trusted without reading the rest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from upath import UPath

from gpt2dist.storage import read_range

READ_BYTES = 8 << 20
"""Read at a time, by each thread."""
Read = Callable[[], None]
"""One of several that may go on at the same time."""


class BadFile(Exception):
    """Not the file that it should be; the message says what is wrong."""


def header(tensors: Mapping[str, int]) -> bytes:
    """Everything before the numbers; tensors: name → elements, in the order of the file."""
    entries, end = {}, 0
    for name, length in tensors.items():
        entries[name] = {"dtype": "F32", "shape": [length], "data_offsets": [end, end + 4 * length]}
        end += 4 * length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class FragmentFile:
    """A file, and what should be in it."""

    path: UPath
    tensors: Mapping[str, int]
    """Name → elements, in the order of the file."""
    sha256: list[str]
    """Of each piece."""
    piece_bytes: int
    """Size of a piece; the last one may be shorter."""

    @cached_property
    def header(self) -> bytes:
        """Everything before the numbers."""
        return header(self.tensors)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Tensor → where its numbers begin."""
        ends = itertools.accumulate((4 * n for n in self.tensors.values()), initial=len(self.header))
        return dict(zip(self.tensors, ends, strict=False))

    @property
    def bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + 4 * sum(self.tensors.values())

    @property
    def pieces(self) -> int:
        """How many pieces it has."""
        return -(-self.bytes // self.piece_bytes)


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + len(target)) of a tensor, to be copied into `target`: fp32, 1-D, contiguous."""

    name: str
    start: int
    target: Tensor


class PieceHashes:
    """sha256 of each piece of a stream of bytes."""

    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._ended: list[str] = []
        self._current, self._size = hashlib.sha256(), 0

    def update(self, data: memoryview) -> None:
        """The next bytes of the stream."""
        while len(data):
            part = data[: self.piece_bytes - self._size]
            self._current.update(part)
            self._size += len(part)
            data = data[len(part) :]
            if self._size == self.piece_bytes:
                self._ended.append(self._current.hexdigest())
                self._current, self._size = hashlib.sha256(), 0

    def hex(self) -> list[str]:
        """The hashes, that of the piece which is not full included."""
        return [*self._ended, self._current.hexdigest()] if self._size else list(self._ended)


def reads(file: FragmentFile, slices: Iterable[Slice]) -> Iterator[Read]:
    """What to do to fill all targets: read the pieces that hold them, and check each before it is used.

    Each raises:
        BadFile: not what the file should be.
        FileNotFoundError: there is no file.
    """
    wanted = []
    for s in slices:
        begin = file.offsets[s.name] + 4 * s.start
        wanted.append((begin, begin + 4 * len(s.target), s.target.view(torch.uint8)))
    needed = {p for begin, end, _ in wanted for p in _pieces(file, begin, end)}
    return _reads(file, sorted(needed.union(_pieces(file, 0, len(file.header)))), wanted)


def checks(file: FragmentFile) -> Iterator[Read]:
    """What to do to check the whole file; see `reads`."""
    return _reads(file, range(file.pieces), [])


_Wanted = tuple[int, int, Tensor]
"""Bytes [begin, end) of the file, and where they go."""


def _pieces(file: FragmentFile, begin: int, end: int) -> range:
    return range(begin // file.piece_bytes, -(-end // file.piece_bytes))


def _reads(file: FragmentFile, pieces: Iterable[int], wanted: list[_Wanted]) -> Iterator[Read]:
    runs = list(_runs(pieces, max(1, READ_BYTES // file.piece_bytes)))
    starts = [run.start * file.piece_bytes for run in runs]
    parts: dict[int, list[_Wanted]] = defaultdict(list)
    for item in wanted:
        for i in range(bisect_right(starts, item[0]) - 1, len(runs)):
            if starts[i] >= item[1]:
                break
            parts[i].append(item)
    return (partial(_read, file, run, parts[i]) for i, run in enumerate(runs))


def _runs(pieces: Iterable[int], most: int) -> Iterator[range]:
    """Consecutive numbers together, at most `most`; `pieces` is sorted."""
    run = range(0)
    for piece in pieces:
        if len(run) and piece == run.stop and len(run) < most:
            run = range(run.start, piece + 1)
        else:
            if len(run):
                yield run
            run = range(piece, piece + 1)
    if len(run):
        yield run


def _read(file: FragmentFile, run: range, wanted: list[_Wanted]) -> None:
    first = run.start * file.piece_bytes
    end = min(run.stop * file.piece_bytes, file.bytes)
    data = read_range(file.path, first, end)
    if len(data) != end - first:
        raise BadFile(f"ends at byte {first + len(data):,} of {file.bytes:,}")
    hashes = PieceHashes(file.piece_bytes)
    hashes.update(memoryview(data))
    for piece, found in zip(run, hashes.hex(), strict=True):
        if found != file.sha256[piece]:
            low, high = piece * file.piece_bytes, min((piece + 1) * file.piece_bytes, file.bytes)
            raise BadFile(f"content differs from its sha256 (bytes {low:,} to {high:,})")
    expected = file.header[first:end]
    if data[: len(expected)] != expected:
        raise BadFile("its header is not that of the numbers which should be in it")
    numbers = torch.frombuffer(data, dtype=torch.uint8)
    for begin, stop, target in wanted:
        low, high = max(begin, first), min(stop, end)
        target[low - begin : high - begin].copy_(numbers[low - first : high - first])
