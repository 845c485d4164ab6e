"""The faults of the way between clients and services."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from shproto.v1 import ingest_pb2

from tests.platform.faults import Faults

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
