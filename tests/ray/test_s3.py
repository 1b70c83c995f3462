"""Everything on an S3 server: prepare, train, resume, audit; the server killed; wrong keys."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs

from gpt2dist.config import RunConfig
from gpt2dist.data.blocks import local_blocks
from gpt2dist.storage import location, writing
from tests.conftest import tiny_run
from tests.distributed import jobs
from tests.distributed.test_engine import logged
from tests.ranks import run_ranks
from tests.ray.test_train import assert_audit, events, steps_done, training, wait_for, write
from tests.s3 import SECRET_KEY, S3Server, outage, throttled
from tests.unit.corpora import lines, run_prepare

pytestmark = pytest.mark.s3
BUCKET = "test"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with an empty bucket, which this process and its children find by the variables of AWS."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    server.filesystem().mkdir(BUCKET)
    env = {**server.env}
    env |= {name: str(tmp_path_factory.mktemp("local")) for name in ("GPT2DIST_CACHE", "TMPDIR")}
    saved = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    s3fs.S3FileSystem.clear_instance_cache()  # clients of other tests know another endpoint
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


def text(run: RunConfig, name: str) -> str:
    return str((location(run.run_dir) / name).read_bytes().decode())


def copy_data(s3: S3Server, on_disk: RunConfig, root: str) -> None:
    """The data set of the local run, on S3."""
    for path in Path(on_disk.prepare.output).iterdir():
        if path.suffix in (".npy", ".json"):
            s3.filesystem().pipe_file(f"{root.removeprefix('s3://')}/data/{path.name}", path.read_bytes())


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run on local disk that every other one must equal: without Ray, without an interruption."""
    root = tmp_path_factory.mktemp("disk")
    (root / "corpus").mkdir()
    (root / "corpus/a.jsonl").write_bytes(corpus())
    run = run_with(str(root))
    run_prepare(run)
    run_ranks(jobs.train_runs, 2, ([run],), root / "rendezvous", timeout=120)
    return run


