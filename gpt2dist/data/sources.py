"""What `prepare.sources` may name, and how its files are cut into tasks of bounded size.

A *piece* is a file or a byte range of one. A line, a row group and a token document belong to the range in which
they start, so any cut gives the same documents. Compressed files cannot be entered in the middle: one piece each.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import io
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from fsspec.utils import glob_translate

from gpt2dist.config import PrepareSection, UserError
from gpt2dist.data import json_array
from gpt2dist.data.compressed import READ_BYTES, Decompressed, is_damage
from gpt2dist.storage import filesystem, serves_ranges
from gpt2dist.urls import is_http, without_secrets, without_secrets_in

STDLIB = "builtin:stdlib"
TOPICS = "pydoc_data.topics"
KINDS = {".txt": "text", ".md": "text", ".jsonl": "lines", ".json": "lines", ".parquet": "parquet", ".bin": "tokens"}
CODECS = {".gz": "gzip", ".zst": "zstd"}
"""Suffix → codec as pyarrow calls it."""
DIRECTORY = "directory"
_COMPRESSIBLE = ("text", "lines")
_VERSIONS = ("mtimens", "etag", "generation", "contentmd5", "digest", "lastmodified", "mtime", "updated", "created")
"""What listings call a file's version, in lower case, without signs; the first one counts."""


@dataclass(frozen=True)
class Piece:
    """A file, or the byte range [start, stop) of one."""

    path: str
    """Local path or URL."""
    kind: str
    """`text`: a document a file; `lines`: a JSON object a line; `array`: one JSON array of objects; `parquet`;
    `tokens`: nanoGPT's or llm.c's .bin; `topics`: pydoc's help texts."""
    start: int
    stop: int
    source: int = 0
    """Index in `prepare.sources`."""
    whole: bool = True
    """Can only be read from its beginning."""
    size: int | None = None
    """Bytes of the whole file when it was listed; None: not known."""
    version: str = ""
    """Of the file, as the listing tells it: another one has another content, even at the same size."""

    @property
    def codec(self) -> str | None:
        """`gzip`, `zstd`, or None."""
        return CODECS.get(_suffixes(self.path)[1])


class SourceChanged(OSError):
    """A file that is not as long as when it was listed: what the chunks leave out of it would be lost."""

    def __init__(self, size: int, listed: int) -> None:
        super().__init__(f"it was changed: {size:,} bytes, and {listed:,} when it was listed")


@dataclass(frozen=True)
class Inventory:
    """The files that `prepare.sources` names."""

    pieces: list[Piece]
    """One a file, sorted within each source."""
    passed_over: Mapping[str, int]
    """Suffix → files of kinds that cannot be read, which lie in a directory or match a glob, and `DIRECTORY` →
    directories that match one; links of web pages are not counted."""


def inventory(prepare: PrepareSection) -> Inventory:
    """What there is to read. Raises `UserError`."""
    if not prepare.sources:
        raise UserError("prepare.sources: empty; name files, directories, globs, URLs or builtin:stdlib")
    output = _real(prepare.output) + "/"
    for source in prepare.sources:
        if output.startswith(_real(source).rstrip("/") + "/"):
            raise UserError(f"prepare.output: {prepare.output} lies in the source {without_secrets(source)}")
    passed_over: Counter[str] = Counter()
    pieces = [piece for i, source in enumerate(prepare.sources) for piece in _expand(source, i, passed_over)]
    for piece in pieces:
        if prepare.output and _real(piece.path).startswith(output):
            raise UserError(f"prepare.sources: {without_secrets(piece.path)} lies in prepare.output")
    return Inventory(pieces, +passed_over)


def cut(pieces: list[Piece], target_bytes: int) -> list[list[Piece]]:
    """Group pieces into chunks of about `target_bytes`; what can be entered in the middle is cut into byte ranges."""
    chunks: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            if room <= 0:
                chunks.append([])
                room = target_bytes
            stop = piece.stop if piece.whole else min(piece.stop, start + room)
            chunks[-1].append(replace(piece, start=start, stop=stop))
            room -= stop - start
            start = stop
    return chunks


def absolute(piece: Piece) -> Piece:
    """The same piece for a process with another working directory."""
    return replace(piece, path=_full(piece.path))


def to_json(pieces: list[Piece]) -> str:
    """A chunk as text, to travel in a Ray Data row."""
    return json.dumps([asdict(piece) for piece in pieces])


def from_json(text: str) -> list[Piece]:
    """The chunk that `to_json` wrote."""
    return [Piece(**item) for item in json.loads(text)]


