"""Runs as Ray jobs: packed, submitted, followed, stopped.

A run keeps its name; each submission of it is an attempt with an id of its own, NAME-1, NAME-2, …, since Ray refuses an
id that it knows. A later attempt goes on where the run was saved. Nothing here ever holds the cluster's token: Ray
reads it itself, from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gpt2dist
from gpt2dist.config import RunConfig, UserError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by Ray when it is imported

STOP_WAIT_S = 600
"""A stopped job has this long to save; Ray's own default is 3 s."""
MAX_PACKAGE_BYTES = 500 << 20
"""Ray takes no larger working directory."""
PATIENCE_S = 600.0
"""For which an unreachable cluster is asked again while a job is followed."""
ENDED = ("SUCCEEDED", "STOPPED", "FAILED", "LOST")
RUN_KEY, ATTEMPT_KEY = "gpt2dist.run", "gpt2dist.attempt"
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for a job's entry point."""


@dataclass(frozen=True)
class Job:
    """One attempt of a run."""

    id: str
    run: str
    """Empty for jobs that were not submitted by `gpt2dist submit`."""
    attempt: int
    status: str
    """PENDING, RUNNING, or one of `ENDED`; LOST: the cluster does not know it any more."""
    message: str = ""
    exit_code: int | None = None
    """Of the entry point, where it has ended by itself."""
    started: float | None = None
    """Unix time."""
    ended: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status in ENDED


# ---------------------------------------------------------------------- what is checked before anything is sent


def check_places(run: RunConfig, source: str) -> None:
    """Raises `UserError` where a job would write to, or read from, its own working directory, which Ray deletes."""
    for key, place in run.shared_places:
        if "://" not in place and not os.path.isabs(place):
            # Of a mixture such a --set would replace all.
            how = f": --set {key}=/shared/{place}" if key != "data.path" or len(run.data_paths) == 1 else ""
            raise UserError(
                f'{source}: {key} = "{place}" is relative: a job has a directory of its own, which goes away with it; '
                f"give a path that all nodes share, or s3://{how}"
            )


def check_address(address: str) -> str:
    """The URL of a dashboard.

    Raises:
        UserError: it is none, or anybody on the way could run code there: plain HTTP to another machine without a token
            (CVE-2023-48022).
    """
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # brackets or a port that are none
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", address):
        raise UserError(f"address: {_shown(address)}: give the URL of the cluster's dashboard, http://HOST:8265")
    if "@" in parts.netloc:
        raise UserError(f"address: {_shown(address)}: give no password in it; Ray's token: see docs/jobs.md")
    if "?" in address or "#" in address:
        raise UserError(f"address: {_shown(address)}: nothing may follow it, from ? or # on")
    if port is None and parts.scheme == "http":
        if parts.path:
            raise UserError(f"address: {url}: give the port too, before the path: http://HOST:8265{parts.path}")
        url += ":8265"
    if parts.scheme == "http" and not _is_loopback(host) and not has_token():
        raise UserError(
            f"address: {url}: refused: plain HTTP to another machine without a token lets anybody who reaches it run "
            "code there (CVE-2023-48022). Start the cluster with RAY_AUTH_MODE=token and give its token by "
            "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, or go through a tunnel or https://"
        )
    return url


