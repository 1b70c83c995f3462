"""Token shards and their manifest: what a prepared data set looks like on storage.

    <data set>/
        train-00000.npy …   1-D uint16 token ids, documents each ended by <|endoftext|>
        val-00000.npy …
        manifest.json       splits, shards with token counts and sha256; written last

A split is the concatenation of its shards. Sample i is its tokens [i·T, (i+1)·T], T+1 ids.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError
from upath import UPath

from gpt2dist import storage
from gpt2dist.config import Section, UserError
from gpt2dist.data import cache
from gpt2dist.data.tokenizer import N_VOCAB
from gpt2dist.storage import publish

Split = Literal["train", "val"]
MANIFEST = "manifest.json"
TOKEN_DTYPE = np.dtype("<u2")


def npy_header(tokens: int) -> bytes:
    """How a shard file begins; numpy pads it to one length, whatever the number."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    return buffer.getvalue()


HEADER_BYTES = len(npy_header(0))
MAX_MAPS = 32
"""Remote shards that a process maps at a time."""
MAX_COUNT = 1 << 53
"""Of tokens or documents; their sums stay below the limits of int64."""


class Shard(Section):
    """One token file."""

    file: str
    """Name inside the data set's directory."""
    tokens: int = Field(ge=1, le=MAX_COUNT)
    """Token ids in the file, <|endoftext|> included."""
    documents: int = Field(ge=0, le=MAX_COUNT)
    """Documents that end in the file."""
    bytes: int = Field(ge=1, le=3 * MAX_COUNT)
    """Size of the file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the file."""


class Tally(Section):
    """Documents and their tokens, <|endoftext|> included; a bad record has no tokens."""

    documents: int = Field(default=0, ge=0, le=MAX_COUNT)
    tokens: int = Field(default=0, ge=0, le=MAX_COUNT)

    def plus(self, documents: int, tokens: int) -> Tally:
        """The sum."""
        return Tally(documents=self.documents + documents, tokens=self.tokens + tokens)


class Source(Section):
    """What became of the documents of one source."""

    name: str
    read: Tally
    kept: Tally
    dropped: dict[str, Tally]
    """By reason."""


class Manifest(Section):
    """The description of a data set; the hash of its text is the data set's fingerprint."""

    format: Literal["gpt2dist-tokens"] = "gpt2dist-tokens"
    version: Literal[1] = 1
    tokenizer: Literal["gpt2"] = "gpt2"
    request: dict[str, Any]
    """What was asked for: sources with their files, and the settings that shape the output."""
    documents: dict[str, int]
    """Documents read, kept and skipped: left out for any reason."""
    sources: list[Source] = Field(default=[])
    """The same by source and reason, in the order of `prepare.sources`."""
    splits: dict[Split, list[Shard]]
    """The shards of each split, in order."""

    def to_bytes(self) -> bytes:
        """The text of manifest.json."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()

    @property
    def fingerprint(self) -> str:
        """Hash that names the data set's exact content."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def tokens(self, split: Split) -> int:
        """Tokens of a split."""
        return sum(shard.tokens for shard in self.splits.get(split, []))


def write_manifest(directory: UPath, manifest: Manifest) -> None:
    """Publish the manifest: from now on the data set exists."""
    publish(directory / MANIFEST, manifest.to_bytes())


def read_manifest(location: str) -> Manifest:
    """The manifest of the data set at `location`. Raises `UserError` where there is none, or not a valid one."""
    path = storage.location(location) / MANIFEST
    try:
        text = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(
            f"{location}: not a prepared data set (no {MANIFEST}); gpt2dist prepare RUN.toml makes one"
        ) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as e:
        problem = e.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"]).encode("unicode_escape").decode()
        raise UserError(f"{path}: not a valid manifest: {key}: {problem['msg']}") from None
    if reason := _inconsistency(manifest):
        raise UserError(f"{path}: not a valid manifest: {reason}")
    return manifest


def _inconsistency(manifest: Manifest) -> str:
    """What cannot be true of a manifest, or an empty string."""
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    seen: set[str] = set()
    for shard in shards:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", shard.file):
            return f"shard file {shard.file!r} is not a plain file name"
        if shard.file in seen:
            return f"shard file {shard.file!r} stands twice"
        seen.add(shard.file)
        if shard.bytes != HEADER_BYTES + 2 * shard.tokens:
            return f"{shard.file}: {shard.tokens:,} tokens do not make {shard.bytes:,} bytes"
    if not manifest.sources:
        return _wrong_counts(manifest, sum(shard.documents for shard in shards))
    for source in manifest.sources:
        if source.read != _sum([source.kept, *source.dropped.values()]):
            return f"sources: {source.name!r}: read is not kept + dropped"
    kept = _sum([source.kept for source in manifest.sources])
    if kept != _sum([Tally(documents=shard.documents, tokens=shard.tokens) for shard in shards]):
        return "the shards do not hold the documents and tokens that the sources say"
    read = sum(source.read.documents for source in manifest.sources)
    if manifest.documents != {"read": read, "kept": kept.documents, "skipped": read - kept.documents}:
        return "documents: not the sums over the sources"
    return ""


