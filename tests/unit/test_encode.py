"""Cutting long texts never changes their tokens."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2dist.data import encode as encode_module
from gpt2dist.data import tokenizer
from gpt2dist.data.encode import _W, CannotEncode, _parts, encode

# What GPT-2's pre-tokenizer tells apart: contractions, white space of all kinds, classes of characters.
WHITE = [" ", "  ", "\n", "\r\n", "\t", "\xa0", "\u3000", "\x1c", "\x85", "\u2028"]
CONTRACTIONS = ["'", "'s", "'ll", "'l", "l", "ve", "re", "’s", "ʼ"]
OTHERS = [
    "a",
    "Z",
    "word",
    "中文",
    "é",
    "e\u0301",
    "1",
    "42",
    "²",
    "½",
    "Ⅷ",
    "٣",
    "_",
    "!",
    "...",
    "。",
    "，",
    "-",
    "😀",
]
PIECES = st.sampled_from([*WHITE, *CONTRACTIONS, *OTHERS, "\u200b", "\ufeff", "<|endoftext|>", "ß", "\u00ad"])
TEXTS = st.lists(st.one_of(PIECES, st.characters(exclude_categories=["Cs"])), max_size=80).map("".join)


@settings(max_examples=1500, deadline=None)
@given(text=TEXTS, length=st.integers(1, 12))
def test_parts_have_the_tokens_of_the_whole(text: str, length: int) -> None:
    encoding = tokenizer.load()
    parts = list(_parts(text, length))
    assert "".join(parts) == text
    ids = [i for part in parts for i in encoding.encode_ordinary(part)]
    assert ids == encoding.encode_ordinary(text)


def test_cuts_are_frequent() -> None:
    """Otherwise the test above could pass without ever cutting."""
    text = "Don't cut   the words of 3rd parties，但是可以。 x1 = y2;\n\n\tdone  "
    assert len(list(_parts(text, 1))) > 15


def test_character_classes_are_those_of_the_pre_tokenizer() -> None:
    """The cuts rely on Python's re and tiktoken's engine agreeing on every character."""
    white, alnum = regex.compile(r"\p{White_Space}"), regex.compile(r"[\p{L}\p{N}]")
    ours_white, ours_alnum = re.compile(f"[{_W}]"), re.compile(r"[^\W_]")
    for code in range(0x110000):
        c = chr(code)
        assert bool(ours_white.match(c)) == bool(white.match(c)), hex(code)
        if ours_alnum.match(c):
            assert alnum.match(c), hex(code)


@pytest.mark.parametrize("filler", [" ", "\n", "\t \n", "a ", "a1", "。中", "don't"])
def test_long_runs(filler: str) -> None:
    """Over a million of white-space characters tiktoken itself fails; ours are the tokens of GPT-2's rule."""
    encoding = tokenizer.load()
    n = 1_200_000 // len(filler)
    text = "start" + filler * n + "end"
    ids = np.concatenate(encode(encoding, text))
    assert encoding.decode(ids.tolist()) == text
    short = np.concatenate(encode(encoding, "start" + filler * 3000 + "end"))
    assert short.tolist() == encoding.encode_ordinary("start" + filler * 3000 + "end")


def test_white_space_run_is_one_match() -> None:
    encoding = tokenizer.load()
    text = "x" + "\n" * 600_000 + "y" * 10
    assert np.concatenate(encode(encoding, text)).tolist() == encoding.encode_ordinary(text)


def test_run_without_a_cut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "MAX_RUN_CHARS", 1000)
    monkeypatch.setattr(encode_module, "PART_CHARS", 100)
    encoding = tokenizer.load()
    encode(encoding, "ok " + "A" * 900 + " ok")
    with pytest.raises(CannotEncode, match="without a place to split"):
        encode(encoding, "ok " + "A" * 1200 + " ok")


def test_large_random_text() -> None:
    rng = random.Random(0)
    words = ["the", "don't", "x1", "  ", "\n\n", "café", "中文。", "...", "'", "we'll", "３", "\u3000"]
    text = "".join(rng.choice(words) + rng.choice([" ", "", " "]) for _ in range(250_000))
    assert len(text) > 3 * encode_module.PART_CHARS
    encoding = tokenizer.load()
    assert np.concatenate(encode(encoding, text)).tolist() == encoding.encode_ordinary(text)
