"""Bad input against the running platform: a clear error, the right status, nothing half-applied.

One embedded platform serves all of these; each test has a topic of its own.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from shformat import BATCH_HEADER_SIZE, Codec, FormatLimits, Records, encode_batch
from shproto import errors
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, IngestClient, QueryClient
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2, types_pb2

from tests.integration.processes import EmbeddedProcess

MIB = 1024 * 1024
LEADER_STAMP_SIZE = 16  # base offset and epoch: the only header fields outside the CRC

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@dataclass
class Platform:
    process: EmbeddedProcess
    data_dir: Path
    coordinator: CoordinatorClient
    ingest: IngestClient
    query: QueryClient

    async def topic(self, **options: object) -> str:
        name = f"bad-{uuid.uuid4().hex[:8]}"
        await self.coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic=name, partitions=1, **options))  # type: ignore[arg-type]
        return name

    async def produce(self, topic: str, batch: bytes, **fields: object) -> ingest_pb2.ProduceResponse:
        request = ingest_pb2.ProduceRequest(topic=topic, batch=batch, **fields)  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            while True:
                try:
                    return await self.ingest.produce(request)
                except errors.NotLeader:  # just created: the agent hears of its lease in a moment
                    await asyncio.sleep(0.02)

    async def fetch(self, topic: str, offset: int, **fields: object) -> query_pb2.FetchResponse:
        request = query_pb2.FetchRequest(topic=topic, offset=offset, **fields)  # type: ignore[arg-type]
        return await self.query.fetch(request)

    async def end(self, topic: str) -> int:
        lookup = query_pb2.OffsetLookup(topic=topic, spec=query_pb2.OFFSET_SPEC_LATEST)
        answer = await self.query.lookup_offsets(query_pb2.LookupOffsetsRequest(lookups=[lookup]))
        return answer.offsets[0].offset

    def objects(self, topic: str) -> list[Path]:
        return sorted((self.data_dir / "objects").rglob(f"*{topic}*/**/*.seg"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    work = tmp_path_factory.mktemp("bad-input")
    process = EmbeddedProcess(work / "data", work, {"STREAMHOUSE_SEAL_AGE_MS": "200"})
    await process.start_serving()
    connection = Connection([process.address])
    yield Platform(
        process, work / "data", CoordinatorClient(connection), IngestClient(connection), QueryClient(connection)
    )
    await connection.close()
    assert await process.stop() == 0, process.log_tail()


def batch_of(*values: bytes, timestamp_ms: int = 0) -> bytes:
    return encode_batch(Records.from_lists(list(values), timestamps_ms=timestamp_ms), codec=Codec.NONE)


def flipped(batch: bytes, at: int) -> bytes:
    return batch[:at] + bytes([batch[at] ^ 0xFF]) + batch[at + 1 :]


async def test_unknown_topic(platform: Platform) -> None:
    with pytest.raises(errors.UnknownTopic, match="nowhere"):
        await platform.produce("nowhere", batch_of(b"x"))
    with pytest.raises(errors.UnknownTopic, match="nowhere"):
        await platform.fetch("nowhere", 0)
    with pytest.raises(errors.UnknownTopic, match="nowhere"):
        await platform.coordinator.describe_topic(coordinator_pb2.DescribeTopicRequest(topic="nowhere"))


async def test_partition_out_of_range(platform: Platform) -> None:
    topic = await platform.topic()
    with pytest.raises(errors.UnknownPartition) as caught:
        await platform.produce(topic, batch_of(b"x"), partition=7)
    assert caught.value.details["partition"] == "7"
    with pytest.raises(errors.UnknownPartition):
        await platform.fetch(topic, 0, partition=7)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "ä", "x" * 250])
async def test_illegal_topic_name(platform: Platform, name: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await platform.coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic=name, partitions=1))
    assert caught.value.details["field"] == "topic"


@pytest.mark.parametrize("partitions", [0, 4_000_000_000])
async def test_partition_count_out_of_range(platform: Platform, partitions: int) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        await platform.coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic="many", partitions=partitions))
    assert caught.value.details["field"] == "partitions"
    assert caught.value.details["value"] == str(partitions)


async def test_topic_twice(platform: Platform) -> None:
    topic = await platform.topic()
    with pytest.raises(errors.TopicExists, match=topic):
        await platform.coordinator.create_topic(coordinator_pb2.CreateTopicRequest(topic=topic, partitions=1))


async def test_batch_over_the_limit(platform: Platform) -> None:
    topic = await platform.topic()
    records = Records.from_lists([b"x" * (17 * MIB)], timestamps_ms=0)
    batch = encode_batch(records, codec=Codec.NONE, limits=FormatLimits(batch_bytes_max=32 * MIB))
    with pytest.raises(errors.BatchTooLarge) as caught:
        await platform.produce(topic, batch)
    assert int(caught.value.details["size_bytes"]) > int(caught.value.details["limit_bytes"])
    assert await platform.end(topic) == 0


async def test_every_damaged_header_byte_is_refused_or_harmless(platform: Platform) -> None:
    """Magic, version, codec, lengths, count, CRC: only base offset and epoch (stamped by the leader) are free."""
    topic = await platform.topic()
    end, refused = 0, []
    for at in range(BATCH_HEADER_SIZE):
        try:
            response = await platform.produce(topic, flipped(batch_of(b"one", b"two"), at))
        except (errors.InvalidBatch, errors.BatchTooLarge):
            refused.append(at)
        else:
            assert (response.base_offset, response.record_count) == (end, 2)
            end += 2
        assert await platform.end(topic) == end, f"byte {at}"
    assert refused[-(BATCH_HEADER_SIZE - LEADER_STAMP_SIZE) :] == list(range(LEADER_STAMP_SIZE, BATCH_HEADER_SIZE))


async def test_damaged_payload_is_refused(platform: Platform) -> None:
    topic = await platform.topic()
    good = batch_of(b"one", b"two")
    for bad in (flipped(good, len(good) - 1), good[:-1], good + b"x", b"", b"STRM", bytes(200)):
        with pytest.raises(errors.InvalidBatch):
            await platform.produce(topic, bad)
    assert await platform.end(topic) == 0


async def test_acks_below_the_topics_minimum(platform: Platform) -> None:
    topic = await platform.topic(min_acks=types_pb2.ACKS_DURABLE)
    with pytest.raises(errors.AcksTooWeak) as caught:
        await platform.produce(topic, batch_of(b"x"), acks=types_pb2.ACKS_WAL)
    assert "durable" in str(caught.value).lower()
    assert (await platform.produce(topic, batch_of(b"x"))).base_offset == 0


async def test_offset_beyond_the_end(platform: Platform) -> None:
    topic = await platform.topic()
    await platform.produce(topic, batch_of(b"x"))
    with pytest.raises(errors.OffsetBeyondEnd) as caught:
        await platform.fetch(topic, 5)
    assert (caught.value.details["offset"], caught.value.details["high_watermark"]) == ("5", "1")
    assert len((await platform.fetch(topic, 1)).batches) == 0


async def test_offset_below_the_start(platform: Platform) -> None:
    topic = await platform.topic(retention_ms=1)
    await platform.produce(topic, batch_of(b"x", timestamp_ms=1), acks=types_pb2.ACKS_DURABLE)
    await platform.produce(topic, batch_of(b"y", timestamp_ms=1), acks=types_pb2.ACKS_DURABLE)
    async with asyncio.timeout(20):
        while (await platform.coordinator.apply_retention(coordinator_pb2.ApplyRetentionRequest())).segments_removed:
            pass
        while True:  # the query service hears of it through the event feed
            try:
                await platform.fetch(topic, 0)
            except errors.OffsetBelowStart as error:
                assert error.details["offset"] == "0"
                break
            await asyncio.sleep(0.02)


async def test_negative_offset(platform: Platform) -> None:
    topic = await platform.topic()
    with pytest.raises((errors.InvalidArgument, errors.OffsetBelowStart)):
        await platform.fetch(topic, -5)


async def test_timestamp_nonsense(platform: Platform) -> None:
    topic = await platform.topic()
    with pytest.raises(errors.InvalidArgument) as caught:
        await platform.produce(topic, batch_of(b"x", timestamp_ms=2**60))
    assert "timestamp" in caught.value.details["field"]
    assert await platform.end(topic) == 0


async def test_a_damaged_block_and_a_missing_object(platform: Platform) -> None:
    topic = await platform.topic()
    await platform.produce(topic, batch_of(b"precious" * 100), acks=types_pb2.ACKS_DURABLE)
    (path,) = platform.objects(topic)
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(flipped(content, 64 + BATCH_HEADER_SIZE + 50))
    with pytest.raises(errors.DataLoss) as caught:
        await platform.fetch(topic, 0)
    assert caught.value.details["object_key"] in str(path)
    assert caught.value.details["topic"] == topic

    path.unlink()
    with pytest.raises(errors.DataLoss) as caught:
        await platform.fetch(topic, 0)
    assert caught.value.details["object_key"] in str(path)

    path.write_bytes(content)  # an operator brings it back
    assert len((await platform.fetch(topic, 0)).batches) == 1


async def test_plain_records_need_no_encoding(platform: Platform) -> None:
    """What grpcurl can do: plain records in, plain records out, null and empty kept apart."""
    topic = await platform.topic()
    await platform.produce(topic, batch_of(b"warm up"))
    records = [
        types_pb2.Record(key=b"k", value=b"v", headers=[types_pb2.Header(key="h", value=b"1")], timestamp_ms=5),
        types_pb2.Record(value=b""),
        types_pb2.Record(key=b"tombstone"),
    ]
    answer = await platform.ingest.produce(
        ingest_pb2.ProduceRequest(topic=topic, records=types_pb2.RecordList(records=records))
    )
    assert (answer.base_offset, answer.record_count) == (1, 3)
    fetched = await platform.fetch(topic, 1, format=query_pb2.FETCH_FORMAT_RECORDS)
    first, second, third = fetched.records
    assert (first.offset, first.key, first.value, first.timestamp_ms, first.headers[0].key) == (1, b"k", b"v", 5, "h")
    assert (second.HasField("key"), second.HasField("value"), second.value) == (False, True, b"")
    assert (third.key, third.HasField("value")) == (b"tombstone", False)


async def test_status_codes_on_the_wire(platform: Platform) -> None:
    """The published status, seen by a client that knows nothing of our error details."""
    async with grpc.aio.insecure_channel(platform.process.address) as channel:
        fetch = channel.unary_unary(
            "/streamhouse.v1.Query/Fetch",
            request_serializer=query_pb2.FetchRequest.SerializeToString,
            response_deserializer=query_pb2.FetchResponse.FromString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await fetch(query_pb2.FetchRequest(topic="nowhere"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "nowhere" in (caught.value.details() or "")


async def test_a_second_serve_on_the_same_directory_is_refused(platform: Platform, tmp_path: Path) -> None:
    second = EmbeddedProcess(platform.data_dir, tmp_path)
    second.start()
    async with asyncio.timeout(30):
        while second.is_running():
            await asyncio.sleep(0.05)
    assert await second.stop() == 1
    assert f"already served by process {platform.process.pid}" in second.log_tail()
