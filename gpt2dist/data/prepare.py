"""Documents → token shards, on Ray Data: read → tokenize → shard, one task a chunk of the sources; then duplicates out.

A task writes its chunk's files itself and returns only counts, so memory is bounded by the documents in flight.
Chunks depend on the sources' sizes alone; so neither the number of CPUs nor the order in which tasks finish
changes a byte of the output. A chunk whose part file is there is done: a killed preparation goes on after it.
The manifest is written last: without it there is no data set.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from upath import UPath

from gpt2dist.config import PrepareSection, RunConfig, UserError
from gpt2dist.data import chunk, dedup, readers, sources, tokenizer
from gpt2dist.data.chunk import PARTS, BadRecordFound, Part
from gpt2dist.data.shards import MANIFEST, Manifest, Shard, Source, Split, Tally, read_manifest, write_manifest
from gpt2dist.data.sources import Inventory, Piece
from gpt2dist.storage import (
    check_writable,
    children,
    exists,
    location,
    publish,
    read_bytes,
    reading,
    remove,
    remove_tree,
    writing,
)
from gpt2dist.urls import without_secrets

QUARANTINE = "quarantine.jsonl"
DEATHS = ".deaths"
"""Suffix of a file in parts/: see `_deaths_counted`."""
MAX_DEATHS = 3
"""Of the process of one task."""
_SHARD = re.compile(r"(train|val)-\d{5,}(\.\d+)?\.npy")
_STAGED = re.compile(rf"\.({_SHARD.pattern}|{re.escape(QUARANTINE)}|{re.escape(MANIFEST)})\.[0-9a-f]{{8}}")
Rows = list[dict[str, Any]]
Execute = Callable[[Callable[..., dict[str, Any]], Rows, PrepareSection], Iterable[dict[str, Any]]]
"""Runs function(row, prepare) for each row, in any order."""


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    total_bytes: int
    bytes: int = 0
    documents: int = 0
    skipped: int = 0
    tokens: int = 0
    step: str = ""
    """What is being done after all bytes were read."""


def look(run: RunConfig) -> tuple[Inventory, Manifest | None]:
    """What there is to read; and the manifest of the data set, where it is complete and made of just that.

    Raises:
        UserError: a source is missing, or the output holds a data set made of something else.
    """
    p = run.prepare
    if not p.output:
        raise UserError("prepare.output: required, but missing")
    tokenizer.load(p.vocab_dir)  # a bad vocabulary is a mistake to hear of now
    files = sources.inventory(p)
    return files, _finished_manifest(p, _request(p, files.pieces))


def _finished_manifest(p: PrepareSection, request: dict[str, Any]) -> Manifest | None:
    if not exists(location(p.output) / MANIFEST):
        return None
    manifest = read_manifest(p.output)
    if manifest.request != request:
        changed = [key for key in request if manifest.request.get(key) != request[key]]
        raise UserError(
            f"prepare.output: {p.output} holds a data set made with other {', '.join(changed) or 'settings'}; "
            "remove it or name another directory"
        )
    return manifest


def on_ray(function: Callable[..., dict[str, Any]], rows: Rows, p: PrepareSection) -> Iterator[dict[str, Any]]:
    """Run a task for each row on Ray Data, on one CPU each."""
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(function, fn_args=(p,), num_cpus=1)
    yield from dataset.iter_rows()


def prepare(
    run: RunConfig, on_progress: Callable[[Progress], None], execute: Execute = on_ray, files: Inventory | None = None
) -> Manifest:
    """Tokenize `prepare.sources` into `prepare.output`, by default on the running Ray cluster.

    files: what `look` has found, where it has just looked.

    Raises:
        UserError: nothing to read, a bad record (unless they are skipped), the output is not writable, or holds a data
            set made of something else.
    """
    p = run.prepare
    check_writable(p.output)
    pieces = (files or sources.inventory(p)).pieces
    chunks = sources.cut(pieces, max(1, int(p.shard_mb * 1e6)))
    request = _request(p, pieces)
    if manifest := _finished_manifest(p, request):  # another process has just ended
        clean_up(p)
        return manifest
    absolute = run.absolute().prepare  # Ray's workers may have another working directory
    with _output_named(p):
        _begin(p, request, pieces)

    parts = _finished(p, len(chunks))
    sizes = [sum(piece.stop - piece.start for piece in pieces) for pieces in chunks]
    state = Progress(total_bytes=sum(sizes))
    for part in parts.values():
        state = _advance(state, part, sizes[part.index])
    on_progress(state)
    rows = [
        {"index": i, "pieces": sources.to_json([sources.absolute(piece) for piece in pieces])}
        for i, pieces in enumerate(chunks)
        if i not in parts
    ]
    failed: dict[str, Any] | None = None
    for row in execute(_tokenize, rows, absolute) if rows else ():
        if row["part"]:
            part = _part_of(row, chunks)
            parts[part.index] = part
            state = _advance(state, part, sizes[part.index])
            on_progress(state)
        elif failed is None or row["index"] < failed["index"]:
            failed = row
        # The first problem in the order of the sources is reported, whichever task ends first.
        if failed and all(i in parts for i in range(failed["index"])):
            _part_of(failed, chunks)
    ordered = [parts[i] for i in range(len(chunks))]
    with _output_named(p):
        if p.dedup != "none":
            on_progress(replace(state, step="removing duplicates"))
            ordered = _deduplicated(absolute, ordered, chunks, execute)
        return _finish(p, request, ordered, chunks)


@contextlib.contextmanager
def _output_named(p: PrepareSection) -> Iterator[None]:
    """Errors that name no file, as of a full disk, become a `UserError` that names the output."""
    try:
        yield
    except OSError as e:
        if e.filename:
            raise
        raise UserError(f"{p.output}: {e.strerror or e}") from None


def _begin(p: PrepareSection, request: dict[str, Any], pieces: list[Piece]) -> None:
    """Keep the finished parts of a killed preparation if it was the same one; otherwise remove them.

    Raises:
        UserError: there are shards that no killed preparation has left.
    """
    # What was done under "fail" had no bad record, so it is good under "skip" too.
    same = {k: v for k, v in request.items() if k != "on_bad_record"}
    # Old and new chunks of a file that was changed do not fit together, also where its size is the same.
    versions = json.dumps([piece.version for piece in pieces]).encode()
    same["versions"] = hashlib.sha256(versions).hexdigest()
    text = json.dumps(same, sort_keys=True).encode()
    path = location(p.output) / PARTS / "request.json"
    if exists(path) and read_bytes(path) == text:
        for old in children(path.parent):
            if old.suffix == DEATHS:
                remove(old)
        return
    shards = [old for old in children(location(p.output)) if _SHARD.fullmatch(old.name)]
    if shards and not exists(path):
        raise UserError(
            f"prepare.output: {shards[0]} is there, but not from a preparation that was stopped; "
            "remove it or name another directory"
        )
    # In this order: where this is stopped, the shards are still known for ours.
    for old in shards:
        remove(old)
    clean_up(p)
    publish(path, text)


def _finished(p: PrepareSection, chunks: int) -> dict[int, Part]:
    """The parts that an earlier attempt finished, whose shards are there."""
    names = (path.name for path in children(location(p.output) / PARTS))
    numbers = [int(name[:-5]) for name in names if re.fullmatch(r"\d+\.json", name)]
    with ThreadPoolExecutor(16) as threads:  # many small reads, of an object store perhaps
        parts = threads.map(lambda i: chunk.read_part(p.output, i), [i for i in numbers if i < chunks])
    return {part.index: part for part in parts if part and (not part.bad or part.on_bad_record == p.on_bad_record)}


def _advance(state: Progress, part: Part, size: int) -> Progress:
    tallies = [(what, tally) for by_reason in part.tallies.values() for what, tally in by_reason.items()]
    kept = [tally for what, tally in tallies if what == "kept"]
    return replace(
        state,
        bytes=state.bytes + size,
        documents=state.documents + sum(tally.documents for tally in kept),
        skipped=state.skipped + sum(tally.documents for what, tally in tallies if what != "kept"),
        tokens=state.tokens + sum(tally.tokens for tally in kept),
    )


def _tokenize(row: dict[str, Any], p: PrepareSection) -> dict[str, Any]:
    """A Ray task; errors travel as text, to end as one line."""
    pieces = sources.from_json(row["pieces"])
    try:
        deaths = location(p.output) / PARTS / f"{row['index']:05d}{DEATHS}"
        with _output_named(p), _deaths_counted(deaths, pieces):
            part = chunk.tokenize_chunk(row["index"], pieces, p)
    except BadRecordFound as e:
        where = {"piece": e.piece, "line": e.record.line, "reason": e.record.reason, "detail": e.record.detail}
        return {"index": row["index"], "part": "", "bad": json.dumps(where), "error": ""}
    except (readers.CannotRead, OSError, UserError) as e:
        return {"index": row["index"], "part": "", "bad": "", "error": str(e).splitlines()[0]}
    return {"index": row["index"], "part": part.model_dump_json(), "bad": "", "error": ""}


@contextlib.contextmanager
def _deaths_counted(path: UPath, pieces: list[Piece]) -> Iterator[None]:
    """Ray starts a task again for ever if its process dies: `path` holds a byte for each start that came to no end."""
    died = len(read_bytes(path)) if exists(path) else 0
    if died >= MAX_DEATHS:
        remove(path)
        first, last = (without_secrets(piece.path) for piece in (pieces[0], pieces[-1]))
        what = f"{first} (byte {pieces[0].start:,}) to {last} (byte {pieces[-1].stop:,})"
        raise UserError(f"{what}: the process that read this died {died} times; out of memory? The log says more")
    publish(path, b"x" * (died + 1))
    try:
        yield
    finally:
        remove(path)


def _part_of(row: dict[str, Any], chunks: list[list[Piece]]) -> Part:
    if row["error"]:
        raise UserError(f"prepare: {row['error']}")
    if row["bad"]:
        bad = json.loads(row["bad"])
        piece = chunks[row["index"]][bad["piece"]]
        try:
            where = _where(piece, bad["line"], readers.lines_before(piece))
        except readers.CannotRead as e:
            raise UserError(f"prepare: {e}") from None
        detail = f" ({bad['detail']})" if bad["detail"] else ""
        hint = "to leave such records out: --set prepare.on_bad_record=skip"
        raise UserError(f"{where}: {bad['reason']}{detail}; {hint}")
    return Part.model_validate_json(row["part"])


def _where(piece: Piece, line: int, before: int) -> str:
    path = without_secrets(piece.path)
    return f"{path}: {readers.UNITS[piece.kind]} {before + line}" if line else path


def _deduplicated(p: PrepareSection, parts: list[Part], chunks: list[list[Piece]], execute: Execute) -> list[Part]:
    """The parts without duplicates, which are counted by source."""
    found = {"duplicate": dedup.exact_duplicates(p.output, parts)}
    if p.dedup == "near":
        found["near-duplicate"] = dedup.near_duplicates(p, parts, found["duplicate"])
    out = {part.index: part for part in parts}
    rows = []
    for part in parts:
        drops = {reason: drop[part.index] for reason, drop in found.items() if drop[part.index].any()}
        if drops:
            out[part.index] = _recounted(p, part, drops)
            if part.deduplicated:  # before this preparation was killed
                continue
            packed = np.packbits(np.logical_or.reduce(list(drops.values()))).tobytes()
            rows.append({"index": part.index, "drop": packed, "part": part.model_dump_json()})
    for row in execute(_drop, rows, p) if rows else ():
        new = _part_of(row, chunks)
        out[new.index] = out[new.index].model_copy(update={"shards": new.shards})
    return [out[part.index] for part in parts]


def _recounted(p: PrepareSection, part: Part, drops: dict[str, npt.NDArray[np.bool_]]) -> Part:
    documents = chunk.read_documents(p.output, part.index)
    tallies = {source: dict(by_reason) for source, by_reason in part.tallies.items()}
    for reason, drop in drops.items():
        gone = documents[drop[documents["index"]]]
        for source in np.unique(gone["source"]).tolist():
            tokens = gone["tokens"][gone["source"] == source]
            n, total = len(tokens), int(tokens.sum(dtype=np.int64))
            tallies[source]["kept"] = tallies[source]["kept"].plus(-n, -total)
            tallies[source][reason] = Tally(documents=n, tokens=total)
    return part.model_copy(update={"tallies": tallies})


def _drop(row: dict[str, Any], p: PrepareSection) -> dict[str, Any]:
    """A Ray task: take the duplicates out of a chunk's shards."""
    part = Part.model_validate_json(row["part"])
    drop = np.unpackbits(np.frombuffer(row["drop"], dtype=np.uint8), count=sum(part.prefixes)).astype(bool)
    try:
        with _output_named(p):
            part = chunk.drop_documents(part, drop, p)
    except (OSError, UserError) as e:
        return {"index": row["index"], "part": "", "bad": "", "error": str(e).splitlines()[0]}
    return {"index": row["index"], "part": part.model_dump_json(), "bad": "", "error": ""}


