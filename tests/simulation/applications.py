"""Applications over the real SDK: a producer, a member of a consumer group, a reader of everything. What they do and
see goes into the history."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shproto.acks import Acks
from shproto.errors import ProducerFenced, StreamHouseError, Unavailable
from streamhouse import Consumer, Producer, RecordBatch
from streamhouse.sequenced import BytesColumn, SequencedProducer, SequencedWriter

from tests.faults import history as h
from tests.faults.payload import name_of, names_of, payload_of
from tests.simulation.history import History
from tests.simulation.loop import PROCESS
from tests.simulation.workload import GIVE_UP_S, PAUSE_S, RECORDS_MAX, Target

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamhouse.delivery import SendResult

REQUEST_TIMEOUT_MS = (500, 2_000)
SESSION_TIMEOUT_MS = (0, 1_500, 4_000)
"""Of a group's member; 0: what the coordinator has for it."""
COMMIT_EVERY_MS = (200, 1_000)
RETRY_TIMEOUT_MS = (1_000, 600_000)
"""For how long a consumer keeps failures from its application."""
WORK_S = (0.0, 0.02, 1.5)
"""What the application takes for a batch at most. The longest: it falls behind, and commits and rebalances go on."""
RESTART_PAUSE_S = 0.5
IN_FLIGHT_MAX = 10
STREAM_NAME = "stream"
"""Of the producer that all writers of numbered records take over from each other."""
WRITES_MAX = 12
"""Until a writer gives the name back by itself; it is taken over sooner by the others."""
REST_S = 3.0

Where = tuple[str, int]


class Application:
    """`run` until `stop`, which returns when all is closed."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until it is cancelled, or ends by itself."""
        self._task = asyncio.current_task()
        await self._work()

    async def _work(self) -> None:
        raise NotImplementedError

    def skip_think_time(self) -> None:
        """Processes from now on each batch in no time."""

    async def stop(self) -> None:
        """As an application that is interrupted."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        here = asyncio.current_task()
        left = [task for task in PROCESS.get().tasks.values() if task is not here and not task.done()]
        assert not left, f"still running after it was closed: {left}"


class Producing(Application):
    """Sends through the SDK's producer, several operations at a time, until `stopping`; `values` gives their names."""

    def __init__(
        self, bootstrap: Sequence[str], history: History, name: str, target: Target, values: Iterator[int],
        rng: random.Random,
    ) -> None:  # fmt: skip
        super().__init__()
        self._bootstrap = bootstrap
        self._history = history
        self._name = name
        self._target = target
        self._values = values
        self._rng = rng
        self._acks: Acks = "durable" if target.min_acks == "durable" or rng.random() < 0.2 else "wal"
        self._waiting: set[asyncio.Task[None]] = set()
        self.stopping = False

    async def _work(self) -> None:
        rng, room = self._rng, asyncio.Semaphore(IN_FLIGHT_MAX)
        producer = Producer(
            self._bootstrap,
            acks=self._acks,
            linger_ms=rng.choice((0, 5, 50)),
            batch_bytes=rng.choice((300, 16 * 1024)),
            compression=rng.choice(("lz4", "none")),
            max_in_flight=rng.choice((2, 8)),
            delivery_timeout_ms=int(GIVE_UP_S * 1000),
            request_timeout_ms=rng.choice(REQUEST_TIMEOUT_MS),
            client_id=self._name,
        )
        try:
            while not self.stopping:
                await asyncio.sleep(rng.uniform(0, PAUSE_S))
                await room.acquire()
                await self._send(producer, room)
            await asyncio.gather(*self._waiting)
        finally:
            await producer.close(flush=False, raise_failures=False)
            await asyncio.gather(*self._waiting)

    async def _send(self, producer: Producer, room: asyncio.Semaphore) -> None:
        target, partition = self._target, self._rng.randrange(self._target.partitions)
        values = tuple(f"{self._name}.{next(self._values)}" for _ in range(self._rng.randrange(1, RECORDS_MAX)))
        operation = h.Produce(self._history.new_id(), self._name, target.topic, partition, values, self._acks)
        self._history.write(operation)
        try:
            payloads = [payload_of(value) for value in values]
            result = await producer.send_many(target.topic, payloads, timestamps_ms=0, partition=partition)
        except StreamHouseError as error:
            self._history.write(h.ProduceFailed(operation.id, True, f"not sent: {error.reason}: {error.message}"))
            room.release()
            return
        task = asyncio.create_task(self._wait(operation, result, room))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _wait(self, operation: h.Produce, result: SendResult, room: asyncio.Semaphore) -> None:
        try:
            sent = await result
            self._history.write(h.Produced(operation.id, h.spans_of(sent.offsets.tolist())))
        except StreamHouseError as error:
            self._history.write(h.ProduceFailed(operation.id, False, f"{error.reason}: {error.message}"))
        finally:
            room.release()


