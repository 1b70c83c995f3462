"""Watch for the notice that the cloud takes this machine back, and drain it from Ray.

Ray itself knows nothing of spot notices. This loop asks the cloud's metadata service every second or two and, on a
notice, has `cluster/drain.py` tell Ray. Whatever fails is logged and tried again; nothing ends the loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

log = logging.getLogger("gpt2dist.spot")

REQUEST_SECONDS = 2.0
DRAIN_SECONDS = 20.0
"""Ray's start and one call, also on a machine that is busy; an attempt that takes longer is ended and made again."""
REPEAT_SECONDS = 60.0
"""An error that stays is logged this often."""


@dataclass(frozen=True)
class Notice:
    """The cloud's word that it takes this machine back."""

    key: str
    """The same for the same notice, however often it is read."""
    what: str
    """For people."""
    deadline: float
    """When the machine is gone, Unix seconds."""


class MetadataError(Exception):
    """The metadata service gave no answer that could be used."""


class Cloud(ABC):
    """A metadata service; `url` is where it listens."""

    url: str

    def __init__(self, url: str | None = None) -> None:
        self.url = (url or self.url).rstrip("/")

    @abstractmethod
    async def notice(self, http: aiohttp.ClientSession) -> Notice | None:
        """The notice, if there is one.

        Raises:
            MetadataError, aiohttp.ClientError, TimeoutError: nothing is known now.
        """


class Aws(Cloud):
    """EC2: IMDSv2. https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html"""

    url = "http://169.254.169.254"
    TOKEN_SECONDS = 21600
    NOTICE_SECONDS = 120.0

    def __init__(self, url: str | None = None) -> None:
        super().__init__(url)
        self._token: str | None = None
        self._renew_at = 0.0
        self._recommended = ""

    async def notice(self, http: aiohttp.ClientSession) -> Notice | None:
        """See `Cloud.notice`. A rebalance recommendation is only logged: often nothing follows."""
        text = await self._get(http, "spot/instance-action")
        if text is not None:
            answer = _json_object(text)
            if "action" not in answer:
                raise MetadataError(f"spot/instance-action without an action: {text[:80]!r}")
            return Notice(text, f"AWS will {answer['action']} this instance", self._deadline(answer.get("time")))
        recommendation = await self._get(http, "events/recommendations/rebalance")
        if recommendation is not None and recommendation != self._recommended:
            log.info("AWS recommends to leave this instance: the risk of an interruption is high. No notice yet.")
        self._recommended = recommendation or ""
        return None

    def _deadline(self, text: Any) -> float:
        try:
            return datetime.fromisoformat(str(text).replace("Z", "+00:00")).astimezone(UTC).timestamp()
        except ValueError:
            log.info("the notice has no time that can be read (%r): two minutes from now are taken", text)
            return time.time() + self.NOTICE_SECONDS

    async def _get(self, http: aiohttp.ClientSession, path: str) -> str | None:
        """The text at a path, or None where there is none."""
        if self._token is None or time.monotonic() > self._renew_at:
            self._token = await self._new_token(http)
            self._renew_at = time.monotonic() + self.TOKEN_SECONDS / 2
        headers = {"X-aws-ec2-metadata-token": self._token}
        async with http.get(f"{self.url}/latest/meta-data/{path}", headers=headers, allow_redirects=False) as response:
            if response.status == 401:
                self._token = None
            return None if response.status == 404 else await _text(response)

    async def _new_token(self, http: aiohttp.ClientSession) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(self.TOKEN_SECONDS)}
        async with http.put(f"{self.url}/latest/api/token", headers=headers, allow_redirects=False) as response:
            token = (await _text(response)).strip()
        if not token or not token.isascii() or not token.isprintable():
            raise MetadataError(f"no token, but {token[:80]!r}")
        return token


class Gcp(Cloud):
    """Compute Engine. https://docs.cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption"""

    url = "http://metadata.google.internal"
    NOTICE_SECONDS = 30.0

    async def notice(self, http: aiohttp.ClientSession) -> Notice | None:
        """See `Cloud.notice`."""
        headers = {"Metadata-Flavor": "Google"}
        path = "/computeMetadata/v1/instance/preempted"
        async with http.get(self.url + path, headers=headers, allow_redirects=False) as response:
            text = (await _text(response)).strip()
        if text not in ("TRUE", "FALSE"):
            raise MetadataError(f"instance/preempted is neither TRUE nor FALSE: {text[:80]!r}")
        if text == "FALSE":
            return None
        return Notice("preempted", "Google Cloud preempts this instance", time.time() + self.NOTICE_SECONDS)