def open_piece(piece: Piece, block_bytes: int = 1 << 23) -> BinaryIO:
    """The file of a piece at its beginning, decompressed; of a remote one at least `block_bytes` are fetched.

    Raises:
        SourceChanged: it has another size than when it was listed.
    """
    if piece.codec:
        content = Decompressed(lambda: _open_file(piece, block_bytes), piece.codec)
        return io.BufferedReader(content, READ_BYTES)
    return _open_file(piece, block_bytes)


def _open_file(piece: Piece, block_bytes: int) -> BinaryIO:
    if "://" not in piece.path:
        local = open(piece.path, "rb", buffering=1 << 20)
        _check_size(piece, local, os.fstat(local.fileno()).st_size)
        return local
    fs, path = filesystem(piece.path)
    streamed = piece.whole and is_http(piece.path)  # without range requests
    f: Any = fs.open(path, "rb", block_size=0 if streamed else block_bytes)
    if not streamed:
        _check_size(piece, f, f.size)
    elif f.r.headers.get("Content-Encoding", "identity") == "identity":
        _check_size(piece, f, f.r.content_length)
    return f if streamed and piece.codec else io.BufferedReader(f, min(1 << 20, block_bytes))


def _check_size(piece: Piece, f: Any, size: int | None) -> None:
    if piece.size is not None and size is not None and size != piece.size:
        f.close()
        raise SourceChanged(size, piece.size)


def _full(location: str) -> str:
    return location.rstrip("/") if "://" in location else os.path.abspath(location)


def _real(location: str) -> str:
    """The place itself, by whatever links it is named."""
    path = location.removeprefix("file://")
    return _full(location) if "://" in path else os.path.realpath(path)


def _expand(source: str, index: int, passed_over: Counter[str]) -> list[Piece]:
    shown = without_secrets(source)
    if source == STDLIB:
        return _stdlib(index)
    if source.startswith("builtin:"):
        raise UserError(f"prepare.sources: {source}: unknown; did you mean {STDLIB}?")
    try:
        if "://" in source and not source.startswith("file://"):
            named, found = _find_remote(source, passed_over)
        else:
            named, found = _find_local(source.removeprefix("file://"), passed_over)
    except Exception as e:  # each object store's client has its own errors
        text = without_secrets_in((str(e) or type(e).__name__).splitlines()[0])
        raise UserError(f"prepare.sources: {shown}: cannot be listed: {text}") from None
    if not named:  # of a directory or a glob: the files we know
        passed_over.update("".join(_suffixes(path)) for path in found if not _kind(path))
        found = {path: info for path, info in found.items() if _kind(path)}
    if not found:
        raise UserError(f"prepare.sources: {shown}: no such file, or nothing in it that can be read")
    with ThreadPoolExecutor(16) as threads:  # for a look into remote .json files
        return list(threads.map(lambda path: _piece(path, found[path], index), sorted(found)))


def _find_local(source: str, passed_over: Counter[str]) -> tuple[bool, dict[str, dict[str, Any]]]:
    if os.path.isdir(source):
        paths = list(_walk(source))
    elif os.path.isfile(source):
        paths = [source]
    else:
        paths = list(_glob(source, passed_over))
    return paths == [source], {p: _local_info(p) if _kind(p) else {} for p in paths}


def _local_info(path: str) -> dict[str, Any]:
    status = os.stat(path)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _glob(pattern: str, passed_over: Counter[str]) -> Iterator[str]:
    """All files that match, each directory once. Raises `OSError` where one below a ** cannot be read."""
    before, deep, _ = pattern.partition("**")
    if deep:  # `glob` goes round and round in links, and passes over what it may not read
        matches = re.compile(glob_translate(pattern)).match
        roots = [root for root in glob.glob(before or ".") if os.path.isdir(root)]
        found = [path for root in roots for path in _walk(root) if matches(path) and not _hidden(path, root)]
    else:
        found = glob.glob(pattern)
        passed_over[DIRECTORY] += sum(map(os.path.isdir, found))
    seen = set()
    for path in sorted(found):
        directory, name = os.path.split(path)
        if (place := (os.path.realpath(directory), name)) not in seen and _is_file(path):
            seen.add(place)
            yield path


def _hidden(path: str, root: str) -> bool:
    """As in a shell: a * stands for no name that begins with a dot."""
    return any(name.startswith(".") for name in os.path.relpath(path, root).split("/"))


