"""One task of the preparation: a chunk of the sources → its token shards and what the later steps need. No Ray here.

In the output directory, for chunk 12:
    train-00012.npy, val-00012.npy    the shards, with the duplicates that were not known yet
    parts/00012.documents             a record a document (`DOCUMENT`), sorted by the hash of its text
    parts/00012.minhash               uint32 [documents, PERMUTATIONS], in their order; only with dedup = "near"
    parts/00012.bad.jsonl             the bad records, if any
    parts/00012.json                  the counts (`Part`); written last: with it the chunk is done
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import tiktoken
from pydantic import ValidationError
from upath import UPath

from gpt2dist.config import PrepareSection, Section
from gpt2dist.data import near, sources, tokenizer
from gpt2dist.data.encode import CannotEncode, encode
from gpt2dist.data.readers import RAW_BYTES, BadRecord, Document, Reader
from gpt2dist.data.shards import HEADER_BYTES, TOKEN_DTYPE, Shard, Split, Tally, npy_header
from gpt2dist.data.sources import Piece
from gpt2dist.data.token_files import Tokens
from gpt2dist.storage import (
    file_size,
    location,
    publish,
    publish_file,
    read_bytes,
    reading,
    remove,
    sha256_of,
    stage,
    writing,
)

PARTS = "parts"
DOCUMENT = np.dtype(
    [("hash", ">u8"), ("hash2", ">u8"), ("index", "<u4"), ("tokens", "<u4"), ("source", "<u2"), ("val", "u1")]
)
"""First 16 bytes of the sha256 of the text, number in the chunk, tokens with <|endoftext|>, source, split."""
_AFTER_HASH = struct.Struct("<IIHB")


class Part(Section):
    """The outcome of a chunk."""

    index: int
    shards: dict[Split, list[Shard]]
    tallies: dict[int, dict[str, Tally]]
    """Source → `kept` or the reason for leaving out → how many."""
    lines: list[int]
    """Lines that start in each piece; the numbers of the lines in later pieces of the file follow from them."""
    prefixes: list[int]
    """Documents by the first byte of their hash."""
    bad: int
    """Bad records in the part's file of them."""
    on_bad_record: str
    """What they were to do."""
    deduplicated: bool = False
    """The duplicates were taken out of the shards; the other files and counts are as before."""


class BadRecordFound(Exception):
    """With on_bad_record = "fail"."""

    def __init__(self, piece: int, record: BadRecord) -> None:
        super().__init__(record.reason)
        self.piece = piece
        self.record = record


