"""Everything on an S3 server: prepare, train, resume, audit; the server killed; wrong keys."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.s3 import S3Server

BUCKET = "test"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with an empty bucket, which this process and its children find by the variables of AWS."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    server.filesystem().mkdir(BUCKET)
    saved = {name: os.environ.get(name) for name in server.env}
    os.environ.update(server.env)
    yield server
    server.kill()
    for name, value in saved.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_server_survives_a_kill(s3: S3Server) -> None:
    from upath import UPath

    path = UPath(f"s3://{BUCKET}/there")
    path.write_bytes(b"x" * 1000)
    s3.kill()
    s3.start()
    assert path.read_bytes() == b"x" * 1000
