"""Checkpoints: safetensors fragments, an index written last, no pickle.

    <run dir>/checkpoints/step-00000100/
        rank-00000.safetensors …   1-D fp32 pieces that the rank owned: weight, exp_avg, exp_avg_sq, ema
        index.json                 step, position, config, parameter table, fragments, hash of every file

A directory without a valid index does not exist. Loading copies the overlap of saved and wanted fragments, so
world size and ZeRO stage may differ from those that saved. Reading needs no DeepSpeed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from upath import UPath

from gpt2dist.config import Section, UserError
from gpt2dist.storage import (
    children,
    exists,
    file_size,
    location,
    publish,
    read_bytes,
    remove,
    remove_tree,
    sha256_of,
    writing,
)
from gpt2dist.train.fragment import Fragment, kinds
from gpt2dist.train.fragment_file import BadFile, Slice, read_slices

INDEX = "index.json"
FILE_NAME = r"^rank-\d{5}(\.\d+)?\.safetensors$"
WRITE_BYTES = 8 << 20
"""Hashed and written at a time."""
Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]


class SavedFragment(Section):
    """One piece of a flattened parameter, [start, start + length), and the file that holds it."""

    parameter: str
    kind: Kind
    start: int = Field(ge=0)
    length: int = Field(ge=1)
    file: str = Field(pattern=FILE_NAME)

    @property
    def key(self) -> str:
        """Name of the tensor inside the file."""
        return fragment_key(self.parameter, self.kind, self.start)


class SavedFile(Section):
    """Size and hash of one file."""

    file: str = Field(pattern=FILE_NAME)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Index(Section):
    """index.json: everything about a checkpoint but the numbers."""

    format: Literal["gpt2dist-checkpoint"] = "gpt2dist-checkpoint"
    version: Literal[1] = 1
    step: int = Field(ge=0)
    """Steps done; training goes on with this step."""
    position: int = Field(ge=0)
    """Samples consumed."""
    data_fingerprint: str
    config: dict[str, Any]
    """The run's resolved configuration."""
    world_size: int = Field(ge=1)
    zero_stage: int
    attempt: int
    scalars: dict[str, float]
    """Adam's step count and the fp16 loss scale."""
    parameters: dict[str, list[int]]
    """Name → shape."""
    fragments: list[SavedFragment]
    files: list[SavedFile]

    def kinds(self, parameter: str) -> tuple[str, ...]:
        """What it holds of a parameter."""
        name = self._optim.get("name", "adamw")
        return kinds(name, self.has_ema, parameter, len(self.parameters[parameter]))

    @property
    def has_ema(self) -> bool:
        """Whether it holds the moving average of the weights."""
        return bool(self._optim.get("ema_decay", 0))

    @property
    def _optim(self) -> dict[str, Any]:
        optim = self.config.get("optim")
        return optim if isinstance(optim, dict) else {}


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: UPath
    index: Index

    @property
    def bytes(self) -> int:
        """Size of all its files but the index."""
        return sum(f.bytes for f in self.index.files)


class BadCheckpoint(Exception):
    """A committed checkpoint that is damaged; the message names the file and what is wrong."""


def fragment_key(parameter: str, kind: str, start: int) -> str:
    """Name of a fragment's tensor inside its file."""
    return f"{parameter}|{kind}|{start}"


def step_directory(run_dir: str, step: int) -> UPath:
    """Where the checkpoint of `step` lies."""
    return location(run_dir) / "checkpoints" / f"step-{step:08d}"


# ---------------------------------------------------------------------- writing


