from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from upath import UPath

from gpt2dist.config import UserError
from gpt2dist.logs import JsonLines, finite, in_time, whole
from gpt2dist.storage import check_writable, location, publish, remove_tree, sha256_of, writing
from tests.disks import Disk, small_disk


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
    assert log.cut(lambda r: r["step"] < 3) == records[3:]
    log.append(records[3])
    assert log.read() == records[:4]
    assert [json.loads(line) for line in open(tmp_path / "log.jsonl")] == records[:4]


@pytest.mark.parametrize("first", [0, 3, 19_999, 20_000])
def test_the_end_of_a_long_log_is_cut_without_reading_the_rest(tmp_path: Path, first: int) -> None:
    log = JsonLines(UPath(tmp_path) / "log.jsonl")
    records = [{"step": i, "text": "x" * 100} for i in range(20_000)]
    log.append(*records)
    tracemalloc.start()
    dropped = log.cut(lambda r: r["step"] < first)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dropped == records[first:]
    assert list(log.each()) == log.read() == records[:first]
    assert first < 19_000 or peak < 1_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", 1) as disk:
        yield disk


def test_a_full_disk_takes_all_records_or_none(disk: Disk) -> None:
    log = JsonLines(UPath(disk.path) / "log.jsonl")
    log.append({"step": 0})
    disk.fill()
    long = [{"step": i, "text": "x" * 100} for i in range(1, 100)]  # more than is left of the block
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            log.append(*long)
        assert (disk.path / "log.jsonl").read_bytes() == b'{"step": 0}\n'
    disk.make_room()
    log.append(*long)
    assert log.read() == [{"step": 0}, *long]


def test_what_could_not_be_written_comes_later_and_in_order(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    log = JsonLines(UPath(disk.path) / "log.jsonl")
    log.append({"step": 0})
    disk.fill()
    records = [{"step": i, "text": "x" * 5000} for i in range(1, 5)]
    for record in records[:2]:
        log.try_append(record)  # no exception: a run goes on without its log
    assert "log.jsonl: not written yet: " in caplog.text
    with pytest.raises(OSError, match="No space left"):
        log.sync()  # but nobody may rely on them
    disk.make_room()
    log.append(records[2])
    log.try_append(records[3])
    assert log.read() == [{"step": 0}, *records]
    disk.fill()
    log.try_append({"step": 9, "text": "x" * 5000})
    disk.make_room()
    log.sync()
    assert [r["step"] for r in log.read()] == [0, 1, 2, 3, 4, 9]


NO_RECORDS = [
    b"5\n",
    b"[1]\n",
    b"null\n",
    b'"x"\n',
    b"\n",
    b'{"a": \n',
    b"\xff\xfe\n",
    b"[" * 50_000 + b"\n",
    b'{"a": 1}',
]


@pytest.mark.parametrize("line", NO_RECORDS)
def test_lines_that_are_no_records_are_left_out(tmp_path: Path, line: bytes) -> None:
    log = JsonLines(UPath(tmp_path) / "log.jsonl")
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 0}\n' + line)
    assert log.read() == log.tail() == [{"step": 0}]
    log.append({"step": 1})
    assert [r for r in log.read() if r != {"a": 1}] == [{"step": 0}, {"step": 1}]
    assert log.cut(lambda r: r.get("step") == 0)[-1] == {"step": 1}
    assert log.read() == [{"step": 0}]


@pytest.mark.parametrize(
    "line",
    [b"{}\n", b'{"time": 1}\n', b'{"step": 1.0, "time": 1}\n', b'{"step": true, "time": 1}\n']
    + [b'{"step": 1, "time": %s}\n' % time for time in (b"null", b'"1"', b"NaN", b"-Infinity", b"1" + b"0" * 400)],
)
def test_foreign_lines_are_no_records(tmp_path: Path, line: bytes) -> None:
    log = JsonLines(UPath(tmp_path) / "log.jsonl", keys={"step": whole, "time": finite})
    (tmp_path / "log.jsonl").write_bytes(line + b'{"step": 0, "time": 1}\n' + line)
    assert log.read() == log.tail() == list(log.each()) == [{"step": 0, "time": 1}]
    assert log.cut(lambda r: r["step"] == 0) == []
    assert (tmp_path / "log.jsonl").read_bytes() == line + b'{"step": 0, "time": 1}\n'


def test_records_in_the_order_of_time() -> None:
    """Of one writer they stay as they were written, also where its clock was set back."""
    parts = [
        [{"i": 0, "time": 5.0}, {"i": 2, "time": 9.0}, {"i": 3, "time": 1.0}],
        [{"i": 1, "time": 6}, {"i": 4, "time": 9.5}],
    ]
    assert [record["i"] for record in in_time(parts)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [100, 300_000])
def test_a_full_disk_leaves_no_part_of_a_file(disk: Disk, size: int) -> None:
    path = UPath(disk.path) / "a" / "f"
    publish(path, b"before")
    disk.fill(leave=200_000 if size > 200_000 else 0)
    for write in (lambda: publish(path, b"x" * size), lambda: write_in_pieces(path, size)):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert path.read_bytes() == b"before"
        assert [p.name for p in path.parent.iterdir()] == ["f"]
    disk.make_room()
    write_in_pieces(path, size)
    assert path.read_bytes() == b"x" * size


def write_in_pieces(path: UPath, size: int) -> None:
    with writing(path) as f:
        for _ in range(10):
            f.write(b"x" * (size // 10))


def test_a_file_that_is_not_written_to_its_end_does_not_appear(tmp_path: Path) -> None:
    def write_half() -> None:
        with writing(UPath(tmp_path) / "f") as f:
            f.write(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []


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


def test_tail_of_a_line_that_is_longer(tmp_path: Path) -> None:
    """A rewind names a thousand documents."""
    log = JsonLines(UPath(tmp_path) / "log.jsonl")
    log.append({"step": 0}, {"step": 1, "documents": ["x" * 100] * 1000})
    assert log.tail(1000)[-1]["step"] == 1
    log.append({"step": 2})
    assert [line["step"] for line in log.tail(1000)] == [2]


def test_check_writable(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new" / "dir"))
    assert list((tmp_path / "new" / "dir").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="storage: cannot write to .*file"):
        check_writable(str(tmp_path / "file"))
    with pytest.raises(UserError, match="storage: cannot write to /proc/none"):
        check_writable("/proc/none")


@pytest.mark.parametrize(
    ("place", "message"),
    [("nosuch://bucket/runs", "cannot be opened: "), ("gs://bucket/runs", "cannot be opened: .*gcsfs")],
)
def test_locations_that_nothing_opens(place: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{place}: {message}"):
        location(place)


def test_small_things(tmp_path: Path) -> None:
    path = UPath(tmp_path) / "f"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    remove_tree(UPath(tmp_path) / "none")