@pytest.mark.timeout(240)
def test_everything_on_s3(s3: S3Server, on_disk: RunConfig, gpt2dist: Run, tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/all"
    s3.filesystem().pipe_file(f"{BUCKET}/all/corpus/a.jsonl", corpus())
    run = run_with(root)
    run_file = str(write(run, tmp_path))
    prepared = json.loads(done(gpt2dist("prepare", run_file, "--json")))
    manifest = json.loads((Path(on_disk.prepare.output) / "manifest.json").read_text())
    on_s3 = json.loads((location(run.prepare.output) / "manifest.json").read_bytes())
    assert on_s3["splits"] == manifest["splits"]
    assert len(on_s3["splits"]["train"]) > 2
    done(gpt2dist("data", "verify", run.prepare.output))
    inspected = json.loads(done(gpt2dist("data", "inspect", run.prepare.output, "--json")))
    assert inspected["documents"] == prepared["documents"]

    done(gpt2dist("train", run_file, "--set", "train.stop_at=7"))
    assert steps_done(run) == 7
    done(gpt2dist("train", run_file))
    assert logged(run) == logged(on_disk)
    assert logged(run, "val_loss") == logged(on_disk, "val_loss")
    assert [e["step"] for e in events(run, "start")] == [0, 7]
    assert_audit(gpt2dist, run, 12)
    assert [m["step"] for m in map(json.loads, text(run, "metrics.jsonl").splitlines())] == list(range(12))
    listed = json.loads(done(gpt2dist("checkpoint", "ls", run.run_dir, "--json")))
    assert [(c["step"], c["valid"]) for c in listed] == [(12, True), (8, True)]
    done(gpt2dist("checkpoint", "verify", run.run_dir))
    assert done(gpt2dist("generate", run.run_dir, "--prompt", "import os", "--max-tokens", "3")).startswith("import os")
    assert "nothing to do" in done(gpt2dist("train", run_file))
    objects = s3.filesystem().find(run.run_dir)  # SeaweedFS lists directories that became empty, Amazon's does not
    names = {name.split("/")[3] for name in objects}
    of_events = {name for name in names if re.fullmatch(r"events(\.\d)?\.jsonl", name)}
    assert names - of_events == {"checkpoints", "config.toml", "ledger.jsonl", "metrics.jsonl"}
    # Of two commands: when the driver begins, when it reserves room, those of the workers, when it ends.
    assert len(of_events) == 8


@pytest.mark.timeout(240)
def test_server_away_while_shards_are_read_and_while_saving(
    s3: S3Server, on_disk: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2DIST_CACHE", str(tmp_path / "cache"))
    root = f"s3://{BUCKET}/killed"
    copy_data(s3, on_disk, root)
    run = run_with(root, cluster__max_failures=0)
    with training(write(run, tmp_path)) as process:

        def away_when(condition: Callable[[], Any]) -> float:
            wait_for(lambda: condition() or process.poll() is not None, 100)
            assert process.poll() is None, process.communicate()[0]
            s3.kill()
            time.sleep(10)
            back = time.time()
            s3.start()
            return back

        away_when(lambda: events(run, "start"))  # neither the training nor the validation shards were read yet
        assert not steps_done(run)
        back = away_when(lambda: steps_done(run))  # the first save, after step 4, is some tenths of a second away
        assert all(commit["time"] > back for commit in events(run, "commit"))
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert len(events(run, "start")) == 1
    assert not events(run, "failure")
    assert logged(run) == logged(on_disk)
    assert logged(run, "val_loss") == logged(on_disk, "val_loss")


@pytest.mark.timeout(420)
def test_server_away_for_30_s_during_a_save_and_during_a_load(
    s3: S3Server, on_disk: RunConfig, gpt2dist: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the last file of a checkpoint is sent, and when the first numbers of one are fetched."""
    monkeypatch.setenv("GPT2DIST_CACHE", str(tmp_path / "cache"))
    root = f"s3://{BUCKET}/outage"
    copy_data(s3, on_disk, root)
    run = run_with(root, cluster__max_failures=0)
    run_file = str(write(run, tmp_path))

    def a_file_is(method: str) -> Callable[[str, str], bool]:
        return lambda command, path: command == method and "/rank-00001.safetensors" in path

    with outage(s3, 30, a_file_is("PUT")) as (away, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        done(gpt2dist("train", run_file, "--set", "train.stop_at=7", timeout=240))
    assert away.ended - away.began >= 30
    trained = [m["step"] for m in map(json.loads, text(run, "metrics.jsonl").splitlines()) if m["time"] > away.began]
    assert max(m for m in trained) == 6
    during = [
        m["step"]
        for m in map(json.loads, text(run, "metrics.jsonl").splitlines())
        if away.began < m["time"] < away.ended
    ]
    assert during, "training waited for the storage"
    with outage(s3, 30, a_file_is("GET")) as (away, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        done(gpt2dist("train", run_file, timeout=240))
    assert away.ended - away.began >= 30
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.env["AWS_ENDPOINT_URL"])
    s3fs.S3FileSystem.clear_instance_cache()
    assert [(e["attempt"], e["step"]) for e in events(run, "start")] == [(1, 0), (2, 7)]
    assert not events(run, "failure")
    assert not events(run, "bad_checkpoint")
    assert logged(run) == logged(on_disk)
    assert logged(run, "val_loss") == logged(on_disk, "val_loss")
    assert_audit(gpt2dist, run, 12)


@pytest.mark.timeout(60)
def test_an_upload_that_is_broken_off_leaves_nothing(s3: S3Server) -> None:
    path = location(f"s3://{BUCKET}/broken/f")

    def write_half() -> None:
        with writing(path) as f:
            for _ in range(5):  # several parts
                f.write(b"x" * (16 << 20))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    fs = s3.filesystem()
    assert not fs.exists(f"{BUCKET}/broken/f")
    uploads = fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])
    assert [u for u in uploads if "broken" in u["Key"]] == []


def manifest_of(root: Path, on_s3: str) -> bytes:
    """The manifest of a local data set, if its sources lay on S3."""
    return (root / "data/manifest.json").read_bytes().replace(str(root).encode(), on_s3.encode())


@pytest.mark.timeout(300)
def test_server_away_while_preparing(s3: S3Server, tmp_path: Path) -> None:
    """Sources are read from it, shards and parts written to it: the same bytes as on disk."""
    rng = random.Random(5)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 12))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=800)) for _ in range(2000)]
    data = lines(*texts[:1000]) + b'{"text": 5}\n' + lines(*texts[1000:], texts[3])
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.jsonl").write_bytes(data)
    changes: dict[str, Any] = {"prepare__shard_mb": 0.3, "prepare__on_bad_record": "skip"}
    run_prepare(run_with(str(tmp_path), **changes))
    root = f"s3://{BUCKET}/preparing"
    s3.filesystem().pipe_file(f"{BUCKET}/preparing/corpus/a.jsonl", data)
    run = run_with(root, **changes)
    command = [sys.executable, "-m", "gpt2dist", "prepare", str(write(run, tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:

        def parts() -> int:
            return len(s3.filesystem().glob(f"{BUCKET}/preparing/data/parts/0*.json"))

        wait_for(lambda: parts() >= 3 or process.poll() is not None, 100)
        assert process.poll() is None, process.communicate()[0]
        assert parts() < 25  # there is something left to do
        s3.kill()
        time.sleep(10)
        assert process.poll() is None, process.communicate()[0]
        s3.start()
        output, _ = process.communicate(timeout=150)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    local = tmp_path / "data"
    remote = location(run.prepare.output)
    assert (remote / "manifest.json").read_bytes() == manifest_of(tmp_path, root)
    quarantine = (local / "quarantine.jsonl").read_bytes().replace(str(tmp_path).encode(), root.encode())
    assert (remote / "quarantine.jsonl").read_bytes() == quarantine
    shards = sorted(local.glob("*.npy"))
    assert len(shards) > 30
    assert {path.name for path in remote.iterdir() if path.suffix == ".npy"} == {path.name for path in shards}
    for path in shards:
        assert (remote / path.name).read_bytes() == path.read_bytes()


@pytest.mark.timeout(240)
def test_a_server_that_throttles(
    s3: S3Server, on_disk: RunConfig, gpt2dist: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of all requests is answered with 503 SlowDown or 429."""
    root = f"s3://{BUCKET}/throttled"
    s3.filesystem().pipe_file(f"{BUCKET}/throttled/corpus/a.jsonl", corpus())
    run = run_with(root)
    monkeypatch.setenv("GPT2DIST_CACHE", str(tmp_path / "cache"))
    with throttled(s3, share=1 / 3, seed=4) as (proxy, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            done(gpt2dist("prepare", str(write(run, tmp_path)), timeout=150))
            assert min(proxy.refused.values()) > 10, proxy.refused
            disk = Path(on_disk.prepare.output)
            assert (location(run.prepare.output) / "manifest.json").read_bytes() == manifest_of(disk.parent, root)
            done(gpt2dist("data", "verify", run.prepare.output))
            for mine, reference in zip(local_blocks(run, 0, 1, 0), local_blocks(on_disk, 0, 1, 0), strict=True):
                assert np.array_equal(mine["tokens"], reference["tokens"])
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
    assert sum(proxy.refused.values()) > proxy.passed / 4


def refusal(result: Any) -> str:
    """The one line on stderr."""
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


@pytest.mark.timeout(120)
def test_no_such_bucket(s3: S3Server, on_disk: RunConfig, gpt2dist: Run, tmp_path: Path) -> None:
    run_file = str(write(on_disk, tmp_path))
    for key, args in (("storage", ["train"]), ("data.path", ["train"]), ("prepare.output", ["prepare"])):
        line = refusal(gpt2dist(*args, run_file, "--set", f"{key}=s3://nothing-here/x"))
        assert "s3://nothing-here/x" in line
        assert "no such bucket" in line
    assert "no such bucket" in refusal(gpt2dist("audit", "s3://nothing-here/x"))
    assert not s3.filesystem().exists("nothing-here")


@pytest.mark.timeout(120)
def test_wrong_keys(
    s3: S3Server, on_disk: RunConfig, gpt2dist: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-but-secret")
    run_file = str(write(on_disk, tmp_path))
    for key, args in (("storage", ["train"]), ("data.path", ["train"]), ("prepare.output", ["prepare"])):
        line = refusal(gpt2dist(*args, run_file, "--set", f"{key}=s3://{BUCKET}/denied"))
        assert f"s3://{BUCKET}/denied" in line
        assert "access denied" in line
        assert "wrong-but-secret" not in line
    assert "access denied" in refusal(gpt2dist("checkpoint", "ls", f"s3://{BUCKET}/all/run"))


def test_the_secret_key_is_nowhere(s3: S3Server) -> None:
    """In no object that the tests above made, and in no log."""
    fs = s3.filesystem()
    objects = fs.find(BUCKET)
    assert any(name.endswith("config.toml") for name in objects)
    for name in objects:
        assert SECRET_KEY.encode() not in fs.cat_file(name), name
    logs = [path for path in Path(os.environ["TMPDIR"]).rglob("*") if path.is_file()]
    assert any(path.name == "log.txt" for path in logs)
    for path in logs:
        assert SECRET_KEY.encode() not in path.read_bytes(), path
