"""The faults of the way between clients and services."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from shproto.errors import Unavailable
from shproto.v1 import ingest_pb2

from tests.platform.faults import Faults
from tests.platform.peer import Peer

INGEST = ingest_pb2.DESCRIPTOR.services_by_name["Ingest"]


class DefectiveIngest:
    """A service with a defect: it answers one request of a produce stream, and fails at the next."""

    async def produce_stream(self, requests: AsyncIterator[Any]) -> AsyncIterator[ingest_pb2.ProduceResponse]:
        await anext(requests)
        yield ingest_pb2.ProduceResponse()
        await anext(requests)
        raise ValueError("a defect")


async def test_a_defect_of_the_produce_path_ends_the_stream() -> None:
    """The stream waited for ever, and a test hung that should have failed."""
    more = asyncio.Event()

    async def requests() -> AsyncIterator[ingest_pb2.ProduceRequest]:
        for _ in range(2):
            yield ingest_pb2.ProduceRequest()
        await more.wait()

    answers = Faults().served(INGEST, DefectiveIngest()).produce_stream(requests())
    await anext(answers)
    with pytest.raises(ValueError, match="a defect"):
        async with asyncio.timeout(60):
            await anext(answers)


@pytest.mark.parametrize(
    "use",
    [
        lambda faults: faults.fail("read_tial", Unavailable("away")),
        lambda faults: faults.fail("read_tial", Unavailable("away"), times=1),
        lambda faults: faults.hang("read_tial"),
        lambda faults: faults.hold("read_tial"),
        lambda faults: faults.delay("read_tial", 1),
        lambda faults: faults.cut("read_tial"),
        lambda faults: faults.change("read_tial", lambda request, answer: None),
        lambda faults: faults.mend("read_tial"),
        lambda faults: faults.calls["read_tial"],
        lambda faults: faults.answered["read_tial"],
        lambda faults: "read_tial" in faults.requests,
    ],
)
def test_a_misspelt_method_is_no_fault_that_never_happens(use: Callable[[Faults], object]) -> None:
    faults = Faults()
    faults.served(INGEST, DefectiveIngest())
    faults.hang("read_tail")
    with pytest.raises(KeyError, match="no method is called 'read_tial'"):
        use(faults)


@pytest.mark.parametrize(
    "use",
    [
        lambda peer: peer.lose_answers("produce_straem"),
        lambda peer: peer.hold("produce_straem"),
        lambda peer: peer.hold_answers("produce_straem"),
        lambda peer: peer.slow_ms.__setitem__("produce_straem", 1),
        lambda peer: peer.calls["produce_straem"],
        lambda peer: "produce_straem" in peer.answers,
    ],
)
def test_a_misspelt_method_of_a_peer_is_an_error(use: Callable[[Peer], object]) -> None:
    peer = Peer(DefectiveIngest(), "the agent")
    assert peer.calls["produce_stream"] == 0
    with pytest.raises(KeyError, match="no method is called"):
        use(peer)
