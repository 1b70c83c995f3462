"""`gpt2dist prepare`, the whole command, against tiktoken alone; and the peak memory at two sizes of corpus."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from gpt2dist.data import tokenizer
from tests.bench.common import Row, interleaved, write_corpus

THREADS = 2
CORPUS_MB, SMALL_MB, LARGE_MB = 900, 500, 2000
RUN = """
name = "bench"
[model]
preset = "tiny"
[prepare]
sources = ["{corpus}"]
output = "{output}"
cpus = {cpus}
"""


def start_prepare(directory: Path, corpus: Path) -> subprocess.Popen[bytes]:
    """The command as a user runs it, into a new output directory."""
    output = directory / "out"
    shutil.rmtree(output, ignore_errors=True)
    run_file = directory / "run.toml"
    run_file.write_text(RUN.format(corpus=corpus, output=output, cpus=THREADS))
    command = [sys.executable, "-m", "gpt2dist", "prepare", str(run_file), "--json"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def speed() -> Iterator[Row]:
    """Seconds of tiktoken's encode_ordinary_batch on texts in memory ÷ seconds of the whole command."""
    encoding = tokenizer.load()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpus = directory / "corpus.jsonl"
        texts = write_corpus(corpus, CORPUS_MB)

        def raw() -> float:
            start = time.perf_counter()
            for i in range(0, len(texts), 1000):  # in batches: all ids at once are gigabytes of Python integers
                encoding.encode_ordinary_batch(texts[i : i + 1000], num_threads=THREADS)
            return time.perf_counter() - start

        def whole() -> float:
            start = time.perf_counter()
            assert start_prepare(directory, corpus).wait(600) == 0
            return time.perf_counter() - start

        ratios = interleaved(raw, whole)
    yield Row(f"prepare / raw tiktoken, {CORPUS_MB} MB, {THREADS} threads", ratios, 0.90, "MB/s ratio")


def memory() -> Iterator[Row]:
    """Peak of the proportional set size of the command and all its processes, large corpus ÷ small corpus."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpora = {mb: directory / f"{mb}.jsonl" for mb in (LARGE_MB, SMALL_MB)}
        for mb, path in corpora.items():
            write_corpus(path, mb)
        peaks = [{mb: _peak(start_prepare(directory, path)) for mb, path in corpora.items()} for _ in range(2)]
    ratios = [peak[LARGE_MB] / peak[SMALL_MB] for peak in peaks]
    small = sum(peak[SMALL_MB] for peak in peaks) / len(peaks) / 1e9
    name = f"memory of prepare, {LARGE_MB} MB / {SMALL_MB} MB ({small:.2f} GB)"
    yield Row(name, ratios, 1.5, "peak bytes ratio", at_most=True)


def _peak(process: subprocess.Popen[bytes]) -> float:
    peak = 0
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        peak = max(peak, sum(_pss(p.pid) for p in family))
        time.sleep(0.2)
    assert process.wait() == 0
    return float(peak)


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("Pss:"))
    except (OSError, StopIteration):  # it has ended
        return 0
