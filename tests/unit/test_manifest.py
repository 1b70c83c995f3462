"""The manifest's parser refuses what cannot be true; `data verify` and `data inspect` tell what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2dist.cli import main
from gpt2dist.config import UserError
from gpt2dist.data.documents import documents_of
from gpt2dist.data.mixture import Component, MixedSplit, Mixture
from gpt2dist.data.shards import Manifest, TokenSplit, read_manifest
from tests.unit.corpora import lines, prepare_run, run_prepare, write


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    texts = [f"document {i} " * (i + 1) for i in range(60)]
    sources = [write(tmp_path / "a.jsonl", lines(*texts)), write(tmp_path / "b.txt", b"document 0 ")]
    run_prepare(prepare_run(tmp_path, *sources, val_fraction=0.2, shard_mb=0.01))
    return tmp_path / "out"


def change(table: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        table = table[int(key)] if isinstance(table, list) else table[key]
    table[last] = value


LIES = {
    "splits.train.0.file": [
        "/etc/passwd",
        "../x.npy",
        "a/b.npy",
        "",
        ".",
        "..",
        "a\\b",
        "train-00001.npy",
        "x\n",
        "é",
        5,
    ],
    "splits.train.0.tokens": [0, -1, 10**30, 1.5, "7", True, None],
    "splits.train.0.bytes": [0, -5, 10**19, 2**53],
    "splits.train.0.documents": [-1, 10**25, 9999],
    "splits.train.0.sha256": ["", "x" * 64, "A" * 64],
    "splits.train.0.extra": [1],
    "splits": [[], None, {"test": []}, {"train": [5]}],
    "sources.0.kept.tokens": [0, -1, 10**40],
    "sources.0.read.documents": [1, 10**15],
    "sources.0.dropped": [{"x": {"documents": 1, "tokens": 0}}, {"x": -1}],
    "sources.0.name": [None],
    "documents": [{"read": 1, "kept": 1, "skipped": 0}, {"read": -1}, []],
    "version": [2, "1"],
    "format": ["other"],
    "tokenizer": ["llama"],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in LIES.items() for value in values])
def test_lies_are_refused_in_one_line(prepared: Path, path: str, value: Any) -> None:
    file = prepared / "manifest.json"
    table = json.loads(file.read_text())
    change(table, path, value)
    file.write_text(json.dumps(table))
    with pytest.raises(UserError, match="not a valid manifest") as error:
        read_manifest(str(prepared))
    assert str(error.value).startswith(str(file))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("documents", "problem"),
    [
        ({"read": 1}, "not the counts"),
        ({"read": 60, "kept": 60, "skipped": 0, "more": 1}, "not the counts"),
        ({"read": 59, "kept": 60, "skipped": -1}, "not the counts"),
        ({"read": 62, "kept": 60, "skipped": 1}, "kept is not"),
        ({"read": 61, "kept": 59, "skipped": 2}, "kept is not"),
        ({"read": 61, "kept": 60, "skipped": 1}, ""),
    ],
)
def test_counts_of_a_manifest_without_sources(prepared: Path, documents: dict[str, int], problem: str) -> None:
    file = prepared / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sources": [], "documents": documents}))
    result = CliRunner().invoke(main, ["data", "inspect", str(prepared)])
    assert result.exit_code == (2 if problem else 0)
    if problem:
        assert f"not a valid manifest: documents: {problem}" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_manifest_that_counts_no_documents(prepared: Path) -> None:
    file = prepared / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sources": [], "documents": {}}))
    assert read_manifest(str(prepared)).documents == {}
    result = CliRunner().invoke(main, ["data", "inspect", str(prepared)])
    assert result.exit_code == 2
    assert "does not count documents" in result.stderr


@pytest.mark.parametrize("how", ["truncated", "too long"])
def test_inspect_names_a_shard_of_another_size(prepared: Path, how: str) -> None:
    name = damage(prepared, how)
    result = CliRunner().invoke(main, ["data", "inspect", str(prepared)])
    assert result.exit_code == 2
    assert f"{prepared}/{name}: {how}" in result.stderr
    assert f"see: gpt2dist data verify {prepared}" in result.stderr


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe{}", b"[" * 10**6, b'{"a":' * 10**5, b"null", b"[]", b"{}", b'{"x": NaN']
)
def test_no_manifest_at_all(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(data)
    result = CliRunner().invoke(main, ["data", "verify", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path}/manifest.json: not a valid manifest")
    assert len(result.stderr.splitlines()) == 1


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzzed_manifests(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """A changed manifest is refused in one line, or says something consistent."""
    directory = tmp_path_factory.mktemp("manifest")
    shard = {"file": "train-0.npy", "tokens": 10, "documents": 2, "bytes": 148, "sha256": "0" * 64}
    tally = {"documents": 2, "tokens": 10}
    table = {
        "request": {"sources": ["a"]},
        "documents": {"read": 2, "kept": 2, "skipped": 0},
        "sources": [{"name": "a", "read": dict(tally), "kept": dict(tally), "dropped": {}}],
        "splits": {"train": [shard], "val": []},
    }
    paths = ["request", "documents", "documents.read", "sources", "sources.0", "sources.0.kept", "splits.train.0"]
    paths += ["splits", "splits.train", *(f"splits.train.0.{key}" for key in shard), "sources.0.kept.tokens", "new"]
    change_at = data.draw(st.sampled_from(paths))
    parts = change_at.split(".")
    target: Any = table
    for key in parts[:-1]:
        target = target[int(key)] if isinstance(target, list) else target[key]
    target[int(parts[-1]) if isinstance(target, list) else parts[-1]] = data.draw(JSON)
    text = json.dumps(table).encode()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + data.draw(st.binary(max_size=4)) + text[at + 1 :]
    (directory / "manifest.json").write_bytes(text)
    error = ""
    try:
        manifest = read_manifest(str(directory))
    except UserError as e:
        error = str(e)
    assert len(error.splitlines()) <= 1
    if not error:
        assert isinstance(manifest, Manifest)
        assert len(manifest.fingerprint) == 64
        assert all(s.bytes == 128 + 2 * s.tokens for shards in manifest.splits.values() for s in shards)


def damage(directory: Path, how: str) -> str:
    shard = sorted(directory.glob("train-*.npy"))[1]
    data = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(data[:-2])
    elif how == "too long":
        shard.write_bytes(data + b"\0\0")
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    return shard.name


@pytest.mark.parametrize("how", ["missing", "truncated", "too long", "altered"])
def test_verify_names_the_damaged_shard(prepared: Path, how: str) -> None:
    good = CliRunner().invoke(main, ["data", "verify", str(prepared)])
    assert good.exit_code == 0
    name = damage(prepared, how)
    result = CliRunner().invoke(main, ["data", "verify", str(prepared)])
    assert result.exit_code == 1
    named = [line for line in result.stdout.splitlines() if "DAMAGED" in line]
    assert len(named) == 1
    assert f"{prepared}/{name}: {how}" in named[0]
    rows = json.loads(CliRunner().invoke(main, ["data", "verify", str(prepared), "--json"]).stdout)
    assert [row["file"] for row in rows if not row["valid"]] == [name]


def test_inspect(prepared: Path) -> None:
    result = json.loads(CliRunner().invoke(main, ["data", "inspect", str(prepared), "--json"]).stdout)
    manifest = read_manifest(str(prepared))
    assert result["documents"] == {"read": 61, "kept": 60, "skipped": 1}
    assert sum(row["documents"] for row in result["lengths"]) == 60
    # document i is 2 tokens repeated i + 1 times
    assert result["lengths"][0]["from"] == 2
    assert result["lengths"][-1]["below"] == 128
    assert sum(source["share"] for source in result["sources"]) == pytest.approx(1)
    assert result["fingerprint"] == manifest.fingerprint
    assert result["sample"].startswith("document ")
    text = CliRunner().invoke(main, ["data", "inspect", str(prepared)])
    assert text.exit_code == 0
    assert "duplicate" in text.stdout
    assert "first document" in text.stdout
    damage(prepared, "missing")
    broken = CliRunner().invoke(main, ["data", "inspect", str(prepared)])
    assert broken.exit_code == 2
    assert len(broken.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_no_data_set(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(main, ["data", command, str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "not a prepared data set" in result.stderr


@pytest.mark.parametrize("begin", [b"\0" * 200, b"\x93NUMPY\x01\0v\0{'descr': '<u2', '[((", b""])
def test_a_shard_whose_header_is_gone_is_named(prepared: Path, begin: bytes) -> None:
    """As after a power cut: its size is right, and numpy would advise to load a pickle."""
    split = TokenSplit(str(prepared), read_manifest(str(prepared)), "train")
    path = prepared / split.shards[0].file
    path.write_bytes(begin + path.read_bytes()[len(begin) :] if begin else b"")
    with pytest.raises(UserError) as error:
        split.samples(np.array([0]), 8)
    hint = f"see: gpt2dist data verify {prepared}"
    assert str(error.value) == f"{path}: damaged: it does not begin as a shard does; {hint}"


def test_ids_of_another_vocabulary_are_refused_where_they_are(prepared: Path) -> None:
    split = TokenSplit(str(prepared), read_manifest(str(prepared)), "train")
    path = prepared / split.shards[0].file
    ids = np.load(path, allow_pickle=False)
    ids[[20, 45]] = 50300, 60_000
    path.write_bytes(path.read_bytes()[: -ids.nbytes] + ids.tobytes())
    assert split.samples(np.array([0, 1]), 8).shape == (2, 9)
    with pytest.raises(UserError) as error:
        split.samples(np.array([1, 5, 2]), 8)
    assert str(error.value) == f"{path}: id 60000 at token 45: GPT-2's go up to 50256"
    data = Mixture([Component(str(prepared), read_manifest(str(prepared)), 1)])
    assert documents_of(MixedSplit(data, "train", 8, 1.0), np.array([5]), 9)  # a rewind names them all the same


def test_inspect_shows_the_text_and_nothing_more(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("I :heart: you\x1b]0;owned\x07\x1b[31m, brackets [b] and\ttabs")
    run = prepare_run(tmp_path, str(source))
    run_prepare(run)
    shown = CliRunner().invoke(main, ["data", "inspect", run.prepare.output]).stdout
    assert "I :heart: you\ufffd]0;owned\ufffd\ufffd[31m, brackets [b] and" in shown