def tokenize_chunk(index: int, pieces: list[Piece], p: PrepareSection) -> Part:
    """Tokenize a chunk's documents one by one, and write all its files.

    Raises:
        BadRecordFound: the first bad record, unless they are to be skipped.
        CannotRead: a source.
        OSError: the output cannot be written.
    """
    out = location(p.output)
    encoding = tokenizer.load(p.vocab_dir)
    tallies: dict[int, dict[str, Tally]] = {}
    rows = bytearray()  # the records: chunks of short documents have millions
    signatures: list[npt.NDArray[np.uint32]] = []
    bad_file: BinaryIO | None = None
    bad = 0
    lines: list[int] = []
    writers: dict[Split, _SplitWriter] = {s: _SplitWriter(out, s, index, p.shard_mb) for s in ("train", "val")}

    def count(source: int, what: str, tokens: int) -> None:
        by_reason = tallies.setdefault(source, {})
        by_reason[what] = by_reason.get(what, Tally()).plus(1, tokens)

    parts = out / PARTS
    with contextlib.ExitStack() as ends:
        for writer in writers.values():
            ends.callback(writer.abandon)
        for number, piece in enumerate(pieces):
            # The standard library is not the user's to mend: what is bad there is counted and left out.
            skip = p.on_bad_record == "skip" or p.sources[piece.source] == sources.STDLIB
            reader = Reader(piece, p.text_field)
            for record in reader:
                result = _encode(record, encoding)
                if isinstance(result, BadRecord):
                    if not skip:
                        raise BadRecordFound(number, result)
                    count(piece.source, result.reason, 0)
                    bad += 1
                    bad_file = bad_file or ends.enter_context(writing(parts / f"{index:05d}.bad.jsonl"))
                    bad_file.write(_bad_line(number, result))
                    continue
                text, ids = result
                tokens = sum(map(len, ids)) + 1
                if len(text) < p.min_chars or (p.max_chars and len(text) > p.max_chars):
                    count(piece.source, "too short" if len(text) < p.min_chars else "too long", tokens)
                    continue
                digest = _sha256(text)
                val = _is_val(digest, p.val_fraction)
                writers["val" if val else "train"].write(ids)
                rows += digest[:16] + _AFTER_HASH.pack(len(rows) // DOCUMENT.itemsize, tokens, piece.source, val)
                count(piece.source, "kept", tokens)
                if p.dedup == "near":
                    signatures.append(near.signature(text))
            lines.append(reader.lines)
        shards = {split: writer.close() for split, writer in writers.items()}
    documents = np.frombuffer(rows, dtype=DOCUMENT)
    documents = documents[np.lexsort((documents["index"], documents["hash2"], documents["hash"]))]
    publish(parts / f"{index:05d}.documents", documents.tobytes())
    if signatures:
        publish(parts / f"{index:05d}.minhash", np.stack(signatures).tobytes())
    prefixes = np.bincount((documents["hash"] >> np.uint64(56)).astype(np.int64), minlength=256).tolist()
    part = Part(
        index=index,
        shards=shards,
        tallies=tallies,
        lines=lines,
        prefixes=prefixes,
        bad=bad,
        on_bad_record=p.on_bad_record,
    )
    publish(parts / f"{index:05d}.json", part.model_dump_json().encode())
    return part


def read_part(output: str, index: int) -> Part | None:
    """The last outcome of a chunk's tasks, where its shards are there in their size."""
    out = location(output)
    try:
        part = Part.model_validate_json(read_bytes(out / PARTS / f"{index:05d}.json"))
        for shard in (shard for shards in part.shards.values() for shard in shards):
            if file_size(out / shard.file) != shard.bytes:
                return None
    except (FileNotFoundError, ValidationError):
        return None
    return part


def read_documents(output: str, index: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """Records [start, stop) of a chunk's documents, in order of their hash: `DOCUMENT` [stop - start]."""
    with reading(location(output) / PARTS / f"{index:05d}.documents") as f:
        f.seek(start * DOCUMENT.itemsize)
        return np.frombuffer(f.read(-1 if stop is None else (stop - start) * DOCUMENT.itemsize), dtype=DOCUMENT)


def drop_documents(part: Part, drop: npt.NDArray[np.bool_], p: PrepareSection) -> Part:
    """Take documents out of a chunk's shards: `drop` is bool [documents of the chunk]."""
    documents = read_documents(p.output, part.index)
    documents = documents[np.argsort(documents["index"])]
    shards: dict[Split, list[Shard]] = {"train": [], "val": []}
    for split, old in part.shards.items():
        mine = documents["val"] == (split == "val")
        keep, tokens, at = ~drop[mine], documents["tokens"][mine].astype(np.int64), 0
        for shard in old:
            here = slice(at, at + shard.documents)
            at += shard.documents
            if new := _shrink(location(p.output) / shard.file, shard, keep[here], tokens[here]):
                shards[split].append(new)
    part = part.model_copy(update={"shards": shards, "deduplicated": True})
    publish(location(p.output) / PARTS / f"{part.index:05d}.json", part.model_dump_json().encode())
    return part


def _shrink(path: UPath, shard: Shard, keep: npt.NDArray[np.bool_], tokens: npt.NDArray[np.int64]) -> Shard | None:
    if keep.all():
        return shard
    left = int(tokens[keep].sum())
    if not left:
        remove(path)
        return None
    ids = np.frombuffer(read_bytes(path), dtype=TOKEN_DTYPE, offset=HEADER_BYTES)
    data = npy_header(left) + ids[np.repeat(keep, tokens)].tobytes()
    publish(path, data)
    sha = hashlib.sha256(data).hexdigest()
    return Shard(file=path.name, tokens=left, documents=int(keep.sum()), bytes=len(data), sha256=sha)


def _encode(record: Document | BadRecord, encoding: tiktoken.Encoding) -> BadRecord | tuple[str, list[Tokens]]:
    """(text, token ids in parts); the text also of token documents: filters, hashes and splits are the same for all."""
    if isinstance(record, BadRecord):
        return record
    if record.tokens is not None:
        data = encoding.decode_bytes(record.tokens.tolist())
        return data.decode("utf-8", "backslashreplace"), [record.tokens]
    try:
        return record.text, encode(encoding, record.text)
    except CannotEncode as e:
        return BadRecord(record.line, "cannot be tokenized", str(e), record.text[:RAW_BYTES].encode())


def _sha256(text: str) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, len(text), 1 << 20):  # no second copy of a huge text
        digest.update(text[start : start + (1 << 20)].encode())
    return digest.digest()


def _is_val(digest: bytes, val_fraction: float) -> bool:
    """By the document's own hash: adding files never moves a document between the splits."""
    return int.from_bytes(digest[:8], "big") / 2**64 < val_fraction


def _bad_line(piece: int, record: BadRecord) -> bytes:
    raw = record.raw.decode("utf-8", "backslashreplace")
    line = {"piece": piece, "line": record.line, "reason": record.reason, "detail": record.detail, "raw": raw}
    return (json.dumps(line) + "\n").encode()


class _SplitWriter:
    """Appends documents to a chunk's shards of one split; a shard ends with the document that fills it."""

    def __init__(self, out: UPath, split: Split, index: int, shard_mb: float) -> None:
        self.out, self.name, self.limit = out, f"{split}-{index:05d}", int(shard_mb * 1e6)
        self.shards: list[Shard] = []
        self.file: BinaryIO | None = None

    def write(self, ids: list[Tokens]) -> None:
        if self.file is None:
            number = f".{len(self.shards)}" if self.shards else ""
            self.path = self.out / f"{self.name}{number}.npy"
            self.temporary = stage(self.path)
            self.file = open(self.temporary, "wb")
            self.file.write(npy_header(0))
            self.tokens = self.documents = 0
        for part in (*ids, _END):
            self.file.write(part.astype(TOKEN_DTYPE, copy=False).tobytes())
            self.tokens += len(part)
        self.documents += 1
        if 2 * self.tokens >= self.limit:
            self._finish_shard()

    def close(self) -> list[Shard]:
        if self.file:
            self._finish_shard()
        return self.shards

    def abandon(self) -> None:
        """Remove an unfinished shard."""
        if self.file:
            with contextlib.suppress(OSError):  # the disk is full
                self.file.close()
            self.temporary.unlink(missing_ok=True)

    def _finish_shard(self) -> None:
        assert self.file
        self.file.seek(0)
        self.file.write(npy_header(self.tokens))  # as long as the one for 0 tokens
        self.file.close()
        sha = sha256_of(UPath(self.temporary))
        size = self.temporary.stat().st_size
        publish_file(self.temporary, self.path)
        self.file = None
        shard = Shard(file=self.path.name, tokens=self.tokens, documents=self.documents, bytes=size, sha256=sha)
        self.shards.append(shard)


_END = np.array([tokenizer.EOT], dtype=TOKEN_DTYPE)
