"""Token files of nanoGPT and llm.c, as others write them: prepared and trained on, the losses of the same texts."""

from __future__ import annotations

import json
import random
import struct
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from gpt2dist.data import tokenizer
from gpt2dist.data.shards import read_manifest
from tests.conftest import tiny_run
from tests.distributed import jobs
from tests.distributed.test_engine import logged
from tests.ray.test_train import write
from tests.unit.corpora import lines, run_prepare


def documents() -> list[str]:
    rng = random.Random(2)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 9))) for _ in range(900)]
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 90))) for _ in range(150)]
    return [*texts, "Größe — 世界 🙂", "two\nlines\r\n\n  and   runs", "<|endoftext|> in a text"]


def nanogpt(path: Path, encoding: tiktoken.Encoding, texts: list[str]) -> None:
    """data/openwebtext/prepare.py: uint16 of the machine, encode_ordinary, the end token after each document."""
    ids = array("H")
    for text in texts:
        ids.extend(encoding.encode_ordinary(text))
        ids.append(50256)
    if sys.byteorder == "big":
        ids.byteswap()
    path.write_bytes(ids.tobytes())


def llmc(path: Path, encoding: tiktoken.Encoding, texts: list[str]) -> None:
    """dev/data/data_common.py: 256 int32 (magic, version 1, number of tokens, zeros), then uint16 ids; in llm.c's
    data the end token stands before each document."""
    ids = [i for text in texts for i in (50256, *encoding.encode_ordinary(text))]
    with open(path, "wb") as f:
        f.write(struct.pack("<3i", 20240520, 1, len(ids)))
        f.write(bytes(4 * (256 - 3)))
        for i in ids:
            f.write(struct.pack("<H", i))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_token_files_train_to_the_losses_of_the_texts(
    tmp_path: Path, gpt2dist: Callable[..., Any], ranks: Callable[..., list[Any]]
) -> None:
    texts = documents()
    encoding = tokenizer.load()
    (tmp_path / "text.jsonl").write_bytes(lines(*texts))
    nanogpt(tmp_path / "nanogpt.bin", encoding, texts)
    llmc(tmp_path / "llmc.bin", encoding, texts)
    runs = {}
    for name, source in (("text", "text.jsonl"), ("nanogpt", "nanogpt.bin"), ("llmc", "llmc.bin")):
        prepare = {"sources": [str(tmp_path / source)], "output": str(tmp_path / f"data-{name}"), "val_fraction": 0.1}
        changes = {f"prepare__{key}": value for key, value in prepare.items()}
        runs[name] = tiny_run(name=name, storage=str(tmp_path), cluster__workers=1, **changes)
        run_prepare(runs[name])
        assert read_manifest(runs[name].prepare.output).documents == {"read": 153, "kept": 153, "skipped": 0}
        if name == "text":  # without Ray
            ranks(jobs.train_runs, 1, [runs[name]])
            continue
        trained = gpt2dist("train", str(write(runs[name], tmp_path)), "--json")
        assert trained.returncode == 0, trained.stdout + trained.stderr
        assert json.loads(trained.stdout)["step"] == 12
    assert (len(logged(runs["text"])), len(logged(runs["text"], "val_loss"))) == (12, 2)
    for name in ("nanogpt", "llmc"):
        assert logged(runs[name]) == logged(runs["text"])
        assert logged(runs[name], "val_loss") == logged(runs["text"], "val_loss")
