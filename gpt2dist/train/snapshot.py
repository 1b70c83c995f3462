"""One rank's part of a checkpoint: copied to host memory at once, written when there is time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from upath import UPath

from gpt2dist.storage import remove, writing
from gpt2dist.train.fragment import Fragment
from gpt2dist.train.fragment_file import PieceHashes, header
from gpt2dist.train.index import SavedFile, SavedFragment

PIECE_BYTES = 256 << 10
"""Of a file that are hashed together. Smaller, the index grows; larger, a rank reads more around what it needs."""
WRITE_BYTES = 8 << 20
"""Written at a time."""


class Snapshot:
    """One rank's fragments as they were at one moment, laid out as the data of the file that they become."""

    def __init__(self, rank: int, attempt: int) -> None:
        # An earlier attempt that is not quite dead may still be writing: never to the same file.
        again = f".{attempt}" if attempt > 1 else ""
        self.file = f"rank-{rank:05d}{again}.safetensors"
        self.table: list[SavedFragment] = []
        self._header = b""
        self._data = torch.empty(0)
        self._left: UPath | None = None  # written, but not known to be part of a checkpoint
        self.written = 0
        """Bytes written since it was made."""

    @property
    def bytes(self) -> int:
        """Of the file."""
        return len(self._header) + 4 * len(self._data)

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copy the fragments to host memory; always the same ones, so that this is allocated once."""
        source = list(fragments)
        if not self.table:
            self._lay_out(source)
        end = 0
        for f, saved in zip(source, self.table, strict=True):
            self._data[end : end + saved.length].copy_(f.tensor.detach(), non_blocking=True)
            end += saved.length
        if source and source[0].tensor.is_cuda:
            torch.cuda.synchronize(source[0].tensor.device)  # of this thread the current one is always the first

    def write(self, directory: UPath) -> SavedFile:
        """Write the file, in pieces; returns its size and hashes."""
        self.discard()
        hashes = PieceHashes(PIECE_BYTES)
        data: Any = self._data.view(torch.uint8).numpy()
        parts = [memoryview(self._header)]
        parts += [memoryview(data[i : i + WRITE_BYTES]) for i in range(0, len(data), WRITE_BYTES)]
        with writing(directory / self.file) as f:
            for part in parts:
                hashes.update(part)
                f.write(part)
                self.written += len(part)
        self._left = directory / self.file
        return SavedFile(file=self.file, bytes=self.bytes, piece_bytes=PIECE_BYTES, sha256=hashes.hex())

    def discard(self) -> None:
        """Delete the file that was written last, unless `kept` was called since: it would only take room."""
        if self._left is not None:
            remove(self._left)
            self._left = None

    def kept(self) -> None:
        """What was written last is part of a checkpoint."""
        self._left = None

    def _lay_out(self, fragments: list[Fragment]) -> None:
        for f in fragments:
            length = f.tensor.numel()
            table = {"parameter": f.parameter, "kind": f.kind, "start": f.start, "length": length, "file": self.file}
            self.table.append(SavedFragment.model_validate(table))
        self._header = header({f.key: f.length for f in self.table})
        # Zeros: touched now, not in the first save.
        self._data = torch.zeros(sum(f.length for f in self.table))
        if fragments and fragments[0].tensor.is_cuda and len(self._data):
            # As it is: torch's pin_memory takes the next power of two. Where it fails, copies are slower.
            torch.cuda.cudart().cudaHostRegister(self._data.data_ptr(), 4 * len(self._data), 0)  # type: ignore[no-untyped-call]