class Numbering(Application):
    """Writes the numbered stream that all writers of the run share: takes the name over, fences, and goes on where the
    answer says, until another one has fenced. Holds the name for a while only, so that there are zombies of every kind:
    paused, cut off, or at rest until the next record.

    A write without an outcome is never guessed at: the next fence answers what was written. An error that no fault
    explains (a gap of sequences, lost data) ends the application, which is an anomaly of its own.
    """

    def __init__(
        self, bootstrap: Sequence[str], history: History, name: str, target: Target, rng: random.Random
    ) -> None:
        super().__init__()
        self._bootstrap = bootstrap
        self._history = history
        self._name = name
        self._target = target
        self._rng = rng
        self._acks: Acks = "durable" if target.min_acks == "durable" or rng.random() < 0.3 else "wal"
        self.stopping = False

    async def _work(self) -> None:
        while not self.stopping:
            producer = SequencedProducer(
                self._bootstrap, STREAM_NAME, acks=self._acks, timeout_ms=int(GIVE_UP_S * 1000)
            )
            try:
                async with producer:
                    await self._hold(producer)
            except (ProducerFenced, Unavailable) as error:
                self._history.write(h.Note(self._name, f"{error.reason}: {error.message}"))
            except StreamHouseError as error:
                if not error.retriable:
                    raise
                self._history.write(h.Note(self._name, f"{error.reason}: {error.message}"))
            await asyncio.sleep(self._rng.uniform(0, REST_S))

    async def _hold(self, producer: SequencedProducer) -> None:
        rng, topic, epoch = self._rng, self._target.topic, producer.producer_epoch
        writers = [producer.writer(topic, partition) for partition in range(self._target.partitions)]
        ends: dict[int, int] = {}
        for _ in range(rng.randrange(1, WRITES_MAX)):
            if self.stopping:
                return
            partition = rng.randrange(len(writers))
            if partition not in ends:
                ends[partition] = await self._fence(writers[partition], partition, epoch)
            count = rng.randrange(1, RECORDS_MAX)
            if await self._write(writers[partition], partition, epoch, ends[partition], count):
                ends[partition] += count
            else:
                del ends[partition]
            await asyncio.sleep(rng.uniform(0, PAUSE_S))

    async def _fence(self, writer: SequencedWriter, partition: int, epoch: int) -> int:
        end = (await writer.fence()).next_sequence
        self._history.write(h.StreamEnd(self._name, self._target.topic, partition, epoch, end, True))
        return end

    async def _write(self, writer: SequencedWriter, partition: int, epoch: int, first: int, count: int) -> bool:
        """Returns True once acknowledged, False if the outcome is not known. Raises ProducerFenced, and what no fault
        explains."""
        # The operation in the name: which try of which epoch wrote a record is what the checker asks.
        operation_id = self._history.new_id()
        values = tuple(f"{STREAM_NAME}.{first + at}.{epoch}.{operation_id}" for at in range(count))
        topic = self._target.topic
        self._history.write(h.Produce(operation_id, self._name, topic, partition, values, self._acks))
        self._history.write(h.Numbered(operation_id, first, epoch))
        payloads = BytesColumn.from_list([payload_of(value) for value in values])
        error: StreamHouseError | None = None
        try:
            await writer.write(first, payloads, timestamps_ms=0)
        except StreamHouseError as raised:
            error = raised
        # Which offsets the records have, and if they are of this try, the answer does not say.
        self._history.write(h.ProduceFailed(operation_id, False, f"{error.reason}" if error else "numbered"))
        if error is None:
            self._history.write(h.StreamEnd(self._name, topic, partition, epoch, first + count, False))
        elif not error.retriable:
            raise error
        return error is None


