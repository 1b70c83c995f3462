"""The preparation: what it keeps, that only its input decides its output, and how it goes on after it was stopped."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2dist.config import UserError
from gpt2dist.data import chunk, dedup, encode, near, sources, tokenizer
from gpt2dist.data.inspection import verify
from gpt2dist.data.prepare import look, prepare
from gpt2dist.data.shards import read_manifest
from tests.unit.corpora import (
    contents,
    failure,
    in_process,
    lines,
    prepare_run,
    quarantine,
    run_prepare,
    texts_of,
    write,
)


def some_texts(n: int, seed: int = 0, distinct: int = 10**9) -> list[str]:
    rng = random.Random(seed)
    return [f"Text {rng.randrange(distinct)}.\n" + "some words " * rng.randrange(20) for _ in range(n)]


def unique(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def test_tokens_are_those_of_tiktoken(tmp_path: Path) -> None:
    texts = [*some_texts(50), "<|endoftext|> is ordinary text", "don't   stop\u3000now"]
    run = prepare_run(tmp_path, write(tmp_path / "a.jsonl", lines(*texts)), shard_mb=0.001)
    manifest = run_prepare(run)
    encoding = tokenizer.load()
    shards = [np.load(tmp_path / "out" / s.file, allow_pickle=False) for s in manifest.splits["train"]]
    expected = [i for text in texts for i in [*encoding.encode_ordinary(text), tokenizer.EOT]]
    assert len(shards) > 3
    assert all(shard.dtype == np.dtype("<u2") for shard in shards)
    assert np.concatenate(shards).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), data=st.data())
def test_first_of_each_text_is_kept(tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: Any) -> None:
    """However the corpus falls into chunks and the chunks' hashes into ranges."""
    tmp_path = tmp_path_factory.mktemp("dedup")
    half = len(texts) // 2
    a, b = (write(tmp_path / f"{n}.jsonl", lines(*t)) for n, t in (("b", texts[:half]), ("a", texts[half:])))
    run = prepare_run(tmp_path, a, b, shard_mb=data.draw(st.sampled_from([64, 1e-4, 2e-5])) * 1.0)
    saved = dedup.RANGE_DOCUMENTS
    dedup.RANGE_DOCUMENTS = data.draw(st.sampled_from([1, 7, 10**6]))
    try:
        manifest = run_prepare(run)
    finally:
        dedup.RANGE_DOCUMENTS = saved
    assert texts_of(run) == unique(texts)
    dropped = sum(s.dropped[r].documents for s in manifest.sources for r in s.dropped)
    assert dropped == len(texts) - len(unique(texts))
    assert manifest.documents == {"read": len(texts), "kept": len(unique(texts)), "skipped": dropped}


def test_counts_by_source_and_reason(tmp_path: Path) -> None:
    encoding = tokenizer.load()
    a = write(tmp_path / "a.jsonl", lines("same", "long " * 50, "s") + b"broken\n" + lines("same", "other"))
    b = write(tmp_path / "b.jsonl", lines("same", "of b"))
    run = prepare_run(tmp_path, a, b, min_chars=2, max_chars=100, on_bad_record="skip")
    manifest = run_prepare(run)
    first, second = manifest.sources
    n = {t: len(encoding.encode_ordinary(t)) + 1 for t in ("same", "long " * 50, "s", "other", "of b")}
    assert texts_of(run) == ["same", "other", "of b"]
    assert {r: (t.documents, t.tokens) for r, t in first.dropped.items()} == {
        "broken JSON": (1, 0),
        "duplicate": (1, n["same"]),
        "too long": (1, n["long " * 50]),
        "too short": (1, n["s"]),
    }
    assert (first.read.documents, first.kept.documents, first.kept.tokens) == (6, 2, n["same"] + n["other"])
    assert (second.read.documents, second.kept.documents) == (2, 1)
    assert second.dropped["duplicate"].tokens == n["same"]
    assert manifest.tokens("train") == first.kept.tokens + second.kept.tokens


