"""Text → GPT-2 token ids in bounded memory: a long text is cut where GPT-2's pre-tokenizer always splits.

The pre-tokenizer matches, one after the other and without looking back,

    '(?:[sdmt]|ll|ve|re) | ?\\p{L}+ | ?\\p{N}+ | ?[^\\s\\p{L}\\p{N}]+ | \\s+$ | \\s+(?!\\S) | \\s

and byte pairs merge inside a match only. So a cut is exact where no match of the whole text runs across it and
the matches before it stay the same without the text after it. With W for white space, that holds
  1. between a character that is not W, and W: no match goes from one to the other, and only matches of W look ahead;
  2. before the last W of a run of two or more that something follows: `\\s+(?!\\S)` leaves just that one to the
     next match, and cut off there, the run is matched by `\\s+$`;
  3. between a letter or number and punctuation, and between a letter and a digit: the character classes differ,
     and contractions begin with an apostrophe, which here only ever starts the second part.
tests/unit/test_encode.py holds this against the encoding of whole texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import tiktoken

PART_CHARS = 1 << 18
"""Texts are cut into parts of about this length. tiktoken's regex fails on white space of 10^6 characters."""
MAX_RUN_CHARS = 2_000_000
"""A longer run of one class of characters is not tokenized: merging it would take seconds and hundreds of MB."""

# Unicode's White_Space, as Rust's \s has it; Python's \s has \x1c to \x1f too.
_W = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_PUNCTUATION = r"!-/:-@\[-`{-~、。，！？；："
_CUT = re.compile(rf"[^{_W}](?=[{_W}])|[{_W}](?=[{_W}][^{_W}])|[^\W_](?=[{_PUNCTUATION}])|[A-Za-z](?=[0-9])")


class CannotEncode(Exception):
    """The text has a run of characters that is too long to be tokenized."""


def encode(encoding: tiktoken.Encoding, text: str) -> list[npt.NDArray[np.uint16]]:
    """Token ids of a text, <|endoftext|> being ordinary text: parts, uint16 [tokens of the part] each.

    Raises:
        CannotEncode: more than `MAX_RUN_CHARS` characters without a place to cut.
    """
    return [
        encoding.encode_to_numpy(part, disallowed_special=()).astype(np.uint16) for part in _parts(text, PART_CHARS)
    ]


def _parts(text: str, length: int) -> Iterator[str]:
    start = 0
    while len(text) - start > length:
        limit = start + MAX_RUN_CHARS
        cut = _CUT.search(text, start + length - 1, limit)
        if cut is None and limit < len(text):
            raise CannotEncode(f"over {MAX_RUN_CHARS:,} characters without a place to split, from {start:,} on")
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
