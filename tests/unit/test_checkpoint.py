from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpt2dist.config import UserError
from gpt2dist.storage import StorageError
from gpt2dist.train import checkpoint, fragment_file, preflight, rundir, snapshot
from gpt2dist.train.checkpoint import BadCheckpoint, Checkpoint, NoneLeft
from gpt2dist.train.fragment import KINDS, Fragment
from gpt2dist.train.index import INDEX, Index
from tests.conftest import tiny_run
from tests.unit.runs import write_rank

SHAPES = {"a": (6, 5), "b": (7,)}
STEP_4 = "checkpoints/step-00000004"


def fragments(cuts: dict[str, list[int]]) -> list[list[Fragment]]:
    """Fragments of two ranks: rank 0 holds [0, cut), rank 1 [cut, end) of each parameter."""
    ranks: list[list[Fragment]] = [[], []]
    for name, shape in SHAPES.items():
        for k, kind in enumerate(KINDS):
            n = torch.Size(shape).numel()
            whole = torch.arange(n, dtype=torch.float32) + 1000 * k + (500 if name == "b" else 0)
            cut = cuts[name][0]
            for rank, (low, high) in enumerate([(0, cut), (cut, n)]):
                if low < high:
                    ranks[rank].append(Fragment(name, kind, low, whole[low:high]))
    return ranks


def save(run_dir: Path, step: int = 4, cuts: dict[str, list[int]] | None = None) -> Checkpoint:
    directory = checkpoint.step_directory(str(run_dir), step)
    parts = [write_rank(directory, r, f) for r, f in enumerate(fragments(cuts or {"a": [13], "b": [7]}))]
    index = Index(
        step=step,
        position=step * 8,
        data_fingerprint="f",
        config={},
        world_size=2,
        zero_stage=2,
        attempt=1,
        scalars={"optimizer_steps": float(step)},
        parameters={n: list(s) for n, s in SHAPES.items()},
        fragments=[f for _, table in parts for f in table],
        files=[file for file, _ in parts],
    )
    checkpoint.commit(directory, index)
    return Checkpoint(directory, checkpoint.read_index(directory))


def test_any_slice_can_be_read_back(tmp_path: Path) -> None:
    saved = save(tmp_path)
    wanted = [Fragment("a", "exp_avg", s, torch.zeros(n)) for s, n in [(0, 30), (5, 20), (13, 1), (12, 2), (29, 1)]]
    checkpoint.load(saved, wanted)
    for f in wanted:
        assert torch.equal(f.tensor, torch.arange(f.start, f.start + len(f.tensor)) + 1000.0)
    weights = checkpoint.load_weights(saved)
    assert torch.equal(weights["a"], torch.arange(30.0).view(6, 5))
    assert torch.equal(weights["b"], torch.arange(7.0) + 500)


def test_a_directory_without_index_does_not_exist(tmp_path: Path) -> None:
    assert checkpoint.newest(str(tmp_path)) is None
    save(tmp_path, 4)
    unfinished = checkpoint.step_directory(str(tmp_path), 8)
    write_rank(unfinished, 0, fragments({"a": [13], "b": [7]})[0])
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.index.step == 4


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step)
    dead = checkpoint.step_directory(str(tmp_path), 5) / INDEX
    dead.unlink()  # as an attempt leaves it that dies while saving
    assert checkpoint.prune(str(tmp_path), keep=2, keep_every=3, clean=7) == [1, 2, 4, 5]
    left = [c.index.step for c in checkpoint.committed(str(tmp_path)) if isinstance(c, Checkpoint)]
    assert left == [7, 6, 3]
    assert not dead.parent.exists()


def test_retention_keeps_the_first_from_each_multiple_on(tmp_path: Path) -> None:
    """A save at a multiple may have had to wait for another one."""
    deleted = []
    for step in (2, 6, 8, 10, 13, 17):
        save(tmp_path, step)
        deleted += checkpoint.prune(str(tmp_path), keep=1, keep_every=5, clean=step)
    assert deleted == [2, 8, 13]
    assert [c.index.step for c in checkpoint.committed(str(tmp_path)) if isinstance(c, Checkpoint)] == [17, 10, 6]


