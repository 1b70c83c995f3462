"""Checkpoints: safetensors fragments, an index written last, no pickle.

    <run dir>/checkpoints/step-00000100/
        rank-00000.safetensors …   1-D fp32 pieces that the rank owned: weight, exp_avg, exp_avg_sq, ema
        index.json                 step, position, config, parameter table, fragments, hashes of every file and its own

A directory without a valid index does not exist. Loading copies the overlap of saved and wanted fragments, so
world size and ZeRO stage may differ from those that saved. Reading needs no DeepSpeed. Nothing that is read is
trusted: whatever the files hold, the answer is the state that was saved, or `BadCheckpoint`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import psutil
import torch
from pydantic import ValidationError
from torch import Tensor
from upath import UPath

from gpt2dist.config import UserError
from gpt2dist.storage import (
    StorageError,
    children,
    exists,
    is_local,
    location,
    plain_files,
    publish,
    read_bytes,
    remove,
    remove_tree,
)
from gpt2dist.train import index as index_json
from gpt2dist.train import rundir
from gpt2dist.train.fragment import Fragment
from gpt2dist.train.fragment_file import BadFile, FragmentFile, Read, Slice, checks, reads
from gpt2dist.train.index import INDEX, MAX_INDEX_BYTES, Index, Kind, SavedFragment

REMOTE_READS = 16
"""At a time from an object store, by each rank."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: UPath
    index: Index

    @property
    def bytes(self) -> int:
        """Size of all its files but the index."""
        return sum(f.bytes for f in self.index.files)

    @cached_property
    def files(self) -> dict[str, FragmentFile]:
        """Name → what should be in it, with its hashes."""
        return self.index.made_of(self.path)


class BadCheckpoint(Exception):
    """A checkpoint that is damaged or made up; the message, one line, names the file and what is wrong."""

    def __init__(self, message: str, step: int = 0) -> None:
        line = "".join(c if c.isprintable() else "?" for c in message)
        super().__init__(line if len(line) <= 500 else f"{line[:500]}…")
        self.step = step
        """Of its directory."""


def step_directory(run_dir: str, step: int) -> UPath:
    """Where the checkpoint of `step` lies."""
    return location(run_dir) / "checkpoints" / f"step-{step:08d}"


# ---------------------------------------------------------------------- writing


def commit(directory: UPath, index: Index) -> None:
    """Publish the index: from now on the checkpoint exists.

    Raises:
        BadCheckpoint: the pieces do not make a whole.
        UserError: files are not there as they were written, or the index would be too large.
    """
    try:
        index_json.check(index)
        check_sizes(Checkpoint(directory, index))
    except ValueError as e:
        raise BadCheckpoint(f"{directory / INDEX}: {e}") from None
    except BadCheckpoint as e:
        raise UserError(f"{e}; do all workers write to the same storage?") from None
    data = index.to_bytes()
    if len(data) > MAX_INDEX_BYTES:
        pieces = f"{len(index.fragments):,} fragments of {index.world_size} workers"
        raise UserError(f"{directory / INDEX}: {pieces} are too many; train.zero_stage 1 and 2 make fewer")
    publish(directory / INDEX, data)
    listed = {INDEX, *(f.file for f in index.files)}
    with contextlib.suppress(OSError, StorageError):  # published is published
        for path in children(directory):  # of an attempt that died while saving, or of a damaged checkpoint
            if path.name not in listed:
                remove(path)


def clear(run_dir: str, step: int, bad: Collection[int] = ()) -> list[int]:
    """Delete what is no checkpoint: directories without an index, which dead attempts left, and the `bad` ones,
    which are damaged or left behind by a rewind.

    Training goes on with `step`. Returns the deleted steps.

    Raises:
        RuntimeError: a later one is there that is not bad: an attempt before committed it meanwhile.
    """
    found = _directories(run_dir)
    left = [(s, path) for s, path in found if s in bad or not exists(path / INDEX)]
    if later := [s for s, path in found if s > step and (s, path) not in left]:
        raise RuntimeError(f"the checkpoint of step {later[0]} was committed while step {step} was loaded")
    for _, path in left:
        _remove_checkpoint(path)
    return sorted(s for s, _ in left)


