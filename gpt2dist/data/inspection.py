"""What a prepared data set holds, and whether its files are what the manifest says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from upath import UPath

from gpt2dist.config import UserError
from gpt2dist.data import tokenizer
from gpt2dist.data.shards import HEADER_BYTES, TOKEN_DTYPE, Manifest, Shard
from gpt2dist.storage import file_size, location, reading, sha256_of

SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Check:
    """One shard."""

    file: str
    problem: str
    """Empty: the file is as the manifest says."""


def verify(directory: str, manifest: Manifest) -> Iterator[Check]:
    """Size and sha256 of every shard, in order."""
    for shards in manifest.splits.values():
        for shard in shards:
            yield Check(shard.file, _problem(location(directory) / shard.file, shard))


def inspect(directory: str, manifest: Manifest) -> dict[str, Any]:
    """Counts, the documents' lengths in tokens, the mix of sources, and the start of the first document.

    Reads all shards.

    Raises:
        OSError: one cannot be read.
        UserError: one has not the size that the manifest says.
    """
    lengths: Counter[int] = Counter()
    for shards in manifest.splits.values():
        for shard in shards:
            if problem := _wrong_size(location(directory) / shard.file, shard):
                raise UserError(
                    f"{directory.rstrip('/')}/{shard.file}: {problem}; see: gpt2dist data verify {directory}"
                )
            lengths.update(_length_classes(location(directory) / shard.file))
    kept = sum(source.kept.tokens for source in manifest.sources)
    return {
        "documents": manifest.documents,
        "tokens": {split: manifest.tokens(split) for split in manifest.splits},
        "shards": {split: len(shards) for split, shards in manifest.splits.items()},
        "fingerprint": manifest.fingerprint,
        "lengths": [
            {"from": 2**i if i else 0, "below": 2 ** (i + 1), "documents": lengths[i]} for i in sorted(lengths)
        ],
        "sources": [
            {**source.model_dump(), "share": source.kept.tokens / kept if kept else 0.0} for source in manifest.sources
        ],
        "sample": _sample(directory, manifest),
    }


def _problem(path: UPath, shard: Shard) -> str:
    try:
        if problem := _wrong_size(path, shard):
            return problem
        return "" if sha256_of(path) == shard.sha256 else "altered: its sha256 is not the manifest's"
    except FileNotFoundError:
        return "missing"
    except OSError as e:
        return f"cannot be read: {e.strerror or e}"


def _wrong_size(path: UPath, shard: Shard) -> str:
    size = file_size(path)
    if size == shard.bytes:
        return ""
    what = "truncated" if size < shard.bytes else "too long"
    return f"{what}: {size:,} bytes, the manifest says {shard.bytes:,}"


def _length_classes(path: UPath) -> Counter[int]:
    """⌊log2(tokens)⌋ of each document that ends in a shard → how many."""
    classes: Counter[int] = Counter()
    length = 0
    for ids in _blocks(path):
        ends = np.flatnonzero(ids == tokenizer.EOT)
        if len(ends):
            lengths = np.diff(ends, prepend=-1) - 1
            lengths[0] += length
            length = 0
            exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
            classes.update(dict(zip(*(a.tolist() for a in np.unique(exponents, return_counts=True)), strict=True)))
        length += len(ids) - (int(ends[-1]) + 1 if len(ends) else 0)
    return classes


def _blocks(path: UPath) -> Iterator[npt.NDArray[np.uint16]]:
    with reading(path) as f:
        f.seek(HEADER_BYTES)
        while data := f.read(1 << 22):
            yield np.frombuffer(data[: len(data) & ~1], dtype=TOKEN_DTYPE)


def _sample(directory: str, manifest: Manifest) -> str:
    shards = manifest.splits.get("train") or manifest.splits.get("val") or []
    for shard in shards[:1]:
        with reading(location(directory) / shard.file) as f:
            f.seek(HEADER_BYTES)
            ids = np.frombuffer(f.read(2 * SAMPLE_TOKENS), dtype=TOKEN_DTYPE)
        end = np.flatnonzero(ids == tokenizer.EOT)
        ids = ids[: end[0]] if len(end) else ids
        known = ids[ids < tokenizer.N_VOCAB].tolist()
        return tokenizer.load().decode_bytes(known).decode("utf-8", "replace")
    return ""
