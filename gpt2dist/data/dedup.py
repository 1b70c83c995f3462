"""Which documents to take out: those whose text came before, in the order of the sources.

Each chunk has its documents' hashes in a sorted file. Ranges of hash prefixes are merged one after the other, so
the memory is one range of all chunks (`RANGE_DOCUMENTS` records) and a byte a document, however many there are.
The result depends on the documents and their order alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2dist.config import PrepareSection
from gpt2dist.data.chunk import DOCUMENT, PARTS, Part, read_documents
from gpt2dist.data.near import PERMUTATIONS, NearIndex
from gpt2dist.storage import location, read_bytes

RANGE_DOCUMENTS = 4_000_000
"""Documents merged at a time: about 0.6 GB with what sorting needs."""
Drops = dict[int, npt.NDArray[np.bool_]]
"""Chunk → bool [documents of the chunk]."""


def exact_duplicates(output: str, parts: list[Part]) -> Drops:
    """All documents but the first of each text."""
    counts = np.array([part.prefixes for part in parts], dtype=np.int64).reshape(-1, 256)
    offsets = np.concatenate([np.zeros((len(parts), 1), np.int64), counts.cumsum(axis=1)], axis=1)
    drops = {part.index: np.zeros(n, dtype=bool) for part, n in zip(parts, offsets[:, -1].tolist(), strict=True)}
    with ThreadPoolExecutor(16) as threads:  # many small reads, of an object store perhaps
        for first, stop in _ranges(counts.sum(axis=0)):
            spans = zip(parts, offsets[:, first].tolist(), offsets[:, stop].tolist(), strict=True)
            records = list(threads.map(lambda s: read_documents(output, s[0].index, s[1], s[2]), spans))
            for chunk, index in _repeated([part.index for part in parts], records):
                drops[chunk][index] = True
    return drops


def near_duplicates(p: PrepareSection, parts: list[Part], exact: Drops) -> Drops:
    """Of the documents that are no exact duplicates, those nearly the same as one that was kept before."""
    index = NearIndex(p.near_threshold)
    drops = {}
    for part in parts:
        drop = drops[part.index] = np.zeros(len(exact[part.index]), dtype=bool)
        if len(drop):
            data = read_bytes(location(p.output) / PARTS / f"{part.index:05d}.minhash")
            for i, signature in enumerate(np.frombuffer(data, dtype=np.uint32).reshape(-1, PERMUTATIONS)):
                drop[i] = not exact[part.index][i] and not index.add(signature)
    return drops


def _ranges(per_prefix: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut the 256 prefixes into ranges [first, stop) of at most `RANGE_DOCUMENTS`, or one prefix."""
    ranges: list[tuple[int, int]] = []
    first, room = 0, RANGE_DOCUMENTS
    for prefix, n in enumerate(per_prefix.tolist()):
        if n > room and prefix > first:
            ranges.append((first, prefix))
            first, room = prefix, RANGE_DOCUMENTS
        room -= n
    return [*ranges, (first, len(per_prefix))]


def _repeated(chunks: list[int], records: list[npt.NDArray[Any]]) -> list[tuple[int, int]]:
    """(chunk, document) of all but the first of each hash."""
    chunk = np.repeat(np.array(chunks, dtype=np.int64), [len(r) for r in records])
    both = np.concatenate(records) if records else np.empty(0, dtype=DOCUMENT)
    high, low, index = (both[name].astype(np.uint64) for name in ("hash", "hash2", "index"))
    order = np.lexsort((index, chunk, low, high))
    same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    repeated = order[1:][same]
    return list(zip(chunk[repeated].tolist(), index[repeated].tolist(), strict=True))
