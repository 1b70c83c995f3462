"""Every kind of source, and every kind of bad record and file with both policies."""

from __future__ import annotations

import contextlib
import functools
import gzip
import http.server
import io
import json
import os
import re
import shutil
import struct
import tempfile
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2dist.config import RunConfig, UserError
from gpt2dist.data import json_array, parquet_footer, readers, sources, tokenizer
from gpt2dist.data.compressed import is_damage
from gpt2dist.data.prepare import look, prepare
from gpt2dist.data.readers import BadRecord, CannotRead, Document, Reader
from gpt2dist.data.shards import read_manifest
from gpt2dist.data.sources import Piece
from gpt2dist.urls import without_secrets, without_secrets_in
from tests.conftest import tiny_run
from tests.unit.corpora import failure, ids_of, in_process, lines, prepare_run, quarantine, run_prepare, texts_of, write

EOT = 50256
TEXTS = ["one fish", "two fish\nthree", "rot fisch — blau", "neun\u2028zehn", "x" * 500, "last"]


def write_parquet(path: Path, texts: list[Any], field: str = "text", row_group_size: int = 2, **kwargs: Any) -> str:
    table = pa.table({"id": list(range(len(texts))), field: texts})
    pq.write_table(table, path, row_group_size=row_group_size, **kwargs)
    return str(path)


def write_nanogpt(path: Path, documents: list[list[int]]) -> str:
    """As nanoGPT's data/openwebtext/prepare.py: ids of each document, then <|endoftext|>, all as uint16."""
    path.write_bytes(b"".join(struct.pack(f"<{len(d) + 1}H", *d, EOT) for d in documents))
    return str(path)


def write_llmc(path: Path, documents: list[list[int]]) -> str:
    """As llm.c's dev/data/data_common.py: 256 int32 of header, then <|endoftext|> and ids of each document."""
    ids = [i for d in documents for i in (EOT, *d)]
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    run = prepare_run(tmp_path, write(tmp_path / name, lines(*TEXTS, field="body")), text_field="body")
    run_prepare(run)
    assert texts_of(run) == TEXTS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst", "A.JSON"])
def test_json_array(tmp_path: Path, name: str, indent: int | None) -> None:
    """However it is written, and however small the tasks are."""
    records = [{"id": [{}, i], "text": text, "more": {"a,]}": '"[\\'}} for i, text in enumerate(TEXTS)]
    for i, ascii_only in enumerate((True, False)):
        data = b"\xef\xbb\xbf \n" * i + json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode() + b"\n"
        run = prepare_run(tmp_path, write(tmp_path / name, data), shard_mb=2e-5, output=f"out{i}")
        run_prepare(run)
        assert [t for s in read_manifest(run.prepare.output).splits["train"] for t in texts_in(run, s.file)] == TEXTS


def test_an_empty_json_array_has_no_records(tmp_path: Path) -> None:
    empty = [write(tmp_path / f"{i}.json", data) for i, data in enumerate((b"[]", b" [ \n ]\n"))]
    run = prepare_run(tmp_path, *empty, write(tmp_path / "z.json", b'[{"text": "one"}]'))
    assert run_prepare(run).documents == {"read": 1, "kept": 1, "skipped": 0}


