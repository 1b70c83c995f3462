from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from upath import UPath

from gpt2dist.config import UserError
from gpt2dist.storage import JsonLines, check_writable, publish, remove_tree, sha256_of


def test_publish_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = UPath(tmp_path) / "a" / "f"
    publish(path, b"one")
    publish(path, b"two")
    assert path.read_bytes() == b"two"

    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        publish(path, b"three")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["f"]


def test_json_lines_survive_a_torn_line(tmp_path: Path) -> None:
    log = JsonLines(UPath(tmp_path) / "log.jsonl")
    assert log.read() == []
    assert log.tail() == []
    records = [{"step": i, "loss": 1 / (i + 3)} for i in range(5)]
    log.append(*records)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # the writer was killed here
    assert log.read() == records
    assert log.tail() == records
    assert log.keep(lambda r: r["step"] < 3) == records[3:]
    log.append(records[3])
    assert log.read() == records[:4]
    assert [json.loads(line) for line in open(tmp_path / "log.jsonl")] == records[:4]


def test_floats_keep_their_bits(tmp_path: Path) -> None:
    log = JsonLines(UPath(tmp_path) / "log.jsonl")
    values = [0.1, 1 / 3, 1e-300, 10.829787015914917, 5e-324]
    log.append(*({"v": v} for v in values))
    assert [r["v"] for r in log.read()] == values


def test_tail_of_a_long_log(tmp_path: Path) -> None:
    log = JsonLines(UPath(tmp_path) / "log.jsonl")
    log.append(*({"step": i} for i in range(10_000)))
    tail = log.tail(1000)
    assert tail[-1] == {"step": 9999}
    assert 10 < len(tail) < 100


def test_check_writable(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new" / "dir"))
    assert list((tmp_path / "new" / "dir").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="storage: cannot write to .*file"):
        check_writable(str(tmp_path / "file"))
    with pytest.raises(UserError, match="storage: cannot write to /proc/none"):
        check_writable("/proc/none")


def test_small_things(tmp_path: Path) -> None:
    path = UPath(tmp_path) / "f"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    remove_tree(UPath(tmp_path) / "none")
