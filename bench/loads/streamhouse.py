"""The loads on StreamHouse."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from streamhouse import Admin, Consumer, Producer, SendResult

from bench.loads import BATCH_BYTES, IN_FLIGHT, Paced, Sent, delays_ms

LINGER_MS = 2


@dataclass(frozen=True, slots=True)
class Flood:
    """Acknowledged records, the seconds from the first send to the last acknowledgement, and those of each batch."""

    records: int
    seconds: float
    acks_s: list[float]


async def flood(
    producer: Producer,
    topic: str,
    values: Sequence[bytes],
    *,
    batch_records: int,
    in_flight: int,
    seconds: float,
    keys: Sequence[bytes] | None = None,
    first: int = 0,
) -> Flood:
    """Sends `values` round and round from `first` on, `in_flight` batches at a time. keys: of each batch. Returns once
    everything is acknowledged; raises what a batch failed with."""
    room = asyncio.Semaphore(in_flight)
    acks_s: list[float] = []
    records, at = 0, first

    async def acknowledged(result: SendResult, sent_s: float) -> None:
        try:
            await result
        finally:
            room.release()
        acks_s.append(time.perf_counter() - sent_s)

    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as waiting:
        while time.perf_counter() - began_s < seconds:
            await room.acquire()
            batch = values[at : at + batch_records]
            at = (at + batch_records) % len(values)
            sent_s = time.perf_counter()
            result = await producer.send_many(topic, batch, None if keys is None else keys[: len(batch)])
            waiting.create_task(acknowledged(result, sent_s))
            records += len(batch)
    return Flood(records, time.perf_counter() - began_s, acks_s)


class StreamHouse:
    """Acknowledged from the fsynced log (`acks="wal"`)."""

    def __init__(self, address: str) -> None:
        self._address = address

    def create_topic(self, topic: str, partitions: int) -> None:
        async def create() -> None:
            async with Admin(self._address) as admin:
                await admin.create_topic(topic, partitions=partitions)

        asyncio.run(create())

    def batches(self, topic: str, values: Sequence[bytes], seconds: float, producers: int) -> Sent:
        async def one(producer: Producer, first: int) -> int:
            batch_records = BATCH_BYTES // len(values[0])
            sent = await flood(
                producer,
                topic,
                values,
                batch_records=batch_records,
                in_flight=IN_FLIGHT,
                seconds=seconds,
                first=first,
            )
            return sent.records

        async def all_of_them() -> Sent:
            made = [Producer(self._address, linger_ms=LINGER_MS) for _ in range(producers)]
            try:
                for producer in made:
                    await producer.send_and_wait(topic, values[0])  # connections, identity
                began_s = time.perf_counter()
                sent = await asyncio.gather(*(one(made[i], i * 10_000 % len(values)) for i in range(producers)))
                return Sent(sum(sent), time.perf_counter() - began_s)
            finally:
                for producer in made:
                    await producer.close()

        return asyncio.run(all_of_them())

    def one_by_one(self, topic: str, values: Sequence[bytes], seconds: float) -> Sent:
        async def send(producer: Producer) -> int:
            sent = 0
            end_s = time.perf_counter() + seconds
            while time.perf_counter() < end_s:
                for value in values[:1000]:
                    await producer.send(topic, value)
                sent += 1000
            await producer.flush()
            return sent

        return self._timed(topic, values, send, LINGER_MS)

    def unpipelined(self, topic: str, values: Sequence[bytes], seconds: float) -> Sent:
        async def send(producer: Producer) -> int:
            sent = 0
            end_s = time.perf_counter() + seconds
            while time.perf_counter() < end_s:
                await producer.send_and_wait(topic, values[sent % len(values)])
                sent += 1
            return sent

        return self._timed(topic, values, send, 0)

    def pace(self, topic: str, paced: Paced) -> Sent:
        async def send(producer: Producer) -> int:
            began_ns, sent = time.monotonic_ns(), 0
            while sent < paced.records:
                due = paced.due((time.monotonic_ns() - began_ns) / 1e9)
                if due > sent:
                    await producer.send_many(topic, paced.values(began_ns, sent, due))
                    sent = due
                await asyncio.sleep(0.001)
            await producer.flush()
            return sent

        return self._timed(topic, [], send, 0)

    def listen(self, topic: str, count: int, began: Callable[[], None]) -> list[float]:
        async def read() -> list[float]:
            delays: list[float] = []
            async with Consumer(self._address, [topic], start="latest") as consumer:
                await consumer.wait_for_assignment()
                await consumer.lag()  # asks for the ends: the positions are known
                began()
                async for batch in consumer.batches():
                    delays += delays_ms(batch.values.to_list(), time.monotonic_ns())
                    if len(delays) >= count:
                        break
            return delays

        return asyncio.run(read())

    def _timed(
        self, topic: str, values: Sequence[bytes], send: Callable[[Producer], Coroutine[Any, Any, int]], linger_ms: int
    ) -> Sent:
        async def timed() -> Sent:
            async with Producer(self._address, linger_ms=linger_ms) as producer:
                if values:  # a paced stream has no record that is not due
                    await producer.send_and_wait(topic, values[0])  # connections, identity
                began_s = time.perf_counter()
                return Sent(await send(producer), time.perf_counter() - began_s)

        return asyncio.run(timed())