def test_memory_does_not_grow_with_a_json_array(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "w") as f:
        f.write("[")
        f.writelines(f'{{"id": {i}, "text": "{"some words " * 100}"}},\n' for i in range(30_000))
        f.write('{"text": "end"}]')
    tracemalloc.start()
    count = sum(1 for _ in Reader(Piece(str(tmp_path / "a.json"), "array", 0, 1), "text"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_001
    assert peak < 6e6 < (tmp_path / "a.json").stat().st_size / 5


@pytest.mark.parametrize("suffix", ["txt", "md", "txt.gz", "md.zst"])
def test_text_files(tmp_path: Path, suffix: str) -> None:
    for i, text in enumerate(TEXTS):
        write(tmp_path / f"texts/{i}.{suffix}", text.encode())
    run = prepare_run(tmp_path, str(tmp_path / "texts"))
    run_prepare(run)
    assert texts_of(run) == TEXTS


@pytest.mark.parametrize("kwargs", [{}, {"compression": "zstd"}, {"use_dictionary": False}, {"row_group_size": 1}])
def test_parquet(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    run = prepare_run(tmp_path, write_parquet(tmp_path / "a.parquet", TEXTS, **kwargs), shard_mb=0.0005)
    run_prepare(run)
    assert texts_of(run) == TEXTS


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_of_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(TEXTS).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(TEXTS, kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    run = prepare_run(tmp_path, str(tmp_path / "a.parquet"))
    run_prepare(run)
    assert texts_of(run) == TEXTS


def test_parquet_with_two_columns_of_that_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "no text (more than one column 'text')" in failure(prepare_run(tmp_path, str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_string_types(tmp_path: Path, kind: pa.DataType) -> None:
    run = prepare_run(tmp_path, write_parquet(tmp_path / "a.parquet", pa.array(TEXTS).cast(kind)))
    run_prepare(run)
    assert texts_of(run) == TEXTS


@pytest.mark.parametrize("shard_mb", [64.0, 0.0002])
@pytest.mark.parametrize("writer", [write_nanogpt, write_llmc])
def test_token_files_give_the_shards_of_the_same_texts(tmp_path: Path, writer: Any, shard_mb: float) -> None:
    """Ours, nanoGPT's and llm.c's way to the same data set, both splits."""
    texts = [f"document {i} " + "word " * i for i in range(40)]
    encoding = tokenizer.load()
    source = writer(tmp_path / "a.bin", [encoding.encode_ordinary(text) for text in texts])
    theirs = prepare_run(tmp_path, source, val_fraction=0.3, shard_mb=shard_mb, output="theirs")
    ours = prepare_run(tmp_path, write(tmp_path / "a.jsonl", lines(*texts)), val_fraction=0.3, output="ours")
    run_prepare(theirs)
    run_prepare(ours)
    for split in ("train", "val"):
        assert ids_of(theirs, split) == ids_of(ours, split)
    assert len(texts_of(ours, "val")) > 3


def test_token_file_without_separators_is_one_document(tmp_path: Path) -> None:
    np.arange(1, 3000, dtype="<u2").tofile(tmp_path / "shakespeare.bin")
    run = prepare_run(tmp_path, str(tmp_path / "shakespeare.bin"), shard_mb=0.001)
    run_prepare(run)
    assert ids_of(run) == [*range(1, 3000), EOT]


def texts_in(run: RunConfig, file: str) -> list[str]:
    ids = np.load(Path(run.prepare.output) / file, allow_pickle=False).tolist()
    return tokenizer.load().decode(ids).split("<|endoftext|>")[:-1]


def test_several_sources_globs_and_directories(tmp_path: Path) -> None:
    write(tmp_path / "b/deep/2.txt", b"two")
    write(tmp_path / "b/1.md", b"one")
    for name in ("ignored.pdf", "deep/more.PDF", "c.parquet.gz", "Makefile"):
        write(tmp_path / "b" / name, b"%PDF")
    one = write(tmp_path / "z.jsonl", lines("zero"))
    write_parquet(tmp_path / "c-1.parquet", ["three"])
    write_parquet(tmp_path / "c-2.parquet", ["four"])
    run = prepare_run(tmp_path, one, str(tmp_path / "b"), str(tmp_path / "c-*.parquet"))
    manifest = run_prepare(run)
    assert texts_of(run) == ["zero", "one", "two", "three", "four"]
    assert [source.kept.documents for source in manifest.sources] == [1, 2, 2]
    assert look(run)[0].passed_over == {".pdf": 2, ".parquet.gz": 1, "": 1}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing*.txt", "no such file"),
        ("a.pdf", "unknown kind of file"),
        ("a.parquet.gz", "unknown kind of file"),
        ("empty", "nothing in it that can be read"),
        ("builtin:stdlub", "did you mean builtin:stdlib"),
        ("nosuch://bucket/a.txt", "cannot be listed"),
        ("http://127.0.0.1:9/a.txt", "cannot be listed"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, source: str, message: str) -> None:
    for name in ("a.pdf", "a.parquet.gz", "empty/a.pdf"):
        write(tmp_path / name, b"x")
    run = prepare_run(tmp_path, source if ":" in source else str(tmp_path / source))
    text = failure(run)
    assert text.startswith(f"prepare.sources: {run.prepare.sources[0]}: ")
    assert message in text


@pytest.fixture
def http_server(tmp_path: Path) -> Iterator[str]:
    """Python's own, which has no range requests."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *a: None  # type: ignore[attr-defined]
    with serving(handler) as url:
        yield url


@contextlib.contextmanager
def serving(handler: Any) -> Iterator[str]:
    """An HTTP server on loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.bin"])
def test_http_without_ranges(tmp_path: Path, http_server: str, name: str) -> None:
    documents = [[10, 11], [12], [13, 14, 15] * 999]
    texts = [tokenizer.load().decode(d) for d in documents]
    if name == "a.bin":
        write_llmc(tmp_path / name, documents)
    else:
        write(tmp_path / name, lines(*texts) if "json" in name else texts[2].encode())
    run = prepare_run(tmp_path, f"{http_server}/{name}?token=secret", shard_mb=0.0001)
    run_prepare(run)
    assert texts_of(run) == (texts if name != "a.txt" else texts[2:])
    assert "secret" not in (tmp_path / "out/manifest.json").read_text()


class WithRanges(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges; where a client takes gzip, it compresses, as some servers do."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            data = gzip.compress(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(data))
        self.asked.append(f"{first}-{last}" if wanted else "all")
        self.send_response((206 if first < len(data) else 416) if wanted else 200)
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


def test_http_with_ranges_is_read_in_pieces(tmp_path: Path) -> None:
    texts = [f"document {i} " * 40 for i in range(60)]
    write(tmp_path / "www/a.jsonl", lines(*texts))
    write_parquet(tmp_path / "www/b.parquet", ["one", "two"])
    with serving(functools.partial(WithRanges, directory=str(tmp_path / "www"))) as url:
        run = prepare_run(tmp_path, f"{url}/a.jsonl", f"{url}/b.parquet", shard_mb=0.005)
        assert [piece.whole for piece in sources.inventory(run.prepare).pieces] == [False, False]
        manifest = run_prepare(run)
    assert len(manifest.splits["train"]) > 4
    assert texts_of(run) == [*texts, "one", "two"]
    assert "all" not in WithRanges.asked


def test_what_tells_a_changed_file_at_the_same_size(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"text")
    for listed in ({"ETag": '"x"', "LastModified": 1}, {"last_modified": 2}, {"mtime": 3.5}, {"contentMd5": "h"}):
        assert sources._version("s3://b/a", listed) == sources._version("s3://b/a", dict(listed)) != ""
        assert sources._version("s3://b/a", listed) != sources._version("s3://b/a", dict.fromkeys(listed, "other"))
    assert sources._version("s3://b/a", {"size": 1, "VersionId": None}) == ""
    with serving(functools.partial(WithRanges, directory=str(tmp_path))) as url:
        queries = ("", "?v=1", "?v=2&sig=secret")
        versions = [sources.inventory(prepare_run(tmp_path, f"{url}/a.txt{q}").prepare).pieces for q in queries]
    assert len({piece.version for (piece,) in versions}) == 3
    assert not any("secret" in piece.version for (piece,) in versions)
    assert all("lastmodified" in piece.version for (piece,) in versions)  # of the answer that told the size


@pytest.mark.parametrize("change", ["shorter", "longer", "appended"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.bin", "a.parquet", "a.json", "a.jsonl.gz", "a.md.zst"])
def test_a_file_whose_size_has_changed_stops_the_preparation(tmp_path: Path, name: str, change: str) -> None:
    """Of a shorter one the end is missing; of a longer one what the chunks do not know of."""
    path = tmp_path / name

    def put(count: int) -> None:
        texts = [f"text {i} {i**5}" for i in range(count)]
        if name == "a.bin":  # nanoGPT's; llm.c's says in its header how long it is
            write_nanogpt(path, [[10, 11]] * count)
        elif name == "a.parquet":
            write_parquet(path, texts)
        else:
            write(path, json.dumps([{"text": t} for t in texts]).encode() if name == "a.json" else lines(*texts))

    put(300)
    run = prepare_run(tmp_path, str(path), shard_mb=0.001)

    def execute(function: Any, rows: list[dict[str, Any]], p: Any) -> Any:
        put({"shorter": 150, "longer": 600, "appended": 300}[change])
        if change == "appended":
            path.write_bytes(path.read_bytes() * 2)
        yield from in_process(function, rows, p)

    with pytest.raises(
        UserError, match=rf"{name}: cannot be read: it was changed: [\d,]+ bytes, and [\d,]+ when it was listed"
    ):
        prepare(run, lambda _: None, execute)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.bin", "a.json"])
def test_a_web_page_whose_size_has_changed(tmp_path: Path, http_server: str, name: str) -> None:
    data = gzip.compress(lines("one")) if name.endswith("gz") else lines("one!")
    if name == "a.json":
        data = b'[{"text": "one"}]  '
    with serving(functools.partial(WithRanges, directory=str(tmp_path))) as ranges:
        for i, url in enumerate((http_server, ranges)):
            (tmp_path / name).write_bytes(data)
            run = prepare_run(tmp_path, f"{url}/{name}", output=f"out{i}")

            def execute(function: Any, rows: list[dict[str, Any]], p: Any) -> Any:
                (tmp_path / name).write_bytes(data * 2)
                yield from in_process(function, rows, p)

            with pytest.raises(UserError, match="it was changed: "):
                prepare(run, lambda _: None, execute)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", lines(*["text"] * 200_000)))
    (piece,) = sources.inventory(prepare_run(tmp_path, str(path)).prepare).pieces
    records = iter(Reader(piece, "text"))
    next(records)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CannotRead, match="it was changed"):
        list(records)


def test_a_bad_record_in_a_file_that_has_changed_since(tmp_path: Path) -> None:
    """Its line cannot be counted any more."""
    path = write(tmp_path / "a.jsonl", lines(*["text"] * 50) + b"bad\n")
    run = prepare_run(tmp_path, path, shard_mb=0.0005)

    def execute(function: Any, rows: list[dict[str, Any]], p: Any) -> Any:
        for row in list(in_process(function, rows, p)):
            Path(path).write_bytes(b"")
            yield row

    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: it was changed"):
        prepare(run, lambda _: None, execute)


def test_memory_file_system_with_globs_and_ranges(tmp_path: Path) -> None:
    """Any fsspec URL: here one with ranges."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus/a.jsonl", lines(*TEXTS))
    fs.pipe("/corpus/deep/b.txt", b"bee")
    pq.write_table(pa.table({"text": ["p1", "p2", "p3"]}), "/corpus/c.parquet", filesystem=fs, row_group_size=1)
    run = prepare_run(tmp_path, "memory://corpus", "memory://corpus/*.parquet", shard_mb=0.0001, dedup="none")
    run_prepare(run)
    assert texts_of(run) == [*TEXTS, "p1", "p2", "p3", "bee", "p1", "p2", "p3"]


def test_file_names_with_signs_of_urls(tmp_path: Path) -> None:
    """Only in http URLs do they mean something."""
    import fsspec

    fs = fsspec.filesystem("memory")
    for name in ("C#/x.md", "a#1.jsonl", "ok.txt", "why?.txt"):
        fs.pipe(f"/signs/{name}", lines(name) if name.endswith("jsonl") else name.encode())
    run = prepare_run(tmp_path, "memory://signs", "memory://signs/why?.txt", dedup="none")
    run_prepare(run)
    assert texts_of(run) == ["C#/x.md", "a#1.jsonl", "ok.txt", "why?.txt", "why?.txt"]


def test_a_directory_is_read_through_links_and_once(tmp_path: Path) -> None:
    for name in ("elsewhere/1.txt", "elsewhere/deep/2.txt", "corpus/3.txt"):
        write(tmp_path / name, name.encode())
    (tmp_path / "corpus/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "corpus")
    for source in ("corpus", "corpus/**/*.txt"):
        run = prepare_run(tmp_path, str(tmp_path / source), dedup="none", output=f"out-{len(source)}")
        run_prepare(run)
        assert texts_of(run) == ["corpus/3.txt", "elsewhere/1.txt", "elsewhere/deep/2.txt"]


def test_a_glob_of_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/d.md", ".git/e.txt", "x/.f.txt"):
        write(tmp_path / name, name.encode())
    monkeypatch.chdir(tmp_path)
    for pattern, names in {
        "**/*.txt": ["a.txt", "x/b.txt", "x/y/c.txt"],
        "x/**": ["x/b.txt", "x/y/c.txt", "x/y/d.md"],
        "*/**/c.txt": ["x/y/c.txt"],
        f"{tmp_path}/**/y/*": [f"{tmp_path}/x/y/c.txt", f"{tmp_path}/x/y/d.md"],
    }.items():
        found = sources.inventory(tiny_run(prepare__sources=[pattern], prepare__output="out").prepare).pieces
        assert [os.path.normpath(piece.path) for piece in found] == names


@pytest.mark.parametrize("source", ["corpus", "corpus/*", "corpus/**", "corpus/gone.jsonl"])
def test_a_link_to_what_is_not_there_is_not_passed_over(tmp_path: Path, source: str) -> None:
    write(tmp_path / "corpus/a.txt", b"here")
    (tmp_path / "corpus/gone.jsonl").symlink_to("/mnt/gone/b.jsonl")
    text = failure(prepare_run(tmp_path, str(tmp_path / source)))
    assert "cannot be listed: " in text
    assert "No such file or directory: " in text
    assert "gone.jsonl" in text


def test_a_directory_that_may_not_be_read_is_no_empty_one() -> None:
    place = Path(tempfile.mkdtemp())
    try:
        write(place / "ok.txt", b"x")
        write(place / "secret/y.txt", b"y")
        place.chmod(0o755)
        (place / "secret").chmod(0)
        if os.getuid() == 0:  # whom nothing is forbidden
            os.seteuid(65534)
        for source in (str(place), f"{place}/**/*.txt"):
            run = tiny_run(prepare__sources=[source], prepare__output="elsewhere")
            with pytest.raises(UserError, match=r"cannot be listed: .*Permission denied: '.*/secret'"):
                sources.inventory(run.prepare)
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(place)


def test_a_file_name_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with open(os.fsencode(tmp_path / "corpus") + b"/caf\xe9.txt", "wb") as f:
        f.write(b"text")
    run = prepare_run(tmp_path, str(tmp_path / "corpus"))
    run_prepare(run)
    assert texts_of(run) == ["text"]


def test_secrets_of_urls_are_not_kept() -> None:
    assert without_secrets("https://u:pw@host:1/a.txt?X-Amz-Signature=s#f") == "https://host:1/a.txt"
    assert without_secrets("s3://bucket/C#/a?.txt") == "s3://bucket/C#/a?.txt"
    assert without_secrets("/a?b#c@d") == "/a?b#c@d"
    error = "403, message='Forbidden', url=URL('https://u:p@h/x%2Fy?sig=SECRET&a=b'), and http://h/z?SECRET."
    assert without_secrets_in(error) == "403, message='Forbidden', url=URL('https://h/x%2Fy'), and http://h/z"
    url = "https://u:pw@host/a.jsonl?sig=SECRET"
    assert tiny_run(prepare__sources=[url, "b.txt"]).for_record().prepare.sources == ["https://host/a.jsonl", "b.txt"]


class _Moody(http.server.BaseHTTPRequestHandler):
    """/slow: a gzip file in twenty pieces; /stuck: stops in the middle; /denied: only HEAD is allowed."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        if "denied" in self.path:
            self.send_error(403)
            return
        self.do_HEAD()
        size = len(self.content) // 20 + 1
        for i in range(20):
            self.wfile.write(self.content[i * size : (i + 1) * size])
            time.sleep(0.1)
            if i == 5 and "stuck" in self.path:
                time.sleep(3)
                return

    def log_message(self, *_: Any) -> None:
        pass

    content = gzip.compress(lines(*(f"{i} {i**7}" for i in range(50_000))))


@pytest.fixture
def moody_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_may_take_long_if_it_goes_on(
    tmp_path: Path, moody_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2dist.storage.SILENCE_S", 1.0)
    run = prepare_run(tmp_path, f"{moody_server}/slow.jsonl.gz?sig=SECRET")
    assert run_prepare(run).documents["kept"] == 50_000
    text = failure(prepare_run(tmp_path, f"{moody_server}/stuck.jsonl.gz?sig=SECRET", output="stuck"))
    assert "/stuck.jsonl.gz: cannot be read" in text
    text = failure(prepare_run(tmp_path, f"{moody_server}/denied.jsonl.gz?sig=SECRET", output="denied"))
    assert "/denied.jsonl.gz: cannot be read: 403" in text
    assert "SECRET" not in text


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20),
    blank=st.booleans(),
    data=st.data(),
)
def test_any_cut_gives_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], blank: bool, data: Any
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(lines(*texts) + (b"\n\n" if blank else b""))
    whole = Piece(str(path), "lines", 0, max(1, path.stat().st_size), whole=False)
    chunks = sources.cut([whole], data.draw(st.integers(1, 60)))
    found, before = [], 0
    for piece in (piece for chunk in chunks for piece in chunk):
        reader = Reader(piece, "text")
        found += [(before + d.line, getattr(d, "text", None)) for d in reader]
        if piece.start < path.stat().st_size:
            assert readers.lines_before(piece) == before
        before += reader.lines
    bad = [not t or t.isspace() or "\0" in t for t in texts]
    assert found == [(i, None if b else t) for i, (t, b) in enumerate(zip(texts, bad, strict=True), 1)]


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 50255), max_size=6), max_size=12), data=st.data())
def test_any_cut_gives_the_same_token_documents(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: Any
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.bin"
    writer = data.draw(st.sampled_from([write_nanogpt, write_llmc]))
    writer(path, documents)
    whole = Piece(str(path), "tokens", 0, max(1, path.stat().st_size), whole=False)
    expected = list(Reader(whole, ""))
    found, before = [], 0
    for piece in (piece for chunk in sources.cut([whole], data.draw(st.integers(1, 40))) for piece in chunk):
        reader = Reader(piece, "")
        found += [(before + d.line, ids(d)) for d in reader]
        before += reader.lines
    assert found == [(d.line, ids(d)) for d in expected]
    full = [d for d in documents if d]
    assert [ids(d) for d in expected if isinstance(d, Document)] == full


def ids(record: Document | BadRecord) -> list[int] | str:
    if isinstance(record, BadRecord):
        return record.reason
    assert record.tokens is not None
    return record.tokens.tolist()


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "broken JSON": b'{"text": "half',
    "broken JSON 2": b"[" * 2_000,
    "broken JSON 3": b'{"text": "a", "more": ' + b"[" * 5000 + b"}" * 5001,
    "cannot be parsed": b'{"text": "a", "n": ' + b"9" * 4400 + b"}",
    "cannot be parsed 2": b'{"text": "a]", "more": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "broken JSON 4": b"{'text': 'single'}",
    "no text": b'{"body": "x"}',
    "no text 2": b'{"text": 5}',
    "no text 3": b'{"text": null}',
    "no text 4": b'["text"]',
    "no text 5": b'"text"',
    "empty": b'{"text": ""}',
    "empty 2": b'{"text": " \\n\\t"}',
    "NUL character": b'{"text": "a\\u0000b"}',
    "lone surrogate": b'{"text": "a\\ud800b"}',
    "lone surrogate 2": b'{"text": "a\\udc00"}',
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_lines(tmp_path: Path, case: str, name: str) -> None:
    """The bad line is the 5th of 6, one of which is blank; small chunks, so that it is not in the first one."""
    reason = case.rstrip(" 2345")
    path = write(tmp_path / name, GOOD * 2 + b"\n" + GOOD + BAD_LINES[case] + b'\n{"text": "end"}\n')
    text = failure(prepare_run(tmp_path, path, shard_mb=2e-5, output="fails"))
    assert text.startswith(f"{path}: line 5: {reason}")
    assert "prepare.on_bad_record=skip" in text
    run = prepare_run(tmp_path, path, on_bad_record="skip", shard_mb=2e-5, dedup="none")
    manifest = run_prepare(run)
    assert texts_of(run) == ["good", "good", "good", "end"]
    assert manifest.documents == {"read": 5, "kept": 4, "skipped": 1}
    assert manifest.sources[0].dropped[reason].documents == 1
    (record,) = quarantine(run)
    assert (record["file"], record["line"], record["reason"]) == (path, 5, reason)
    assert record["raw"].startswith(BAD_LINES[case][:9].decode())
    assert len(record["raw"]) <= 1000 * len("\\xff")


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("name", ["a.json", "a.json.zst"])
def test_bad_elements(tmp_path: Path, case: str, name: str) -> None:
    """The bad one is the 3rd of 4; after broken syntax nothing is read, and the record says so."""
    reason = case.rstrip(" 2345")
    path = write(tmp_path / name, b"[" + b",\n".join([GOOD, GOOD, BAD_LINES[case], b'{"text": "end"}']) + b"]")
    text = failure(prepare_run(tmp_path, path, output="fails"))
    assert text.startswith(f"{path}: element 3: {reason}")
    run = prepare_run(tmp_path, path, on_bad_record="skip", dedup="none")
    manifest = run_prepare(run)
    broken = reason == "broken JSON"
    assert texts_of(run) == ["good", "good"] + ["end"] * (not broken)
    assert manifest.sources[0].dropped[reason].documents == 1
    (record,) = quarantine(run)
    assert (record["file"], record["line"], record["reason"]) == (path, 3, reason)
    assert ("nothing after it in this file can be read" in record["detail"]) == broken
    assert record["raw"].strip().startswith(BAD_LINES[case][:9].decode())


@pytest.mark.parametrize(
    ("text", "balanced"),
    [
        (b"5", True),
        (b'{"a": [1, "]\\"}"]}', True),
        (b"[}", False),
        (b"]", False),
        (b"[", False),
        (b'"a', False),
        (b'["a\\"]', False),
    ],
)
def test_brackets_that_close(text: bytes, balanced: bool) -> None:
    assert json_array.is_balanced(text) == balanced


@pytest.mark.parametrize(
    ("data", "kept", "problem"),
    [
        (b'[{"text": "a"}, {"text": "b"}', 1, "the array does not end"),
        (b'[{"text": "a"}, {"text": "b\\', 1, "the array does not end"),
        (b'[{"text": "a"},', 1, "the array does not end"),
        (b"[", 0, "the array does not end"),
        (b'[{"text": "a"}] [{"text": "b"}]', 1, "the array has ended before"),
        (b'[{"text": "a"}]]', 1, "the array has ended before"),
        (b'[{"text": "a"}}', 0, "a bracket closes that did not open"),
        (b'[{"text": "a"},]', 1, "Expecting value"),
        (b'[,{"text": "a"}]', 0, "Expecting value"),
        (b'[{"text": "a"} {"text": "b"}, {"text": "c"}]', 0, "Extra data"),
        (b'[{"text": "a"], {"text": "b"}]', 0, "Expecting ',' delimiter"),
    ],
)
@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_broken_json_arrays(
    tmp_path: Path, data: bytes, kept: int, problem: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "BLOCK_BYTES", block)
    records = list(Reader(Piece(write(tmp_path / "a.json", data), "array", 0, 1), "text"))
    assert [isinstance(record, Document) for record in records] == [True] * kept + [False]
    bad = records[-1]
    assert isinstance(bad, BadRecord)
    assert (bad.line, bad.reason) == (kept + 1, "broken JSON")
    assert bad.detail.startswith(problem)
    assert bad.detail.endswith("; nothing after it in this file can be read")


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.recursive(st.none() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s))
    ),
    indent=st.sampled_from([None, 1]),
    limit=st.integers(1, 40) | st.just(10**6),
    block=st.integers(1, 50),
)
@example(values=[None], indent=1, limit=1, block=1)  # more white space than an element may be long
def test_any_json_array_falls_into_its_elements(values: list[Any], indent: int | None, limit: int, block: int) -> None:
    """However the blocks fall; of an element that is too long, the beginning."""
    saved, json_array.BLOCK_BYTES = json_array.BLOCK_BYTES, block
    try:
        for ascii_only in (True, False):
            text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
            file = io.BufferedReader(io.BytesIO(text))  # type: ignore[arg-type]
            found = list(json_array.elements(file, limit))
            assert not any(problem for _, problem in found)
            assert len(found) == len(values)
            for (element, _), value in zip(found, values, strict=True):
                if len(element) <= limit:
                    assert json.loads(element.decode(errors="surrogatepass")) == value
    finally:
        json_array.BLOCK_BYTES = saved


