"""How S3 is spoken to: what is tried again, for how long, and what its client's errors mean.

Endpoint, region and credentials are botocore's business: it reads the usual variables, files and roles of AWS.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError

RETRIES = 12
"""Of a request, after pauses of 0.1 s × 1.7^i up to 15 s: 59 s together, and what the requests themselves take."""
CONFIG = {
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "connect_timeout": 5,
    "read_timeout": 20,
}
"""For botocore. `read_timeout` is that of silence, not of the whole answer."""
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
"""AWS answers with 400 to a session's keys that are no longer good."""
QUIET_S = 60.0
"""A broken connection is reported once in this time."""

logger = logging.getLogger(__name__)
_last_report = -QUIET_S


def options() -> dict[str, Any]:
    """Of fsspec's file system: no memory of listings, since other processes write too."""
    s3fs.S3FileSystem.retries = RETRIES
    # s3fs asks this of every error that it does not know itself, inside open files too.
    s3fs.core.set_custom_error_handler(is_transient)
    return {"use_listings_cache": False, "config_kwargs": CONFIG}


def is_transient(error: Exception) -> bool:
    """Throttling, a failure of the server's own, a broken connection, a timeout."""
    if isinstance(error, ClientError):
        transient = _status(error) >= 500 or _status(error) in (408, 429) or _code(error) == "RequestTimeout"
    else:
        kinds = (HTTPClientError, BotoConnectionError, aiohttp.ClientError, ConnectionError, TimeoutError)
        transient = isinstance(error, kinds)
    if transient:
        _report(error)
    return transient


def reason(error: BaseException) -> str:
    """Why a location cannot be used at all, in one line; empty where the error says something else."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(cause, ClientError):
        code = _code(cause)
        if code == "NoSuchBucket":
            return "no such bucket"
        if _status(cause) in (401, 403) or code in EXPIRED:
            return f"access denied ({code}); docs/storage.md says which keys and rights are needed"
        if _status(cause) >= 500 or _status(cause) == 429 or code == "RequestTimeout":
            return f"the server failed for too long ({code})"
    if isinstance(error, (HTTPClientError, BotoConnectionError, aiohttp.ClientError)):
        return f"cannot be reached: {_one_line(error)}"
    if isinstance(error, BotoCoreError):  # no credentials, no region
        return _one_line(error)
    return ""


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _report(error: Exception) -> None:
    global _last_report
    if time.monotonic() - _last_report > QUIET_S:
        _last_report = time.monotonic()
        logger.warning("storage: %s; trying again", _one_line(error))
