"""Corpora for the tests of the preparation, and the preparation without Ray."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from gpt2dist.config import RunConfig, UserError
from gpt2dist.data import tokenizer
from gpt2dist.data.prepare import Progress, prepare
from gpt2dist.data.shards import Manifest
from tests.conftest import tiny_run


def lines(*texts: str, field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text}).encode() + b"\n" for text in texts)


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return str(path)


def prepare_run(tmp_path: Path, *sources: str, output: str = "out", **changes: Any) -> RunConfig:
    settings = {f"prepare__{key}": value for key, value in changes.items()}
    settings.setdefault("prepare__val_fraction", 0.0)
    return tiny_run(prepare__sources=list(sources), prepare__output=str(tmp_path / output), **settings)


def in_process(function: Any, rows: list[dict[str, Any]], p: Any) -> Any:
    """Runs the tasks here, last one first: their order must not matter."""
    return (function(row, p) for row in reversed(rows))


def run_prepare(run: RunConfig) -> Manifest:
    states: list[Progress] = []
    manifest = prepare(run, states.append, in_process)
    assert states[-1].bytes == states[-1].total_bytes
    return manifest


def failure(run: RunConfig) -> str:
    """The one line that a preparation ends with."""
    with pytest.raises(UserError) as error:
        run_prepare(run)
    assert "\n" not in str(error.value)
    assert not (Path(run.prepare.output) / "manifest.json").exists()
    return str(error.value)


def ids_of(run: RunConfig, split: str = "train") -> list[int]:
    files = sorted(Path(run.prepare.output).glob(f"{split}-*.npy"))
    return [int(i) for file in files for i in np.load(file, allow_pickle=False)]


def texts_of(run: RunConfig, split: str = "train") -> list[str]:
    """The documents of a prepared split, decoded."""
    parts = tokenizer.load().decode(ids_of(run, split)).split("<|endoftext|>")
    assert parts[-1] == ""
    return parts[:-1]


def quarantine(run: RunConfig) -> list[dict[str, Any]]:
    path = Path(run.prepare.output) / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the log."""
    files = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file() and p.suffix != ".log"}
    return {name: path.read_bytes() for name, path in files.items()}