def test_an_element_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(json_array, "BLOCK_BYTES", 30)
    path = write(tmp_path / "a.json", json.dumps([{"text": t} for t in ("one", "x," * 500, "three")]).encode())
    run = prepare_run(tmp_path, path, on_bad_record="skip")
    run_prepare(run)
    assert texts_of(run) == ["one", "three"]
    assert [(r["line"], r["reason"]) for r in quarantine(run)] == [(2, "too large")]


def _truncated(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _bad_files(tmp_path: Path) -> dict[str, tuple[str, str, int]]:
    """Case → (file, reason, documents in it that are good)."""
    many = [f"{i} {i * i:x} some text that does not compress so well {i**5}" for i in range(3000)]
    cases: dict[str, tuple[str, str, int]] = {}
    for name, share, good in (("cut.jsonl.gz", 0.5, -1), ("cut.jsonl.zst", 0.5, -1), ("tail.jsonl.gz", 0.999, -1)):
        write(tmp_path / name, lines(*many))
        _truncated(tmp_path / name, share)
        cases[name] = str(tmp_path / name), "damaged file", good
    for name in ("plain.jsonl.gz", "plain.txt.zst", "none.txt.gz", "none.jsonl.zst"):
        (tmp_path / name).write_bytes(lines("not compressed at all") if "plain" in name else b"")
        cases[name] = str(tmp_path / name), "empty" if name == "none.txt.gz" else "damaged file", 0
    write_parquet(tmp_path / "cut.parquet", many)
    _truncated(tmp_path / "cut.parquet", 0.7)
    (tmp_path / "none.parquet").write_bytes(b"")
    (tmp_path / "noise.parquet").write_bytes(b"PAR1" + b"\x15" * 200 + b"PAR1")
    for name in ("cut.parquet", "none.parquet", "noise.parquet"):
        cases[name] = str(tmp_path / name), "damaged file", 0
    write_parquet(tmp_path / "other.parquet", ["a"], field="body")
    write_parquet(tmp_path / "number.parquet", [1, 2])
    cases["other.parquet"] = str(tmp_path / "other.parquet"), "no text", 0
    cases["number.parquet"] = str(tmp_path / "number.parquet"), "no text", 0
    return cases | _bad_token_files(tmp_path)


def _bad_token_files(tmp_path: Path) -> dict[str, tuple[str, str, int]]:
    def file(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    header = struct.pack("<256i", 20240520, 1, 3, *[0] * 253)
    return {
        "odd": (file("odd.bin", b"\1\0\2\0\3"), "damaged file", 0),
        "one byte": (file("one.bin", b"\1"), "damaged file", 0),
        "no bytes": (file("zero.bin", b""), "damaged file", 0),
        "short": (file("short.bin", header + b"\1\0\2\0"), "damaged file", 0),
        "version": (file("v7.bin", struct.pack("<256i", 20240520, 7, 1, *[0] * 253) + b"\1\0\0\0"), "damaged file", 0),
        "range": (file("range.bin", struct.pack("<7H", 5, EOT, 6, 50257, EOT, 7, 8)), "token out of range", 2),
        "empty doc": (file("hole.bin", struct.pack("<6H", 5, EOT, EOT, 6, 7, EOT)), "empty", 2),
    }


def test_bad_files(tmp_path: Path) -> None:
    filler = write(tmp_path / "good.jsonl", lines("a good one"))
    for case, (path, reason, good) in _bad_files(tmp_path).items():
        text = failure(prepare_run(tmp_path, filler, path, output=f"fail-{case}"))
        assert text.startswith(path), case
        assert reason in text, case
        for shard_mb in (64.0, 0.001):
            changes = {"on_bad_record": "skip", "output": f"skip-{case}-{shard_mb}", "shard_mb": shard_mb}
            run = prepare_run(tmp_path, filler, path, **changes)
            source = run_prepare(run).sources[1]
            assert {r: t.documents for r, t in source.dropped.items()} == {reason: 1}, case
            assert source.read.documents == source.kept.documents + 1, case
            assert [r["file"] for r in quarantine(run)] == [path], case
            assert good in (-1, source.kept.documents), case


def test_a_damaged_page_costs_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS, write_page_checksum=True, use_dictionary=False, compression="none")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"rot fisch", b"red fisch"))
    run = prepare_run(tmp_path, str(path), on_bad_record="skip")
    run_prepare(run)
    assert texts_of(run) == [*TEXTS[:2], *TEXTS[4:]]
    (record,) = quarantine(run)
    assert "row group 1" in record["detail"]
    assert record["line"] == 3


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_documents_before_the_damage_are_kept(tmp_path: Path, name: str) -> None:
    texts = [f"{i} {i**7}" for i in range(50_000)]
    array = json.dumps([{"text": text} for text in texts]).encode()
    path = write(tmp_path / name, lines(*texts) if "jsonl" in name else array)
    _truncated(tmp_path / name, 0.5)
    there = zlib.decompressobj(31).decompress((tmp_path / name).read_bytes())
    run = prepare_run(tmp_path, path, on_bad_record="skip")
    run_prepare(run)
    kept = texts_of(run)
    assert len(kept) == there.count(b'"}')
    assert 15_000 < len(kept) < 35_000
    assert kept == texts[: len(kept)]
    assert quarantine(run)[0]["line"] == len(kept) + 1