def test_retention_leaves_unfinished_newer_directories(tmp_path: Path) -> None:
    save(tmp_path, 4)
    being_written = checkpoint.step_directory(str(tmp_path), 8)
    write_rank(being_written, 0, fragments({"a": [13], "b": [7]})[0])
    assert checkpoint.prune(str(tmp_path), keep=1, keep_every=0, clean=4) == []
    assert being_written.exists()


def test_retention_keeps_what_a_rewind_would_lead_to(tmp_path: Path) -> None:
    for step in (3, 4, 6, 7):
        save(tmp_path, step)
    assert checkpoint.prune(str(tmp_path), keep=1, keep_every=0, clean=5) == [3, 6]
    assert checkpoint.prune(str(tmp_path), keep=1, keep_every=0, clean=7) == [4]


def test_a_checkpoint_that_came_while_another_was_loaded_is_not_deleted(tmp_path: Path) -> None:
    save(tmp_path, 8)
    save(tmp_path, 12)  # by a worker of the attempt before, which had been cut off
    with pytest.raises(RuntimeError, match="step 12 was committed while step 8 was loaded"):
        checkpoint.clear(str(tmp_path), 8)
    assert [c.index.step for c in checkpoint.committed(str(tmp_path)) if isinstance(c, Checkpoint)] == [12, 8]


def test_retention_never_removes_what_was_saved_last(tmp_path: Path) -> None:
    """A damaged checkpoint of a later step, left out at the start, does not count as the newest one."""
    save(tmp_path, 4)
    flip(save(tmp_path, 8).path / "rank-00000.safetensors")
    assert checkpoint.clear(str(tmp_path), 4, bad={8}) == [8]  # as the trainer does when it goes on from step 4
    save(tmp_path, 6)
    assert checkpoint.prune(str(tmp_path), keep=1, keep_every=0, clean=6) == [4]
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.index.step == 6


def flip(path: Any, at: int | None = None) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "PIECE_BYTES", 40)
    monkeypatch.setattr(snapshot, "WRITE_BYTES", 100)
    monkeypatch.setattr(fragment_file, "READ_BYTES", 80)


@pytest.mark.usefixtures("small_pieces")
def test_any_slice_is_read_from_any_pieces(tmp_path: Path) -> None:
    test_any_slice_can_be_read_back(tmp_path)
    saved = Checkpoint(checkpoint.step_directory(str(tmp_path), 4), checkpoint.read_index(tmp_path / STEP_4))
    assert all(len(file.sha256) == -(-file.bytes // 40) > 10 for file in saved.index.files)
    for start in range(30):
        for stop in range(start + 1, 31):
            target = torch.zeros(stop - start)
            checkpoint.load(saved, [Fragment("a", "exp_avg_sq", start, target)])
            assert torch.equal(target, torch.arange(start, stop) + 2000.0)


@pytest.mark.usefixtures("small_pieces")
def test_every_byte_of_a_file_is_checked(tmp_path: Path) -> None:
    """Whichever one is wrong: `verify` sees it, and so does a load of everything."""
    saved = save(tmp_path)
    file = saved.path / "rank-00001.safetensors"
    for at in range(file.stat().st_size):
        flip(file, at)
        with pytest.raises(BadCheckpoint, match="rank-00001.safetensors: content differs from its sha256 .bytes"):
            checkpoint.verify(saved)
        with pytest.raises(BadCheckpoint, match="rank-00001.safetensors: content differs from its sha256 .bytes"):
            checkpoint.load(saved, everything())
        flip(file, at)
    checkpoint.verify(saved)


def everything() -> list[Fragment]:
    return [
        Fragment(name, kind, 0, torch.zeros(torch.Size(shape).numel()))
        for name, shape in SHAPES.items()
        for kind in KINDS
    ]


@pytest.mark.usefixtures("small_pieces")
def test_only_what_holds_a_slice_is_read(tmp_path: Path) -> None:
    """Damage elsewhere does not matter to a reader of one parameter; it does to the reader of what is damaged."""
    saved = save(tmp_path)
    flip(saved.path / "rank-00001.safetensors", -1)
    last = saved.index.fragments[-1]
    target = torch.zeros(3)
    checkpoint.load(saved, [Fragment("a", "weight", 20, target)])
    assert target.tolist() == [20, 21, 22]
    with pytest.raises(BadCheckpoint):
        checkpoint.load(saved, [Fragment(last.parameter, last.kind, last.start, torch.zeros(last.length))])


def test_files_open_with_the_safetensors_library(tmp_path: Path) -> None:
    saved = save(tmp_path)
    tensors = load_file(saved.path / "rank-00001.safetensors")
    assert torch.equal(tensors["a|exp_avg|13"], torch.arange(13.0, 30) + 1000)
    assert {f.key for f in saved.index.fragments if f.file == "rank-00001.safetensors"} == tensors.keys()


def test_what_is_not_there_cannot_be_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path)
    for wanted in (Fragment("c", "weight", 0, torch.zeros(1)), Fragment("a", "weight", 25, torch.zeros(6))):
        with pytest.raises(BadCheckpoint, match="does not hold"):
            checkpoint.load(saved, [wanted])


@pytest.mark.parametrize(
    ("damage", "message", "seen_by_size"),
    [
        (flip, "rank-00001.safetensors: content differs from its sha256", False),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "rank-00001.safetensors: .* bytes, the index says", True),
        (lambda p: p.unlink(), "rank-00001.safetensors: missing", True),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Any], None], message: str, seen_by_size: bool) -> None:
    save(tmp_path, 4)
    saved = save(tmp_path, 8)
    damage(saved.path / "rank-00001.safetensors")
    with pytest.raises(BadCheckpoint, match=message):
        checkpoint.verify(saved)
    with pytest.raises(BadCheckpoint, match=message):
        checkpoint.load(saved, everything())
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.index.step == (4 if seen_by_size else 8)
    row = checkpoint.describe(saved, str(tmp_path))
    assert row["valid"] is not seen_by_size