def _wrong_counts(manifest: Manifest, kept: int) -> str:
    """The same of `documents` in a manifest without sources, which may also be without these counts."""
    counts = manifest.documents
    if counts and (counts.keys() != {"read", "kept", "skipped"} or min(counts.values()) < 0):
        return "documents: not the counts read, kept and skipped"
    if counts and not counts["read"] - counts["skipped"] == counts["kept"] == kept:
        return "documents: kept is not read - skipped, or not what the shards hold"
    return ""


def _sum(tallies: list[Tally]) -> Tally:
    documents, tokens = (sum(getattr(tally, what) for tally in tallies) for what in ("documents", "tokens"))
    return Tally.model_construct(documents=documents, tokens=tokens)


class TokenSplit:
    """Random access to one split of a data set."""

    def __init__(self, location: str, manifest: Manifest, split: Split, cache_gb: float = 20.0) -> None:
        """`cache_gb`: of the copies that this node keeps of remote shards."""
        self.location = location
        self.directory = storage.location(location)
        self.cache_bytes = int(cache_gb * 1e9)
        self.split = split
        self.shards = manifest.splits.get(split, [])
        self.starts = np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)
        """Token offset of each shard in the split, and the total at the end: int64 [shards + 1]."""
        self._open: dict[int, npt.NDArray[np.uint16]] = {}

    @property
    def tokens(self) -> int:
        """Tokens of the split."""
        return int(self.starts[-1])

    def num_samples(self, seq_len: int) -> int:
        """Samples of `seq_len` + 1 ids, neighbours sharing one id."""
        return max(0, (self.tokens - 1) // seq_len)

    def samples(self, ids: npt.NDArray[np.int64], seq_len: int) -> npt.NDArray[np.uint16]:
        """Token ids of samples `ids`: uint16 [len(ids), seq_len + 1].

        Raises:
            UserError: a shard is damaged, or made with another vocabulary.
        """
        out = np.empty((len(ids), seq_len + 1), dtype=np.uint16)
        for row, i in zip(out, ids, strict=True):
            self._read_into(row, int(i) * seq_len)
        if out.size and out.max() >= N_VOCAB:
            row, column = np.argwhere(out >= N_VOCAB)[0]
            at = int(ids[row]) * seq_len + int(column)
            index = int(np.searchsorted(self.starts, at, side="right")) - 1
            path, number = self.directory / self.shards[index].file, at - int(self.starts[index])
            raise UserError(f"{path}: id {out[row, column]} at token {number:,}: GPT-2's go up to {N_VOCAB - 1}")
        return out

    def check_sizes(self) -> None:
        """Raises `UserError` that names a shard which is missing or not as long as the manifest says."""
        try:
            sizes = storage.file_sizes(self.directory)
        except FileNotFoundError:
            sizes = {}
        for shard in self.shards:
            path = self.directory / shard.file
            size = sizes.get(shard.file)
            if size is None:
                raise UserError(f"{path}: shard is missing")
            if size != shard.bytes:
                raise UserError(f"{path}: shard has {size:,} bytes, the manifest says {shard.bytes:,}")

    def _read_into(self, row: npt.NDArray[np.uint16], start: int) -> None:
        index = int(np.searchsorted(self.starts, start, side="right")) - 1
        filled = 0
        while filled < len(row):  # a sample may run across shards
            offset = start + filled - int(self.starts[index])
            piece = self.shard(index)[offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1

    def shard(self, index: int) -> npt.NDArray[np.uint16]:
        """The tokens of one shard: uint16 [its tokens], mapped."""
        if index not in self._open:
            path = self.directory / self.shards[index].file
            if storage.is_local(path):
                array = self._mapped(path, path)
            else:
                while len(self._open) >= MAX_MAPS:  # a mapped copy keeps its room on the disk
                    del self._open[next(iter(self._open))]
                shard = self.shards[index]
                with cache.local_copy(path, shard.sha256, shard.bytes, self.cache_bytes) as copy:
                    array = self._mapped(copy, path)
            if array.dtype != TOKEN_DTYPE or array.shape != (self.shards[index].tokens,):
                raise UserError(f"{path}: holds {array.dtype} {array.shape}, the manifest says otherwise")
            self._open[index] = array
        return self._open[index]

    def _mapped(self, file: os.PathLike[str], path: UPath) -> npt.NDArray[np.uint16]:
        """The array in a local file; path: the shard."""
        try:
            array: npt.NDArray[np.uint16] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError):
            hint = f"see: gpt2dist data verify {self.location}"
            raise UserError(f"{path}: damaged: it does not begin as a shard does; {hint}") from None
        return array
