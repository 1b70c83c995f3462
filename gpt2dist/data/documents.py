"""Which documents lie in given samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpt2dist.data import tokenizer
from gpt2dist.data.mixture import MixedSplit
from gpt2dist.data.order import Ids
from gpt2dist.data.shards import TokenSplit

BEGINNING = 16
"""Tokens of a document that are shown."""


def documents_of(split: MixedSplit, ids: Ids, limit: int) -> list[dict[str, Any]]:
    """The first `limit` documents that have a token in samples `ids`, each once, in the order of the samples.

    Each as {"shard": its file, "document": its number in there from 0, "begins": its first words}.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for i in ids.reshape(-1):
        k = int(np.searchsorted(split.offsets, i, side="right")) - 1
        first = int(i - split.offsets[k]) * split.seq_len
        for document in _documents(split.parts[k], first, first + split.seq_len + 1):
            found.setdefault((document["shard"], document["document"]), document)
            if len(found) == limit:
                return list(found.values())
    return list(found.values())


def _documents(tokens: TokenSplit, first: int, end: int) -> Iterator[dict[str, Any]]:
    """Documents of tokens [first, end) of a split; one that runs into the next shard counts there again."""
    index = int(np.searchsorted(tokens.starts, first, side="right")) - 1
    while index < len(tokens.shards) and tokens.starts[index] < end:
        shard = tokens.shard(index)
        offset = int(tokens.starts[index])
        low, high = max(0, first - offset), min(len(shard), end - offset)
        ends = np.flatnonzero(shard[:high] == tokenizer.EOT)
        before = int(np.searchsorted(ends, low))
        starts = [0, *(ends + 1).tolist()][before:]
        for number, start in enumerate(starts, before):
            if start < high:
                ids = shard[start : start + BEGINNING]
                text = tokenizer.load().decode_bytes(ids[ids < tokenizer.N_VOCAB].tolist())
                name = f"{tokens.location.rstrip('/')}/{tokens.shards[index].file}"
                yield {"shard": name, "document": number, "begins": text.decode("utf-8", "replace")}
        index += 1