def test_a_run_with_nothing_but_damage_has_none_left(tmp_path: Path) -> None:
    (save(tmp_path, 4).path / "rank-00000.safetensors").unlink()
    (save(tmp_path, 8).path / "index.json").write_text("{}")
    with pytest.raises(NoneLeft, match="step-00000008/index.json: not a valid index: content differs"):
        checkpoint.newest(str(tmp_path))


def test_an_index_that_is_gone_is_missed(tmp_path: Path) -> None:
    """The events know that there was one; without them the directory is that of a save that did not end."""
    save(tmp_path, 4)
    (save(tmp_path, 8).path / "index.json").unlink()
    assert checkpoint.steps(str(tmp_path)) == [4]
    events = rundir.events_log(str(tmp_path))
    events.append(
        {"time": 0.0, "event": "start", "step": 0},
        {"time": 0.0, "event": "commit", "step": 4},
        {"time": 0.0, "event": "commit", "step": 8},
    )
    assert checkpoint.steps(str(tmp_path)) == [8, 4]
    with pytest.raises(BadCheckpoint, match="step-00000008/index.json: missing"):
        checkpoint.open_step(str(tmp_path), 8)
    events.append({"time": 0.0, "event": "start", "step": 4})  # it went on from there
    assert checkpoint.steps(str(tmp_path)) == [4]
    events.append({"time": 0.0, "event": "commit", "step": 6}, {"time": 0.0, "event": "rewind", "steps": [5, 7]})
    assert checkpoint.steps(str(tmp_path)) == [4]


def test_what_a_rewind_left_behind_is_not_the_newest(tmp_path: Path) -> None:
    """The driver may die before the next attempt deletes it."""
    for step in (4, 6):
        save(tmp_path, step)
    rundir.events_log(str(tmp_path)).append(
        {"time": 0.0, "event": "rewind", "steps": [5, 8], "positions": [], "attempt": 1}
    )
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.index.step == 4
    events = rundir.events_log(str(tmp_path))
    assert checkpoint.left_behind(str(tmp_path), events.read()) == [6]
    save(tmp_path, 8)
    events.append({"time": 1.0, "event": "start", "step": 4, "attempt": 2})  # who logs it has deleted them
    assert checkpoint.left_behind(str(tmp_path), events.read()) == []


