"""Object stores, on fsspec's memory file system: logs, the cache of shards, slices of checkpoints."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import s3fs
import torch
from upath import UPath

from gpt2dist import logs, storage
from gpt2dist.config import UserError
from gpt2dist.data import cache
from gpt2dist.logs import JsonLines
from gpt2dist.storage import StorageError, location, publish
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.checkpoint import BadCheckpoint
from gpt2dist.train.fragment import Fragment
from tests.conftest import ROOT
from tests.unit.test_checkpoint import SHAPES, save


@pytest.fixture
def remote() -> UPath:
    return location(f"memory://{uuid.uuid4().hex}")


def names(path: UPath) -> set[str]:
    return {p.name for p in storage.children(path)}


# ---------------------------------------------------------------------- locations and logs


def test_no_credentials_in_locations() -> None:
    with pytest.raises(UserError, match="environment variables") as e:
        location("s3://key:hidden@bucket/x")
    assert "hidden" not in str(e.value)


def test_a_log_is_one_object_written_now_and_then(remote: UPath) -> None:
    log = JsonLines(remote / "log.jsonl", flush_s=60)
    for i in range(5):
        log.append({"step": i})
    assert JsonLines(remote / "log.jsonl").read() == [{"step": 0}]  # the others wait
    log.sync()
    assert log.read() == log.tail() == [{"step": i} for i in range(5)]
    assert names(remote) == {"log.jsonl"}
    assert JsonLines(remote / "none.jsonl").tail() == JsonLines(remote / "none.jsonl").read() == []


def test_a_long_log_goes_on_in_another_object(remote: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SEGMENT_BYTES", 100)
    log = JsonLines(remote / "log.jsonl")
    records = [{"step": i, "loss": 1 / (i + 3)} for i in range(50)]
    for record in records:
        log.append(record)
    assert names(remote) >= {"log.jsonl", "log.1.jsonl", "log.9.jsonl", "log.10.jsonl"}
    assert log.read() == records
    assert log.tail(60)[-1] == records[-1]
    new = JsonLines(remote / "log.jsonl")  # of the next attempt
    assert new.cut(lambda r: r["step"] < 31) == records[31:]
    assert log.read() == records[:31]
    new.append(*records[31:])
    assert log.read() == records


def test_the_next_attempt_goes_on_in_the_same_object(remote: UPath) -> None:
    JsonLines(remote / "log.jsonl").append({"step": 0}, {"step": 1})
    log = JsonLines(remote / "log.jsonl")
    log.cut(lambda r: r["step"] < 1)
    log.append({"step": 1, "again": True})
    assert log.read() == [{"step": 0}, {"step": 1, "again": True}]
    assert names(remote) == {"log.jsonl"}


def test_nobody_waits_for_a_store_that_is_away(remote: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    away, back = threading.Event(), threading.Event()

    def publish_later(path: UPath, data: bytes) -> None:
        if not back.is_set():
            away.set()
            back.wait(10)  # as the client tries again for a minute
            raise StorageError(f"{path}: cannot be reached")
        publish(path, data)

    monkeypatch.setattr(logs, "publish", publish_later)
    log = JsonLines(remote / "log.jsonl")
    start = time.monotonic()
    for i in range(3):
        log.try_append({"step": i})
    assert away.wait(10)
    log.try_append({"step": 3})
    assert time.monotonic() - start < 5
    back.set()
    log.sync()
    assert log.read() == [{"step": i} for i in range(4)]


def test_a_request_is_looked_for_without_waiting(remote: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "POLL_S", 0.0)
    run_dir = str(remote)
    requests = rundir.Requests(run_dir)

    def wait_for(what: str) -> None:
        deadline = time.monotonic() + 10
        while requests.newest() != what:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    assert requests.newest() == ""
    rundir.request(run_dir, rundir.RESIZE)
    wait_for(rundir.RESIZE)
    rundir.withdraw(run_dir)
    asked = threading.Event()

    def unreachable(run_dir: str) -> str:
        asked.set()
        raise StorageError("cannot be reached")

    monkeypatch.setattr(rundir, "requested", unreachable)
    while not asked.is_set():
        requests.newest()
    assert requests.newest() == ""
    monkeypatch.undo()
    rundir.request(run_dir, rundir.STOP)
    monkeypatch.setattr(rundir, "POLL_S", 0.0)
    requests._not_before = 0.0
    wait_for(rundir.STOP)


def test_two_writers_lose_nothing(remote: UPath) -> None:
    logs = [JsonLines(remote / "log.jsonl") for _ in range(3)]
    for i in range(9):
        logs[i % 3].append({"i": i})
    assert [r["i"] for r in logs[0].read()] == list(range(9))  # in their order
    assert [r["i"] for r in logs[0].tail(parts=4)] == [5, 6, 7, 8]
    logs[2].append({"i": 9})  # nobody came after it
    assert [r["i"] for r in logs[0].tail()] == [8, 9]


def test_a_log_that_was_copied_to_disk(remote: UPath, tmp_path: Path) -> None:
    """With all its parts; who goes on writes into the last one."""
    for i in range(3):
        JsonLines(remote / "log.jsonl").append({"i": 2 * i}, {"i": 2 * i + 1})
    for path in remote.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    log = JsonLines(UPath(tmp_path) / "log.jsonl")
    assert [r["i"] for r in log.read()] == [r["i"] for r in log.each()] == [0, 1, 2, 3, 4, 5]
    assert [r["i"] for r in log.cut(lambda r: r["i"] < 3)] == [3, 4, 5]
    log.append({"i": 3})
    log.sync()
    assert [r["i"] for r in log.tail()] == [3]
    assert [r["i"] for r in JsonLines(UPath(tmp_path) / "log.jsonl").read()] == [0, 1, 2, 3]


# ---------------------------------------------------------------------- the cache


def put(remote: UPath, content: bytes) -> tuple[UPath, str, int]:
    path = remote / f"{hashlib.sha256(content).hexdigest()[:8]}.npy"
    publish(path, content)
    return path, hashlib.sha256(content).hexdigest(), len(content)


def copies() -> set[str]:
    return {p.name for p in cache.directory().iterdir() if p.suffix != ".lock"}


@pytest.fixture(autouse=True)
def cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2DIST_CACHE", str(tmp_path / "cache"))


def test_cache_keeps_what_was_used_last(remote: UPath) -> None:
    files = [put(remote, bytes([i]) * 100) for i in range(4)]
    for i, file in enumerate([*files[:3], files[0]]):
        with cache.local_copy(*file, limit=300) as copy:
            assert copy.read_bytes() == file[0].read_bytes()
            os.utime(copy, (i, i))
    with cache.local_copy(*files[3], limit=300):
        assert copies() == {files[i][1] for i in (0, 2, 3)}
    with cache.local_copy(*files[1], limit=10) as copy:  # one is always held
        assert copies() == {files[1][1]}
    with cache.local_copy(*files[1], limit=10), cache.local_copy(*files[2], limit=10):
        assert copies() == {files[1][1], files[2][1]}  # not removed while it is opened


def test_a_map_outlives_its_file(remote: UPath) -> None:
    import numpy as np

    first, second = put(remote, b"\1" * 100), put(remote, b"\2" * 100)
    with cache.local_copy(*first, limit=150) as copy:
        array = np.memmap(copy, dtype=np.uint8, mode="r")
    with cache.local_copy(*second, limit=150):
        assert copies() == {second[1]}
    assert array.tobytes() == b"\1" * 100


def test_a_copy_is_on_the_disk_before_it_has_its_name(remote: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sha, size = put(remote, b"x" * 100)
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", os.stat(a).st_size)), replace(a, b)))
    with cache.local_copy(path, sha, size, limit=1000):
        assert calls == [("fsync", 100), ("replace", 100)]


def test_a_damaged_download_is_named(remote: UPath) -> None:
    path, sha, size = put(remote, b"x" * 100)
    for content, problem in ((b"y" * 100, "damaged: its sha256"), (b"x" * 99, "has 99 bytes, the manifest says 100")):
        publish(path, content)
        where = f"{path.name}: shard (is|has) .*"
        with pytest.raises(UserError, match=where) as e, cache.local_copy(path, sha, size, limit=1000):
            pass
        assert problem in str(e.value)
        assert copies() == set()
    path.unlink()
    with pytest.raises(UserError, match="shard is missing"), cache.local_copy(path, sha, size, limit=1000):
        pass


SLOW_READER = """
import sys, time
from contextlib import contextmanager
from upath import UPath
from gpt2dist.data import cache
path, sha, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
reading = cache.reading
@contextmanager
def slow(p):
    print("fetched", flush=True)
    with reading(p) as f:
        yield f
        time.sleep(0.5)