def _finish(p: PrepareSection, request: dict[str, Any], parts: list[Part], chunks: list[list[Piece]]) -> Manifest:
    splits: dict[Split, list[Shard]] = {"train": [], "val": []}
    for split, shards in splits.items():
        shards.extend(shard for part in parts for shard in part.shards[split])
    counts = [_count(without_secrets(name), i, parts) for i, name in enumerate(p.sources)]
    read, kept = (sum(getattr(source, what).documents for source in counts) for what in ("read", "kept"))
    if not splits["train"]:
        left_out: Counter[str] = Counter()
        for source in counts:
            left_out.update({reason: tally.documents for reason, tally in source.dropped.items()})
        found = [f"{read:,} read", *(f"{n:,} left out ({reason})" for reason, n in left_out.most_common())]
        found += [f"{kept:,} in the validation split; lower prepare.val_fraction"] if kept else []
        raise UserError(f"prepare.sources: no document went to the training split: {', '.join(found)}")
    documents = {"read": read, "kept": kept, "skipped": read - kept}
    manifest = Manifest(request=request, documents=documents, sources=counts, splits=splits)
    _write_quarantine(p, parts, chunks)
    write_manifest(location(p.output), manifest)
    clean_up(p)
    return manifest


def clean_up(p: PrepareSection) -> None:
    """Remove parts/, and unfinished shards of tasks that were killed: what a complete data set does not need."""
    for old in children(location(p.output)):
        if _STAGED.fullmatch(old.name):
            remove(old)
    remove_tree(location(p.output) / PARTS)


