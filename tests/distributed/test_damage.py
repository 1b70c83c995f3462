"""Each file of a checkpoint in turn deleted, cut or changed: the right older checkpoint, or a refusal; nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2dist.config import RunConfig
from gpt2dist.train import checkpoint, rundir
from gpt2dist.train.checkpoint import Checkpoint
from tests.conftest import tiny_run
from tests.distributed import jobs, saves
from tests.distributed.test_engine import logged
from tests.unit.test_checkpoint import flip

Ranks = Callable[..., list[Any]]


def delete(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_last(path: Path) -> None:
    flip(path, -2)  # the last byte of an index is a newline


FILES = ("index.json", "rank-00000.safetensors", "rank-00001.safetensors")
DAMAGES = (delete, cut, empty, flip, flip_first, flip_last)
CASES = [(file, damage) for file in FILES for damage in DAMAGES]


def copy(run: RunConfig, name: str, without: tuple[int, ...] = ()) -> RunConfig:
    other = run.model_copy(update={"name": name, "train": run.train.model_copy(update={"stop_at": None})})
    shutil.copytree(run.run_dir, other.run_dir)
    for step in without:
        shutil.rmtree(checkpoint.step_directory(other.run_dir, step))
    return other


def newest_file(run: RunConfig, file: str) -> Path:
    return Path(checkpoint.step_directory(run.run_dir, 8)) / file


@pytest.mark.timeout(400)
def test_every_damage_ends_in_an_older_checkpoint_or_a_refusal(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"data__path": make_data([3000]), "storage": str(tmp_path), "eval__every_steps": 0}
    whole = tiny_run(name="whole", train__steps=10, **changes)
    half = tiny_run(name="half", train__steps=10, train__stop_at=8, **changes)
    ranks(saves.train_all, 2, [(whole, saves.none), (half, saves.none)])
    reference = logged(whole)

    fallen_back, refused = {}, {}
    for i, (file, damage) in enumerate(CASES):
        fallen_back[i] = copy(half, f"older-{i}")
        refused[i] = copy(half, f"alone-{i}", without=(4,))
        for run in (fallen_back[i], refused[i]):
            damage(newest_file(run, file))
    both = copy(half, "both")
    for step in (4, 8):
        flip(Path(checkpoint.step_directory(both.run_dir, step)) / "rank-00001.safetensors")
    gone = copy(half, "gone", without=(4, 8))
    calls = [(run, saves.none) for run in (*fallen_back.values(), *refused.values(), both, gone)]
    ended = iter(ranks(saves.train_all, 2, calls, timeout=350)[0])

    for i, (file, damage) in enumerate(CASES):
        case, run = (file, damage.__name__), fallen_back[i]
        assert next(ended) == {"start": 4, "end": "finished"}, case
        assert logged(run) == reference, case
        (event,) = [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "bad_checkpoint"]
        assert event["step"] == 8, case
        assert str(newest_file(run, file)) in event["reason"], case
        for found in checkpoint.committed(run.run_dir):
            assert isinstance(found, Checkpoint), case  # the damaged one was replaced
            checkpoint.verify(found)
    for i, (file, damage) in enumerate(CASES):
        case, run = (file, damage.__name__), refused[i]
        end = next(ended)
        assert end["start"] is None, case
        assert end["end"].startswith(f"{run.run_dir}: no good checkpoint is left: {newest_file(run, file)}: "), case
        assert_untouched(run, half)
    for run, file in ((both, "step-00000008/rank-00001.safetensors"), (gone, "step-00000008/index.json")):
        end = next(ended)
        assert end["start"] is None
        assert file in end["end"]
        assert_untouched(run, half)


def assert_untouched(run: RunConfig, original: RunConfig) -> None:
    """Nothing was trained, saved or deleted."""
    for log in ("metrics.jsonl", "ledger.jsonl"):
        assert (Path(run.run_dir) / log).read_bytes() == (Path(original.run_dir) / log).read_bytes()
    starts = [e for e in rundir.events_log(run.run_dir).read() if e["event"] == "start"]
    assert len(starts) == 1
    for path in (Path(run.run_dir) / "checkpoints").iterdir():
        assert {p.name for p in path.iterdir()} <= set(FILES)


@pytest.mark.timeout(120)
def test_a_checkpoint_of_another_model_is_not_taken_for_an_older_one(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    """It is whole, but not of this run."""
    changes: dict[str, Any] = {"data__path": make_data([3000]), "eval__every_steps": 0, "train__stop_at": 8}
    run = tiny_run(name="run", storage=str(tmp_path), **changes)
    other = tiny_run(name="other", storage=str(tmp_path), model__n_layer=1, **changes)
    ranks(saves.train_all, 2, [(run, saves.none), (other, saves.none)])
    older = checkpoint.step_directory(run.run_dir, 4)
    shutil.rmtree(older)
    shutil.copytree(checkpoint.step_directory(other.run_dir, 4), older)
    flip(newest_file(run, "rank-00000.safetensors"))
    result = ranks(saves.train, 2, run.model_copy(update={"train": run.train.model_copy(update={"stop_at": 12})}))[0]
    assert result["start"] is None
    assert "no good checkpoint is left" in result["end"]
    reasons = [e["reason"] for e in rundir.events_log(run.run_dir).read() if e["event"] == "bad_checkpoint"]
    assert "content differs from its sha256" in reasons[0]
    assert "does not fit the checkpoint" in reasons[1]


@pytest.mark.timeout(180)
def test_what_another_machine_does_not_see_is_not_deleted(
    ranks: Ranks, make_data: Callable[..., str], tmp_path: Path
) -> None:
    """The second worker's machine has an older view of the storage."""
    changes: dict[str, Any] = {"data__path": make_data([3000]), "eval__every_steps": 0}
    run, stale = (tiny_run(storage=str(tmp_path / view), train__stop_at=4, **changes) for view in ("now", "before"))
    ranks(saves.train_all, 1, [(run, saves.none)])
    shutil.copytree(run.run_dir, stale.run_dir)
    later = tiny_run(storage=run.storage, train__stop_at=8, **changes)
    ranks(saves.train_all, 1, [(later, saves.none)])
    run = tiny_run(storage=run.storage, **changes)
    problems = ranks(jobs.restore_from_views, 2, run, [run.storage, stale.storage])
    missing = Path(checkpoint.step_directory(stale.run_dir, 8)) / "index.json"
    assert (
        problems
        == [
            f"{missing}: missing, or not a plain file; but another machine finds it whole: is the storage "
            "shared, and up to date?"
        ]
        * 2
    )
    assert [c.index.step for c in checkpoint.committed(run.run_dir) if isinstance(c, Checkpoint)] == [8, 4]