def test_near_duplicates(tmp_path: Path) -> None:
    rng = random.Random(5)
    words = [f"w{i}" for i in range(2000)]
    originals = [" ".join(rng.choice(words) for _ in range(300)) for _ in range(30)]
    changed = [text.replace(text.split()[7], "changed", 1) + "!" for text in originals[:10]]
    other = [" ".join(text.split()[:150] + ["half"] * 150) for text in originals[:5]]
    texts = [*originals, *changed, *other, originals[0]]
    source = write(tmp_path / "a.jsonl", lines(*texts))
    run = prepare_run(tmp_path, source, dedup="near", shard_mb=0.01)
    manifest = run_prepare(run)
    assert texts_of(run) == [*originals, *other]
    assert {r: t.documents for r, t in manifest.sources[0].dropped.items()} == {"duplicate": 1, "near-duplicate": 10}
    strict = prepare_run(tmp_path, source, dedup="near", near_threshold=0.995, output="strict")
    run_prepare(strict)
    assert texts_of(strict) == texts[:-1]
    exact = prepare_run(tmp_path, source, dedup="exact", output="exact")
    run_prepare(exact)
    assert texts_of(exact) == texts[:-1]
    none = prepare_run(tmp_path, source, dedup="none", output="none")
    run_prepare(none)
    assert texts_of(none) == texts


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.85, 0.9, 0.95, 0.98, 0.985, 0.99, 0.995, 0.999])
def test_hardly_a_pair_above_the_threshold_is_missed(threshold: float) -> None:
    """Of pairs that agree in just as many values as they must."""
    rng = np.random.default_rng(0)
    index, found = near.NearIndex(threshold), 0
    for _ in range(200):
        one = rng.integers(0, 2**32, near.PERMUTATIONS, dtype=np.uint32)
        two = one.copy()
        two[rng.permutation(near.PERMUTATIONS)[: int((1 - threshold) * near.PERMUTATIONS)]] ^= 1
        assert index.add(one)
        found += not index.add(two)
    assert found >= (200 if threshold >= 0.95 else 185)


