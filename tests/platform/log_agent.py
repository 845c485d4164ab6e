"""An ingest agent without a disk, whose buffers a test cuts: a real session and real announcements at the coordinator,
and the acknowledged batches in a list.

Owns: the acknowledged batches of the ranges that it leads. Does not own: its session and its ranges, which the
coordinator keeps.
Invariants: offsets of a range follow each other from its start; a batch once held never changes.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from shformat import Records, encode_batch, read_batch_header
from shproto.errors import Unavailable
from shproto.keys import RangeKey
from shproto.v1 import coordinator_pb2 as c
from shproto.v1 import ingest_pb2


class LogAgent:
    """`leads`: the newest range of each partition. `tamper` changes what a pulled slice is answered with."""

    def __init__(self, coordinator: Any, agent_id: str = "agent", topic: str = "orders") -> None:
        self.agent_id = agent_id
        self.address = f"{agent_id}:1"
        self.batches: dict[RangeKey, list[bytes]] = {}
        self.leads: dict[int, c.RangeGrant] = {}
        self.tamper: Callable[[list[bytes]], list[bytes]] = lambda batches: batches
        self.session = c.OpenSessionResponse()
        self._coordinator = coordinator
        self._topic = topic
        self._names: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        """Refuses the calls of clients."""
        if name.startswith("_"):
            raise AttributeError(name)

        async def refuse(request: object) -> None:
            raise Unavailable(f"{name} is not a call of this agent")

        return refuse

    async def open(self) -> None:
        """Opens a session with an empty log, which is given what nobody leads."""
        wal_id = uuid.uuid4().bytes
        request = c.OpenSessionRequest(agent_id=self.agent_id, role="ingest", address=self.address, wal_id=wal_id)
        self.session = await self._coordinator.open_session(request)
        answer = await self._coordinator.get_grants(c.GetGrantsRequest(session_token=self.session.session_token))
        self.leads = {grant.partition: grant for grant in answer.grants}

    def append(self, partition: int, counts: list[int]) -> c.BufferSlice:
        """Acknowledges batches of so many records each; returns the slice that they make."""
        grant = self.leads[partition]
        held = self.batches.setdefault(RangeKey(grant.topic_id, partition, grant.epoch), [])
        base = read_batch_header(held[-1]).end_offset if held else grant.start_offset
        next_offset, size_bytes = base, 0
        for count in counts:
            records = records_of(partition, next_offset, count)
            held.append(encode_batch(records, base_offset=next_offset, epoch=grant.epoch))
            next_offset += count
            size_bytes += len(held[-1])
        return c.BufferSlice(
            topic_id=grant.topic_id,
            topic=self._topic,
            partition=partition,
            epoch=grant.epoch,
            base_offset=base,
            end_offset=next_offset,
            record_count=next_offset - base,
            size_bytes=size_bytes,
        )

    async def seal(self, name: str, *slices: c.BufferSlice) -> None:
        """Announces a buffer; `name` is the test's name of it."""
        buffer_id = self.id_of(name)
        self._names[buffer_id] = name
        await self._coordinator.announce_buffer(
            c.AnnounceBufferRequest(session_token=self.session.session_token, buffer_id=buffer_id, slices=slices)
        )

    def id_of(self, name: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, name))

    def name_of(self, buffer_id: str) -> str:
        return self._names[buffer_id]

    async def pull_slice(self, request: ingest_pb2.PullSliceRequest) -> AsyncIterator[ingest_pb2.PullSliceResponse]:
        held = self.batches[RangeKey(request.topic_id, request.partition, request.epoch)]
        wanted = [b for b in held if request.base_offset <= read_batch_header(b).base_offset < request.end_offset]
        for batch in self.tamper(wanted):
            yield ingest_pb2.PullSliceResponse(batches=[batch])

    async def describe_agent(self, request: ingest_pb2.DescribeAgentRequest) -> ingest_pb2.DescribeAgentResponse:
        return ingest_pb2.DescribeAgentResponse(session_id=self.session.session_id)


def records_of(partition: int, base: int, count: int) -> Records:
    values = [f"value {partition}/{base + number}".encode() * 3 for number in range(count)]
    return Records.from_lists(values, keys=[str(base + number).encode() for number in range(count)], timestamps_ms=base)