def left_behind(run_dir: str, events: list[dict[str, Any]]) -> list[int]:
    """Steps of the checkpoints that the newest rewind has left behind.

    The first attempt after a rewind deletes them, and logs its start only then: those of earlier rewinds are gone.
    """
    started = max((e["attempt"] for e in rundir.starts(events)), default=0)
    new = [rewind for rewind in rundir.rewinds(events) if rewind["attempt"] >= started]
    gone = []
    for step in steps(run_dir) if new else ():
        if step <= min(rewind["steps"][0] for rewind in new):
            break
        with contextlib.suppress(BadCheckpoint):
            found = open_step(run_dir, step)
            if _is_left(found, new):
                gone.append(step)
    return gone


def _is_left(checkpoint: Checkpoint, rewinds: list[dict[str, Any]]) -> bool:
    """Whether one of the rewinds went back to before it."""
    index = checkpoint.index
    return any(index.step > rewind["steps"][0] and index.attempt <= rewind["attempt"] for rewind in rewinds)


def prune(run_dir: str, keep: int, keep_every: int, clean: int) -> list[int]:
    """Delete all but the newest `keep` checkpoints, the newest up to `clean`, and one of each `keep_every` steps.

    Returns the deleted steps.
    Directories without an index, of saves that failed, go too where they are older than the newest checkpoint.
    """
    committed = sorted(step for step, path in _directories(run_dir) if exists(path / INDEX))
    kept = {*committed[-keep:], *[s for s in committed if s <= clean][-1:]}
    if keep_every:  # the first from each multiple on: a save that has to wait for another one comes a little later
        kept |= set({s // keep_every: s for s in reversed(committed) if s >= keep_every}.values())
    gone = [(s, path) for s, path in _directories(run_dir) if committed and s < committed[-1] and s not in kept]
    for _, path in gone:
        _remove_checkpoint(path)
    return sorted(s for s, _ in gone)


def _remove_checkpoint(path: UPath) -> None:
    if _is_link(path):
        remove(path)  # what it leads to is not ours
        return
    with contextlib.suppress(IsADirectoryError):  # somebody's joke
        remove(path / INDEX)  # first it stops to exist, then its files go
    remove_tree(path)


# ---------------------------------------------------------------------- finding and checking


def steps(run_dir: str) -> list[int]:
    """Steps whose checkpoint was committed, newest first; it need not be good, nor there any more.

    Raises:
        StorageError: some were, but the directory in which they lay is not there.
    """
    logged, place = rundir.saved_step(run_dir), location(run_dir) / "checkpoints"
    if logged and is_local(place) and not place.is_dir():
        raise StorageError(
            f"{place}: not there, though step {logged} was saved; if the storage is not away: to start anew choose "
            "another name, or delete the run's directory"
        )
    found = {step for step, path in _directories(run_dir) if exists(path / INDEX) or _is_link(path)}
    if logged > max(found, default=0):
        found.add(logged)
    return sorted(found, reverse=True)


def open_step(run_dir: str, step: int) -> Checkpoint:
    """The checkpoint of a step, its index checked; the files are not looked at. Raises like `read_index`."""
    path = step_directory(run_dir, step)
    try:
        return Checkpoint(path, read_index(path))
    except BadCheckpoint as e:
        raise BadCheckpoint(str(e), step) from None


def committed(run_dir: str) -> Iterator[Checkpoint | BadCheckpoint]:
    """All committed checkpoints, newest first; those whose index is missing or unreadable come as `BadCheckpoint`."""
    for step in steps(run_dir):
        try:
            yield open_step(run_dir, step)
        except BadCheckpoint as e:
            yield e


def is_there_up_to(run_dir: str, step: int) -> bool:
    """Whether there is a checkpoint of this step or of one before, with files of the right size."""
    for found in committed(run_dir):
        if isinstance(found, Checkpoint) and found.index.step <= step:
            with contextlib.suppress(BadCheckpoint):
                check_sizes(found)
                return True
    return False


def newest(run_dir: str) -> Checkpoint | None:
    """The newest checkpoint with a readable index and files of the right size; None if there never was one.

    Hashes are not computed.

    Raises:
        NoneLeft: there were some, but none is good.
        StorageError: they are away.
    """
    problem: BadCheckpoint | None = None
    left = rundir.rewinds(rundir.events_log(run_dir).read())
    for found in committed(run_dir):
        if isinstance(found, BadCheckpoint):
            problem = problem or found
            continue
        if _is_left(found, left):
            continue  # to be deleted by the next attempt
        try:
            check_sizes(found)
        except BadCheckpoint as e:
            problem = problem or e
        else:
            return found
    if problem is not None:
        steps(run_dir)  # raises where they went away meanwhile
        raise NoneLeft(run_dir, str(problem))
    return None


class NoneLeft(UserError):
    """A run had checkpoints, but none is good."""

    def __init__(self, run_dir: str, problem: str) -> None:
        super().__init__(f"{run_dir}: no good checkpoint is left: {problem}")


def read_index(path: UPath) -> Index:
    """The checked index of a checkpoint's directory.

    Raises:
        BadCheckpoint: damaged, or not there.
        OSError: it cannot be read, at least not now.
    """
    try:
        if _is_link(path):
            raise BadCheckpoint(f"{path}: a symbolic link, not a directory")
        size = plain_files(path).get(INDEX)
        if size is None:
            raise BadCheckpoint(f"{path / INDEX}: missing, or not a plain file")
        if size > MAX_INDEX_BYTES:
            raise BadCheckpoint(f"{path / INDEX}: {size:,} bytes are too many for an index")
        index = Index.model_validate(index_json.parse(read_bytes(path / INDEX)))
        index_json.check(index)
    except ValidationError as e:
        problem = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadCheckpoint(f"{path / INDEX}: not a valid index: {where}: {problem['msg']}") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as e:
        raise BadCheckpoint(f"{path / INDEX}: not a valid index: {e}") from None
    if path.name != f"step-{index.step:08d}":
        raise BadCheckpoint(f"{path / INDEX}: of another step, {index.step}")
    return index


def check_sizes(checkpoint: Checkpoint) -> None:
    """Every file there, at its size. Raises `BadCheckpoint`."""
    sizes = plain_files(checkpoint.path)
    for f in checkpoint.index.files:
        path, size = checkpoint.path / f.file, sizes.get(f.file)
        if size is None:
            raise BadCheckpoint(f"{path}: missing, or not a plain file", checkpoint.index.step)
        if size != f.bytes:
            raise BadCheckpoint(f"{path}: {size:,} bytes, the index says {f.bytes:,}", checkpoint.index.step)


def verify(checkpoint: Checkpoint) -> None:
    """Sizes and hashes of all files. Raises `BadCheckpoint`."""
    check_sizes(checkpoint)
    _run((file, read) for file in checkpoint.files.values() for read in checks(file))


class Misfit(UserError):
    """A checkpoint of another model."""


def check_fits(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises `Misfit` where the checkpoint's parameters are not those of the model."""
    saved = {name: tuple(shape) for name, shape in checkpoint.index.parameters.items()}
    for name in [*shapes, *saved]:
        if saved.get(name) != shapes.get(name):
            has = f"shape {list(saved[name])}" if name in saved else "no such parameter"
            wants = f"shape {list(shapes[name])}" if name in shapes else "no such parameter"
            raise Misfit(
                f"{source}: model: does not fit the checkpoint {checkpoint.path}: {name}: saved {has}, "
                f"the model has {wants}; choose another name or the model it was saved with"
            )


# ---------------------------------------------------------------------- reading


def load(checkpoint: Checkpoint, wanted: Iterable[Fragment]) -> None:
    """Fill fragments from a checkpoint, reading and checking only what holds them.

    Raises:
        BadCheckpoint: damaged, or something is not in it; some fragments may be filled.
        OSError: it cannot be read, at least not now.
    """
    saved: dict[tuple[str, str], list[SavedFragment]] = defaultdict(list)
    for f in checkpoint.index.fragments:
        saved[f.parameter, f.kind].append(f)
    slices: dict[str, list[Slice]] = defaultdict(list)
    for want in wanted:
        end, found = want.start + want.tensor.numel(), 0
        for have in saved[want.parameter, want.kind]:
            low, high = max(want.start, have.start), min(end, have.start + have.length)
            if low < high:
                target = want.tensor[low - want.start : high - want.start]
                slices[have.file].append(Slice(have.key, low - have.start, target))
                found += high - low
        if found != want.tensor.numel():
            raise BadCheckpoint(f"{checkpoint.path}: does not hold {want.parameter} {want.kind}", checkpoint.index.step)
    check_sizes(checkpoint)
    files = checkpoint.files
    _run((files[name], read) for name in sorted(slices) for read in reads(files[name], slices[name]))


def _run(calls: Iterable[tuple[FragmentFile, Read]]) -> None:
    """Several at a time.

    Raises:
        BadCheckpoint: names the first bad file.
        OSError: one cannot be read, at least not now.
    """
    todo = list(calls)
    local = not todo or is_local(todo[0][0].path)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1) if local else REMOTE_READS) as threads:
        futures = [(file, threads.submit(read)) for file, read in todo]
        try:
            for file, future in futures:
                try:
                    future.result()
                except BadFile as e:
                    raise BadCheckpoint(f"{file.path}: {e}") from None
                except FileNotFoundError:
                    raise BadCheckpoint(f"{file.path}: missing") from None
                except OSError as e:
                    e.filename = e.filename or str(file.path)
                    raise
        finally:
            threads.shutdown(cancel_futures=True)


def load_weights(checkpoint: Checkpoint, kind: Kind = "weight") -> dict[str, Tensor]:
    """The whole fp32 weights, or their moving average, name → tensor, on the CPU.

    Raises `BadCheckpoint`, and `UserError` if they do not fit into memory.
    """
    shapes = checkpoint.index.parameters
    need, have = 4 * sum(map(math.prod, shapes.values())), psutil.virtual_memory().available
    if need > have:
        raise UserError(f"{checkpoint.path}: the weights take {need:,} bytes; {have:,} of memory are free")
    check_sizes(checkpoint)  # before room is made for what it says
    weights = {name: torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    load(checkpoint, [Fragment(name, kind, 0, tensor) for name, tensor in weights.items()])
    return {name: t.view(shapes[name]) for name, t in weights.items()}


def _is_link(path: UPath) -> bool:
    return is_local(path) and bool(path.is_symlink())


def _directories(run_dir: str) -> list[tuple[int, UPath]]:
    paths = children(location(run_dir) / "checkpoints")
    matches = ((re.fullmatch(r"step-([0-9]{8,18})", path.name), path) for path in paths)
    return [(int(match[1]), path) for match, path in matches if match]


def describe(checkpoint: Checkpoint | BadCheckpoint, run_dir: str) -> dict[str, Any]:
    """One row of `checkpoint ls --json`."""
    if isinstance(checkpoint, BadCheckpoint):
        path = str(step_directory(run_dir, checkpoint.step))
        return {"step": checkpoint.step, "path": path, "valid": False, "reason": str(checkpoint)}
    try:
        check_sizes(checkpoint)
        reason = None
    except BadCheckpoint as e:
        reason = str(e)
    row = {
        "step": checkpoint.index.step,
        "path": str(checkpoint.path),
        "bytes": checkpoint.bytes,
        "world_size": checkpoint.index.world_size,
        "zero_stage": checkpoint.index.zero_stage,
        "valid": reason is None,
    }
    return row if reason is None else row | {"reason": reason}