def test_a_rewind_does_not_hide_that_checkpoints_are_away(tmp_path: Path) -> None:
    for step in (4, 6):
        save(tmp_path, step)
    rundir.events_log(str(tmp_path)).append(
        {"time": 0.0, "event": "commit", "step": 4},
        {"time": 0.0, "event": "commit", "step": 6},
        {"time": 0.0, "event": "rewind", "steps": [5, 8], "positions": [], "attempt": 1},
    )
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    with pytest.raises(StorageError, match="not there, though step 4 was saved"):
        checkpoint.newest(str(tmp_path))
    assert not any(tmp_path.glob("checkpoints"))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A damaged one is deleted when training goes on with the one before."""
    saved = save(tmp_path, 8)

    def fails(*_: Any) -> bytes:
        raise OSError(number, "not now")

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "read_bytes", fails)
        with pytest.raises(OSError, match="not now"):
            checkpoint.open_step(str(tmp_path), 8)
    monkeypatch.setattr("gpt2dist.train.fragment_file.read_range", fails)
    with pytest.raises(OSError, match=r"not now: .*rank-0000"):
        checkpoint.load(saved, everything())


def test_files_that_cannot_be_deleted_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills although old checkpoints are said to be gone."""
    for step in (4, 8, 12):
        save(tmp_path, step)

    def refuse(path: Any, *, dir_fd: int | None = None) -> None:
        raise PermissionError(errno.EACCES, "denied", str(path))

    with monkeypatch.context() as m:
        m.setattr(os, "unlink", refuse)
        m.setattr(os, "remove", refuse)
        with pytest.raises(PermissionError):
            checkpoint.prune(str(tmp_path), 1, 0, 12)
    assert checkpoint.prune(str(tmp_path), 1, 0, 12) == [4, 8]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000012"]


@pytest.mark.parametrize(
    ("lost", "message"),
    [("checkpoints", "checkpoints: not there, though step 4 was saved"), ("", "not there any more")],
)
def test_a_run_waits_for_its_storage(tmp_path: Path, lost: str, message: str) -> None:
    """Before a restart: what is away is not damaged, and a run must neither end nor begin anew for it."""
    run = tiny_run(storage=str(tmp_path), name="run", checkpoint={"retry_minutes": 0.05})
    save(Path(run.run_dir), 4)
    (Path(run.run_dir) / "config.toml").write_text("")
    rundir.events_log(run.run_dir).append({"time": 0.0, "event": "commit", "step": 4})
    place, away = Path(run.run_dir) / lost, tmp_path / "away"
    told: list[str] = []

    def tell(problem: str) -> None:
        told.append(problem)
        if len(told) == 2:
            away.rename(place)

    def newest(say: Callable[[str], None]) -> Checkpoint | None:
        return preflight.when_there(run, lambda: preflight.newest_of_begun(run), say)

    place.rename(away)
    found = newest(tell)
    assert found is not None
    assert found.index.step == 4
    assert len(told) == 2
    assert message in told[0]
    place.rename(away)
    with pytest.raises(StorageError, match=message):
        newest(told.append)
    away.rename(place)
    (Path(run.run_dir) / STEP_4 / INDEX).unlink()
    with pytest.raises(NoneLeft):
        newest(pytest.fail)


def test_files_of_other_machines_are_not_committed(tmp_path: Path) -> None:
    """Where nodes do not share their storage, rank 0 sees only its own file."""
    saved = save(tmp_path, 4)
    other = checkpoint.step_directory(str(tmp_path), 9)
    write_rank(other, 0, fragments({"a": [13], "b": [7]})[0])
    with pytest.raises(UserError, match="rank-00001.safetensors: missing.*do all workers write to the same storage"):
        checkpoint.commit(other, saved.index.model_copy(update={"step": 9}))
    assert not (other / INDEX).exists()


def test_commit_refuses_what_is_incomplete(tmp_path: Path) -> None:
    saved = save(tmp_path)
    index = saved.index.model_copy(update={"fragments": saved.index.fragments[:-1]})
    other = checkpoint.step_directory(str(tmp_path), 9)
    with pytest.raises(BadCheckpoint, match="elements"):
        checkpoint.commit(other, index)
    assert not (other / INDEX).exists()


def test_a_checkpoint_that_does_not_fit_the_model(tmp_path: Path) -> None:
    saved = save(tmp_path)
    checkpoint.check_fits(saved, SHAPES, "run.toml")
    with pytest.raises(UserError, match=r"run.toml: model: does not fit .*: a: saved shape \[6, 5\], .* \[5, 5\]"):
        checkpoint.check_fits(saved, {**SHAPES, "a": (5, 5)}, "run.toml")
    with pytest.raises(UserError, match="c: saved no such parameter"):
        checkpoint.check_fits(saved, {**SHAPES, "c": (5, 5)}, "run.toml")
    with pytest.raises(UserError, match="b: saved shape"):
        checkpoint.check_fits(saved, {"a": (6, 5)}, "run.toml")