class Snapshot:
    """One rank's fragments as they were at one moment, laid out as the data of the file that they become."""

    def __init__(self, rank: int, attempt: int) -> None:
        # An earlier attempt that is not quite dead may still be writing: never to the same file.
        again = f".{attempt}" if attempt > 1 else ""
        self.file = f"rank-{rank:05d}{again}.safetensors"
        self.table: list[SavedFragment] = []
        self._header = b""
        self._data = torch.empty(0)
        self._left: UPath | None = None  # written, but not known to be part of a checkpoint
        self.written = 0
        """Bytes written since it was made."""

    @property
    def bytes(self) -> int:
        """Of the file."""
        return len(self._header) + 4 * len(self._data)

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copy the fragments to host memory; always the same ones, so that this is allocated once."""
        source = list(fragments)
        if not self.table:
            self._lay_out(source)
        end = 0
        for f, saved in zip(source, self.table, strict=True):
            self._data[end : end + saved.length].copy_(f.tensor.detach(), non_blocking=True)
            end += saved.length
        if source and source[0].tensor.is_cuda:
            torch.cuda.synchronize()

    def write(self, directory: UPath) -> SavedFile:
        """Write the file, in pieces; returns its size and hash."""
        self.discard()
        digest = hashlib.sha256()
        data: Any = memoryview(self._data.numpy()).cast("B")  # type: ignore[arg-type]
        with writing(directory / self.file) as f:
            for piece in (self._header, *(data[i : i + WRITE_BYTES] for i in range(0, len(data), WRITE_BYTES))):
                digest.update(piece)
                f.write(piece)
                self.written += len(piece)
        self._left = directory / self.file
        return SavedFile(file=self.file, bytes=self.bytes, sha256=digest.hexdigest())

    def discard(self) -> None:
        """Delete the file that was written last, unless `kept` was called since: it would only take room."""
        if self._left is not None:
            remove(self._left)
            self._left = None

    def kept(self) -> None:
        """What was written last is part of a checkpoint."""
        self._left = None

    def _lay_out(self, fragments: list[Fragment]) -> None:
        header: dict[str, Any] = {}
        end = 0
        for f in fragments:
            length = f.tensor.numel()
            table = {"parameter": f.parameter, "kind": f.kind, "start": f.start, "length": length, "file": self.file}
            self.table.append(SavedFragment.model_validate(table))
            header[self.table[-1].key] = {"dtype": "F32", "shape": [length], "data_offsets": [end, end + 4 * length]}
            end += 4 * length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        pinned = bool(fragments) and fragments[0].tensor.is_cuda
        self._data = torch.zeros(end // 4, pin_memory=pinned)  # zeros: touched now, not in the first save


def write_rank(
    directory: UPath, rank: int, fragments: Iterable[Fragment], attempt: int = 1
) -> tuple[SavedFile, list[SavedFragment]]:
    """Write one rank's file at once; returns its description for the index."""
    snapshot = Snapshot(rank, attempt)
    snapshot.take(fragments)
    return snapshot.write(directory), snapshot.table


def commit(directory: UPath, index: Index) -> None:
    """Publish the index: from now on the checkpoint exists. Raises `BadCheckpoint` on missing pieces."""
    check_coverage(index)
    publish(directory / INDEX, (index.model_dump_json(indent=1) + "\n").encode())
    listed = {INDEX, *(f.file for f in index.files)}
    for path in children(directory):  # of an attempt that died while saving, or of a damaged checkpoint
        if path.name not in listed:
            remove(path)


def clear_unfinished(run_dir: str) -> list[int]:
    """Delete what dead attempts left: directories without an index; returns their steps."""
    left = [(step, path) for step, path in _directories(run_dir) if not exists(path / INDEX)]
    for _, path in left:
        remove_tree(path)
    return sorted(step for step, _ in left)


def remove_after(run_dir: str, step: int, attempt: int) -> list[int]:
    """Delete checkpoints of later steps that this attempt or an earlier one saved; returns their steps."""
    gone = []
    for found in committed(run_dir):
        if isinstance(found, Checkpoint) and found.index.step > step and found.index.attempt <= attempt:
            remove(found.path / INDEX)
            remove_tree(found.path)
            gone.append(found.index.step)
    return gone


def prune(run_dir: str, keep: int, keep_every: int) -> list[int]:
    """Delete all but the newest `keep` checkpoints and every `keep_every`-th step; returns the deleted steps.

    Directories without an index, of saves that failed, go too where they are older than the newest checkpoint.
    """
    committed = sorted(step for step, path in _directories(run_dir) if exists(path / INDEX))
    kept = set(committed[-keep:]) | {s for s in committed if keep_every and s % keep_every == 0}
    gone = [(s, path) for s, path in _directories(run_dir) if committed and s < committed[-1] and s not in kept]
    for _, path in gone:
        remove(path / INDEX)  # first it stops to exist, then its files go
        remove_tree(path)
    return sorted(s for s, _ in gone)


# ---------------------------------------------------------------------- finding and checking


def committed(run_dir: str) -> Iterator[Checkpoint | BadCheckpoint]:
    """All checkpoints with an index, newest first; an unreadable index comes as `BadCheckpoint`."""
    for _, path in sorted(_directories(run_dir), reverse=True):
        if not exists(path / INDEX):
            continue
        try:
            yield Checkpoint(path, read_index(path))
        except BadCheckpoint as e:
            yield e


def newest(run_dir: str) -> Checkpoint | None:
    """The newest checkpoint with a readable index and files of the right size; hashes are not computed."""
    for checkpoint in committed(run_dir):
        if isinstance(checkpoint, Checkpoint):
            with contextlib.suppress(BadCheckpoint):
                check_sizes(checkpoint)
                return checkpoint
    return None