def _is_file(path: str) -> bool:
    """Also a link to what is not there: its size cannot be read then, which is no reason to pass it over."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _walk(directory: str) -> Iterator[str]:
    """All files below, through symbolic links too, each directory once. Raises `OSError` where one cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for place, below, files in os.walk(directory, onerror=fail, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # by another link, or a link that leads back up
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below.sort()
        yield from (path for name in files if _is_file(path := os.path.join(place, name)))


def _find_remote(source: str, passed_over: Counter[str]) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Files at a URL, with fsspec's description of each."""
    fs, path = filesystem(source)
    http = is_http(source)
    globbed = "*" in source or "[" in source or (not http and "?" in source)
    if not (http and globbed) and ((http and _kind(source)) or fs.isfile(path)):  # also where its name has a ? in it
        return True, {source: _info(fs, path)}
    found = fs.glob(path, detail=True) if globbed else fs.find(path, detail=True)
    if globbed and not http and "**" not in path:  # which goes into them
        passed_over[DIRECTORY] += sum(info.get("type") == "directory" for info in found.values())
    files = {fs.unstrip_protocol(p): info for p, info in found.items() if info.get("type") != "directory"}
    if http:  # a listing of links knows no sizes
        files = {p: _info(fs, p) for p in files if _kind(p)}
    return False, files


def _info(fs: Any, path: str) -> dict[str, Any]:
    """fsspec's description of a file; `partial`: ranges of it can be read, which it does not know of HTTP servers."""
    return {**fs.info(path), "partial": not is_http(path) or serves_ranges(fs, path)}


def _suffixes(path: str) -> tuple[str, str]:
    """(.jsonl, .gz) of a.jsonl.gz; (.txt, "") of a.txt."""
    stem, last = os.path.splitext(urlsplit(path).path if is_http(path) else path)
    if last.lower() in CODECS:
        return os.path.splitext(stem)[1].lower(), last.lower()
    return last.lower(), ""


def _kind(path: str) -> str | None:
    suffix, codec = _suffixes(path)
    kind = KINDS.get(suffix)
    return None if codec and kind not in _COMPRESSIBLE else kind


def _piece(path: str, info: dict[str, Any], source: int) -> Piece:
    shown = without_secrets(path)
    kind = _kind(path)
    if kind is None:
        known = ", ".join(KINDS)
        raise UserError(
            f"prepare.sources: {shown}: unknown kind of file; known: {known} (the first four also .gz, .zst)"
        )
    size = info.get("size")
    if size is None:
        raise UserError(f"prepare.sources: {shown}: the server does not tell its size; download it first")
    partial = info.get("partial", True)
    if not partial and kind == "parquet":
        raise UserError(f"prepare.sources: {shown}: the server has no range requests; download it first")
    whole = kind == "text" or bool(_suffixes(path)[1]) or not partial
    # An empty file is read too: of most kinds it is a bad record.
    piece = Piece(path, kind, 0, max(size, 1), source, whole, size, _version(path, info))
    return replace(piece, kind="array", whole=True) if _is_array(piece) else piece


def _version(path: str, info: dict[str, Any]) -> str:
    """Of what a listing has said already; of http also the whole address, whose query may name the content."""
    known = {re.sub("[^a-z0-9]", "", key.lower()): value for key, value in info.items() if value is not None}
    found = next((f"{key} {known[key]}" for key in _VERSIONS if key in known), "")
    if not is_http(path):
        return found
    return f"{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()} {found}"


def _is_array(piece: Piece) -> bool:
    if _suffixes(piece.path)[0] != ".json":
        return False
    try:
        with open_piece(piece, block_bytes=1 << 16) as f:
            return json_array.is_array(f)
    except Exception as e:
        if isinstance(e, OSError) and is_damage(e):  # the task that reads it will say so
            return False
        text = without_secrets_in((str(e) or type(e).__name__).splitlines()[0])
        raise UserError(f"prepare.sources: {without_secrets(piece.path)}: cannot be read: {text}") from None


def _stdlib(source: int) -> list[Piece]:
    """The running Python's library sources without its tests, and the texts of its `help()`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = (p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    topics = importlib.import_module(TOPICS).__file__ or ""

    def piece(path: str, kind: str) -> Piece:
        info = _local_info(path)
        return Piece(path, kind, 0, info["size"], source, size=info["size"], version=_version(path, info))

    pieces = [piece(str(p), "text") for p in sorted(paths) if str(p) != topics]
    return [*(p for p in pieces if p.stop), piece(topics, "topics")]
