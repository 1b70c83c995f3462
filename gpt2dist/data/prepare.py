"""Documents → token shards, on Ray Data: read → tokenize → shard, one task a chunk of the sources.

A task writes its chunk's shards itself and returns only counts, so memory is bounded by the chunks in flight.
Chunks depend on the sources' sizes alone; so neither the number of CPUs nor the order in which tasks finish
changes a byte of the output. The manifest is written last: without it there is no data set.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from upath import UPath

from gpt2dist.config import PrepareSection, RunConfig, UserError
from gpt2dist.data import sources, tokenizer
from gpt2dist.data.shards import MANIFEST, TOKEN_DTYPE, Manifest, Shard, Split, read_manifest, write_manifest
from gpt2dist.data.sources import BadRecord, Piece
from gpt2dist.storage import check_writable, publish


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    total_bytes: int
    bytes: int = 0
    documents: int = 0
    skipped: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Prepared:
    """The outcome of `prepare`."""

    manifest: Manifest
    up_to_date: bool
    """The data set was there already."""


def is_up_to_date(run: RunConfig) -> Manifest | None:
    """The manifest of the data set, where it is complete and made of just these sources.

    Raises:
        UserError: a source is missing, or the output holds a data set made of something else.
    """
    p = run.prepare
    if not p.output:
        raise UserError("prepare.output: required, but missing")
    tokenizer.load(p.vocab_dir)  # a bad vocabulary is a mistake to hear of now
    request = _request(p, sources.inventory(p))
    if not (UPath(p.output) / MANIFEST).exists():
        return None
    manifest = read_manifest(p.output)
    if manifest.request != request:
        changed = [key for key in request if manifest.request.get(key) != request[key]]
        raise UserError(
            f"prepare.output: {p.output} holds a data set made with other {', '.join(changed) or 'settings'}; "
            "remove it or name another directory"
        )
    return manifest


def prepare(run: RunConfig, on_progress: Callable[[Progress], None]) -> Manifest:
    """Tokenize `prepare.sources` into `prepare.output` on the running Ray cluster.

    Raises:
        UserError: nothing to read, a bad record (unless they are skipped), or the output is not writable.
    """
    p = run.prepare
    check_writable(p.output)
    pieces = sources.inventory(p)
    chunks = sources.cut(pieces, int(p.shard_mb * 1e6))
    state = Progress(total_bytes=sum(piece.stop - piece.start for piece in pieces))
    on_progress(state)
    absolute = run.absolute().prepare  # Ray's workers may have another working directory
    rows = [
        {
            "index": i,
            "pieces": sources.to_json([replace(c, path=os.path.abspath(c.path)) for c in chunk]),
            "bytes": sum(c.stop - c.start for c in chunk),
        }
        for i, chunk in enumerate(chunks)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map(
        _tokenize_chunk, fn_args=(absolute,), num_cpus=1
    )
    results: dict[int, dict[str, Any]] = {}
    for row in dataset.iter_rows():
        result = json.loads(row["result"])
        if result["error"]:
            raise UserError(f"{result['error']}; to leave such records out: --set prepare.on_bad_record=skip")
        results[result["index"]] = result
        state = replace(
            state,
            bytes=state.bytes + row["bytes"],
            documents=state.documents + result["documents"],
            skipped=state.skipped + result["skipped"],
            tokens=state.tokens + sum(s["tokens"] for s in result["shards"].values()),
        )
        on_progress(state)
    return _finish(p, pieces, [results[i] for i in sorted(results)])


def _finish(p: PrepareSection, pieces: list[Piece], results: list[dict[str, Any]]) -> Manifest:
    splits: dict[Split, list[Shard]] = {"train": [], "val": []}
    for split, shards in splits.items():
        shards.extend(Shard(**r["shards"][split]) for r in results if split in r["shards"])
    if not splits["train"]:
        raise UserError("prepare.sources: no document went to the training split: the data set would be empty")
    kept = sum(r["documents"] for r in results)
    skipped = sum(r["skipped"] for r in results)
    manifest = Manifest(
        request=_request(p, pieces),
        documents={"read": kept + skipped, "kept": kept, "skipped": skipped},
        splits=splits,
    )
    write_manifest(UPath(p.output), manifest)
    return manifest


def _request(p: PrepareSection, pieces: list[Piece]) -> dict[str, Any]:
    """What determines the output; files by name and size, so a copy elsewhere is the same request."""
    files = "".join(f"{os.path.basename(piece.path)} {piece.stop}\n" for piece in pieces)
    return {
        "sources": list(p.sources),
        "files": hashlib.sha256(files.encode()).hexdigest(),
        "text_field": p.text_field,
        "val_fraction": p.val_fraction,
        "on_bad_record": p.on_bad_record,
        "shard_mb": p.shard_mb,
    }


def _tokenize_chunk(row: dict[str, Any], p: PrepareSection) -> dict[str, Any]:
    """One task: tokenize a chunk's documents, write its shards, return counts as JSON."""
    encoding = tokenizer.load(p.vocab_dir)
    end = np.array([tokenizer.EOT], dtype=TOKEN_DTYPE)
    tokens: dict[Split, list[np.ndarray[Any, Any]]] = {"train": [], "val": []}
    documents = skipped = 0
    error = ""
    for piece in sources.from_json(row["pieces"]):
        # The standard library is not the user's to mend: what is no UTF-8 there is counted and left out.
        skip = p.on_bad_record == "skip" or p.sources == [sources.STDLIB]
        for document in sources.documents(piece, p.text_field):
            if isinstance(document, BadRecord):
                skipped += 1
                error = error or ("" if skip else str(document))
                continue
            documents += 1
            ids = encoding.encode_to_numpy(document, disallowed_special=()).astype(TOKEN_DTYPE)
            tokens[_split_of(document, p.val_fraction)] += [ids, end]
    shards = {}
    for split, parts in tokens.items():
        if parts and not error:
            file = f"{split}-{row['index']:05d}.npy"
            shards[split] = _write_shard(UPath(p.output) / file, np.concatenate(parts), len(parts) // 2)
    result = {
        "index": row["index"],
        "error": error,
        "documents": documents,
        "skipped": skipped,
        "shards": {split: shard.model_dump() for split, shard in shards.items()},
    }
    return {"result": json.dumps(result), "bytes": row["bytes"]}


def _write_shard(path: UPath, tokens: np.ndarray[Any, Any], documents: int) -> Shard:
    buffer = io.BytesIO()
    np.save(buffer, tokens, allow_pickle=False)
    data = buffer.getvalue()
    publish(path, data)
    return Shard(
        file=path.name,
        tokens=len(tokens),
        documents=documents,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _split_of(document: str, val_fraction: float) -> Split:
    """By the document's own hash: adding files never moves a document between the splits."""
    digest = hashlib.sha256(document.encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") / 2**64 < val_fraction else "train"