def _shown(address: str) -> str:
    """Without a password, query or fragment."""
    start = re.match(r"\w*://|", address)
    assert start
    rest = address[start.end() :]
    if re.search(r"[?#].*@", rest, re.DOTALL):  # a password with such a sign, or a query with an @
        return f"{start[0]}…"
    return start[0] + re.split(r"[?#]", rest)[0].rpartition("@")[2]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def has_token() -> bool:
    """Whether Ray would find a token; it is not read here."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return False
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path or Path.home() / ".ray" / "auth_token").is_file()


# ---------------------------------------------------------------------- packing


def pack(run: RunConfig, include: tuple[str, ...], target: Path) -> str:
    """Put what a job needs into a directory: the resolved run file, this package, and other files; its name there.

    include: files and directories below the present one; they lie at the same relative path for the job.

    Raises:
        UserError: one is missing, elsewhere or unreadable, or all together are too large for Ray.
    """
    # Ray leaves out what a .gitignore in the package names, though it was asked for.
    ignore = shutil.ignore_patterns("__pycache__", ".gitignore")
    shutil.copytree(Path(gpt2dist.__file__).parent, target / "gpt2dist", ignore=ignore)
    for name in include:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"--include {name}: give a path below the present directory")
        if not path.exists():
            raise UserError(f"--include {name}: no such file")
        try:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target / path, ignore=ignore, dirs_exist_ok=True)
            elif path.name != ".gitignore":
                shutil.copy(path, target / path)
        except OSError as e:  # copytree goes on, and raises a list of what it could not copy: a broken link
            several = isinstance(e, shutil.Error) and e.args and isinstance(e.args[0], list)
            raise UserError(f"--include {name}: {e.args[0][0][2] if several else e}") from None
    run_file = f"{run.name}.toml"
    (target / run_file).write_text(run.to_toml(), encoding="utf-8")
    sizes = {path.relative_to(target): path.stat().st_size for path in target.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MAX_PACKAGE_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UserError(
            f"the package of the job has {total / 1e6:,.0f} MB, Ray takes {MAX_PACKAGE_BYTES / 1e6:,.0f}; the largest "
            f"file is {largest}, {sizes[largest] / 1e6:,.0f} MB: keep data on storage that the nodes share"
        )
    return run_file


# ---------------------------------------------------------------------- the cluster


class JobClient:
    """Ray's Jobs API at an address."""

    def __init__(self, address: str) -> None:
        """Raises `UserError` where nothing answers, or the token is missing or wrong."""
        self.address = check_address(address)
        if has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray does not send it
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging", "dashboard.modules.job.sdk"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # "Uploading package …", "WebSocket closed …"
        with self._errors():
            self._ray = JobSubmissionClient(self.address)

    def jobs(self, run: str = "") -> list[Job]:
        """All jobs, or those of one run; the oldest first."""
        with self._errors():
            found = [_job(details) for details in self._ray.list_jobs() if details.submission_id]
        wanted = [job for job in found if not run or job.run == run]
        return sorted(wanted, key=lambda job: (job.started or 0.0, job.attempt))

    def find(self, name: str) -> Job:
        """The newest attempt of a run, or else the job with an id. Raises `UserError`, also where a name is both."""
        jobs = self.jobs()
        of_run = [job for job in reversed(jobs) if job.run == name]
        with_id = [job for job in jobs if job.id == name]
        if of_run and with_id and with_id[0].run not in ("", name):
            other = with_id[0].run
            raise UserError(f"{name}: a run, and a job of the run {other}: give {of_run[0].id} or {other}")
        if found := of_run or with_id:
            return found[0]
        known = ", ".join(sorted({job.run or job.id for job in jobs})) or "none"
        raise UserError(f"{name}: no such run or job at {self.address}; known: {known}")

    def submit(self, run: RunConfig, *, include: tuple[str, ...] = (), prepare: bool = False, retries: int = 0) -> Job:
        """Start the next attempt of a run.

        prepare: its data set is prepared first; retries: the driver is started again so often when it dies.

        Raises:
            UserError: the run is in progress, or the package is too large.
        """
        before = self.jobs(run.name)
        for job in before:
            if not job.is_over:
                raise UserError(
                    f"{run.name}: {job.id} is {job.status.lower()} at {self.address}; "
                    f"see: gpt2dist jobs logs {run.name} --follow, or: gpt2dist jobs stop {run.name}"
                )
        attempt = 1 + max((job.attempt for job in before), default=0)
        job_id = f"{run.name}-{attempt}"
        with tempfile.TemporaryDirectory(prefix="gpt2dist-job-") as name:
            run_file = pack(run if prepare else run.for_record(), include, Path(name))
            commands = "prepare,train" if prepare else "train"
            command = ["python", "-m", "gpt2dist.cluster.entry", "--retries", str(retries), commands, run_file]
            with self._errors():
                self._ray.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=job_id,
                    metadata={RUN_KEY: run.name, ATTEMPT_KEY: str(attempt)},
                    runtime_env={"working_dir": name, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
                )
        return Job(job_id, run.name, attempt, "PENDING")

    def status(self, job_id: str) -> Job:
        """How a job stands; LOST where the cluster does not know it."""
        with self._errors():
            try:
                return _job(self._ray.get_job_info(job_id))
            except RuntimeError as e:
                if "404" in str(e):
                    return Job(job_id, "", 0, "LOST", "the cluster does not know it; its head was started anew")
                raise

    def logs(self, job_id: str) -> str:
        """What a job has printed so far."""
        with self._errors():
            return str(self._ray.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Pass on what a job prints until it has ended, and return it as it then is.

        Raises:
            UserError: the cluster could not be reached for `PATIENCE_S`.
        """
        log, reached = _Unseen(write), time.monotonic()
        while True:
            try:
                log.begin()
                with self._errors():
                    asyncio.run(self._tail(job_id, log))
            except UserError:  # the connection, which may come back; or a job that prints nothing yet
                pass
            try:
                job = self.status(job_id)
                reached = time.monotonic()
                if job.is_over:
                    if job.status != "LOST":
                        log.begin()
                        log(self.logs(job_id))
                    return job
            except UserError:
                if time.monotonic() - reached > PATIENCE_S:
                    raise
            time.sleep(1)

    async def _tail(self, job_id: str, log: Callable[[str], None]) -> None:
        async for text in self._ray.tail_job_logs(job_id):
            log(text)

    def stop(self, job_id: str) -> Job:
        """End a job: its driver gets SIGTERM, on which it saves. Returns it as it ended."""
        with self._errors():
            self._ray.stop_job(job_id)
        deadline = time.monotonic() + STOP_WAIT_S + 60
        while not (job := self.status(job_id)).is_over:
            if time.monotonic() > deadline:
                raise UserError(f"{job_id}: has not ended {STOP_WAIT_S} s after it was told to; see its logs")
            time.sleep(0.5)
        return job

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What Ray's client raises becomes one line."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as e:
            code = 401 if "required" in str(e).partition(":")[0] else 403
            problem = (
                f"the cluster refuses the token ({code})" if has_token() else f"the cluster wants a token ({code})"
            )
            how = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            raise UserError(f"address: {self.address}: {problem}; Ray takes it from {how}") from None
        except BrokenPipeError:  # of our own output
            raise
        except (requests.exceptions.RequestException, aiohttp.ClientError, OSError) as e:
            raise UserError(f"address: {self.address}: no Ray dashboard answers there ({_first_line(e)})") from None
        except RuntimeError as e:
            raise UserError(f"address: {self.address}: {_first_line(e)}") from None


class _Unseen:
    """Passes on what is new of a text that is told from its beginning more than once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.seen = self.told = 0

    def begin(self) -> None:
        """The text is told from its beginning."""
        self.told = 0

    def __call__(self, text: str) -> None:
        """The next piece of it."""
        new = text[max(0, self.seen - self.told) :]
        self.told += len(text)
        self.seen = max(self.seen, self.told)
        if new:
            self.write(new)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    times = (None if t is None else t / 1000 for t in (details.start_time, details.end_time))
    started, ended = times
    return Job(
        id=details.submission_id,
        run=metadata.get(RUN_KEY, ""),
        attempt=int(metadata.get(ATTEMPT_KEY, 0)),
        status=str(getattr(details.status, "value", details.status)),
        message=_first_line(Exception(details.message or "")) if details.message else "",
        exit_code=details.driver_exit_code,
        started=started,
        ended=ended,
    )