@pytest.mark.parametrize("codec", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["zeros", "garbage", "cut", "flipped"])
def test_all_before_the_damage_is_delivered(tmp_path: Path, codec: str, damage: str) -> None:
    """Short files and long ones; of zstd as far as its blocks of 128 KiB are whole."""
    for count in (1, 3, 40_000):
        content = b"".join(b"%d %d\n" % (i, i**7) for i in range(count))
        path = tmp_path / f"{damage}-{count}.jsonl.{codec}"
        zstd = zstandard.ZstdCompressor(write_checksum=True)
        data = bytearray(gzip.compress(content) if codec == "gz" else zstd.compress(content))
        at = len(data)
        if damage == "zeros":
            data += bytes(100)
        elif damage == "garbage":
            data += b"\1garbage" * 9
        elif damage == "cut":
            at -= 5
            del data[at:]
        else:
            at = len(data) // 2
            data[at : at + 20] = bytes(b ^ 0xFF for b in data[at : at + 20])
        path.write_bytes(data)
        if codec == "gz":
            least = len(zlib.decompressobj(31).decompress(data[:at]))
        else:
            whole = zstandard.ZstdDecompressor().decompressobj()
            least = len(whole.decompress(data[:at]))
        got = bytearray()

        def read(path: Path = path, size: int = len(data), got: bytearray = got) -> None:
            with sources.open_piece(Piece(str(path), "lines", 0, size, whole=True)) as f:
                while piece := f.read1(1 << 20):  # type: ignore[attr-defined]
                    got += piece

        with pytest.raises(OSError, match=".") as error:
            read()
        assert is_damage(error.value)
        if damage != "flipped":
            assert got == content[:least]
        else:  # what a wrong bit makes of the symbols after it may come too
            assert got[:least] == content[:least]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.zst", "a.txt.zst"])