def _count(name: str, source: int, parts: list[Part]) -> Source:
    totals: dict[str, Tally] = {"kept": Tally()}
    for part in parts:
        for what, tally in part.tallies.get(source, {}).items():
            totals[what] = totals.get(what, Tally()).plus(tally.documents, tally.tokens)
    read = Tally()
    for tally in totals.values():
        read = read.plus(tally.documents, tally.tokens)
    kept = totals.pop("kept")
    return Source(name=name, read=read, kept=kept, dropped=totals)


def _write_quarantine(p: PrepareSection, parts: list[Part], chunks: list[list[Piece]]) -> None:
    """All bad records in the order of the sources, their lines counted from the start of the file."""
    path = location(p.output) / QUARANTINE
    if not any(part.bad for part in parts):
        remove(path)
        return
    before: dict[tuple[int, str], int] = {}
    with writing(path) as f:
        for part in parts:
            records = _bad_records(p, part)
            record = next(records, None)
            for number, (piece, lines) in enumerate(zip(chunks[part.index], part.lines, strict=True)):
                key = (piece.source, piece.path)
                while record and record["piece"] == number:
                    del record["piece"]
                    record["line"] = record["line"] and record["line"] + before.get(key, 0)
                    f.write((json.dumps({"file": without_secrets(piece.path), **record}) + "\n").encode())
                    record = next(records, None)
                before[key] = before.get(key, 0) + lines


def _bad_records(p: PrepareSection, part: Part) -> Iterator[dict[str, Any]]:
    """One at a time: there may be millions. In the order of the chunk's pieces."""
    if part.bad:
        with reading(location(p.output) / PARTS / f"{part.index:05d}.bad.jsonl") as f:
            yield from map(json.loads, f)


def _request(p: PrepareSection, pieces: list[Piece]) -> dict[str, Any]:
    """What determines the output; files by name and size, so a copy elsewhere is the same request."""
    names = (os.path.basename(without_secrets(piece.path)) for piece in pieces)
    files = "".join(f"{name} {piece.stop}\n" for name, piece in zip(names, pieces, strict=True))
    request = {
        "sources": [without_secrets(source) for source in p.sources],
        "files": hashlib.sha256(files.encode("utf-8", "surrogateescape")).hexdigest(),
        "text_field": p.text_field,
        "val_fraction": p.val_fraction,
        "on_bad_record": p.on_bad_record,
        "shard_mb": p.shard_mb,
        "dedup": p.dedup,
        "min_chars": p.min_chars,
        "max_chars": p.max_chars,
    }
    return request | ({"near_threshold": p.near_threshold} if p.dedup == "near" else {})
