"""index.json of a checkpoint: everything about it but the numbers. Whoever wrote it is not trusted."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat
from upath import UPath

from gpt2dist.config import Section
from gpt2dist.train.fragment import kinds
from gpt2dist.train.fragment_file import FragmentFile

INDEX = "index.json"
MAX_INDEX_BYTES = 256 << 20
"""About 500,000 fragments."""

FileName = Annotated[str, Field(pattern=r"^rank-\d{5}(\.\d+)?\.safetensors$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,200}$")]
Count = Annotated[int, Field(ge=1, le=1 << 50)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]


class SavedFragment(Section):
    """One piece of a flattened parameter, [start, start + length), and the file that holds it."""

    parameter: Name
    kind: Kind
    start: int = Field(ge=0, le=1 << 50)
    length: Count
    file: FileName

    @property
    def key(self) -> str:
        """Name of the tensor inside the file."""
        return f"{self.parameter}|{self.kind}|{self.start}"


class SavedFile(Section):
    """Size of one file, and the hashes of its pieces, the last of which may be shorter."""

    file: FileName
    bytes: Count
    piece_bytes: int = Field(ge=1, le=1 << 24)
    sha256: list[Hash]


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
    scalars: dict[str, FiniteFloat]
    """Adam's step count and the fp16 loss scale."""
    parameters: dict[Name, Annotated[list[Count], Field(max_length=4)]] = Field(max_length=100_000)
    """Name → shape."""
    fragments: list[SavedFragment]
    """Those of a file in the order in which they lie in it."""
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

    def made_of(self, directory: UPath) -> dict[str, FragmentFile]:
        """Name → what should be in the file, with its hashes."""
        tensors: dict[str, dict[str, int]] = defaultdict(dict)
        for f in self.fragments:
            tensors[f.file][f.key] = f.length
        return {f.file: FragmentFile(directory / f.file, tensors[f.file], f.sha256, f.piece_bytes) for f in self.files}

    def to_bytes(self) -> bytes:
        """The content of index.json. Its first line is the hash of everything after it."""
        return with_hash(self.model_dump_json().encode())


def with_hash(table: bytes) -> bytes:
    """A JSON object with `sha256` as its first key, alone on the first line: of all that follows that line."""
    rest = table.removeprefix(b"{") + b"\n"
    return b'{"sha256":"' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest


def parse(data: bytes) -> dict[str, Any]:
    """The table in index.json, without its hash. Raises `ValueError`."""
    first, _, rest = data.partition(b"\n")
    match = re.fullmatch(rb'\{"sha256":"([0-9a-f]{64})",', first)
    if match is None or hashlib.sha256(rest).hexdigest() != match[1].decode():
        raise ValueError("content differs from its sha256")
    try:
        table = json.loads(b"{" + rest, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return dict(table)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key stands twice")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def check(index: Index) -> None:
    """Each element of every parameter in exactly one fragment of each of its kinds; files made of their fragments.

    Raises `ValueError`.
    """
    spans: dict[tuple[str, str], list[SavedFragment]] = defaultdict(list)
    files = {f.file for f in index.files}
    for f in index.fragments:
        if f.parameter not in index.parameters:
            raise ValueError(f"fragment of an unknown parameter {f.parameter}")
        if f.file not in files:
            raise ValueError(f"fragment in an unlisted file {f.file}")
        if f.kind not in index.kinds(f.parameter):
            raise ValueError(f"{f.parameter} has no {f.kind}")
        spans[f.parameter, f.kind].append(f)
    for name, shape in index.parameters.items():
        for kind in index.kinds(name):
            end = 0
            for f in sorted(spans[name, kind], key=lambda f: f.start):
                if f.start != end:
                    raise ValueError(f"{name} {kind}: missing or repeated at {end}")
                end += f.length
            if end != math.prod(shape):
                raise ValueError(f"{name} {kind}: {end} of {math.prod(shape)} elements")
    if len(files) != len(index.files):
        raise ValueError("a file is listed twice")
    made = index.made_of(UPath())
    for file in index.files:
        if file.bytes != made[file.file].bytes:
            raise ValueError(f"{file.file} has {file.bytes:,} bytes, its fragments make {made[file.file].bytes:,}")
        if len(file.sha256) != made[file.file].pieces:
            raise ValueError(f"{file.file} has {len(file.sha256)} hashes for {made[file.file].pieces} pieces")
    if "optimizer_steps" not in index.scalars:
        raise ValueError("no optimizer_steps")
