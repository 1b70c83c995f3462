"""Checkpoints that somebody has made up, or that a disk has damaged: one line, nothing run, nothing huge allocated.

Damage is caught by hashes. Here the hashes fit, but for the tests that say otherwise: whoever makes a checkpoint up
computes them too.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors

from gpt2dist.config import UserError
from gpt2dist.model.gpt2 import GPT2Config, build
from gpt2dist.train import checkpoint
from gpt2dist.train.checkpoint import BadCheckpoint, Checkpoint
from gpt2dist.train.fragment import KINDS, Fragment
from gpt2dist.train.fragment_file import header
from gpt2dist.train.index import INDEX, with_hash
from tests.conftest import tiny_run
from tests.unit.runs import save_run
from tests.unit.test_checkpoint import everything, save
from tests.unit.test_cli import cli

Change = Callable[[dict[str, Any]], Any]


@contextlib.contextmanager
def limited_memory(more: int = 2 << 30) -> Iterator[None]:
    """Allocations beyond what this process has, and some for threads, fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def index_file(saved: Checkpoint) -> Path:
    return Path(saved.path / INDEX)


def change_index(saved: Checkpoint, change: Change) -> None:
    table = json.loads(index_file(saved).read_text())
    del table["sha256"]
    change(table)
    index_file(saved).write_bytes(with_hash(json.dumps(table).encode()))


def hash_again(saved: Checkpoint) -> None:
    """Sizes and hashes in the index become those of the files as they are now."""

    def change(table: dict[str, Any]) -> None:
        for file in table["files"]:
            data = Path(saved.path / file["file"]).read_bytes()
            file |= {"bytes": len(data), "piece_bytes": 64}
            file["sha256"] = [hashlib.sha256(data[i : i + 64]).hexdigest() for i in range(0, len(data), 64)]

    change_index(saved, change)


def read_all(run_dir: Path, step: int) -> list[Fragment]:
    """As a resume does, and `verify`."""
    with limited_memory():
        found = checkpoint.open_step(str(run_dir), step)
        checkpoint.verify(found)
        fragments = everything()
        checkpoint.load(found, fragments)
        checkpoint.load_weights(found)
    return fragments


def assert_refused(run_dir: Path, step: int = 8) -> str:
    with pytest.raises(BadCheckpoint) as e:
        read_all(run_dir, step)
    assert len(str(e.value).splitlines()) == 1
    assert str(e.value).isprintable()
    return str(e.value)


# ---------------------------------------------------------------------- the index


def everywhere(name: str) -> Change:
    """The first file has another name."""

    def change(i: dict[str, Any]) -> None:
        old = i["files"][0]["file"]
        for row in [*i["files"], *i["fragments"]]:
            if row["file"] == old:
                row["file"] = name

    return change


