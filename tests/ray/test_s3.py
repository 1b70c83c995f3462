"""Everything on an S3 server: prepare, train, resume, audit; the server killed; wrong keys."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.config import RunConfig
from gpt2dist.storage import children, location
from tests.conftest import tiny_run
from tests.distributed.test_engine import logged
from tests.ray.test_train import CLI, assert_audit, events, steps_done, write
from tests.s3 import S3Server
from tests.unit.corpora import lines

BUCKET = "test"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with an empty bucket, which this process and its children find by the variables of AWS."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    server.filesystem().mkdir(BUCKET)
    env = {**server.env, "GPT2DIST_CACHE": str(tmp_path_factory.mktemp("cache"))}
    saved = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    yield server
    server.kill()
    for name, value in saved.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def corpus() -> bytes:
    return lines(*(f"document {i} " + " ".join(str(i * j) for j in range(60)) for i in range(400)))


def run_with(root: str, **changes: Any) -> RunConfig:
    """A run with its sources, data set and run directory below `root`."""
    changes = {"prepare__sources": [f"{root}/corpus/*.jsonl"], "prepare__output": f"{root}/data"} | changes
    changes = {"prepare__shard_mb": 0.05, "prepare__val_fraction": 0.1, "prepare__cpus": 2, "storage": root} | changes
    return tiny_run(**changes)


def done(result: Any) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return str(result.stdout)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run on local disk that every other one must equal: prepared and trained without an interruption."""
    import subprocess

    root = tmp_path_factory.mktemp("disk")
    (root / "corpus").mkdir()
    (root / "corpus/a.jsonl").write_bytes(corpus())
    run = run_with(str(root))
    for command in ("prepare", "train"):
        done(
            subprocess.run(
                [*CLI, command, str(write(run, root))], capture_output=True, text=True, timeout=120, check=False
            )
        )
    return run


@pytest.mark.timeout(240)
def test_everything_on_s3(s3: S3Server, on_disk: RunConfig, gpt2dist: Run, tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/all"
    s3.filesystem().pipe_file(f"{BUCKET}/all/corpus/a.jsonl", corpus())
    run = run_with(root)
    run_file = str(write(run, tmp_path))
    prepared = json.loads(done(gpt2dist("prepare", run_file, "--json")))
    manifest = json.loads((Path(on_disk.data_path) / "manifest.json").read_text())
    on_s3 = json.loads((location(run.data_path) / "manifest.json").read_bytes())
    assert on_s3["splits"] == manifest["splits"]
    assert len(on_s3["splits"]["train"]) > 2
    done(gpt2dist("data", "verify", run.data_path))
    assert json.loads(done(gpt2dist("data", "inspect", run.data_path, "--json")))["documents"] == prepared["documents"]

    done(gpt2dist("train", run_file, "--set", "train.stop_at=7"))
    assert steps_done(run) == 7
    done(gpt2dist("train", run_file))
    assert logged(run) == logged(on_disk)
    assert logged(run, "val_loss") == logged(on_disk, "val_loss")
    assert [e["step"] for e in events(run, "start")] == [0, 7]
    assert_audit(gpt2dist, run, 12)
    listed = json.loads(done(gpt2dist("checkpoint", "ls", run.run_dir, "--json")))
    assert [(c["step"], c["valid"]) for c in listed] == [(12, True), (8, True)]
    done(gpt2dist("checkpoint", "verify", run.run_dir))
    assert done(gpt2dist("generate", run.run_dir, "--prompt", "import os", "--max-tokens", "3")).startswith("import os")
    assert "nothing to do" in done(gpt2dist("train", run_file))
    names = {path.name for path in children(location(run.run_dir))}
    assert names == {"checkpoints", "config.toml", "events.jsonl", "events.1.jsonl", "ledger.jsonl", "metrics.jsonl"}
