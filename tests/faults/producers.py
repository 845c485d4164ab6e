"""Producers of a run: the SDK's, which retries and is idempotent, and one that tries every batch exactly once."""

import asyncio
import random
from dataclasses import dataclass
from itertools import count

from shformat import Codec, Records, encode_batch
from shproto.acks import Acks
from shproto.errors import NOT_WRITTEN, StreamHouseError
from shproto.rpc import Connection
from shproto.services import CoordinatorClient, IngestClient
from shproto.v1 import coordinator_pb2, ingest_pb2, types_pb2
from streamhouse import Producer

from tests.faults.history import Produce, Produced, ProduceFailed, Recorder, spans_of
from tests.faults.payload import payload_of

RECORDS_MAX = 12
PAUSE_S = (0.01, 0.15)
IN_FLIGHT_MAX = 10
"""Operations of one partition: a partition that waits for its leader must not keep the others waiting."""

DELIVERY_TIMEOUT_MS = 60_000
REQUEST_TIMEOUT_MS = 4_000
TRY_TIMEOUT_MS = 3_000

REFUSALS = frozenset(
    {
        "INVALID_ARGUMENT", "INVALID_BATCH", "BATCH_TOO_LARGE", "ACKS_TOO_WEAK", "UNKNOWN_TOPIC", "UNKNOWN_PARTITION",
        "OVERLOADED", "DISK_FULL", "SEQUENCE_GAP", "PRODUCER_FENCED", "SHUTTING_DOWN",
    }
)  # fmt: skip
"""Answers of an agent that say: nothing was written. So may NOT_LEADER. See docs/errors.md."""


def is_refusal(error: StreamHouseError) -> bool:
    """A leader that lost its lease in the middle says NOT_LEADER, too, and that it does not know."""
    return error.reason in REFUSALS or (error.reason == "NOT_LEADER" and error.details.get("outcome") == NOT_WRITTEN)


@dataclass(frozen=True, slots=True)
class Target:
    """A topic that is written to. acks: what its producers ask for."""

    topic: str
    partitions: int
    acks: Acks


class _Producing:
    """Makes operations: who, where, which values."""

    def __init__(self, process: str, target: Target, recorder: Recorder, rng: random.Random) -> None:
        self.process = process
        self.target = target
        self.recorder = recorder
        self.rng = rng
        self.stopping = False
        self._numbers = count()

    def invoke(self, partition: int) -> Produce:
        """The next operation, recorded."""
        values = tuple(f"{self.process}.{next(self._numbers)}" for _ in range(self.rng.randrange(1, RECORDS_MAX)))
        operation = Produce(
            self.recorder.new_id(), self.process, self.target.topic, partition, values, self.target.acks
        )
        self.recorder.write(operation)
        return operation

    async def pause(self) -> None:
        await asyncio.sleep(self.rng.uniform(*PAUSE_S))


class SdkProducer(_Producing):
    """Pipelined, idempotent; what it gives up may be written or not. Sends from many tasks at once, in an order that
    the SDK keeps from the first record on."""

    async def run(self, bootstrap: str) -> None:
        """Until `stopping`; then waits for everything under way."""
        rooms = [asyncio.Semaphore(IN_FLIGHT_MAX) for _ in range(self.target.partitions)]
        options = Producer(
            bootstrap,
            acks=self.target.acks,
            linger_ms=5,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            client_id=self.process,
        )
        waiting: set[asyncio.Task[None]] = set()
        try:
            while not self.stopping:
                partition = self.rng.randrange(self.target.partitions)
                if not rooms[partition].locked():
                    await rooms[partition].acquire()  # there is room: does not wait
                    task = asyncio.create_task(self._send(options, rooms[partition], self.invoke(partition)))
                    waiting.add(task)
                    task.add_done_callback(waiting.discard)
                await self.pause()
            await asyncio.gather(*waiting)
        finally:
            for task in waiting:
                task.cancel()
            await options.close(flush=False, raise_failures=False)

    async def _send(self, producer: Producer, room: asyncio.Semaphore, operation: Produce) -> None:
        try:
            values = [payload_of(value) for value in operation.values]
            sent = await (await producer.send_many(operation.topic, values, partition=operation.partition))
            self.recorder.write(Produced(operation.id, spans_of(sent.offsets.tolist())))
        except StreamHouseError as error:
            self.recorder.write(ProduceFailed(operation.id, False, f"{error.reason}: {error.message}"[:200]))
        finally:
            room.release()


class SingleTryProducer(_Producing):
    """One call after the other, each batch sent once and without a producer id: nothing may repeat it."""

    async def run(self, bootstrap: str) -> None:
        """Until `stopping`."""
        coordinator = CoordinatorClient(Connection(bootstrap.split(","), timeout_ms=TRY_TIMEOUT_MS))
        agents: dict[str, IngestClient] = {}
        leaders: list[str] = []
        try:
            while not self.stopping:
                await self.pause()
                if not any(leaders):
                    leaders = await self._leaders(coordinator)
                    continue
                operation = self.invoke(self.rng.randrange(self.target.partitions))
                address = leaders[operation.partition]
                if address and address not in agents:
                    agents[address] = IngestClient(Connection([address], timeout_ms=TRY_TIMEOUT_MS))
                if not await self._try(agents.get(address), operation):
                    leaders = []
        finally:
            await coordinator.close()
            for agent in agents.values():
                await agent.close()

    async def _leaders(self, coordinator: CoordinatorClient) -> list[str]:
        try:
            request = coordinator_pb2.GetMetadataRequest(topics=[self.target.topic])
            topic = (await coordinator.get_metadata(request)).topics[0]
        except StreamHouseError:
            return []
        return [leader.address for leader in topic.leaders]

    async def _try(self, agent: IngestClient | None, operation: Produce) -> bool:
        """Whether it was acknowledged."""
        if agent is None:
            self.recorder.write(ProduceFailed(operation.id, True, "nobody leads the partition: not sent"))
            return False
        records = Records.from_lists([payload_of(value) for value in operation.values], timestamps_ms=0)
        acks = types_pb2.ACKS_DURABLE if operation.acks == "durable" else types_pb2.ACKS_WAL
        request = ingest_pb2.ProduceRequest(
            topic=operation.topic,
            partition=operation.partition,
            batch=encode_batch(records, codec=Codec.LZ4),
            acks=acks,
            timeout_ms=TRY_TIMEOUT_MS,
        )
        try:
            answer = await agent.produce(request)
        except StreamHouseError as error:
            text = f"{error.reason}: {error.message}"[:200]
            self.recorder.write(ProduceFailed(operation.id, is_refusal(error), text))
            return False
        spans = ((answer.base_offset, len(operation.values)),)
        self.recorder.write(Produced(operation.id, spans, answer.epoch))
        return True