@pytest.mark.parametrize("log", [27, 28, 31])
def test_a_long_zstd_window_is_no_damage(tmp_path: Path, name: str, log: int) -> None:
    compressor = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=log))
    stream = compressor.compressobj()  # of unknown length: the window is not cut to it
    text = b'[{"text": "one"}]' if name == "a.json.zst" else lines("one")
    (tmp_path / name).write_bytes(stream.compress(text) + stream.flush())
    run = prepare_run(tmp_path, str(tmp_path / name), on_bad_record="skip")
    if log == 27:
        assert run_prepare(run).documents["kept"] == 1
    else:
        assert f"{name}: cannot be read: its zstd window is over 128 MiB" in failure(run)


@pytest.mark.parametrize("value", ["", "a\0b", None, "  ", b"\xff\xfe"])
def test_bad_parquet_values(tmp_path: Path, value: Any) -> None:
    values = ["r1", "r2", value, "r4", "r5"]
    column = pa.array([v if v is None or isinstance(v, bytes) else v.encode() for v in values], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 5, column.buffers())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    text = failure(prepare_run(tmp_path, str(tmp_path / "a.parquet"), shard_mb=0.0001, output="fails"))
    assert text.startswith(f"{tmp_path}/a.parquet: row 3: ")
    run = prepare_run(tmp_path, str(tmp_path / "a.parquet"), shard_mb=0.0001, on_bad_record="skip")
    run_prepare(run)
    assert texts_of(run) == ["r1", "r2", "r4", "r5"]
    assert [r["line"] for r in quarantine(run)] == [3]


