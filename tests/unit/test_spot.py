"""The loop that waits for a spot notice, against metadata services on loopback; Ray comes in tests/ray/test_spot.py."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from gpt2dist.cluster import spot
from tests import metadata
from tests.metadata import FAULTS, Metadata

AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"


@pytest.fixture
def service() -> Iterator[Metadata]:
    with metadata.serve() as state:
        yield state


def ask(cloud: spot.Cloud) -> spot.Notice | None:
    return asyncio.run(spot.ask_once(cloud))


def run_watch(
    cloud: spot.Cloud, script: Callable[[], Awaitable[None]], accept: Callable[[], bool] = lambda: True
) -> list[spot.Notice]:
    """Runs the loop while `script` plays; returns the notices that it was told to drain for."""
    calls: list[spot.Notice] = []

    async def drain(notice: spot.Notice) -> bool:
        calls.append(notice)
        return accept()

    async def both() -> None:
        loop = asyncio.create_task(spot.watch(cloud, drain, interval=0.05))
        await script()
        assert not loop.done()
        loop.cancel()

    asyncio.run(both())
    return calls


def test_aws_token_first_then_404_until_the_notice(service: Metadata) -> None:
    cloud = spot.Aws(service.url)
    assert ask(cloud) is None
    assert service.requests[0][:2] == (200, "PUT")
    at = service.aws_notice()
    notice = ask(cloud)
    assert notice is not None
    assert notice.deadline == at
    assert "terminate" in notice.what
    assert [method for _, method, _ in service.requests].count("PUT") == 1
    assert 401 not in {status for status, _, _ in service.requests}


def test_aws_token_that_is_no_longer_valid_is_renewed(service: Metadata) -> None:
    cloud = spot.Aws(service.url)
    ask(cloud)
    service.tokens.clear()
    service.aws_notice()
    with pytest.raises(spot.MetadataError, match="401"):
        ask(cloud)
    assert ask(cloud) is not None


def test_aws_notice_without_a_time_that_can_be_read_still_counts(service: Metadata) -> None:
    for time_ in ({}, {"time": "soon"}, {"time": None}):
        service.documents["/latest/meta-data/spot/instance-action"] = json.dumps({"action": "stop", **time_})
        notice = ask(spot.Aws(service.url))
        assert notice is not None
        assert 110 < notice.deadline - time.time() < 125


def test_aws_rebalance_recommendation_is_logged_once_and_drains_nothing(
    service: Metadata, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    recommended = json.dumps({"noticeTime": "2026-11-20T08:22:00Z"})
    service.documents["/latest/meta-data/events/recommendations/rebalance"] = recommended

    async def script() -> None:
        await asyncio.sleep(0.5)

    assert run_watch(spot.Aws(service.url), script) == []
    assert caplog.text.count("recommends") == 1


def test_google_cloud(service: Metadata) -> None:
    path = "/computeMetadata/v1/instance/preempted"
    cloud = spot.Gcp(service.url)
    service.documents[path] = "FALSE"
    assert ask(cloud) is None
    service.documents[path] = "TRUE\n"
    notice = ask(cloud)
    assert notice is not None
    assert 25 < notice.deadline - time.time() < 31
    service.documents[path] = "MAYBE"
    with pytest.raises(spot.MetadataError, match="MAYBE"):
        ask(cloud)


def test_azure_heeds_only_preempt_events_of_this_machine(service: Metadata) -> None:
    event = {
        "EventId": "A1",
        "EventType": "Preempt",
        "Resources": ["fleet_3"],
        "NotBefore": "Mon, 19 Sep 2033 18:29:47 GMT",
    }
    service.documents[AZURE_NAME] = "fleet_3"
    cases: list[tuple[dict[str, object], bool]] = [
        ({}, True),
        ({"EventType": "Reboot"}, False),
        ({"Resources": ["fleet_2"]}, False),
        ({"Resources": ["fleet_2", "fleet_3"], "NotBefore": ""}, True),
    ]
    for change, ours in cases:
        service.documents[AZURE_EVENTS] = json.dumps({"Events": [event | change]})
        assert (ask(spot.Azure(service.url)) is not None) == ours
    service.documents[AZURE_EVENTS] = json.dumps({"Events": [event]})
    notice = ask(spot.Azure(service.url))
    assert notice is not None
    assert notice.deadline == 2010767387
    for broken in ("[]", "{}", '{"Events": 3}', '{"Events": [3]}', ""):
        service.documents[AZURE_EVENTS] = broken
        with pytest.raises(spot.MetadataError):
            ask(spot.Azure(service.url))


@pytest.mark.parametrize("cloud", [spot.Aws, spot.Gcp, spot.Azure])
def test_no_fault_of_the_service_ends_the_loop_or_passes_for_a_notice(
    service: Metadata, cloud: type[spot.Cloud], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spot, "REQUEST_SECONDS", 0.3)
    before: list[int] = []

    async def script() -> None:
        for fault in FAULTS:
            service.fault = fault
            await asyncio.sleep(0.5)
        before.append(len(service.requests))
        service.fault = ""
        service.documents |= {AZURE_NAME: "me", "/computeMetadata/v1/instance/preempted": "TRUE"}
        events = [{"EventType": "Preempt", "Resources": ["me"], "EventId": "1"}]
        service.documents[AZURE_EVENTS] = json.dumps({"Events": events})
        service.aws_notice()
        await asyncio.sleep(0.8)

    assert len(run_watch(cloud(service.url), script)) == 1


def test_a_service_that_is_not_there_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def script() -> None:
        await asyncio.sleep(0.5)

    assert run_watch(spot.Aws("http://127.0.0.1:1"), script) == []
    assert caplog.text.count("127.0.0.1:1") == 2  # one line, which names the address twice


def test_drain_is_tried_until_it_works_and_then_once_a_notice(service: Metadata) -> None:
    answers = iter([False, False, True, True])

    async def script() -> None:
        service.aws_notice(100)
        await asyncio.sleep(0.7)
        service.documents.clear()  # hibernated and back
        await asyncio.sleep(0.3)
        service.aws_notice(110)
        await asyncio.sleep(0.4)

    calls = run_watch(spot.Aws(service.url), script, lambda: next(answers))
    assert [call.key == calls[0].key for call in calls] == [True, True, True, False]


def test_drain_that_raises_does_not_end_the_loop(service: Metadata) -> None:
    def no_memory() -> bool:
        raise OSError("fork: cannot allocate memory")

    async def script() -> None:
        service.aws_notice()
        await asyncio.sleep(0.5)

    assert len(run_watch(spot.Aws(service.url), script, no_memory)) > 2


def test_it_is_light() -> None:
    """It lies beside the training on every worker, and is there before Ray."""
    code = (
        "import sys, psutil, gpt2dist.cli, gpt2dist.cluster.spot\n"
        "print([m for m in ('torch', 'ray', 'numpy', 'pyarrow', 'fsspec') if m in sys.modules])\n"
        "print(psutil.Process().memory_info().rss >> 20)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert out[0] == "[]"
    assert int(out[1]) < 100
