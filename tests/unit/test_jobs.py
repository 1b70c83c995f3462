"""What `submit` checks and packs before anything is sent, and the entry point that starts a dead driver again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpt2dist.cli import main
from gpt2dist.cluster import jobs
from gpt2dist.cluster.jobs import check_address, check_places, has_token, pack
from gpt2dist.commands.jobs import _follow
from gpt2dist.config import UserError, load_run
from tests.conftest import ROOT, tiny_run


@pytest.fixture
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A HOME without a token; the path at which Ray looks for one."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


# ---------------------------------------------------------------------- the address


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("localhost", "http://localhost:8265"),
        ("[::1]:8299/", "http://[::1]:8299"),
        ("127.0.1.7:80", "http://127.0.1.7:80"),
        ("https://ray.example.com", "https://ray.example.com"),
    ],
)
def test_addresses_that_need_no_token(no_token: Path, address: str, url: str) -> None:
    assert check_address(address) == url


@pytest.mark.parametrize(
    "address", ["http://10.0.0.5:8265", "head:8265", "http://localhost.example.com", "0.0.0.0:8265"]
)
def test_plain_http_to_another_machine_needs_a_token(
    no_token: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    with pytest.raises(UserError, match="CVE-2023-48022"):
        check_address(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    check_address(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # then Ray sends none
    with pytest.raises(UserError, match="CVE-2023-48022"):
        check_address(address)


def test_token_is_found_where_ray_finds_it(no_token: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    assert not has_token()
    (tmp_path / "mine").write_text("t")
    assert has_token()
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    no_token.parent.mkdir()
    no_token.write_text("t")
    assert has_token()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "address: ray://head:10001: give the URL of the cluster's dashboard"),
        ("http://", "address: http://: give the URL of the cluster's dashboard"),
        ("http://[::1", "address: http://[::1: give the URL of the cluster's dashboard"),
        ("http://head:port", "address: http://head:port: give the URL of the cluster's dashboard"),
        ("https://me:pass@head", "address: https://head: give no password in it"),
        ("https://me:pass@he?ad@x", "address: https://…: give no password in it"),
        ("https://head/?token=pass@", "address: https://…: nothing may follow it, from ? or # on"),
        ("http://127.0.0.1:8265/#/jobs", "address: http://127.0.0.1:8265/: nothing may follow it"),
        ("http://127.0.0.1/ray", "address: http://127.0.0.1/ray: give the port too, before the path"),
        ("my head:8265", "address: my head:8265: give the URL of the cluster's dashboard"),
    ],
)
def test_addresses_that_are_none(no_token: Path, address: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_address(address)
    assert str(caught.value).startswith(message)
    assert "pass@" not in str(caught.value)


# ---------------------------------------------------------------------- the package


def test_package_holds_the_resolved_run_and_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = load_run(ROOT / "jobs" / "smoke.toml", ("train.steps=7", "storage=/shared/runs"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    target = tmp_path / "package"
    assert pack(run, ("texts",), target) == "smoke.toml"
    assert load_run(target / "smoke.toml") == run
    assert (target / "texts" / "a.txt").read_text() == "a"
    names = {path.name for path in target.rglob("*")}
    assert "__pycache__" not in names
    code = "import gpt2dist.cluster.entry, gpt2dist.cluster.machines as m; m.load_machines(); print(m.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=target, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(target / "gpt2dist" / "cluster" / "machines.py"), done.stderr


def test_package_that_is_too_large_names_the_largest_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("corpus.txt", "wb") as f:
        f.truncate(jobs.MAX_PACKAGE_BYTES)  # takes no space on the disk
    with pytest.raises(
        UserError, match=r"the package of the job has 5\d\d MB.*the largest file is corpus\.txt, 524 MB"
    ):
        pack(tiny_run(), ("corpus.txt",), tmp_path / "package")


@pytest.mark.parametrize(
    ("name", "message"), [("/etc/hosts", "below the present"), ("../x", "below"), ("no", "no such file")]
)
def test_what_cannot_be_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--include {name}: .*{message}"):
        pack(tiny_run(), (name,), tmp_path / "package")


def test_what_git_ignores_is_packed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reads .gitignore in the package, and leaves out what it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in (".gitignore", "texts/.gitignore", "texts/a.txt"):
        (tmp_path / name).write_text("*\n")
    pack(tiny_run(), ("texts", ".gitignore"), target := tmp_path / "package")
    assert (target / "texts" / "a.txt").exists()
    assert list(target.rglob(".gitignore")) == []


def test_a_broken_link_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="--include texts: .*texts/link"):
        pack(tiny_run(), ("texts",), tmp_path / "package")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "runs"}, 'x.toml: storage = "runs" is relative'),
        ({"data__path": "data"}, 'x.toml: data.path = "data" is relative'),
        ({"data__path": "", "prepare__output": "data"}, 'x.toml: prepare.output = "data" is relative'),
        ({"data__path": {"/a": 1.0, "b": 2.0}}, 'x.toml: data.path = "b" is relative'),
        ({"data__path": {"b": 1.0, "/a": 2.0}}, 'x.toml: data.path = "b" is relative'),
    ],
)
def test_a_job_may_not_write_into_its_own_directory(changes: dict[str, object], message: str) -> None:
    fine = {"storage": "s3://bucket/runs", "data__path": "/shared/data"}
    check_places(tiny_run(**fine), "x.toml")
    with pytest.raises(UserError) as caught:
        check_places(tiny_run(**{**fine, **changes}), "x.toml")
    assert str(caught.value).startswith(message)
    assert ("--set" in str(caught.value)) == (not isinstance(changes.get("data__path"), dict))


def test_a_relative_storage_is_refused_by_submit_and_inside_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke = str(ROOT / "jobs" / "smoke.toml")
    monkeypatch.setenv(jobs.IN_A_JOB, "{}")
    monkeypatch.chdir(tmp_path)
    for command in (["submit", smoke, "--address", "127.0.0.1:1"], ["train", smoke], ["prepare", smoke]):
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert 'storage = "runs" is relative' in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- the entry point


def entry(tmp_path: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    """The entry point, with a package of another kind in the place of gpt2dist's command line."""
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import sys\nfrom gpt2dist.cluster import entry\nentry.PAUSE_S = 0.2\n"
        "stop = entry._Stop()\n"
        f"sys.exit(entry._run([sys.executable, '-c', {program!r}, *sys.argv[2:]], int(sys.argv[1]), stop))\n"
    )
    command = [sys.executable, str(runner), *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)