cache.reading = slow
with cache.local_copy(UPath(path), sha, size, 1000) as copy:
    assert copy.read_bytes() == b"x" * size
print("read", flush=True)
"""


def test_two_processes_fetch_once(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"x" * 100)
    command = [
        sys.executable,
        "-c",
        SLOW_READER,
        str(tmp_path / "shard"),
        hashlib.sha256(b"x" * 100).hexdigest(),
        "100",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [p.communicate(timeout=60)[0].split() for p in processes]
    assert sorted(outputs) == [["fetched", "read"], ["read"], ["read"]]


# ---------------------------------------------------------------------- checkpoints


def test_checkpoint_from_an_object_store(remote: UPath) -> None:
    saved = save(str(remote))  # type: ignore[arg-type]
    (found,) = checkpoint.committed(str(remote))
    assert found == saved
    checkpoint.verify(saved)
    for start, stop in ((0, 30), (10, 20), (13, 14), (29, 30)):
        target = torch.zeros(stop - start)
        checkpoint.load(saved, [Fragment("a", "exp_avg", start, target)])
        assert target.tolist() == [1000.0 + i for i in range(start, stop)]
    assert checkpoint.load_weights(saved)["b"].tolist() == [500.0 + i for i in range(7)]
    path = saved.path / "rank-00000.safetensors"
    good = path.read_bytes()
    publish(path, good[:-4])
    with pytest.raises(BadCheckpoint, match=r"rank-00000\.safetensors: .* bytes, the index says"):
        checkpoint.verify(saved)
    publish(path, good[:-1] + b"\x7f")
    with pytest.raises(BadCheckpoint, match="differs from its sha256"):
        checkpoint.verify(saved)
    with pytest.raises(BadCheckpoint, match=r"rank-00000\.safetensors: content differs"):
        checkpoint.load_weights(saved)
    path.unlink()
    with pytest.raises(BadCheckpoint, match=r"rank-00000\.safetensors: missing"):
        checkpoint.load_weights(saved)
    assert checkpoint.prune(str(remote), 1, 0, clean=4) == []
    assert set(SHAPES) == {"a", "b"}


# ---------------------------------------------------------------------- S3 without a server


def test_an_unreachable_server_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2dist import s3

    s3fs.S3FileSystem.clear_instance_cache()  # one that an earlier test made has no credentials
    monkeypatch.setattr(s3, "RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
    start = time.monotonic()
    with pytest.raises(UserError, match="s3://bucket/data/manifest.json: cannot be reached: .*127.0.0.1:9") as e:
        storage.read_bytes(location("s3://bucket/data/manifest.json"))
    assert "a-secret-key" not in str(e.value)
    assert time.monotonic() - start < 10
