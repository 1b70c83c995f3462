from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2dist.config import UserError
from gpt2dist.train import checkpoint
from gpt2dist.train.checkpoint import BadCheckpoint, Checkpoint, Index
from gpt2dist.train.fragment import KINDS, Fragment

SHAPES = {"a": (6, 5), "b": (7,)}


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
    parts = [checkpoint.write_rank(directory, r, f) for r, f in enumerate(fragments(cuts or {"a": [13], "b": [7]}))]
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
    checkpoint.write_rank(unfinished, 0, fragments({"a": [13], "b": [7]})[0])
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.index.step == 4


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step)
    dead = checkpoint.step_directory(str(tmp_path), 5) / checkpoint.INDEX
    dead.unlink()  # as an attempt leaves it that dies while saving
    assert checkpoint.prune(str(tmp_path), keep=2, keep_every=3) == [1, 2, 4, 5]
    left = [c.index.step for c in checkpoint.committed(str(tmp_path)) if isinstance(c, Checkpoint)]
    assert left == [7, 6, 3]
    assert not dead.parent.exists()


def test_retention_leaves_unfinished_newer_directories(tmp_path: Path) -> None:
    save(tmp_path, 4)
    being_written = checkpoint.step_directory(str(tmp_path), 8)
    checkpoint.write_rank(being_written, 0, fragments({"a": [13], "b": [7]})[0])
    assert checkpoint.prune(str(tmp_path), keep=1, keep_every=0) == []
    assert being_written.exists()


def flip(path: Any) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


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
        checkpoint.verify(saved, share=1, shares=2)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.index.step == (4 if seen_by_size else 8)
    row = checkpoint.describe(saved, str(tmp_path))
    assert row["valid"] is not seen_by_size


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i["files"][0].update(file="../../etc/passwd"),
        lambda i: i["files"][0].update(file="/etc/passwd"),
        lambda i: i["files"][0].update(bytes=-1),
        lambda i: i["fragments"][0].update(start=-1),
        lambda i: i["fragments"][0].update(length=10**12),
        lambda i: i["fragments"][0].update(file="rank-00007.safetensors"),
        lambda i: i["fragments"][0].update(parameter="no.such"),
        lambda i: i["fragments"].pop(),
        lambda i: i["fragments"].append(dict(i["fragments"][0])),
        lambda i: i["parameters"].update(c=[3]),
        lambda i: i["config"].update(optim={"ema_decay": 0.9}),  # promises what is not there
        lambda i: i["fragments"].append(dict(i["fragments"][0], kind="ema")),
        lambda i: i["config"].update(optim=[]) or i["fragments"].pop(),
        lambda i: i["parameters"].update(a=[6, 6]),
        lambda i: i.update(version=2),
        lambda i: i.update(extra=1),
        lambda i: i.pop("step"),
    ],
)
def test_hostile_or_inconsistent_indexes_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    save(tmp_path, 4)
    saved = save(tmp_path, 8)
    index = json.loads((saved.path / checkpoint.INDEX).read_text())
    change(index)
    (saved.path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint):
        checkpoint.read_index(saved.path)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.index.step == 4


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", pickle.dumps({"step": 1}), b"[" * 100_000])
def test_an_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    saved = save(tmp_path)
    (saved.path / checkpoint.INDEX).write_bytes(content)
    with pytest.raises(BadCheckpoint, match="not a valid index"):
        checkpoint.read_index(saved.path)
    assert checkpoint.newest(str(tmp_path)) is None


def test_commit_refuses_what_is_incomplete(tmp_path: Path) -> None:
    saved = save(tmp_path)
    index = saved.index.model_copy(update={"fragments": saved.index.fragments[:-1]})
    other = checkpoint.step_directory(str(tmp_path), 9)
    with pytest.raises(BadCheckpoint, match="elements"):
        checkpoint.commit(other, index)
    assert not (other / checkpoint.INDEX).exists()


def test_a_checkpoint_that_does_not_fit_the_model(tmp_path: Path) -> None:
    saved = save(tmp_path)
    checkpoint.check_fits(saved, SHAPES, "run.toml")
    with pytest.raises(UserError, match=r"run.toml: model: does not fit .*: a: saved shape \[6, 5\], .* \[5, 5\]"):
        checkpoint.check_fits(saved, {**SHAPES, "a": (5, 5)}, "run.toml")
    with pytest.raises(UserError, match="c: saved no such parameter"):
        checkpoint.check_fits(saved, {**SHAPES, "c": (5, 5)}, "run.toml")
    with pytest.raises(UserError, match="b: saved shape"):
        checkpoint.check_fits(saved, {"a": (6, 5)}, "run.toml")