class Consuming(Application):
    """Reads through the SDK's consumer; a new one after some errors, the same one after others. Each has a name of its
    own in the history."""

    group = ""

    def __init__(self, bootstrap: Sequence[str], history: History, name: Callable[[], str], rng: random.Random) -> None:
        super().__init__()
        self._bootstrap = bootstrap
        self._history = history
        self._next_name = name
        self._rng = rng
        self._work_s = rng.choice(WORK_S)
        self._by_record = rng.random() < 0.5
        self.name = ""
        self.consumer: Consumer | None = None

    def skip_think_time(self) -> None:
        self._work_s = 0.0

    def positions(self) -> Mapping[Where, int]:
        """Where it is, per partition it reads."""
        if self.consumer is None:
            return {}
        return {(where.topic, where.partition): at for where, at in self.consumer.positions().items()}

    async def _work(self) -> None:
        while True:
            self.name = self._next_name()
            try:
                async with self._open() as consumer:
                    self.consumer = consumer
                    await self._read(consumer)
            except StreamHouseError as error:
                self._failed(error)
            self.consumer = None
            await asyncio.sleep(RESTART_PAUSE_S)

    def _failed(self, error: StreamHouseError) -> None:
        self._history.write(h.ReadFailed(self.name, error.reason, error.message))

    def _open(self) -> AbstractAsyncContextManager[Consumer]:
        raise NotImplementedError

    async def _read(self, consumer: Consumer) -> None:
        """Until it is closed, or fails more than once."""
        for _ in range(2):
            try:
                await (self._read_records(consumer) if self._by_record else self._read_batches(consumer))
                return
            except StreamHouseError as error:
                self._failed(error)

    async def _read_records(self, consumer: Consumer) -> None:
        async for record in consumer:
            self._polled(record.topic, record.partition, ((record.offset, 1),), (name_of(record.value),))
            await self._process()

    async def _read_batches(self, consumer: Consumer) -> None:
        async for batch in consumer.batches():
            self._take(batch)
            await self._process()

    def _take(self, batch: RecordBatch) -> None:
        values = names_of(batch.values.to_list())
        self._polled(batch.topic, batch.partition, h.spans_of(batch.offsets.tolist()), values)

    def _polled(self, topic: str, partition: int, spans: h.Spans, values: tuple[str, ...]) -> None:
        self._history.write(h.Polled(self.name, topic, partition, spans, values, group=self.group))

    async def _process(self) -> None:
        if self._work_s and self._rng.random() < 0.3:
            await asyncio.sleep(self._rng.uniform(0, self._work_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """The part of a group that all its members share. `polled(application, where)` is called whenever a member was
    given records. sessions_ms: session timeouts, of which each member draws one."""

    group: str
    topics: Sequence[str]
    polled: Callable[[GroupMember, Where], None]
    sessions_ms: Sequence[int]


class GroupMember(Consuming):
    """Commits by itself or lets the SDK; is closed from outside or interrupted."""

    def __init__(
        self, bootstrap: Sequence[str], history: History, name: Callable[[], str], rng: random.Random,
        membership: Membership,
    ) -> None:  # fmt: skip
        super().__init__(bootstrap, history, name, rng)
        self._membership = membership
        self.group = membership.group
        self._auto_commit = rng.random() < 0.5

    @property
    def member_id(self) -> str:
        """As the group knows it; empty while it is no member."""
        member = self.consumer._membership if self.consumer is not None else None
        return member.member_id if member is not None else ""

    def reads(self, where: Where) -> bool:
        return self.consumer is not None and where in self.consumer.assignment

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Consumer]:
        rng = self._rng
        consumer = Consumer(
            self._bootstrap,
            self._membership.topics,
            group=self.group,
            auto_commit=self._auto_commit,
            auto_commit_interval_ms=rng.choice(COMMIT_EVERY_MS),
            session_timeout_ms=rng.choice(self._membership.sessions_ms),
            request_timeout_ms=rng.choice(REQUEST_TIMEOUT_MS),
            retry_timeout_ms=rng.choice(RETRY_TIMEOUT_MS),
            client_id=self.name,
        )
        async with consumer:
            committing = None if self._auto_commit else asyncio.create_task(self._commit(consumer))
            try:
                yield consumer
            finally:
                if committing is not None:
                    committing.cancel()
                    await asyncio.gather(committing, return_exceptions=True)

    async def _commit(self, consumer: Consumer) -> None:
        """Whatever was handed over, again and again."""
        while True:
            await asyncio.sleep(self._rng.choice(COMMIT_EVERY_MS) / 1000)
            try:
                await consumer.commit()
            except StreamHouseError:
                continue  # the history has it

    def _polled(self, topic: str, partition: int, spans: h.Spans, values: tuple[str, ...]) -> None:
        super()._polled(topic, partition, spans, values)
        self._membership.polled(self, (topic, partition))

    async def stop(self) -> None:
        consumer = self.consumer
        if consumer is None or self._rng.random() < 0.5:
            await super().stop()
            return
        try:
            await consumer.close()
        except StreamHouseError as error:  # of the last commit: the group had ended this member's session, say
            self._failed(error)
        await super().stop()


class ReadingAll(Consuming):
    """Every partition from its beginning, without a group."""

    def __init__(
        self, bootstrap: Sequence[str], history: History, name: Callable[[], str], rng: random.Random,
        partitions: Sequence[Where],
    ) -> None:  # fmt: skip
        super().__init__(bootstrap, history, name, rng)
        self._partitions = partitions

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Consumer]:
        for where in self._partitions:
            self._history.write(h.Assigned(self.name, *where, 0))
        rng = self._rng
        async with Consumer(
            self._bootstrap,
            assign=self._partitions,
            start=0,
            request_timeout_ms=rng.choice(REQUEST_TIMEOUT_MS),
            retry_timeout_ms=rng.choice(RETRY_TIMEOUT_MS),
        ) as consumer:
            yield consumer
