"""Near-duplicates by MinHash (Broder 1997) and locality-sensitive hashing, with the datasketch library."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

PERMUTATIONS = 128
SHINGLE_WORDS = 5
SCHEME = "affine32"
"""Of the hash functions; fixed, so that a newer datasketch gives the same result."""
MIN_ROWS = 12
"""Values in a band that is sure to be found."""
MISSES = (0.02, 0.98)
"""Weights of candidates that are none, and of pairs that are missed."""
_WORD = re.compile(r"\w+")
_BATCH = 4096

Signature = npt.NDArray[np.uint32]


def signature(text: str) -> Signature:
    """MinHash of a text's sequences of 5 words, in lower case: uint32 [PERMUTATIONS]."""
    from datasketch import MinHash  # it brings scipy: only where it is used

    minhash = MinHash(num_perm=PERMUTATIONS, seed=1, scheme=SCHEME)
    words = (match.group().lower().encode() for match in _WORD.finditer(text))
    window = list(islice(words, SHINGLE_WORDS))
    batch = [b" ".join(window) or text.encode()]  # a text without words stands for itself
    for word in words:
        window = [*window[1:], word]
        batch.append(b" ".join(window))
        if len(batch) == _BATCH:  # update_batch takes 1 kB of memory a shingle
            minhash.update_batch(batch)
            batch = []
    if batch:
        minhash.update_batch(batch)
    return np.asarray(minhash.hashvalues).astype(np.uint32)


class NearIndex:
    """The documents kept so far; about 6 kB of memory each at a threshold of 0.8, less above."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self.threshold = threshold
        # Candidates are compared afterwards, so too many cost only time; one that is no candidate is missed. Two
        # signatures that differ in n values have one of n + 1 bands in common for sure.
        bands = max(2, int((1 - threshold) * PERMUTATIONS) + 1)  # datasketch has no single one
        rows = PERMUTATIONS // bands
        # Short bands have too many documents in common; then datasketch finds what misses few pairs.
        self.index: Any = MinHashLSH(
            threshold=threshold,
            num_perm=PERMUTATIONS,
            params=(bands, rows) if rows >= MIN_ROWS else None,
            weights=MISSES,
        )
        self.kept: list[Signature] = []

    def add(self, document: Signature) -> bool:
        """Add a document, unless it is nearly the same as one that is there; returns whether it was added."""
        from datasketch import MinHash

        minhash = MinHash(num_perm=PERMUTATIONS, seed=1, scheme=SCHEME, hashvalues=document.astype(np.uint64))
        for i in self.index.query(minhash):
            if np.mean(self.kept[i] == document) >= self.threshold:
                return False
        self.index.insert(len(self.kept), minhash)
        self.kept.append(document)
        return True