CHANGES: dict[str, Change] = {
    "up": everywhere("../../../../etc/passwd"),
    "up, then plain": everywhere("../step-00000004/rank-00000.safetensors"),
    "absolute": everywhere("/etc/passwd"),
    "nul": everywhere("rank-00000.safetensors\0"),
    "newline": everywhere("rank-00000.safetensors\n"),
    "other digits": everywhere("rank-٠٠٠٠٠.safetensors"),
    "bytes negative": lambda i: i["files"][0].update(bytes=-1),
    "bytes huge": lambda i: i["files"][0].update(bytes=1 << 62),
    "bytes beyond all": lambda i: i["files"][0].update(bytes=10**4000),
    "bytes as text": lambda i: i["files"][0].update(bytes="1"),
    "bytes as float": lambda i: i["files"][0].update(bytes=1e300),
    "pieces of nothing": lambda i: i["files"][0].update(piece_bytes=0),
    "pieces negative": lambda i: i["files"][0].update(piece_bytes=-5),
    "pieces huge": lambda i: i["files"][0].update(piece_bytes=1 << 40),
    "too few hashes": lambda i: i["files"][0].update(sha256=[]),
    "too many hashes": lambda i: i["files"][0]["sha256"].append("0" * 64),
    "hash of other letters": lambda i: i["files"][0]["sha256"].__setitem__(0, "A" * 64),
    "hash of another file": lambda i: i["files"][0].update(sha256=i["files"][1]["sha256"]),
    "file twice": lambda i: i["files"].append(dict(i["files"][0])),
    "file not listed": lambda i: i["fragments"][0].update(file="rank-00007.safetensors"),
    "file without fragments": lambda i: i["files"].append(dict(i["files"][0], file="rank-00007.safetensors")),
    "start negative": lambda i: i["fragments"][0].update(start=-1),
    "start huge": lambda i: i["fragments"][0].update(start=1 << 62),
    "start true": lambda i: i["fragments"][0].update(start=True),
    "length 0": lambda i: i["fragments"][0].update(length=0),
    "length huge": lambda i: i["fragments"][0].update(length=10**12),
    "missing": lambda i: i["fragments"].pop(),
    "repeated": lambda i: i["fragments"].append(dict(i["fragments"][0])),
    "overlapping": lambda i: i["fragments"][-1].update(start=i["fragments"][-1]["start"] - 1),
    "in another order": lambda i: i["fragments"].insert(0, i["fragments"].pop(1)),
    "no such kind": lambda i: i["fragments"][0].update(kind="momentum"),
    "another kind": lambda i: i["fragments"][0].update(kind="exp_avg"),
    "a dtype": lambda i: i["fragments"][0].update(dtype="F16"),
    "unknown parameter": lambda i: i["fragments"][0].update(parameter="no.such"),
    "parameter too many": lambda i: i["parameters"].update(c=[3]),
    "another shape": lambda i: i["parameters"].update(a=[6, 6]),
    "shape negative": lambda i: i["parameters"].update(a=[-6, -5]),
    "shape huge": lambda i: i["parameters"].update(a=[1 << 45, 1 << 45]),
    "shape of floats": lambda i: i["parameters"].update(a=[6.0, 5.0]),
    "shape deep": lambda i: i["parameters"].update(a=[6, 5, *[1] * 100]),
    "shape nested": lambda i: i["parameters"].update(a=[[6, 5]]),
    "name with escapes": lambda i: i["parameters"].update({"\x1b[2J\r\nfine": [3]}),
    "many parameters": lambda i: i["parameters"].update({f"p{n}": [1] for n in range(100_001)}),
    "not a number": lambda i: i["scalars"].update(optimizer_steps=float("nan")),
    "endless": lambda i: i["scalars"].update(optimizer_steps=float("inf")),
    "no steps of Adam": lambda i: i["scalars"].pop("optimizer_steps"),
    "another version": lambda i: i.update(version=2),
    "extra key": lambda i: i.update(extra=1),
    "no step": lambda i: i.pop("step"),
    "another step": lambda i: i.update(step=9),
    "step negative": lambda i: i.update(step=-8),
    "nothing in it": lambda i: (i["parameters"].clear(), i["fragments"].clear(), i["files"].clear()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_made_up_indexes(tmp_path: Path, change: Change) -> None:
    save(tmp_path, 4)
    saved = save(tmp_path, 8)
    change_index(saved, change)
    assert "step-00000008" in assert_refused(tmp_path)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    if found.index.step != 4:  # what only the files' content shows
        with pytest.raises(BadCheckpoint):
            checkpoint.load(found, everything())


def nested(depth: int) -> bytes:
    return b'{"format":' + b"[" * depth + b"]" * depth + b"}"


RAW: dict[str, bytes] = {
    "empty": b"",
    "no text": b"\xff\xfe\0\0",
    "a pickle": pickle.dumps({"step": 1}),
    "a list": with_hash(b"[]"),
    "nothing": with_hash(b"null"),
    "half": with_hash(b'{"step": 8'),
    "no text, hashed": with_hash(b'{"format":"\xff\xff"}'),
    "deep": with_hash(nested(100_000)),
    "deep and large": with_hash(nested(10_000_000)),
    "a long number": with_hash(b'{"step":' + b"9" * 1_000_000 + b"}"),
    "two hashes": with_hash(b'{"sha256":"' + b"0" * 64 + b'","step":8}'),
    "no hash": b'{"format":"gpt2dist-checkpoint","step":8}',
}


@pytest.mark.parametrize("content", RAW.values(), ids=list(RAW))
def test_an_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    saved = save(tmp_path, 8)
    index_file(saved).write_bytes(content)
    assert "step-00000008/index.json: not a valid index" in assert_refused(tmp_path)


def test_the_same_key_twice(tmp_path: Path) -> None:
    saved = save(tmp_path, 8)
    text = index_file(saved).read_bytes().split(b"\n", 1)[1]
    for once, twice in (
        (b'"step":8', b'"step":9,"step":8'),
        (b'"a":[6,5]', b'"a":[30],"a":[6,5]'),
        (b'"kind":"weight","start":0', b'"kind":"weight","start":5,"start":0'),
    ):
        assert once in text
        index_file(saved).write_bytes(with_hash(b"{" + text.replace(once, twice, 1)))
        assert "a key stands twice" in assert_refused(tmp_path)


def test_endless_numbers_as_text(tmp_path: Path) -> None:
    saved = save(tmp_path, 8)
    text = index_file(saved).read_bytes().split(b"\n", 1)[1]
    for number in (b"NaN", b"-Infinity", b"1e999"):
        changed = text.replace(b'"optimizer_steps":8.0', b'"optimizer_steps":' + number)
        assert changed != text
        index_file(saved).write_bytes(with_hash(b"{" + changed))
        assert_refused(tmp_path)


def test_an_index_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    saved = save(tmp_path, 8)
    os.truncate(index_file(saved), 1 << 30)
    assert "1,073,741,824 bytes are too many for an index" in assert_refused(tmp_path)


def test_any_wrong_bit_and_any_cut_of_an_index_is_seen(tmp_path: Path) -> None:
    """Here the hash does not fit: a damaged disk."""
    saved = save(tmp_path, 8)
    good = index_file(saved).read_bytes()
    for at in range(len(good)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << (at % 8)
        index_file(saved).write_bytes(damaged)
        with pytest.raises(BadCheckpoint, match="index.json"):
            checkpoint.read_index(saved.path)
        index_file(saved).write_bytes(good[:at])
        with pytest.raises(BadCheckpoint, match="index.json"):
            checkpoint.read_index(saved.path)


# ---------------------------------------------------------------------- the files


class Marker:
    """Unpickled, it leaves a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def same_size(data: bytes, size: int) -> bytes:
    return data[:size] + b" " * (size - len(data))


def header_of(data: bytes) -> dict[str, Any]:
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def with_header(data: bytes, text: bytes) -> bytes:
    """The file with another header of the same size."""
    length = int.from_bytes(data[:8], "little")
    assert len(text) <= length
    return data[:8] + text + b" " * (length - len(text)) + data[8 + length :]


def edited(change: Change) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        entries = header_of(data)
        change(entries)
        return with_header(data, json.dumps(entries, separators=(",", ":")).encode())

    return edit


FILES: dict[str, Callable[[bytes], bytes]] = {
    "header of impossible length": lambda d: b"\xff" * 8 + d[8:],
    "header longer than it is": lambda d: (len(d)).to_bytes(8, "little") + d[8:],
    "header of another dtype": edited(lambda e: e["a|weight|0"].update(dtype="I32")),
    "header of half the bytes": edited(lambda e: e["a|weight|0"].update(dtype="F16")),
    "header of another shape": edited(lambda e: e["a|weight|0"].update(shape=[1, 13])),
    "header with a negative shape": edited(lambda e: e["a|weight|0"].update(shape=[-13])),
    "header whose tensors are swapped": edited(
        lambda e: e.update({"a|weight|0": e["a|exp_avg|0"], "a|exp_avg|0": e["a|weight|0"]})
    ),
    "header whose tensors overlap": edited(lambda e: e["a|weight|0"].update(data_offsets=[0, 0])),
    "header that lacks a tensor": edited(lambda e: e.pop("a|weight|0")),
    "header with a key twice": lambda d: with_header(d, b'{"a|weight|0":1,"a|weight|0":2}'),
    "header nested deeply": lambda d: with_header(d, b"[" * 100),
    "header that is none": lambda d: with_header(d, b"\xff\xff\xff"),
    "other tensors": lambda d: same_size(to_safetensors({"x": torch.zeros(2, dtype=torch.float64)}), len(d)),
}


@pytest.mark.parametrize("change", FILES.values(), ids=list(FILES))
def test_made_up_files(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    saved = save(tmp_path, 8)
    file = Path(saved.path / "rank-00000.safetensors")
    data = file.read_bytes()
    file.write_bytes(change(data))
    assert len(file.read_bytes()) == len(data)
    assert file.read_bytes() != data
    assert "content differs from its sha256" in assert_refused(tmp_path)
    hash_again(saved)
    assert "rank-00000.safetensors: its header is not that" in assert_refused(tmp_path)


@pytest.mark.parametrize("change", [lambda d: d + b"\0", lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b""])
def test_files_of_another_size(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    saved = save(tmp_path, 8)
    file = Path(saved.path / "rank-00000.safetensors")
    file.write_bytes(change(file.read_bytes()))
    assert "rank-00000.safetensors" in assert_refused(tmp_path)
    hash_again(saved)
    assert_refused(tmp_path)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    saved = save(tmp_path, 8)
    file, marker = Path(saved.path / "rank-00000.safetensors"), tmp_path / "marker"
    archive = io.BytesIO()
    torch.save(Marker(str(marker)), archive)
    for data in (pickle.dumps(Marker(str(marker))), archive.getvalue()):
        file.write_bytes(same_size(data, len(file.read_bytes())))
        hash_again(saved)
        assert_refused(tmp_path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Marker(str(marker))))
    assert marker.exists()  # it would have


def test_a_file_of_a_terabyte_of_nothing(tmp_path: Path) -> None:
    """A sparse one, and an index that fits it: no room is made for it."""
    saved = save(tmp_path, 8)
    elements = 1 << 38
    (file,) = [f for f in saved.index.files if f.file == "rank-00000.safetensors"]

    def change(i: dict[str, Any]) -> None:
        i["parameters"] = {"a": [elements]}
        fragment = {"parameter": "a", "start": 0, "length": elements, "file": file.file}
        i["fragments"] = [{**fragment, "kind": kind} for kind in KINDS]
        made = header({f"a|{kind}|0": elements for kind in KINDS})
        size = len(made) + 12 * elements
        os.truncate(saved.path / file.file, size)
        pieces = -(-size // (1 << 24))
        i["files"] = [{"file": file.file, "bytes": size, "piece_bytes": 1 << 24, "sha256": ["0" * 64] * pieces}]

    change_index(saved, change)
    with limited_memory():
        found = checkpoint.open_step(str(tmp_path), 8)
        checkpoint.check_sizes(found)
        with pytest.raises(UserError, match="the weights take 1,099,511,627,776 bytes"):
            checkpoint.load_weights(found)


def links(directory: Path, outside: Path) -> dict[str, Callable[[], None]]:
    def replace(name: str) -> None:
        shutil.move(directory / name, outside / name)
        (directory / name).symlink_to(outside / name)

    def pipe(name: str) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    def whole() -> None:
        shutil.move(directory, outside / "step")
        directory.symlink_to(outside / "step")

    def device() -> None:
        (directory / "index.json").unlink()
        (directory / "index.json").symlink_to("/dev/zero")

    def index_directory() -> None:
        (directory / "index.json").unlink()
        (directory / "index.json").mkdir()

    return {
        "file": lambda: replace("rank-00000.safetensors"),
        "index": lambda: replace("index.json"),
        "whole": whole,
        "pipe for a file": lambda: pipe("rank-00000.safetensors"),
        "pipe for the index": lambda: pipe("index.json"),
        "device": device,
        "directory": index_directory,
    }


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", list(links(Path(), Path())))
def test_links_and_pipes(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    save(tmp_path, 4)
    directory = Path(save(tmp_path, 8).path)
    links(directory, outside)[kind]()
    there = sorted(outside.rglob("*"))
    assert_refused(tmp_path)
    found = checkpoint.newest(str(tmp_path))
    assert found is not None
    assert found.index.step == 4
    checkpoint.clear(str(tmp_path), 4, bad={8})
    assert not directory.exists()
    assert not directory.is_symlink()
    assert sorted(outside.rglob("*")) == there  # nothing outside was deleted
    saved = save(tmp_path, 8)  # and the step can be saved again
    checkpoint.verify(saved)


# ---------------------------------------------------------------------- anything at all

NUMBERS = st.one_of(st.integers(-10, 100), st.integers(), st.sampled_from([0, -1, 1 << 31, 1 << 62, 1 << 64, 10**30]))
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=30), st.sampled_from(["a", "b", *KINDS])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON value, but of its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, inner in items for p in [(*path, key), *places(inner, (*path, key))]]


@st.composite
def changed(draw: st.DrawFn, table: dict[str, Any]) -> dict[str, Any]:
    """A copy with one to three values replaced, removed, or moved to another place."""
    result: dict[str, Any] = json.loads(json.dumps(table))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(result)))
        holder: Any = result
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "copy"]))
        if action == "remove":
            del holder[path[-1]]
        elif action == "replace":
            holder[path[-1]] = draw(VALUES)
        else:
            source: Any = result
            for key in draw(st.sampled_from(places(result))):
                source = source[key]
            holder[path[-1]] = json.loads(json.dumps(source))
        if not places(result):
            break
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save(tmp_path_factory.mktemp("made"), 8)


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_index_is_refused_or_gives_what_was_saved(made: Checkpoint, data: st.DataObject) -> None:
    good = made.index.model_dump(mode="json")
    index_file(made).write_bytes(with_hash(json.dumps(data.draw(changed(good))).encode()))
    run_dir = made.path.parent.parent
    expected = everything()
    try:
        found = read_all(Path(run_dir), 8)
    except (BadCheckpoint, UserError):
        return
    finally:
        index_file(made).write_bytes(made.index.to_bytes())
    checkpoint.load(made, expected)
    for f, right in zip(found, expected, strict=True):
        assert torch.equal(f.tensor, right.tensor)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_a_header_is_refused(made: Checkpoint, data: st.DataObject) -> None:
    file = Path(made.path / "rank-00000.safetensors")
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    entries = header_of(good)
    text = data.draw(
        st.one_of(
            st.binary(max_size=length),
            changed(entries).map(lambda e: json.dumps(e, separators=(",", ":")).encode()[:length]),
            changed({"x": entries}).map(lambda e: json.dumps(e.get("x"), separators=(",", ":")).encode()[:length]),
        )
    )
    bad = with_header(good, text)
    if data.draw(st.booleans()):
        bad = data.draw(st.integers(0, (1 << 64) - 1)).to_bytes(8, "little") + bad[8:]
    try:
        file.write_bytes(bad)
        hash_again(made)
        if bad == good:
            read_all(Path(made.path.parent.parent), 8)
        else:
            assert_refused(Path(made.path.parent.parent))
    finally:
        file.write_bytes(good)
        index_file(made).write_bytes(made.index.to_bytes())


# ---------------------------------------------------------------------- the commands


@pytest.fixture
def run_dir(tmp_path: Path, make_data: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """One checkpoint of a run whose file is run.toml."""
    monkeypatch.chdir(tmp_path)
    run = tiny_run(name="made", data__path=make_data([3000]))
    Path("run.toml").write_text(run.to_toml())
    return Path(save_run(run, build(GPT2Config.from_run(run), 0), step=8))


def commands(run_dir: Path) -> list[list[str]]:
    place = str(run_dir)
    return [
        ["train", "run.toml"],
        ["generate", place, "--prompt", "x", "--max-tokens", "1"],
        ["evaluate", place, "--batches", "1"],
        ["export", place, "--output", "out"],
        ["audit", place],
    ]


def assert_all_refuse(run_dir: Path, message: str) -> None:
    """Every command that reads a checkpoint."""
    before = sorted(Path().rglob("*"))
    for args in commands(run_dir):
        with limited_memory():
            result = cli(*args)
        assert result.exit_code == 2, (args, result.output, result.exception)
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: "), args
        assert message in line, args
    with limited_memory():
        result = cli("checkpoint", "verify", str(run_dir))
    assert result.exit_code == 1
    assert message in result.stdout
    assert [line.startswith("step 8: DAMAGED: ") for line in result.stdout.splitlines()] == [True]
    assert sorted(Path().rglob("*")) == before  # nothing begun, nothing half-written


@pytest.fixture
def saved(run_dir: Path) -> Checkpoint:
    return checkpoint.open_step(str(run_dir), 8)


@pytest.mark.parametrize(
    "name",
    ["up", "absolute", "length huge", "overlapping", "missing", "another step", "not a number", "bytes negative"],
)
def test_commands_refuse_made_up_indexes(run_dir: Path, saved: Checkpoint, name: str) -> None:
    change_index(saved, CHANGES[name])
    assert_all_refuse(run_dir, "step-00000008/index.json")


@pytest.mark.timeout(60)
def test_commands_refuse_links_pipes_and_large_indexes(run_dir: Path, saved: Checkpoint) -> None:
    index = index_file(saved)
    content = index.read_bytes()
    os.truncate(index, 1 << 30)
    assert_all_refuse(run_dir, "index.json: 1,073,741,824 bytes are too many for an index")
    index.write_bytes(with_hash(nested(1_000_000)))
    assert_all_refuse(run_dir, "index.json: not a valid index: nested too deeply")
    index.unlink()
    os.mkfifo(index)
    assert_all_refuse(run_dir, "index.json: missing, or not a plain file")
    index.unlink()
    index.write_bytes(content)
    file = Path(saved.path / "rank-00001.safetensors")
    file.rename("elsewhere")
    file.symlink_to(Path("elsewhere").absolute())
    assert_all_refuse(run_dir, "rank-00001.safetensors: missing, or not a plain file")


def test_models_beyond_all_bounds_are_not_built(run_dir: Path, saved: Checkpoint) -> None:
    """The configuration is made up as well."""
    config = run_dir / "config.toml"
    text = config.read_text()
    for change in ("n_layer = 9999", "n_embd = 1000000", "n_layer = 1000000000", "n_embd = 10000000000000000000"):
        key = change.split()[0]
        config.write_text(text.replace(next(line for line in text.splitlines() if line.startswith(key)), change))
        for args in commands(run_dir)[1:4]:
            with limited_memory():
                result = cli(*args)
            assert result.exit_code == 2, (args, change, result.output, result.exception)
            assert len(result.stderr.splitlines()) == 1
            assert "config.toml" in result.stderr
    config.unlink()
    os.mkfifo(config)
    assert "not a run file" in cli("generate", str(run_dir)).stderr