COUNT = (
    "import os, sys, time, signal; n = os.open('starts', os.O_APPEND | os.O_CREAT | os.O_WRONLY); os.write(n, b'x'); "
)


def test_dead_driver_is_started_again(tmp_path: Path) -> None:
    program = COUNT + "os.kill(os.getpid(), 9) if os.stat('starts').st_size < 3 else None"
    process = entry(tmp_path, program, "5")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "starts").read_text() == "xxx"
    assert output.count("the driver was killed by signal 9") == 2


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (1, 3)])
def test_mistake_of_the_user_is_not_tried_again(tmp_path: Path, code: int, starts: int) -> None:
    process = entry(tmp_path, COUNT + f"sys.exit({code})", "2")
    process.communicate(timeout=60)
    assert process.returncode == code
    assert len((tmp_path / "starts").read_text()) == starts


def test_storage_that_is_away_when_a_dead_driver_is_started_again_is_no_mistake(tmp_path: Path) -> None:
    program = (
        COUNT + "n = os.stat('starts').st_size; os.kill(os.getpid(), 9) if n == 1 else sys.exit(2 if n < 4 else 0)"
    )
    process = entry(tmp_path, program, "5")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "starts").read_text() == "xxxx"


def test_a_name_of_a_run_and_of_another_runs_job_is_refused() -> None:
    client = object.__new__(jobs.JobClient)
    client.jobs = lambda run="": [  # type: ignore[method-assign]
        jobs.Job("exp-1-1", "exp-1", 1, "RUNNING"),
        jobs.Job("exp-1", "exp", 1, "RUNNING"),  # the newer one
    ]
    client.address = "http://head:8265"
    with pytest.raises(UserError, match="exp-1: a run, and a job of the run exp: give exp-1-1 or exp"):
        client.find("exp-1")
    assert client.find("exp").id == "exp-1"
    assert client.find("exp-1-1").run == "exp-1"


def test_the_hint_names_the_run_whose_id_may_be_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    client = object.__new__(jobs.JobClient)
    client.address = "http://head:8265"

    def follow(job_id: str, write: object) -> jobs.Job:
        raise KeyboardInterrupt

    client.follow = follow  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        _follow(client, jobs.Job("exp-1", "exp", 1, "RUNNING"), as_json=False)
    assert "gpt2dist jobs stop exp --address http://head:8265" in capsys.readouterr().err


def test_stopped_driver_is_waited_for_and_not_started_again(tmp_path: Path) -> None:
    """Ray signals the entry point and the driver; the driver takes its time, and ends with its own exit code."""
    program = (
        COUNT + "signal.signal(15, lambda *_: (time.sleep(0.5), sys.exit(3))); print('up', flush=True); time.sleep(60)"
    )
    process = entry(tmp_path, program, "5")
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    process.send_signal(signal.SIGTERM)
    for child in children:
        subprocess.run(["kill", child], check=True)
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert (tmp_path / "starts").read_text() == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="a driver outlives its entry point there")
def test_driver_saves_and_ends_when_its_entry_point_is_killed(tmp_path: Path) -> None:
    program = "import signal, sys, time, pathlib; save = lambda *_: (pathlib.Path('saved').touch(), sys.exit()); "
    program += "signal.signal(15, save); print('up', flush=True); time.sleep(60)"
    process = entry(tmp_path, program, "5")
    assert process.stdout
    process.stdout.readline()
    process.kill()
    deadline = time.monotonic() + 20
    while not (tmp_path / "saved").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.wait()


def test_a_reader_of_the_log_that_goes_ends_it() -> None:
    """`jobs logs --follow | head`: this is not the cluster's connection."""
    client = object.__new__(jobs.JobClient)
    client.address = "http://127.0.0.1:9"
    with pytest.raises(BrokenPipeError), client._errors():
        raise BrokenPipeError
    with pytest.raises(UserError, match="no Ray dashboard answers there"), client._errors():
        raise ConnectionRefusedError


def test_log_that_is_told_twice_is_shown_once() -> None:
    shown: list[str] = []
    log = jobs._Unseen(shown.append)
    log("one\ntw")
    log.begin()
    log("one\n")
    log("two\nthree\n")
    log.begin()
    log("one\ntwo\nthree\n")
    assert "".join(shown) == "one\ntwo\nthree\n"