@pytest.mark.parametrize("data", [b"", b" \n ", b"abc\xff", b"a\0b"])
def test_bad_text_files(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path / "bad.txt", data)
    good = write(tmp_path / "good.txt", b"good")
    assert failure(prepare_run(tmp_path, path, good, output="fails")).startswith(f"{path}: ")
    run = prepare_run(tmp_path, path, good, on_bad_record="skip")
    assert run_prepare(run).documents == {"read": 2, "kept": 1, "skipped": 1}
    assert texts_of(run) == ["good"]


def test_out_of_range_token_names_the_document(tmp_path: Path) -> None:
    documents = [[i, i + 1] for i in range(1, 100)] + [[65535]] + [[7]]
    path = write_nanogpt(tmp_path / "a.bin", documents)
    assert f"{path}: document 100: token out of range" in failure(prepare_run(tmp_path, path, shard_mb=0.0001))


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")
    json_lines = write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + lines("first", "second"))
    run = prepare_run(tmp_path, text, json_lines)
    run_prepare(run)
    assert texts_of(run) == ["hello", "first", "second"]


def test_a_file_that_vanished_is_not_a_bad_record(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match=r"gone\.txt: cannot be read: No such file"):
        list(Reader(Piece(str(tmp_path / "gone.txt"), "text", 0, 5), "text"))


