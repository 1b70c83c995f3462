"""Runs as Ray jobs, on a real head with a dashboard and token authentication: by `gpt2dist submit`, and without it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt2dist.cluster.local import NETWORK, LocalCluster
from gpt2dist.config import RunConfig
from gpt2dist.train import checkpoint
from tests.conftest import ROOT, tiny_run
from tests.ray.test_train import assert_audit, events, steps_done, wait_for, write

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Client:
    """Commands that a user types on a machine with the token of a cluster, and all that they have printed."""

    cluster: LocalCluster
    directory: Path
    printed: list[str] = field(default_factory=list)
    command_lines: set[str] = field(default_factory=set)

    @property
    def address(self) -> str:
        return f"http://{NETWORK}.1:{self.cluster.dashboard_port}"

    @property
    def token_file(self) -> Path:
        return self.cluster.directory / "token"

    def env(self, token: bool = True) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH") and k != "RAY_ADDRESS"}
        kept |= {"HOME": str(self.directory), "PYTHONPATH": str(ROOT)}
        return {**kept, **({"RAY_AUTH_TOKEN_PATH": str(self.token_file)} if token else {})}

    def start(self, *command: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # Ray's own command line sends the token only in this mode; ours finds out.
        env = {**self.env(), **({"RAY_AUTH_MODE": "token"} if command[0] == RAY else {})}
        return subprocess.Popen(command, cwd=self.directory, env=env, **pipes)  # type: ignore[call-overload,no-any-return]

    def finish(self, process: subprocess.Popen[str], code: int = 0, timeout: float = 200) -> str:
        output, _ = process.communicate(timeout=timeout)
        self.printed.append(output)
        assert process.returncode == code, output
        return output

    def run(self, *command: str, code: int = 0) -> str:
        return self.finish(self.start(*command), code)

    def gpt2dist(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "gpt2dist", *arguments, "--address", self.address]

    def jobs(self, *arguments: str) -> str:
        return self.run(*self.gpt2dist("jobs", *arguments))

    def look_at_processes(self) -> None:
        """Remember the command lines of everything that runs."""
        for p in psutil.process_iter(["cmdline"]):
            self.command_lines.add(" ".join(p.info["cmdline"] or []))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(head_cpus=6, dashboard=True) as started:
        yield started


@pytest.fixture
def client(cluster: LocalCluster, tmp_path: Path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(cluster, tmp_path / "home")


def long_run(tmp_path: Path, data: str, name: str) -> tuple[RunConfig, str]:
    """A run that does not end by itself, and its run file."""
    run = tiny_run(name=name, storage=str(tmp_path), data__path=data, train__steps=100_000)
    return run, str(write(run, tmp_path))


def saved_step(run: RunConfig) -> int:
    found = checkpoint.newest(run.run_dir)
    return found.index.step if found else 0


def processes(run: RunConfig, *words: str) -> list[psutil.Process]:
    """Those of a job of the run whose command line has all the words."""
    found = []
    for p in psutil.process_iter(["cmdline"]):
        line = p.info["cmdline"] or []
        if f"{run.name}.toml" in " ".join(line) and all(word in line for word in words):
            found.append(p)
    return found


def assert_nowhere(client: Client, run: RunConfig) -> None:
    """The token is in no file, metadata, output or command line, but in its own file."""
    token = client.token_file.read_text()
    assert len(token) == 64
    searched = 0
    for directory in (client.cluster.directory, Path(run.run_dir), client.directory):
        for path in directory.rglob("*"):
            if path.is_file() and path != client.token_file:
                with contextlib.suppress(OSError):
                    assert token.encode() not in path.read_bytes(), path
                    searched += 1
    assert searched > 20
    for text in [*client.printed, *client.command_lines]:
        assert token not in text
    assert any(f"{run.name}.toml" in line for line in client.command_lines)  # those of the job were seen
    request = urllib.request.Request(f"{client.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        known = answer.read().decode()
    assert run.name in known
    assert token not in known


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_submitted_stopped_and_submitted_again(
    client: Client, make_data: Callable[..., str], gpt2dist: Any, tmp_path: Path
) -> None:
    run, run_file = long_run(tmp_path, make_data([30_000]), "ours")
    following = client.start(*client.gpt2dist("submit", run_file, "--follow"))
    wait_for(lambda: steps_done(run) >= 10)
    client.look_at_processes()
    refused = client.run(*client.gpt2dist("submit", run_file), code=2)
    assert refused.startswith("error: ours: ours-1 is running at ")
    assert json.loads(client.jobs("status", "ours", "--json"))["status"] == "RUNNING"

    stopped = client.jobs("stop", "ours")
    assert stopped.endswith("ours-1: stopped\n")
    followed = client.finish(following)
    for text in (stopped, followed):
        assert "saving after this step, then ending" in text
    assert re.search(r"\nstep \d+/100000  loss \d", followed)
    (end,) = events(run, "end")
    assert saved_step(run) == end["step"] == steps_done(run) >= 10

    more = f"train.stop_at={end['step'] + 10}"
    finished = client.run(*client.gpt2dist("submit", run_file, "--set", more, "--follow"))
    assert finished.startswith(f"submitted ours-2 to {client.address}\n")
    assert finished.endswith("ours-2: succeeded\n")
    first, second = events(run, "start")
    assert (first["step"], second["step"], second["redone_steps"]) == (0, end["step"], 0)
    assert saved_step(run) == end["step"] + 10
    assert_audit(gpt2dist, run, end["step"] + 10)

    listed = json.loads(client.jobs("list", "--json"))
    assert [(j["id"], j["run"], j["status"]) for j in listed if j["run"] == "ours"] == [
        ("ours-1", "ours", "STOPPED"),
        ("ours-2", "ours", "SUCCEEDED"),
    ]
    assert client.jobs("logs", "ours-1") in followed
    assert_nowhere(client, run)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_same_without_our_command(
    client: Client, make_data: Callable[..., str], gpt2dist: Any, tmp_path: Path
) -> None:
    """`ray job submit` with the scripts and the runtime environment in jobs/."""
    run, run_file = long_run(tmp_path, make_data([30_000]), "bare")
    env = (ROOT / "jobs" / "runtime_env.yaml").read_text().replace("working_dir: .", f"working_dir: {ROOT}")
    (client.directory / "env.yaml").write_text(env)
    place = ["--address", client.address]

    def submit(job: str, *more: str) -> list[str]:
        how = ["--submission-id", job, "--runtime-env", "env.yaml", "--", "python", "jobs/train.py", run_file]
        return [RAY, "job", "submit", *place, *how, *more]

    following = client.start(*submit("a"))
    wait_for(lambda: steps_done(run) >= 10)
    client.look_at_processes()
    client.run(RAY, "job", "stop", *place, "a")
    client.finish(following)
    (end,) = events(run, "end")
    assert saved_step(run) == end["step"] == steps_done(run) >= 10
    done = client.run(*submit("b", "--retries", "1", "--set", f"train.stop_at={end['step'] + 10}"))
    assert "Job 'b' succeeded" in done
    assert saved_step(run) == end["step"] + 10
    assert_audit(gpt2dist, run, end["step"] + 10)
    assert_nowhere(client, run)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_driver_and_job_are_killed(
    client: Client, make_data: Callable[..., str], gpt2dist: Any, tmp_path: Path
) -> None:
    """SIGKILL to the driver: the entry point starts it again. To the entry point: the client submits again."""
    run, run_file = long_run(tmp_path, make_data([30_000]), "killed")
    following = client.start(*client.gpt2dist("submit", run_file, "--follow", "--retries", "2"))
    wait_for(lambda: steps_done(run) >= 10)
    (driver,) = processes(run, "gpt2dist", "train")
    driver.kill()
    wait_for(lambda: len(events(run, "start")) == 2)
    wait_for(lambda: steps_done(run) >= events(run, "start")[-1]["step"] + 5)
    for p in processes(run, "gpt2dist.cluster.entry"):
        p.kill()
    wait_for(lambda: len(events(run, "start")) == 3)
    wait_for(lambda: steps_done(run) >= events(run, "start")[-1]["step"] + 5)
    client.jobs("stop", "killed")
    output = client.finish(following)
    assert "the driver was killed by signal 9; 2 retries left" in output
    assert "submitting again, 2 left\nsubmitted killed-2 to " in output
    assert output.endswith("killed-2: stopped\n")
    assert_audit(gpt2dist, run, steps_done(run))


def test_wrong_and_missing_tokens_are_one_line(client: Client, make_data: Callable[..., str], tmp_path: Path) -> None:
    _, run_file = long_run(tmp_path, make_data([3000]), "denied")
    for token, said in ((None, "the cluster wants a token (401)"), ("wrong", "the cluster refuses the token (403)")):
        env = client.env(token=False) | ({"RAY_AUTH_TOKEN": token} if token else {})
        for arguments in (["submit", run_file], ["jobs", "list"], ["jobs", "stop", "denied"]):
            command = client.gpt2dist(*arguments)
            done = subprocess.run(
                command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 2
            assert done.stdout == ""
            ray_takes = "Ray takes it from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            assert done.stderr == f"error: address: {client.address}: {said}; {ray_takes}\n"
    assert client.jobs("list", "--json").count("denied") == 0


def test_unknown_jobs_and_dead_addresses_are_one_line(client: Client) -> None:
    output = client.run(*client.gpt2dist("jobs", "logs", "nobody"), code=2)
    assert output.startswith(f"error: nobody: no such run or job at {client.address}; known: ")
    command = [sys.executable, "-m", "gpt2dist", "jobs", "list", "--address", f"http://{NETWORK}.1:9"]
    assert "error: address: http://127.0.1.1:9: no Ray dashboard answers there" in client.run(*command, code=2)
