"""Saving in the background, on two real ranks, while storage misbehaves: the losses do not know of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.config import RunConfig
from gpt2dist.data.mixture import Mixture
from gpt2dist.train import checkpoint, ledger, rundir
from gpt2dist.train.checkpoint import Checkpoint
from gpt2dist.train.watchdog import EXIT_CODE
from tests.conftest import ROOT, tiny_run
from tests.distributed import jobs, saves
from tests.distributed.test_engine import logged

Ranks = Callable[..., list[Any]]


def events(run: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in rundir.events_log(run.run_dir).read() if e["event"] == kind]


def saved(run: RunConfig) -> dict[int, Checkpoint]:
    """Step → checkpoint; all must be good."""
    found = list(checkpoint.committed(run.run_dir))
    for c in found:
        assert isinstance(c, Checkpoint), c
        checkpoint.verify(c)
    return {c.index.step: c for c in found if isinstance(c, Checkpoint)}


def hashes(found: Checkpoint) -> list[list[str]]:
    return [f.sha256 for f in found.index.files]


def assert_clean(run: RunConfig, step: int = 12) -> None:
    lines = rundir.ledger_log(run.run_dir).read()
    assert [line["step"] for line in lines] == list(range(step))
    audit = ledger.audit(run, Mixture.open(run), lines, step)
    assert audit.clean
    assert audit.samples == step * run.global_batch


@pytest.mark.timeout(240)
def test_a_storage_that_fails_changes_no_loss(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    data = make_data([3000])

    def run(name: str, **changes: Any) -> RunConfig:
        keys = {"eval__every_steps": 0, "checkpoint__keep": 20, "data__path": data, "storage": str(tmp_path)}
        return tiny_run(name=name, **{**keys, **changes})

    blocking = run("blocking", checkpoint__background=False, checkpoint__every_steps=1)
    one, index = run("one"), run("index")
    slow = run("slow", checkpoint__every_steps=1, train__steps=12)
    late = run("late", checkpoint__retry_minutes=0.02)
    kept = run("kept", checkpoint__every_steps=2, checkpoint__keep=1, checkpoint__keep_every=4)
    calls = [(blocking, saves.none), (one, saves.rank_1_cannot_write), (index, saves.index_cannot_be_written)]
    calls += [(slow, saves.slow_disk), (late, saves.rank_1_never_writes_again), (kept, saves.none)]
    full = run("full", checkpoint__every_steps=2, checkpoint__keep=1)
    calls += [(full, saves.old_ones_cannot_be_deleted)]
    results = ranks(saves.train_all, 2, calls)
    assert results[0] == results[1]
    reference = saved(blocking)
    assert list(reference) == list(range(12, 0, -1))
    for other in (one, index, slow, late, kept, full):
        assert logged(other) == logged(blocking), other.name
    ends = dict(zip(("blocking", "one", "index", "slow", "late", "kept", "full"), results[0], strict=True))

    # A rank that cannot write: nothing is committed, and it is tried again.
    assert ends["one"] == {"start": 0, "end": "finished"}
    failures, commits = events(one, "save_failed"), events(one, "commit")
    assert {4 <= e["step"] < 9 for e in failures} == {True}
    assert len(failures) >= 2
    assert all(e["reason"].startswith("OSError: [Errno 27] File too large") for e in failures)
    assert min(e["step"] for e in commits) >= 9
    assert list(saved(one)) == [e["step"] for e in reversed(commits)]

    # Rank 0 cannot commit: the same; and the ledger has each line once.
    assert {e["step"] for e in events(index, "save_failed")} <= {4, 5, 6}
    assert "index.json" in events(index, "save_failed")[0]["reason"]
    assert 6 < min(saved(index)) < 12

    # A slow disk: one save at a time, of the state at its beginning, whatever was trained since.
    steps = sorted(saved(slow))
    assert steps[0] == 1
    assert steps[-1] == 12
    assert len(steps) < 12  # put off while another one was in flight
    assert [e["step"] for e in events(slow, "commit")] == steps
    for step, found in saved(slow).items():
        assert hashes(found) == hashes(reference[step]), step

    # The last state cannot be saved: an end that says so; what was saved before stays, and is gone on from.
    assert ends["late"]["end"] == (
        "the state of step 12 could not be saved: OSError: [Errno 27] File too large; the newest checkpoint is that of "
        "step 8"
    )
    assert list(saved(late)) == [8, 4]
    assert not events(late, "end")
    again = ranks(saves.train_all, 2, [(late, saves.none)])[0]
    assert again == [{"start": 8, "end": "finished"}]
    assert logged(late) == logged(blocking)
    newest = saved(late)[12]
    assert hashes(newest) == hashes(reference[12])
    assert [f.file for f in newest.index.files] == ["rank-00000.2.safetensors", "rank-00001.2.safetensors"]

    # What is saved stays saved, whether or not older ones can be deleted.
    assert ends["full"]["end"] == "finished"
    assert events(full, "save_failed") == []
    assert list(saved(full)) == [e["step"] for e in reversed(events(full, "not_deleted"))]
    assert events(full, "not_deleted")[-1]["reason"] == "not permitted"
    for found in saved(full).values():
        checkpoint.verify(found)

    # Retention.
    assert list(saved(kept)) == [12, 8, 4]
    for each in (blocking, one, index, slow, late, kept):
        assert_clean(each)
        directories = {path.name for path in (Path(each.run_dir) / "checkpoints").iterdir()}
        unfinished = directories - {f"step-{step:08d}" for step in saved(each)}
        assert all(name < "step-00000012" for name in unfinished)
        for found in saved(each).values():
            assert {p.name for p in found.path.iterdir()} == {"index.json", *found.files}


@pytest.mark.timeout(120)
def test_what_dead_attempts_left_is_cleared(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), train__stop_at=4)
    ranks(saves.train, 2, run)
    good = saved(run)[4]
    begun = Path(checkpoint.step_directory(run.run_dir, 8))
    begun.mkdir()
    for name in ("rank-00000.safetensors", ".rank-00001.safetensors.3f2a91bc"):
        (begun / name).write_bytes(b"x" * 100)
    (good.path / "rank-00001.2.safetensors").write_bytes(b"x")  # of a straggler
    ended = ranks(saves.train, 2, run.model_copy(update={"train": run.train.model_copy(update={"stop_at": 6})}))
    assert ended[0] == {"start": 4, "end": "stopped"}
    assert not begun.exists()
    assert list(saved(run)) == [6, 4]


@pytest.mark.timeout(120)
def test_storage_that_is_not_shared_is_told(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    changes = {"checkpoint__retry_minutes": 0.0, "train__stop_at": 2, "checkpoint__every_steps": 0}
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), **changes)
    (first, _) = ranks(saves.train_where_nothing_is_shared, 2, run)
    assert "rank-00001.safetensors: missing" in first["end"]
    assert "do all workers write to the same storage?" in first["end"]
    assert first["end"].endswith("; there is no checkpoint")


@pytest.mark.timeout(180)
def test_no_evaluation_holds_up_the_last_save(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """It would be over after the machine has gone; where there is time for it, it is made."""
    changes = {"storage": str(tmp_path), "data__path": make_data([3000]), "eval__every_steps": 5}
    changes |= {"checkpoint__every_steps": 3, "batch__micro_batches": 1, "cluster__workers": 1}
    ends = {}
    for seconds_left, steps, evaluated in ((4.5, 60, [5]), (60.0, 12, [5, 10, 12])):
        run = tiny_run(name=f"left-{seconds_left}", train__steps=steps, **changes)
        (ends[seconds_left],) = ranks(jobs.train_on_a_leaving_machine, 1, run, 6, seconds_left, 3.0)
        rows = rundir.metrics_log(run.run_dir).read()
        assert [row["step"] + 1 for row in rows if "val_loss" in row] == evaluated
        assert max(saved(run)) == len(rows)
    assert ends == {4.5: "preempted", 60.0: "finished"}


@pytest.mark.timeout(120)
def test_only_what_hangs_is_taken_for_a_hang(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """Neither a last save that is tried again, nor a step and an evaluation which together take longer."""
    changes = {"storage": str(tmp_path), "data__path": make_data([3000]), "cluster__hang_timeout_s": 3.0}
    changes |= {"cluster__workers": 1, "checkpoint__every_steps": 0}
    retried = tiny_run(name="retried", **changes, eval__every_steps=0, checkpoint__retry_minutes=0.15)
    slow = tiny_run(name="slow", **changes, eval__every_steps=2, train__steps=4)
    calls = [(retried, saves.nothing_can_be_written), (slow, saves.slow_steps_and_evaluations)]
    ((first, second),) = ranks(saves.train_all, 1, calls)
    assert first["end"].startswith("the state of step 12 could not be saved: ")
    assert second["end"] == "finished"
    assert events(retried, "hang") == events(slow, "hang") == []


@pytest.mark.timeout(120)
def test_a_write_that_never_ends_holds_no_failed_worker(make_data: Callable[..., str], tmp_path: Path) -> None:
    """The watchdog ends it: nobody else would, where it is alone."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), cluster__workers=1, cluster__hang_timeout_s=2.0)
    code = "import sys; from tests.distributed import saves; saves.fail_while_a_write_hangs(*sys.argv[1:])"
    command = [sys.executable, "-c", code, run.model_dump_json(), str(tmp_path / "rendezvous")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == EXIT_CODE, done.stderr
    assert len(events(run, "hang")) == 1


@pytest.mark.timeout(120)
def test_a_profile_that_cannot_be_written_ends_no_run(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    run = tiny_run(
        storage=str(tmp_path), data__path=make_data([3000]), train__profile_steps=(3, 5), eval__every_steps=0
    )
    assert ranks(saves.train, 1, run, saves.profile_cannot_be_written) == [{"start": 0, "end": "finished"}]


@pytest.mark.timeout(120)
def test_what_earlier_attempts_took_is_known(ranks: Ranks, make_data: Callable[..., str], tmp_path: Path) -> None:
    """A notice soon after a start: how long saves and evaluations take decides what is still done."""
    run = tiny_run(storage=str(tmp_path), data__path=make_data([3000]), eval__every_steps=2, train__stop_at=6)
    assert ranks(saves.train, 1, run)[0]["end"] == "stopped"
    for file, key, seconds in (("events.jsonl", "work_s", 40.0), ("metrics.jsonl", "eval_s", 50.0)):
        log = Path(run.run_dir) / file  # as if on a slower machine
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps(row | {key: seconds} if key in row else row) + "\n" for row in rows))
    assert ranks(saves.known_seconds, 1, run) == [(40.0, 50.0)]