class Azure(Cloud):
    """Scheduled events. https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events"""

    url = "http://169.254.169.254"
    NOTICE_SECONDS = 30.0

    def __init__(self, url: str | None = None) -> None:
        super().__init__(url)
        self._name: str | None = None

    async def notice(self, http: aiohttp.ClientSession) -> Notice | None:
        """See `Cloud.notice`. Events of the other machines of a scale set are seen here too, and left alone."""
        text = await self._get(http, "/metadata/scheduledevents?api-version=2020-07-01")
        events = _json_object(text).get("Events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise MetadataError(f"scheduledevents without a list of Events: {text[:80]!r}")
        for event in events:
            if event.get("EventType") != "Preempt":
                continue
            if self._name is None:
                path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
                self._name = (await self._get(http, path)).strip()
            if self._name in event.get("Resources", []):
                key = str(event.get("EventId"))
                return Notice(key, "Azure preempts this machine", self._deadline(event.get("NotBefore")))
        return None

    def _deadline(self, text: Any) -> float:
        try:
            return parsedate_to_datetime(str(text)).timestamp()
        except ValueError:  # empty once the event has started
            return time.time() + self.NOTICE_SECONDS

    async def _get(self, http: aiohttp.ClientSession, path: str) -> str:
        async with http.get(self.url + path, headers={"Metadata": "true"}, allow_redirects=False) as response:
            return await _text(response)


CLOUDS: dict[str, type[Cloud]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


async def _text(response: aiohttp.ClientResponse) -> str:
    if response.status != 200:
        raise MetadataError(f"{response.method} {response.url} gives HTTP {response.status}")
    return await response.text(errors="replace")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise MetadataError(f"not a JSON object: {text[:80]!r}")
    return value


def session() -> aiohttp.ClientSession:
    """A HTTP session for metadata services: short time-outs, no proxy."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS), trust_env=False)


async def ask_once(cloud: Cloud) -> Notice | None:
    """The notice, if there is one. Raises what `Cloud.notice` does."""
    async with session() as http:
        return await cloud.notice(http)


async def watch(cloud: Cloud, drain: Callable[[Notice], Awaitable[bool]], interval: float) -> None:
    """Ask `cloud` every `interval` seconds for ever; call `drain` on a notice until it returns True, once a notice."""
    notice: Notice | None = None
    drained = False
    errors = Errors()
    async with session() as http:
        while True:
            try:
                found = await cloud.notice(http)
            except Exception as e:
                errors.log(f"{cloud.url}: {type(e).__name__}: {e}")
            else:
                errors.ended()
                if found is None:
                    notice, drained = None, False
                elif notice is None or found.key != notice.key:
                    notice, drained = found, False
                    log.info("NOTICE: %s in %.0f s", notice.what, notice.deadline - time.time())
            if notice is not None and not drained:
                try:
                    drained = await drain(notice)
                except Exception as e:
                    log.info("not drained: %s: %s; trying again", type(e).__name__, e)
            await asyncio.sleep(interval)


class Drainer:
    """Drains this machine's Ray nodes, in a process that waits with Ray imported: on a busy machine that takes seconds.

    Args:
        address, node_ip: see `drain.drain_nodes`.
    """

    def __init__(self, address: str, node_ip: str | None) -> None:
        self._where = {"address": address, "node_ip": node_ip}
        self._ready: asyncio.subprocess.Process | None = None

    async def prepare(self) -> None:
        """Start the process that waits."""
        pipe = asyncio.subprocess.PIPE
        command = [sys.executable, "-m", "gpt2dist.cluster.drain"]
        self._ready = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)

    async def drain(self, notice: Notice) -> bool:
        """Whether it worked; why not is logged."""
        if self._ready is None:
            await self.prepare()
        process, self._ready = self._ready, None
        assert process is not None
        request = json.dumps({**self._where, "message": notice.what, "deadline": notice.deadline})
        try:
            answer = await asyncio.wait_for(process.communicate(f"{request}\n".encode()), DRAIN_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
            log.info("not drained: no answer from Ray in %.0f s; trying again", DRAIN_SECONDS)
            return False
        out, err = (stream.decode(errors="replace").splitlines() for stream in answer)
        if process.returncode != 0:
            fatal = [line for line in err if "Check failed" in line or "Error" in line]
            log.info("not drained: %s; trying again", " ".join([*out, *fatal][:1]) or f"exit code {process.returncode}")
            return False
        log.info("drained Ray node %s", " and ".join(out))
        await self.prepare()  # should another notice follow
        return True


class Errors:
    """Logs an error when it begins, when it changes and every minute, not on every attempt."""

    def __init__(self) -> None:
        self._last = ""
        self._at = 0.0

    def log(self, message: str) -> None:
        """An attempt failed."""
        if message != self._last or time.monotonic() - self._at > REPEAT_SECONDS:
            log.info("%s; trying on", message)
            self._last, self._at = message, time.monotonic()

    def ended(self) -> None:
        """An attempt succeeded."""
        if self._last:
            log.info("the metadata service answers again")
            self._last = ""
