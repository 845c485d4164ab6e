"""The end of a run: waits until everything is registered, then reads everything back and lists what there is."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import boto3
from botocore.config import Config
from shformat import decode_batch
from shproto.errors import StreamHouseError, Unavailable
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, IngestClient, QueryClient
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2, types_pb2

from tests.faults.fleet import AGENTS, QUERIES, Fleet
from tests.faults.history import Range, ReadBack, Recorder, Segment, StoredObject, spans_of
from tests.faults.payload import names_of
from tests.integration.servers import BUCKET

Where = tuple[str, int]
POLL_S = 0.5
READ_BYTES = 4 * 1024 * 1024
CALL_TIMEOUT_MS = 10_000
DATA_PREFIXES = ("data/", "mixed/")


class NotSettled(Exception):
    """The system did not come to rest in the time it had. Says what is missing."""


@dataclass
class Snapshot:
    """What the coordinator knows: ranges and segments per partition."""

    ranges: dict[Where, list[types_pb2.OffsetRange]] = field(default_factory=dict)
    segments: dict[Where, list[types_pb2.SegmentRef]] = field(default_factory=dict)


async def take_snapshot(coordinator: CoordinatorClient) -> Snapshot:
    """Raises StreamHouseError."""
    snapshot = Snapshot()
    async for part in coordinator.get_snapshot(coordinator_pb2.GetSnapshotRequest()):
        for item in part.partitions:
            where = (item.topic.topic, item.partition)
            if item.ranges:
                snapshot.ranges[where] = list(item.ranges)
            snapshot.segments.setdefault(where, []).extend(item.segments)
    return snapshot


async def _unfinished(fleet: Fleet, coordinator: CoordinatorClient) -> list[str]:
    """What keeps the run from being over: ranges without an end, records that are not registered. Empty: nothing."""
    snapshot = await take_snapshot(coordinator)
    missing = [
        f"{topic}/{partition} epoch {item.epoch} of {item.agent_id} is {item.status}, registered to "
        f"{item.registered_end} of {item.end_offset if item.HasField('end_offset') else '?'}"
        for (topic, partition), ranges in snapshot.ranges.items()
        for item in ranges
        if not _is_finished(item, is_newest=item is ranges[-1])
    ]
    for name in AGENTS:
        agent = IngestClient(Connection([fleet.members[name].listen], timeout_ms=CALL_TIMEOUT_MS))
        try:
            state = await agent.describe_agent(ingest_pb2.DescribeAgentRequest())
        finally:
            await agent.close()
        if state.unregistered_bytes:
            missing.append(f"{name} holds {state.unregistered_bytes} bytes that are not registered")
    return missing


def _is_finished(item: types_pb2.OffsetRange, is_newest: bool) -> bool:
    if item.status == "open":
        return is_newest
    return item.HasField("end_offset") and item.registered_end >= item.end_offset


async def wait_until_registered(fleet: Fleet, timeout_s: float) -> None:
    """Raises NotSettled."""
    coordinator = CoordinatorClient(Connection(fleet.bootstrap().split(","), timeout_ms=CALL_TIMEOUT_MS))
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                missing = await _unfinished(fleet, coordinator)
            except StreamHouseError as error:
                missing = [f"no answer: {error.reason}: {error.message}"]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise NotSettled("; ".join(missing))
            await asyncio.sleep(POLL_S)
    finally:
        await coordinator.close()


async def read_back(
    fleet: Fleet, reader: str, partitions: Sequence[Where], recorder: Recorder, timeout_s: float
) -> dict[Where, int]:
    """Everything there is, through one query service; records it. Where each partition ends. Raises NotSettled."""
    query = QueryClient(Connection([fleet.members[reader].listen], timeout_ms=CALL_TIMEOUT_MS))
    deadline = time.monotonic() + timeout_s
    ends = {}
    try:
        for topic, partition in partitions:
            ends[topic, partition] = 0
            async for response in _fetch_all(query, topic, partition, deadline):
                offset = ends[topic, partition]
                offsets, values = _records(response.batches, offset)
                recorder.write(ReadBack(reader, topic, partition, spans_of(offsets), names_of(values)))
                ends[topic, partition] = response.next_offset
    finally:
        await query.close()
    return ends


def _records(batches: Sequence[bytes], from_offset: int) -> tuple[list[int], list[bytes | None]]:
    offsets: list[int] = []
    values: list[bytes | None] = []
    for batch in batches:
        records = decode_batch(batch)
        first = int((records.offsets < from_offset).sum())
        kept = records.slice(first, len(records))
        offsets += kept.offsets.tolist()
        values += kept.values.to_list()
    return offsets, values


async def _fetch_all(
    query: QueryClient, topic: str, partition: int, deadline: float
) -> AsyncIterator[query_pb2.FetchResponse]:
    offset = 0
    while True:
        request = query_pb2.FetchRequest(topic=topic, partition=partition, offset=offset, max_bytes=READ_BYTES)
        waits_for = ""
        try:
            response = await query.fetch(request)
            waits_for = response.waiting_reason
        except Unavailable as error:
            waits_for = error.message
        if waits_for:
            if time.monotonic() > deadline:
                raise NotSettled(f"{topic}/{partition} cannot be read at {offset}: {waits_for}")
            await asyncio.sleep(POLL_S)
            continue
        yield response
        if not response.batches and response.next_offset == offset:
            if offset < response.high_watermark:
                raise NotSettled(f"{topic}/{partition}: nothing at {offset}, below {response.high_watermark}")
            return
        offset = response.next_offset


async def record_metadata(fleet: Fleet, recorder: Recorder) -> set[str]:
    """Ranges and registrations; the keys that these refer to. Raises StreamHouseError."""
    coordinator = CoordinatorClient(Connection(fleet.bootstrap().split(","), timeout_ms=CALL_TIMEOUT_MS))
    try:
        snapshot = await take_snapshot(coordinator)
    finally:
        await coordinator.close()
    for (topic, partition), ranges in snapshot.ranges.items():
        for item in ranges:
            end = item.end_offset if item.HasField("end_offset") else -1
            recorder.write(
                Range(
                    topic, partition, item.epoch, item.start_offset, item.limit_offset, item.registered_end, end,
                    item.status,
                )
            )  # fmt: skip
    keys = set()
    for (topic, partition), segments in snapshot.segments.items():
        for ref in segments:
            keys.add(ref.object_key)
            recorder.write(
                Segment(
                    ref.segment_id, topic, partition, ref.epoch, ref.base_offset, ref.end_offset,
                    "" if ref.lost_reason else ref.object_key, ref.object_at, ref.size_bytes,
                )
            )  # fmt: skip
    return keys


def list_objects(settings: dict[str, str]) -> dict[str, int]:
    """Key -> size of every object that holds records. Blocks."""
    s3 = boto3.client(
        "s3",
        endpoint_url=settings["STREAMHOUSE_S3_ENDPOINT"],
        region_name=settings["STREAMHOUSE_S3_REGION"],
        aws_access_key_id=settings["STREAMHOUSE_S3_ACCESS_KEY"],
        aws_secret_access_key=settings["STREAMHOUSE_S3_SECRET_KEY"],
        config=Config(s3={"addressing_style": "path"}),
    )
    try:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        found = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}
    finally:
        s3.close()
    return {key: size for key, size in found.items() if key.startswith(DATA_PREFIXES)}


async def record_objects(fleet: Fleet, recorder: Recorder, referred: set[str], timeout_s: float) -> None:
    """The listing, once the sweep has left only what is referred to; or as it is when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        objects = await asyncio.to_thread(list_objects, fleet.servers["s3"].settings)
        if objects.keys() <= referred or time.monotonic() > deadline:
            break
        await asyncio.sleep(POLL_S)
    for key, size_bytes in objects.items():
        recorder.write(StoredObject(key, size_bytes))


async def read_back_everywhere(
    fleet: Fleet, partitions: Sequence[Where], recorder: Recorder, timeout_s: float
) -> dict[Where, int]:
    """Through every query service; the highest end of each partition. Raises NotSettled."""
    ends = [await read_back(fleet, reader, partitions, recorder, timeout_s) for reader in QUERIES]
    return {where: max(end[where] for end in ends) for where in partitions}
