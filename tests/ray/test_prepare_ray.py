"""The command `prepare` on Ray: the same bytes with 1 and 2 CPUs, and after Ctrl-C and two kills at random moments."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.corpora import contents, lines, write

RUN = """
name = "run"
[model]
preset = "tiny"
[prepare]
sources = ["corpus/*.jsonl", "corpus/*.gz"]
output = "out"
on_bad_record = "skip"
shard_mb = {shard_mb}
"""


def make_corpus(tmp_path: Path, megabytes: float, shard_mb: float) -> list[str]:
    """Documents of random words; a few duplicates and bad lines, all of them at the end."""
    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 12))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=1500)) for _ in range(int(megabytes * 90))]
    half = len(texts) // 2
    write(tmp_path / "corpus/a.jsonl", lines(*texts[:half]))
    write(tmp_path / "corpus/b.jsonl", lines(*texts[half:], texts[0]) + b'{"text": 5}\n{"text": "\xff"}\n')
    write(tmp_path / "corpus/c.jsonl.gz", lines(texts[0], texts[1], "the last document"))
    (tmp_path / "run.toml").write_text(RUN.format(shard_mb=shard_mb))
    return texts


def start(tmp_path: Path, output: str, cpus: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpt2dist", "prepare", "run.toml", "--json"]
    command += ["--set", f"prepare.output={output}", "--set", f"prepare.cpus={cpus}"]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


def kill(process: subprocess.Popen[str]) -> None:
    """As when the machine goes: the command and every process that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: one line, and no process is left."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "interrupted; the same command goes on with what is left"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.mark.timeout(600)
def test_cpus_and_kills_change_no_byte(tmp_path: Path) -> None:
    texts = make_corpus(tmp_path, megabytes=14, shard_mb=0.5)
    expected = finish(start(tmp_path, "two", 2))
    assert expected["documents"] == {"read": len(texts) + 6, "kept": len(texts) + 1, "skipped": 5}
    assert finish(start(tmp_path, "one", 1)) == expected
    files = contents(tmp_path / "two")
    assert contents(tmp_path / "one") == files
    assert len(json.loads(files["manifest.json"])["splits"]["train"]) > 20
    quarantine = [json.loads(line) for line in files["quarantine.jsonl"].splitlines()]
    lines_in_b = len(texts) - len(texts) // 2 + 1
    assert [(r["reason"], r["line"]) for r in quarantine] == [
        ("no text", lines_in_b + 1),
        ("invalid UTF-8", lines_in_b + 2),
    ]

    rng = random.Random(11)
    parts = tmp_path / "killed/parts"
    done: dict[str, int] = {}
    goals = sorted(rng.sample(range(1, 18), 3))
    for goal in goals:
        process = start(tmp_path, "killed", 2)
        least = max(goal, len(done) + 1)
        wait_until(lambda least=least: len(list(parts.glob("0*.json"))) >= least, process)
        if goal == goals[0]:
            interrupt(process)
        else:
            time.sleep(rng.random() / 4)
            kill(process)
        assert not (tmp_path / "killed/manifest.json").exists()
        now = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*.json")}
        assert len(now) >= least
        assert {name: now[name] for name in done} == done, "a finished chunk was done again"
        done = now
    shards = {name: (tmp_path / "killed" / f"train-{name[:5]}.npy").stat().st_mtime_ns for name in done}
    assert finish(start(tmp_path, "killed", 2)) == expected
    assert contents(tmp_path / "killed") == files
    for name, when in shards.items():
        assert (tmp_path / "killed" / f"train-{name[:5]}.npy").stat().st_mtime_ns == when, "done again"


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_preparations_in_one_directory(tmp_path: Path) -> None:
    make_corpus(tmp_path, megabytes=10, shard_mb=0.5)
    process = start(tmp_path, "out", 1)
    wait_until(lambda: (tmp_path / "out/.lock").exists(), process)
    second = start(tmp_path, "out", 1)
    _, err = second.communicate(timeout=60)
    assert process.poll() is None
    assert second.returncode == 2
    assert err.splitlines() == ["error: out: another process is preparing this data set"]
    expected = finish(process)
    assert finish(start(tmp_path, "out", 1)) == expected  # up to date
    assert subprocess.run([sys.executable, "-m", "gpt2dist", "data", "verify", "out"], cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_a_task_whose_process_always_dies_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """As when memory does not suffice for a document: Ray itself would try for ever."""
    make_corpus(tmp_path, megabytes=30, shard_mb=64)
    process = start(tmp_path, "out", 1)
    deaths = tmp_path / "out/parts/00000.deaths"
    try:
        for n in range(1, 4):
            wait_until(lambda n=n: deaths.exists() and deaths.stat().st_size == n, process)
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ray::Map" in " ".join(child.cmdline()):
                        child.kill()
        _, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill(process)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert line.startswith("error: run.toml: prepare: ")
    assert "corpus/a.jsonl (byte 0) to " in line
    assert "corpus/c.jsonl.gz (byte " in line
    assert "the process that read this died 3 times" in line
    finish(start(tmp_path, "out", 1))  # the next preparation counts from zero


def test_a_bad_record_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    make_corpus(tmp_path, megabytes=0.1, shard_mb=64)
    command = [sys.executable, "-m", "gpt2dist", "prepare", "run.toml", "--set", "prepare.on_bad_record=fail"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: corpus/b.jsonl: line 7: no text (no string in field 'text'); "
        "to leave such records out: --set prepare.on_bad_record=skip"
    ]
    assert not (tmp_path / "out/manifest.json").exists()