def test_split_of_a_document_never_changes(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", lines(*some_texts(200, 1)))
    b = write(tmp_path / "b.jsonl", lines(*some_texts(200, 2)))
    one = prepare_run(tmp_path, a, val_fraction=0.2, output="one")
    both = prepare_run(tmp_path, b, a, val_fraction=0.2, output="both", shard_mb=0.003)
    run_prepare(one)
    run_prepare(both)
    for split in ("train", "val"):
        assert set(texts_of(one, split)) < set(texts_of(both, split))
    assert 20 < len(texts_of(one, "val")) < 60


def test_a_compressed_file_makes_shards_of_bounded_size(tmp_path: Path) -> None:
    texts = some_texts(500)
    run = prepare_run(tmp_path, write(tmp_path / "a.jsonl.gz", lines(*texts)), shard_mb=0.002)
    manifest = run_prepare(run)
    sizes = [shard.bytes for shard in manifest.splits["train"]]
    assert len(sizes) > 5
    assert max(sizes) < 3000
    assert [t for s in manifest.splits["train"] for t in texts_in(tmp_path / "out" / s.file)] == unique(texts)


def texts_in(path: Path) -> list[str]:
    return tokenizer.load().decode(np.load(path, allow_pickle=False).tolist()).split("<|endoftext|>")[:-1]


def test_a_run_that_cannot_be_tokenized_is_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MAX_RUN_CHARS", 3000)
    monkeypatch.setattr(encode, "PART_CHARS", 1000)
    path = write(tmp_path / "a.jsonl", lines("fine", "A" * 5000, "fine too"))
    assert f"{path}: line 2: cannot be tokenized" in failure(prepare_run(tmp_path, path, output="fails"))
    run = prepare_run(tmp_path, path, on_bad_record="skip")
    run_prepare(run)
    assert texts_of(run) == ["fine", "fine too"]
    assert quarantine(run)[0]["raw"] == "A" * 1000


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    run = prepare_run(tmp_path, write(tmp_path / "a.jsonl", lines("short")), min_chars=10)
    assert failure(run).endswith("no document went to the training split: 1 read, 1 left out (too short)")


class Stopped(BaseException):
    """As good as a kill: nothing of the preparation handles it."""


class Tasks:
    """Runs tasks in a random order, and is stopped when `limit` are done."""

    def __init__(self, limit: float = float("inf"), seed: int = 0) -> None:
        self.limit = limit
        self.seed = seed
        self.done = 0
        self.tokenized: list[int] = []

    def __call__(self, function: Any, rows: list[dict[str, Any]], p: Any) -> Iterator[dict[str, Any]]:
        order = list(rows)
        random.Random(len(rows) + self.seed).shuffle(order)
        for row in order:
            if self.done == self.limit:
                raise Stopped
            self.done += 1
            result = function(row, p)
            if function.__name__ == "_tokenize":
                self.tokenized.append(row["index"])
            yield result


def corpus(tmp_path: Path) -> list[str]:
    texts = some_texts(300, 3, distinct=150)
    bad = b'{"text": 5}\n'
    one = write(tmp_path / "a.jsonl", lines(*texts[:200]) + bad + lines(*texts[200:]) + bad)
    return [one, write(tmp_path / "b.jsonl.gz", lines(*texts[50:150])), write(tmp_path / "c.txt", b"a text")]


def test_stopped_anywhere_it_goes_on_to_the_same_result(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"on_bad_record": "skip", "val_fraction": 0.1, "shard_mb": 0.004}
    run = prepare_run(tmp_path, *corpus(tmp_path), output="whole", **settings)
    manifest = run_prepare(run)
    expected = contents(tmp_path / "whole")
    assert not any("parts" in name or name.startswith(".") for name in expected)
    assert {record["line"] for record in quarantine(run)} == {201, 302}
    counting = Tasks()
    prepare(prepare_run(tmp_path, *corpus(tmp_path), output="counting", **settings), lambda _: None, counting)
    assert counting.done > len(counting.tokenized) > 8
    for stop in range(counting.done):
        run = prepare_run(tmp_path, *corpus(tmp_path), output=f"stopped-{stop}", **settings)
        before, after = Tasks(stop), Tasks()
        with pytest.raises(Stopped):
            prepare(run, lambda _: None, before)
        assert not (tmp_path / f"stopped-{stop}/manifest.json").exists()
        again = prepare(run, lambda _: None, after)
        assert contents(tmp_path / f"stopped-{stop}") == expected
        assert again.fingerprint == manifest.fingerprint
        assert sorted(before.tokenized + after.tokenized) == sorted(counting.tokenized)  # nothing twice


def test_order_of_tasks_does_not_matter(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"on_bad_record": "skip", "shard_mb": 0.003, "dedup": "near"}
    results = []
    for i, execute in enumerate((in_process, Tasks())):
        run = prepare_run(tmp_path, *corpus(tmp_path), output=f"out{i}", **settings)
        prepare(run, lambda _: None, execute)
        results.append(contents(tmp_path / f"out{i}"))
    assert results[0] == results[1]


def test_fail_then_skip_keeps_what_was_done(tmp_path: Path) -> None:
    sources = corpus(tmp_path)
    fails = prepare_run(tmp_path, *sources, shard_mb=0.004)
    with pytest.raises(UserError, match=r"a\.jsonl: line 201: no text"):  # of two, the first
        prepare(fails, lambda _: None, Tasks())
    done = {int(path.name[:5]) for path in (tmp_path / "out/parts").glob("0*.json")}
    tasks = Tasks()
    skips = prepare_run(tmp_path, *sources, shard_mb=0.004, on_bad_record="skip")
    prepare(skips, lambda _: None, tasks)
    assert done
    assert not done & set(tasks.tokenized)
    clean = prepare_run(tmp_path, *sources, shard_mb=0.004, on_bad_record="skip", output="clean")
    run_prepare(clean)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


@pytest.mark.parametrize("seed", range(6))
def test_the_first_bad_record_is_reported_whichever_task_ends_first(tmp_path: Path, seed: int) -> None:
    bad = b'{"text": 5}\n'
    many = [b"".join(lines(*some_texts(20, i)) + bad * (i in (4, 7, 9)) for i in range(12)) for _ in range(2)]
    sources = [write(tmp_path / f"{i}.jsonl", data) for i, data in enumerate(many)]
    run = prepare_run(tmp_path, *sources, shard_mb=0.001)
    tasks = Tasks(seed=seed)
    with pytest.raises(UserError, match=r"0\.jsonl: line 101: no text"):
        prepare(run, lambda _: None, tasks)
    with pytest.raises(UserError, match=r"0\.jsonl: line 101: no text"):  # with what is left to do
        prepare(run, lambda _: None, Tasks(seed=seed + 50))


def test_skip_then_fail_does_not_take_over_what_was_skipped(tmp_path: Path) -> None:
    sources = corpus(tmp_path)
    with pytest.raises(Stopped):
        prepare(prepare_run(tmp_path, *sources, shard_mb=0.004, on_bad_record="skip"), lambda _: None, Tasks(12))
    assert "a.jsonl: line " in failure(prepare_run(tmp_path, *sources, shard_mb=0.004))


def test_parts_of_another_request_are_not_used(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", lines(*some_texts(300)))
    with pytest.raises(Stopped):
        prepare(prepare_run(tmp_path, source, shard_mb=0.002), lambda _: None, Tasks(5))
    other = prepare_run(tmp_path, source, shard_mb=0.01, min_chars=30)
    run_prepare(other)
    clean = prepare_run(tmp_path, source, shard_mb=0.01, min_chars=30, output="clean")
    run_prepare(clean)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_source_that_changed_at_the_same_size_is_read_anew(tmp_path: Path, place: str) -> None:
    import fsspec

    name = str(tmp_path / "a.jsonl") if place == "local" else "memory://same-size/a.jsonl"
    texts = some_texts(300)

    def put(texts: list[str]) -> None:
        fsspec.open(name, "wb").fs.pipe(name, lines(*texts))

    put(texts)
    run = prepare_run(tmp_path, name, shard_mb=0.002)
    with pytest.raises(Stopped):
        prepare(run, lambda _: None, Tasks(5))
    again = Tasks(1)
    with pytest.raises(Stopped):  # nothing changed: it goes on
        prepare(run, lambda _: None, again)
    put(list(reversed(texts)))
    tasks = Tasks()
    prepare(run, lambda _: None, tasks)
    assert set(again.tokenized) < set(tasks.tokenized)
    assert texts_of(run) == unique(list(reversed(texts)))
    clean = prepare_run(tmp_path, name, shard_mb=0.002, output="clean")
    run_prepare(clean)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    put(texts)  # a data set that is finished goes by names and sizes, as before
    assert look(run)[1] is not None


def test_files_of_others_are_not_removed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", lines(*some_texts(50)))
    for name in ("train-7.npy", "val-2024-results.npy.bak", ".train-00000.npy.part"):
        write(tmp_path / "out" / name, b"mine")
    run_prepare(prepare_run(tmp_path, source))
    assert {p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name.count("train-7") or "val" in p.name} == {
        b"mine"
    }
    assert (tmp_path / "out/.train-00000.npy.part").exists()
    mine = Path(write(tmp_path / "other/train-00000.npy", b"mine"))
    assert f"prepare.output: {mine} is there, but not from" in failure(prepare_run(tmp_path, source, output="other"))
    assert mine.read_bytes() == b"mine"


def test_shards_of_a_stopped_preparation_are_removed_for_other_settings(tmp_path: Path) -> None:
    """Also where that is stopped in its turn."""
    source = write(tmp_path / "a.jsonl", lines(*some_texts(300)))
    with pytest.raises(Stopped):
        prepare(prepare_run(tmp_path, source, shard_mb=0.002), lambda _: None, Tasks(5))
    staged = Path(write(tmp_path / "out/.train-00003.1.npy.0123abcd", b"half"))
    other = prepare_run(tmp_path, source, shard_mb=64.0)
    with pytest.raises(Stopped):
        prepare(other, lambda _: None, Tasks(0))
    assert not list((tmp_path / "out").glob("*.npy"))
    assert not staged.exists()
    run_prepare(other)


def test_what_a_killed_preparation_left_beside_its_manifest_goes(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from gpt2dist.cli import main

    source = write(tmp_path / "a.jsonl", lines("one", "two"))
    run = prepare_run(tmp_path, source)
    run_prepare(run)
    before = contents(tmp_path / "out")
    (tmp_path / "run.toml").write_text(run.to_toml())
    for again in (
        lambda: prepare(run, lambda _: None),
        lambda: CliRunner().invoke(main, ["prepare", str(tmp_path / "run.toml")]),
    ):
        write(tmp_path / "out/parts/00000.json", b"{}")
        for name in ("train-00000.npy", "quarantine.jsonl", "manifest.json"):
            write(tmp_path / f"out/.{name}.01234567", b"half")
        again()
        assert contents(tmp_path / "out") == before


def test_up_to_date_and_other_settings(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", lines("one", "two"))
    run = prepare_run(tmp_path, source)
    assert look(run)[1] is None
    manifest = run_prepare(run)
    assert look(run)[1] == manifest
    with pytest.raises(UserError, match="made with other dedup"):
        look(prepare_run(tmp_path, source, dedup="none"))


def test_a_shard_that_was_lost_between_two_attempts_is_noticed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", lines(*["same text"] * 200, *some_texts(100)))
    run = prepare_run(tmp_path, source, shard_mb=0.001)
    with pytest.raises(Stopped):
        prepare(run, lambda _: None, Tasks(8))
    shards = sorted((tmp_path / "out").glob("train-*.npy"))
    shards[-1].write_bytes(b"other")
    shards[-2].unlink()
    run_prepare(run)
    clean = prepare_run(tmp_path, source, shard_mb=0.001, output="clean")
    run_prepare(clean)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_output_on_an_object_store(tmp_path: Path) -> None:
    """fsspec's memory file system stands for one: no directories, no renames, no appends."""
    import fsspec

    settings: dict[str, Any] = {"on_bad_record": "skip", "val_fraction": 0.1, "shard_mb": 0.004}
    run = prepare_run(tmp_path, *corpus(tmp_path), **settings)
    run_prepare(run)
    local = contents(tmp_path / "out")
    remote = run.model_copy(update={"prepare": run.prepare.model_copy(update={"output": "memory://bucket/out"})})
    with pytest.raises(Stopped):
        prepare(remote, lambda _: None, Tasks(5))
    prepare(remote, lambda _: None, Tasks())
    fs = fsspec.filesystem("memory")
    assert {path.removeprefix("/bucket/out/"): fs.cat(path) for path in fs.find("/bucket/out")} == local
    assert list(verify("memory://bucket/out", read_manifest("memory://bucket/out")))


@pytest.mark.parametrize(("line", "kept"), [('{"text": "tweet %d"}', True), ('  "coordinates": %d,', False)])
def test_memory_does_not_grow_with_the_records_of_a_chunk(tmp_path: Path, line: str, kept: bool) -> None:
    """Short documents, and a pretty-printed file each line of which is a bad record."""
    n = 40_000
    source = write(tmp_path / "a.jsonl", "".join(line % i + "\n" for i in range(n)).encode())
    run = prepare_run(tmp_path, source, on_bad_record="skip", dedup="none")
    (tmp_path / "out").mkdir()
    (pieces,) = sources.cut(sources.inventory(run.prepare).pieces, 10**9)
    tokenizer.load()
    tracemalloc.start()
    part = chunk.tokenize_chunk(0, pieces, run.prepare)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.bad == (0 if kept else n)
    assert peak < (200 * n if kept else 2e6), peak


FULL = """
import resource, signal, sys
from gpt2dist.config import UserError
from gpt2dist.data.prepare import prepare
from tests.unit.corpora import in_process, prepare_run
from pathlib import Path

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    prepare(prepare_run(Path(sys.argv[1]), sys.argv[2], on_bad_record="skip"), lambda _: None, in_process)
except UserError as e:
    print(e)
"""


@pytest.mark.parametrize(("limit", "whose"), [(1000, "task"), (9000, "driver")])
def test_a_disk_that_is_full_is_named(tmp_path: Path, limit: int, whose: str) -> None:
    """As no more may be written: to the shards of a task, or to what the driver writes from all of them."""
    lines_ = [*lines(*some_texts(40)).decode().splitlines(), *["no JSON"] * (60 if whose == "driver" else 0)]
    halves = ["\n".join(lines_[i::2]).encode() for i in range(2)]
    for i, half in enumerate(halves):
        write(tmp_path / f"texts/{i}.jsonl", half)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(tmp_path / "texts"), str(limit)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "out"
    start = "prepare: " if whose == "task" else ""
    assert done.stdout == f"{start}{out}: {os.strerror(errno.EFBIG)}\n"
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
