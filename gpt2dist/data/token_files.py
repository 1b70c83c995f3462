"""Token files of other projects: nanoGPT's (uint16 ids) and llm.c's (a header of 256 int32, then uint16 ids)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpt2dist.data.tokenizer import EOT

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
"""Of llm.c."""
Tokens = npt.NDArray[np.uint16]


class Joined:
    """Bytes that were read already, then the rest of a stream that cannot seek."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self.head, self.rest = head, rest

    def read(self, n: int) -> bytes:
        """Up to `n` bytes."""
        head, self.head = self.head, b""
        return head + self.rest.read(n - len(head))


def header_of(head: bytes, size: int) -> tuple[int, str]:
    """(bytes of the header, what is wrong with the file)."""
    fields = np.frombuffer(head[:12].ljust(12, b"\0"), dtype="<i4")
    if fields[0] == MAGIC:
        if fields[1] != VERSION:
            return 0, f"llm.c version {fields[1]}; known: {VERSION}"
        if size != HEADER_BYTES + 2 * int(fields[2]):
            return 0, f"{size:,} bytes, but its header says {int(fields[2]):,} tokens"
        return HEADER_BYTES, ""
    if size % 2 or len(head) < 2:
        return 0, f"{size if head else 0:,} bytes: not a file of uint16 tokens"
    return 0, ""


def token_blocks(f: Any) -> Iterator[Tokens]:
    """The rest of a file as arrays of ids: uint16 [any length]."""
    rest = b""
    while data := f.read(1 << 22):
        data = rest + data
        even = len(data) & ~1
        rest = data[even:]
        yield np.frombuffer(data[:even], dtype="<u2")


def token_documents(blocks: Iterator[Tokens], at: int, limit_bytes: int) -> Iterator[tuple[int, Tokens | None]]:
    """(position of its first token, tokens) of what stands between <|endoftext|>s; None: over `limit_bytes`.

    The last one is left out where the file ends with <|endoftext|>.
    """
    held: list[Tokens] = []
    length = 0
    for block in blocks:
        begin = 0
        for end in [*np.flatnonzero(block == EOT).tolist(), None]:
            part = block[begin:end]
            length += len(part)
            if 2 * length <= limit_bytes:
                held.append(part)
            if end is not None:
                yield at, np.concatenate(held) if 2 * length <= limit_bytes else None
                at += length + 1
                held, length, begin = [], 0, end + 1
    if length:
        yield at, np.concatenate(held) if 2 * length <= limit_bytes else None