def read_index(path: UPath) -> Index:
    """The checked index of a checkpoint directory. Raises `BadCheckpoint`."""
    try:
        index = Index.model_validate_json(read_bytes(path / INDEX))
    except (ValidationError, OSError, ValueError) as e:
        reason = e.errors(include_url=False)[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise BadCheckpoint(f"{path / INDEX}: not a valid index: {reason}") from None
    check_coverage(index)
    return index


def check_coverage(index: Index) -> None:
    """Every element of every parameter in exactly one fragment of each of its kinds. Raises `BadCheckpoint`."""
    spans: dict[tuple[str, str], list[SavedFragment]] = defaultdict(list)
    files = {f.file for f in index.files}
    for f in index.fragments:
        if f.parameter not in index.parameters:
            raise BadCheckpoint(f"step {index.step}: fragment of an unknown parameter {f.parameter}")
        if f.file not in files:
            raise BadCheckpoint(f"step {index.step}: fragment in an unlisted file {f.file}")
        if f.kind not in index.kinds(f.parameter):
            raise BadCheckpoint(f"step {index.step}: {f.parameter} has no {f.kind}")
        spans[f.parameter, f.kind].append(f)
    for name, shape in index.parameters.items():
        for kind in index.kinds(name):
            end = 0
            for f in sorted(spans[name, kind], key=lambda f: f.start):
                if f.start != end:
                    raise BadCheckpoint(f"step {index.step}: {name} {kind}: missing or repeated at {end}")
                end += f.length
            if end != math.prod(shape):
                raise BadCheckpoint(f"step {index.step}: {name} {kind}: {end} of {math.prod(shape)} elements")


def check_sizes(checkpoint: Checkpoint) -> None:
    """Every file there, at its size. Raises `BadCheckpoint`."""
    for f in checkpoint.index.files:
        path = checkpoint.path / f.file
        try:
            size = file_size(path)
        except FileNotFoundError:
            raise BadCheckpoint(f"{path}: missing") from None
        if size != f.bytes:
            raise BadCheckpoint(f"{path}: {size:,} bytes, the index says {f.bytes:,}")


def verify(checkpoint: Checkpoint, share: int = 0, shares: int = 1) -> None:
    """Sizes of all files, hashes of every `shares`-th one from `share` on. Raises `BadCheckpoint`."""
    check_sizes(checkpoint)
    for f in checkpoint.index.files[share::shares]:
        if sha256_of(checkpoint.path / f.file) != f.sha256:
            raise BadCheckpoint(f"{checkpoint.path / f.file}: content differs from its sha256")


def check_fits(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raises `UserError` where the checkpoint's parameters are not those of the model."""
    saved = {name: tuple(shape) for name, shape in checkpoint.index.parameters.items()}
    for name in [*shapes, *saved]:
        if saved.get(name) != shapes.get(name):
            has = f"shape {list(saved[name])}" if name in saved else "no such parameter"
            wants = f"shape {list(shapes[name])}" if name in shapes else "no such parameter"
            raise UserError(
                f"{source}: model: does not fit the checkpoint {checkpoint.path}: {name}: saved {has}, "
                f"the model has {wants}; choose another name or the model it was saved with"
            )


# ---------------------------------------------------------------------- reading


def load(checkpoint: Checkpoint, wanted: Iterable[Fragment]) -> None:
    """Fill fragments from a checkpoint, reading only the slices that overlap them. Raises `BadCheckpoint`."""
    saved: dict[tuple[str, str], list[SavedFragment]] = defaultdict(list)
    for f in checkpoint.index.fragments:
        saved[f.parameter, f.kind].append(f)
    slices: dict[str, list[Slice]] = defaultdict(list)
    for want in wanted:
        end = want.start + want.tensor.numel()
        for have in saved[want.parameter, want.kind]:
            low, high = max(want.start, have.start), min(end, have.start + have.length)
            if low < high:
                target = want.tensor[low - want.start : high - want.start]
                slices[have.file].append(Slice(have.key, have.length, low - have.start, target))
    sizes = {f.file: f.bytes for f in checkpoint.index.files}
    for name in sorted(slices):
        try:
            read_slices(checkpoint.path / name, sizes[name], slices[name])
        except BadFile as e:
            raise BadCheckpoint(f"{checkpoint.path / name}: {e}") from None


def load_weights(checkpoint: Checkpoint, kind: Kind = "weight") -> dict[str, Tensor]:
    """The whole fp32 weights, or their moving average, name → tensor, on the CPU."""
    weights = {name: torch.empty(math.prod(shape)) for name, shape in checkpoint.index.parameters.items()}
    load(checkpoint, [Fragment(name, kind, 0, tensor) for name, tensor in weights.items()])
    return {name: t.view(checkpoint.index.parameters[name]) for name, t in weights.items()}


def _directories(run_dir: str) -> list[tuple[int, UPath]]:
    paths = children(location(run_dir) / "checkpoints")
    matches = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in paths)
    return [(int(match[1]), path) for match, path in matches if match]


def describe(checkpoint: Checkpoint | BadCheckpoint, run_dir: str) -> dict[str, Any]:
    """One row of `checkpoint ls --json`."""
    if isinstance(checkpoint, BadCheckpoint):
        return {"step": None, "path": run_dir, "valid": False, "reason": str(checkpoint)}
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
