"""Documents from pieces of files; what is no document comes as a `BadRecord` in its place, so nothing gets lost."""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError
from pydantic_core import from_json

from gpt2dist.data import json_array, parquet_footer, sources
from gpt2dist.data.compressed import is_damage
from gpt2dist.data.sources import Piece, SourceChanged, open_piece
from gpt2dist.data.token_files import HEADER_BYTES, Joined, Tokens, header_of, token_blocks, token_documents
from gpt2dist.data.tokenizer import N_VOCAB
from gpt2dist.urls import without_secrets, without_secrets_in

MAX_RECORD_BYTES = 1 << 30
"""A longer line, text file or token document is a bad record: it would have to fit in memory."""
RAW_BYTES = 1000
"""Of a bad record, kept for the quarantine file."""
UNITS = {"lines": "line", "array": "element", "parquet": "row", "tokens": "document"}


@dataclass(frozen=True)
class Document:
    """A document: text, or the token ids of a .bin file."""

    line: int
    """Of a line, element, row or token document: which of those that start in the piece, from 1. Of a file: 0."""
    text: str = ""
    tokens: Tokens | None = None
    """uint16 [tokens], without <|endoftext|>."""


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document."""

    line: int
    """As in `Document`."""
    reason: str
    """What it is counted under."""
    detail: str = ""
    raw: bytes = b""
    """How the record begins."""


class CannotRead(Exception):
    """The storage does not deliver the file."""


class Reader:
    """Iterates over the documents and bad records of a piece, in order.

    Raises:
        CannotRead: the file cannot be read (which is not the file's content being bad), or was changed since it was
            listed.
    """

    def __init__(self, piece: Piece, text_field: str) -> None:
        self.piece = piece
        self.field = text_field
        self.lines = 0
        """Lines, elements, rows or token documents that started in the piece so far."""

    def __iter__(self) -> Iterator[Document | BadRecord]:
        try:
            yield from getattr(self, f"_{self.piece.kind}")()
        except _CLIENT_ERRORS as e:
            if not isinstance(e, OSError) or not is_damage(e):
                raise _cannot_read(self.piece, e) from None
            in_lines = self.piece.kind in ("lines", "array")
            yield BadRecord(self.lines + 1 if in_lines else 0, "damaged file", str(e))

    def _topics(self) -> Iterator[Document]:
        for text in importlib.import_module(sources.TOPICS).topics.values():
            yield Document(0, text)

    def _text(self) -> Iterator[Document | BadRecord]:
        with open_piece(self.piece) as f:
            data = f.read(MAX_RECORD_BYTES + 1)
        if len(data) <= MAX_RECORD_BYTES:
            self._check_end(len(data))
        yield self._decode(0, data)

    def _check_end(self, end: int) -> None:
        """end: bytes of the file as it is now. Raises `SourceChanged`."""
        piece = self.piece
        if not piece.codec and piece.size is not None and end != piece.size:  # since it was opened
            raise SourceChanged(end, piece.size)

    def _lines(self) -> Iterator[Document | BadRecord]:
        piece = self.piece
        with open_piece(piece) as f:
            position = 0
            if piece.start:  # the line that runs across the start belongs to the range before
                f.seek(piece.start - 1)
                position = piece.start - 1 + _skip_line(f)
            while piece.whole or position < piece.stop:
                line = f.readline(MAX_RECORD_BYTES + 1)
                if not line:
                    if piece.codec and not self.lines and piece.stop == 1:
                        yield BadRecord(0, "damaged file", f"empty, not a .{piece.codec} file")
                    self._check_end(position)
                    return
                position += len(line)
                if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                    position += _skip_line(f)
                self.lines += 1
                if not line.isspace():
                    record = self._json(self.lines, line)
                    del line  # it may be huge
                    yield record

    def _array(self) -> Iterator[Document | BadRecord]:
        with open_piece(self.piece) as f:
            for text, problem in json_array.elements(f, MAX_RECORD_BYTES):
                self.lines += 1
                bad = BadRecord(self.lines, "broken JSON", problem, text[:RAW_BYTES])
                record = bad if problem else self._json(self.lines, text)
                if isinstance(record, BadRecord) and record.reason == "broken JSON":
                    # Where the next element begins, no one can tell for sure.
                    yield replace(record, detail=f"{record.detail}; nothing after it in this file can be read")
                    return
                del text
                yield record

    def _json(self, number: int, line: bytes) -> Document | BadRecord:
        raw = line[:RAW_BYTES]
        if len(line) > MAX_RECORD_BYTES:
            return BadRecord(number, "too large", f"over {MAX_RECORD_BYTES >> 20} MiB", raw)
        strict = True
        try:
            record: Any = from_json(line)  # without a decoded copy of the line; refuses lone surrogates
        except ValueError:  # let the standard library judge, and say what is wrong
            strict = False
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as e:
                return BadRecord(number, "invalid UTF-8", f"byte {e.start}", raw)
            except json.JSONDecodeError as e:
                return BadRecord(number, "broken JSON", f"{e.msg} at column {e.colno}", raw)
            except (ValueError, RecursionError) as e:  # a number of thousands of digits; deep nesting
                reason = "cannot be parsed" if json_array.is_balanced(line) else "broken JSON"
                return BadRecord(number, reason, str(e), raw)
        text = record.get(self.field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            return BadRecord(number, "no text", f"no string in field {self.field!r}", raw)
        if surrogate := not strict and _SURROGATE.search(text):
            return BadRecord(number, "lone surrogate", f"character {surrogate.start()}", raw)
        return _checked(number, text, raw)

    def _parquet(self) -> Iterator[Document | BadRecord]:
        piece = self.piece
        with open_piece(piece) as f:
            size = f.seek(0, io.SEEK_END)
            try:
                if parquet_footer.aborts(f):
                    raise pa.ArrowInvalid("pyarrow aborts on its footer")
                file = pq.ParquetFile(f, page_checksum_verification=True)
                footer = file.metadata
                if footer.num_rows != sum(footer.row_group(i).num_rows for i in range(footer.num_row_groups)):
                    raise pa.ArrowInvalid("its row groups do not have the rows of the file")
                problem = self._column_problem(file.schema_arrow)
            except _ARROW_ERRORS as e:
                if isinstance(e, OSError) and not is_damage(e):
                    raise
                problem = BadRecord(0, "damaged file", _one_line(e))
            if problem:
                if piece.start == 0:  # reported once, by the first range
                    yield problem
                return
            rows = 0
            for i in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(i)
                if piece.start <= _group_start(group, size) < piece.stop:
                    yield from self._row_group(file, i, rows)
                rows += group.num_rows

    def _column_problem(self, schema: pa.Schema) -> BadRecord | None:
        if schema.names.count(self.field) > 1:
            return BadRecord(0, "no text", f"more than one column {self.field!r}")
        at = schema.get_field_index(self.field)
        if at < 0:
            return BadRecord(0, "no text", f"no column {self.field!r}; columns: {', '.join(schema.names)}")
        kind = schema.field(at).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(is_(kind) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
            return BadRecord(0, "no text", f"column {self.field!r} is {kind}, not a string")
        return None

    def _row_group(self, file: pq.ParquetFile, index: int, row: int) -> Iterator[Document | BadRecord]:
        """Rows are numbered in the file, not in the piece: the footer tells how many come before."""
        end = row + file.metadata.row_group(index).num_rows
        try:
            for batch in file.iter_batches(64, row_groups=[index], columns=[self.field], use_threads=False):
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(pa.large_binary()):
                    row += 1
                    data = value.as_py()
                    if data is None:
                        yield BadRecord(row, "no text", f"null in column {self.field!r}")
                    else:
                        yield self._decode(row, data)
        except _ARROW_ERRORS as e:
            if isinstance(e, OSError) and not is_damage(e):
                raise
            yield BadRecord(row + 1, "damaged file", f"row group {index}: {_one_line(e)}")
            return
        if row != end:  # a damaged page header: pyarrow stops early without an error
            yield BadRecord(row + 1, "damaged file", f"row group {index}: {row - end:+,} rows")

    def _decode(self, number: int, data: bytes) -> Document | BadRecord:
        raw = data[:RAW_BYTES]
        if len(data) > MAX_RECORD_BYTES:
            return BadRecord(number, "too large", f"over {MAX_RECORD_BYTES >> 20} MiB", raw)
        try:
            return _checked(number, data.decode("utf-8-sig"), raw)
        except UnicodeDecodeError as e:
            return BadRecord(number, "invalid UTF-8", f"byte {e.start}", raw)

    def _tokens(self) -> Iterator[Document | BadRecord]:
        piece = self.piece
        with open_piece(piece) as f:
            head = f.read(HEADER_BYTES)
            size = None if piece.whole else f.seek(0, io.SEEK_END)
            header, problem = header_of(head, size if size is not None else piece.stop)
            if problem:
                if piece.start == 0:
                    yield BadRecord(0, "damaged file", problem, head[:RAW_BYTES])
                return
            # In tokens: a document that starts at `first` follows an <|endoftext|> at first - 1.
            first, stop = (max(0, b - header + 1) // 2 for b in (piece.start, piece.stop))
            before = max(0, first - 1)
            if piece.whole:
                blocks = token_blocks(Joined(head[header:], f))
            else:
                f.seek(header + 2 * before)
                blocks = token_blocks(f)
            for at, ids in token_documents(blocks, before, MAX_RECORD_BYTES):
                if at < first:
                    continue  # began in the range before
                if at >= stop:
                    return
                if at == 0 and ids is not None and not len(ids):
                    continue  # llm.c puts <|endoftext|> before each document, nanoGPT after: no document in front of it
                self.lines += 1
                yield _checked_tokens(self.lines, ids)


def lines_before(piece: Piece) -> int:
    """Lines (of .bin: documents) of the file that start before the piece; reads all that is before it.

    Raises:
        CannotRead: the file cannot be read.
    """
    if piece.start == 0 or piece.kind not in ("lines", "tokens"):
        return 0
    if piece.kind == "tokens":
        reader = Reader(Piece(piece.path, "tokens", 0, piece.start, whole=False), "")
        return sum(1 for _ in reader)
    count, left = 1, piece.start - 1
    try:
        with open_piece(piece) as f:
            while left > 0 and (block := f.read(min(left, 1 << 22))):
                count += block.count(b"\n")
                left -= len(block)
    except _CLIENT_ERRORS as e:
        raise _cannot_read(piece, e) from None
    return count


_SURROGATE = re.compile("[\ud800-\udfff]")
_CLIENT_ERRORS = (OSError, aiohttp.ClientError, BotoCoreError)
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError)


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _cannot_read(piece: Piece, error: BaseException) -> CannotRead:
    path, why = without_secrets(piece.path), getattr(error, "strerror", None) or _one_line(error)
    return CannotRead(f"{path}: cannot be read: {without_secrets_in(why)}")


def _skip_line(f: BinaryIO) -> int:
    skipped = 0
    while part := f.readline(1 << 24):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _checked(number: int, text: str, raw: bytes) -> Document | BadRecord:
    if not text or text.isspace():
        return BadRecord(number, "empty", raw=raw)
    if "\0" in text:
        return BadRecord(number, "NUL character", f"character {text.index(chr(0))}", raw)
    return Document(number, text)


def _group_start(group: Any, size: int) -> int:
    """Byte at which a row group starts; inside the file even if a damaged footer says otherwise."""
    column = group.column(0)
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        start = min(start, column.dictionary_page_offset)
    return int(min(max(0, start), size - 1))


def _checked_tokens(number: int, ids: Tokens | None) -> Document | BadRecord:
    if ids is None:
        return BadRecord(number, "too large", f"over {MAX_RECORD_BYTES >> 21} Mi tokens")
    if not len(ids):
        return BadRecord(number, "empty")
    if (ids >= N_VOCAB).any():
        raw = " ".join(map(str, ids[: RAW_BYTES // 6].tolist())).encode()
        return BadRecord(number, "token out of range", f"{int(ids.max())} is above {N_VOCAB - 1}", raw)
    return Document(number, tokens=ids)