def test_output_and_sources_must_not_overlap(tmp_path: Path) -> None:
    write(tmp_path / "corpus/a.txt", b"text")
    inside = prepare_run(tmp_path, str(tmp_path / "corpus"), output="corpus/out")
    with pytest.raises(UserError, match="lies in the source"):
        run_prepare(inside)
    write(tmp_path / "out/b.txt", b"text")
    with pytest.raises(UserError, match=r"b\.txt lies in prepare\.output"):
        run_prepare(prepare_run(tmp_path, str(tmp_path / "*/*.txt")))


@pytest.mark.parametrize("source", ["link", "real", "deep/link", "file"])
def test_output_in_a_source_by_a_link(tmp_path: Path, source: str) -> None:
    write(tmp_path / "real/a.txt", b"text")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/link").symlink_to("../link")
    (tmp_path / "other").symlink_to(tmp_path / "deep/link")
    name = "file://" + str(tmp_path / "link") if source == "file" else str(tmp_path / source)
    with pytest.raises(UserError, match="lies in the source"):
        sources.inventory(prepare_run(tmp_path, name, output="other/out").prepare)
    write(tmp_path / "real/out/b.txt", b"text")
    with pytest.raises(UserError, match=r"b\.txt lies in prepare\.output"):
        sources.inventory(prepare_run(tmp_path, str(tmp_path / "link/*/*.txt"), output="real/out").prepare)
    beside = prepare_run(tmp_path, str(tmp_path / "link/out"), output="real/outer").prepare
    assert len(sources.inventory(beside).pieces) == 1


