"""Documents from sources: what `prepare.sources` may name, and how it is cut into tasks of bounded size."""

from __future__ import annotations

import glob
import importlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2dist.config import PrepareSection, UserError

STDLIB = "builtin:stdlib"
TOPICS = "pydoc_data.topics"
TEXT_SUFFIXES = (".txt", ".md")
LINES_SUFFIXES = (".jsonl",)


class BadRecord(Exception):
    """A record that is no document; the message names file, line and reason."""


@dataclass(frozen=True)
class Piece:
    """A file, or a byte range of one; a line belongs to the range in which it starts."""

    path: str
    kind: str
    """`text`: the file is one document; `lines`: a JSON object a line; `topics`: pydoc's help texts."""
    start: int
    stop: int


def inventory(prepare: PrepareSection) -> list[Piece]:
    """All files that `prepare.sources` names, sorted within each source. Raises `UserError`."""
    if not prepare.sources:
        raise UserError("prepare.sources: empty; name files, directories, globs or builtin:stdlib")
    return [piece for source in prepare.sources for piece in _expand(source)]


def cut(pieces: list[Piece], target_bytes: int) -> list[list[Piece]]:
    """Group pieces into chunks of about `target_bytes`; long .jsonl files are cut into byte ranges."""
    chunks: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            if room <= 0:
                chunks.append([])
                room = target_bytes
            stop = min(piece.stop, start + room) if piece.kind == "lines" else piece.stop
            chunks[-1].append(Piece(piece.path, piece.kind, start, stop))
            room -= stop - start
            start = stop
    return chunks


def documents(piece: Piece, text_field: str) -> Iterator[str | BadRecord]:
    """The documents of a piece, in order; a bad record comes as a `BadRecord` in its place."""
    if piece.kind == "topics":
        yield from importlib.import_module(TOPICS).topics.values()
    elif piece.kind == "lines":
        yield from _json_lines(piece, text_field)
    else:
        try:
            text = Path(piece.path).read_bytes().decode("utf-8")
            yield text if text else BadRecord(f"{piece.path}: empty document")
        except UnicodeDecodeError as e:
            yield BadRecord(f"{piece.path}: byte {e.start}: not valid UTF-8")


def to_json(pieces: list[Piece]) -> str:
    """A chunk as text, to travel in a Ray Data row."""
    return json.dumps([asdict(piece) for piece in pieces])


def from_json(text: str) -> list[Piece]:
    """The chunk that `to_json` wrote."""
    return [Piece(**item) for item in json.loads(text)]


def _expand(source: str) -> list[Piece]:
    if source == STDLIB:
        return _stdlib()
    if source.startswith("builtin:"):
        raise UserError(f"prepare.sources: {source}: unknown; did you mean {STDLIB}?")
    if os.path.isdir(source):
        paths = sorted(p for p in Path(source).rglob("*") if p.suffix in TEXT_SUFFIXES + LINES_SUFFIXES)
    else:
        paths = sorted(Path(p) for p in glob.glob(source, recursive=True) if os.path.isfile(p))
    if not paths:
        raise UserError(f"prepare.sources: {source}: no such file, or nothing in it that can be read")
    return [_piece(path) for path in paths]


def _piece(path: Path) -> Piece:
    size = path.stat().st_size
    if path.suffix in TEXT_SUFFIXES:
        return Piece(str(path), "text", 0, max(size, 1))
    if path.suffix in LINES_SUFFIXES:
        return Piece(str(path), "lines", 0, size)
    known = ", ".join(TEXT_SUFFIXES + LINES_SUFFIXES)
    raise UserError(f"prepare.sources: {path}: unknown kind of file; known: {known}")


def _stdlib() -> list[Piece]:
    """The running Python's library sources without its tests, and the texts of its `help()`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = (p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    pieces = [Piece(str(p), "text", 0, p.stat().st_size) for p in sorted(paths)]
    topics = importlib.import_module(TOPICS).__file__ or ""
    return [*(p for p in pieces if p.stop and p.path != topics), Piece(topics, "topics", 0, os.path.getsize(topics))]


def _json_lines(piece: Piece, text_field: str) -> Iterator[str | BadRecord]:
    with open(piece.path, "rb") as f:
        if piece.start:  # the line that runs across the start belongs to the range before
            f.seek(piece.start - 1)
            f.readline()
        while f.tell() < piece.stop:
            at = f.tell()
            line = f.readline()
            if line.strip():
                yield _record(line, f"{piece.path}: byte {at}", text_field)


def _record(line: bytes, where: str, text_field: str) -> str | BadRecord:
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        return BadRecord(f"{where}: not valid UTF-8")
    except json.JSONDecodeError as e:
        return BadRecord(f"{where}: broken JSON: {e.msg}")
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return BadRecord(f"{where}: no text in field {text_field!r}")
    if not text:
        return BadRecord(f"{where}: empty document")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadRecord(f"{where}: lone surrogate in field {text_field!r}")
    return text
