"""Slices of safetensors files, local or remote, without reading the rest.

The format: 8 bytes, the little-endian length of the header; the header, JSON: tensor → dtype, shape, [begin, end)
in what follows; the numbers. Local files are read by the safetensors library, which cannot read remote ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from upath import UPath

from gpt2dist.config import Section
from gpt2dist.storage import is_local, read_ranges

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""
BATCH_BYTES = 256 << 20
"""Of remote slices that are held in memory at a time."""


class BadFile(Exception):
    """Not a file of 1-D fp32 tensors, or not the expected ones; the message says what is wrong."""


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + len(target)) of a tensor, to be copied into `target`: fp32, 1-D."""

    key: str
    length: int
    """Elements of the whole tensor."""
    start: int
    target: Tensor


def read_slices(path: UPath, size: int, slices: Iterable[Slice]) -> None:
    """Fill all targets from the file, which has `size` bytes.

    Raises:
        BadFile: not what the file should be.
        FileNotFoundError: there is no file.
    """
    if is_local(path):
        _read_local(path, slices)
    else:
        _read_remote(path, size, slices)


def _read_local(path: UPath, slices: Iterable[Slice]) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            for s in slices:
                s.target.copy_(file.get_slice(s.key)[s.start : s.start + s.target.numel()])
    except SafetensorError as e:
        raise BadFile(str(e)) from None


def _read_remote(path: UPath, size: int, slices: Iterable[Slice]) -> None:
    offsets = _offsets(path, size)
    batch: list[tuple[Slice, int]] = []
    held = 0
    for s in slices:
        if s.key not in offsets or offsets[s.key][1] - offsets[s.key][0] != 4 * s.length:
            raise BadFile(f"no tensor {s.key} of {s.length:,} elements")
        if held + 4 * s.target.numel() > BATCH_BYTES:
            _copy(path, batch)
            batch, held = [], 0
        batch.append((s, offsets[s.key][0] + 4 * s.start))
        held += 4 * s.target.numel()
    _copy(path, batch)


def _copy(path: UPath, batch: list[tuple[Slice, int]]) -> None:
    pieces = read_ranges(path, [(at, at + 4 * s.target.numel()) for s, at in batch])
    for (s, _), data in zip(batch, pieces, strict=True):
        if len(data) != 4 * s.target.numel():
            raise BadFile(f"{s.key}: the file ends too early")
        s.target.copy_(torch.frombuffer(bytearray(data), dtype=torch.float32))


class _Tensor(Section):
    """An entry of the header."""

    dtype: str = Field(pattern="^F32$")
    shape: tuple[int] = Field(strict=False)
    data_offsets: tuple[int, int] = Field(strict=False)


_HEADER = TypeAdapter(dict[str, _Tensor])


def _offsets(path: UPath, size: int) -> dict[str, tuple[int, int]]:
    """Tensor → [begin, end) in the file. The tensors must fill the file one after the other."""
    (data,) = read_ranges(path, [(0, min(8, size))])
    length = int.from_bytes(data, "little")
    if len(data) != 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise BadFile("not a safetensors file: its header has an impossible length")
    (text,) = read_ranges(path, [(8, 8 + length)])
    try:
        header: Any = json.loads(text)
        if isinstance(header, dict):
            header.pop("__metadata__", None)
        tensors = _HEADER.validate_python(header)
    except (ValueError, RecursionError) as e:
        what = e.errors(include_url=False)[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise BadFile(f"not a safetensors file of 1-D fp32 tensors: {what}") from None
    first = end = 8 + length
    offsets = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        low, high = (first + offset for offset in tensor.data_offsets)
        if low != end or high - low != 4 * tensor.shape[0] or tensor.shape[0] < 0:
            raise BadFile(f"not a safetensors file: {name} lies where it cannot")
        offsets[name] = (low, high)
        end = high
    if end != size:
        raise BadFile(f"not a safetensors file: {size:,} bytes, its header says {end:,}")
    return offsets