def test_directories_that_a_glob_matches_are_counted(tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    for name in ("a.txt", "b/c.txt", "d.txt/e.txt"):
        write(tmp_path / "corpus" / name, b"text")
        fs.pipe(f"/directories/{name}", b"text")
    for place in (str(tmp_path / "corpus"), "memory://directories"):
        for pattern, found, passed_over in (("*", 1, 2), ("*.txt", 1, 1), ("**", 3, 0), ("", 3, 0)):
            files = sources.inventory(prepare_run(tmp_path, f"{place}/{pattern}".rstrip("/")).prepare)
            assert len(files.pieces) == found
            assert files.passed_over == ({"directory": passed_over} if passed_over else {})


RAW = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(list(BAD_LINES.values())).map(lambda b: b[:200]),
    st.text(max_size=20).map(lambda t: json.dumps({"text": t}).encode()),
)


@settings(max_examples=150, deadline=None)
@given(records=st.lists(RAW, max_size=8), name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.txt", "a.bin", "a.json"]))
def test_fuzz_nothing_is_lost(tmp_path_factory: pytest.TempPathFactory, records: list[bytes], name: str) -> None:
    tmp_path = tmp_path_factory.mktemp("fuzz")
    data = b"\n".join(records) if name != "a.json" else b"[" + b",".join(records) + b"]"
    path = write(tmp_path / name, data)
    good = write(tmp_path / "good.txt", b"good one")
    run = prepare_run(tmp_path, good, path, on_bad_record="skip", shard_mb=3e-5, dedup="none")
    manifest = run_prepare(run)
    source = manifest.sources[1]
    assert source.read.documents == source.kept.documents + len(quarantine(run))
    if "jsonl" in name:
        assert source.read.documents == sum(bool(line.strip()) for line in data.split(b"\n"))
    assert manifest.tokens("train") == len(ids_of(run))


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.bin", "a.json"]), data=st.data())
def test_fuzz_damaged_files(tmp_path_factory: pytest.TempPathFactory, name: str, data: Any) -> None:
    """Flipped, cut and inserted bytes end as good and bad records, never as a traceback."""
    tmp_path = tmp_path_factory.mktemp("fuzz")
    if name == "a.parquet":
        write_parquet(tmp_path / name, TEXTS)
    elif name == "a.bin":
        write_llmc(tmp_path / name, [[1, 2, 3], [4], [5, 6]])
    elif name == "a.json":
        write(tmp_path / name, json.dumps([{"text": text} for text in TEXTS]).encode())
    else:
        write(tmp_path / name, lines(*TEXTS))
    content = bytearray((tmp_path / name).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    (tmp_path / name).write_bytes(content)
    good = write(tmp_path / "good.txt", b"good one")
    run = prepare_run(tmp_path, good, str(tmp_path / name), on_bad_record="skip", dedup="none")
    try:
        source = run_prepare(run).sources[1]
    except UserError as e:  # a frame's header that asks for much memory may be meant so
        if "its zstd window" not in str(e):
            raise
        return
    assert source.read.documents == source.kept.documents + len(quarantine(run))
    if source.kept.documents < len(TEXTS) and name not in ("a.bin", "a.json"):  # `[]` has no records
        assert quarantine(run)


def test_a_footer_on_which_pyarrow_aborts_is_a_bad_record(tmp_path: Path) -> None:
    """Any altered bit of the footer: this process lives on, and each good record is kept or named."""
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    content = Path(path).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    piece = Piece(path, "parquet", 0, len(content), whole=False)
    aborted = 0
    for at in range(footer, len(content)):
        damaged = bytearray(content)
        for value in (content[at] ^ 4, content[at] ^ 32, 6, 70):
            damaged[at] = value
            Path(path).write_bytes(damaged)
            records = list(Reader(piece, "text"))
            bad = [r for r in records if isinstance(r, BadRecord)]
            assert bad or len(records) == len(TEXTS)
            aborted += any(r.detail == "pyarrow aborts on its footer" for r in bad)
    assert aborted > 3  # otherwise pyarrow has learned it, and the look at the footer can go
    Path(path).write_bytes(content)
    assert len(list(Reader(piece, "text"))) == len(TEXTS)


def test_a_process_that_cannot_look_at_footers_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setattr(parquet_footer, "_child", None)
    monkeypatch.setattr(parquet_footer, "_CHILD", "raise SystemExit(3)")
    with pytest.raises(CannotRead, match=r"a\.parquet: cannot be read: a process that looks at parquet footers"):
        list(Reader(Piece(path, "parquet", 0, 10**9, whole=False), "text"))


def test_a_damaged_parquet_page_that_ends_early_is_a_bad_record(tmp_path: Path) -> None:
    """pyarrow reads fewer rows from it, without an error."""
    write_parquet(tmp_path / "a.parquet", TEXTS)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    assert content[164] == 4  # the number of values in a page header, zigzag-encoded: 2
    content[164] = 0
    (tmp_path / "a.parquet").write_bytes(content)
    run = prepare_run(tmp_path, str(tmp_path / "a.parquet"), on_bad_record="skip", dedup="none")
    source = run_prepare(run).sources[0]
    assert source.kept.documents == len(TEXTS) - 2
    assert [record["reason"] for record in quarantine(run)] == ["damaged file"]


def test_a_data_set_without_documents_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"body": "x"}\n' * 3 + b"{broken\n")
    text = failure(prepare_run(tmp_path, path, on_bad_record="skip"))
    assert text.endswith(
        "no document went to the training split: 4 read, 3 left out (no text), 1 left out (broken JSON)"
    )
    one = write(tmp_path / "b.jsonl", lines("a document"))
    text = failure(prepare_run(tmp_path, one, val_fraction=0.999, output="val"))
    assert text.endswith("1 read, 1 in the validation split; lower prepare.val_fraction")
