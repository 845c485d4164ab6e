"""The loads on Apache Kafka, through confluent-kafka (librdkafka): what Kafka's users of Python take.

Options are those of the loads on StreamHouse: LZ4, batches of up to 1 MB, the same waits.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from bench.loads import BATCH_BYTES, IN_FLIGHT, Paced, Sent, delays_ms

LINGER_MS = 2
TIMEOUT_S = 120


class Kafka:
    """Acknowledged by all in-sync replicas, of which a single broker has one (`acks=all`)."""

    def __init__(self, address: str) -> None:
        self._address = address

    def create_topic(self, topic: str, partitions: int) -> None:
        admin = AdminClient({"bootstrap.servers": self._address})
        for created in admin.create_topics([NewTopic(topic, partitions, 1)]).values():
            created.result(TIMEOUT_S)

    def batches(self, topic: str, values: Sequence[bytes], seconds: float, producers: int) -> Sent:
        records = BATCH_BYTES // len(values[0])
        made = [self._producer(LINGER_MS) for _ in range(producers)]
        for producer in made:
            _produce_and_wait(producer, topic, values[0])
        batches = [
            [{"value": value} for value in values[at : at + records]] for at in range(0, len(values) - records, records)
        ]
        began_s, sent, turn = time.perf_counter(), 0, 0
        while time.perf_counter() - began_s < seconds:
            for producer in made:
                batch = batches[turn % len(batches)]
                turn += 1
                while len(producer) >= IN_FLIGHT * records:
                    producer.poll(0.0005)
                if producer.produce_batch(topic, batch) != len(batch):
                    raise RuntimeError("the producer's queue is full")
                sent += len(batch)
        for producer in made:
            _flush(producer)
        done = Sent(sent, time.perf_counter() - began_s)
        self._check(topic, sent + producers)
        return done

    def one_by_one(self, topic: str, values: Sequence[bytes], seconds: float) -> Sent:
        producer = self._producer(LINGER_MS)
        _produce_and_wait(producer, topic, values[0])
        began_s, sent = time.perf_counter(), 0
        while time.perf_counter() - began_s < seconds:
            for value in values[:1000]:
                while len(producer) >= 500_000:
                    producer.poll(0.0005)
                producer.produce(topic, value)
            producer.poll(0)
            sent += 1000
        _flush(producer)
        done = Sent(sent, time.perf_counter() - began_s)
        self._check(topic, sent + 1)
        return done

    def unpipelined(self, topic: str, values: Sequence[bytes], seconds: float) -> Sent:
        producer = self._producer(0)
        _produce_and_wait(producer, topic, values[0])
        began_s, sent = time.perf_counter(), 0
        while time.perf_counter() - began_s < seconds:
            _produce_and_wait(producer, topic, values[sent % len(values)])
            sent += 1
        return Sent(sent, time.perf_counter() - began_s)

    def pace(self, topic: str, paced: Paced) -> Sent:
        producer = self._producer(0)
        began_ns, sent = time.monotonic_ns(), 0
        while sent < paced.records:
            due = paced.due((time.monotonic_ns() - began_ns) / 1e9)
            if due > sent:
                producer.produce_batch(topic, [{"value": value} for value in paced.values(began_ns, sent, due)])
                sent = due
            producer.poll(0)
            time.sleep(0.001)
        _flush(producer)
        return Sent(sent, (time.monotonic_ns() - began_ns) / 1e9)

    def listen(self, topic: str, count: int, began: Callable[[], None]) -> list[float]:
        consumer = Consumer({"bootstrap.servers": self._address, "group.id": "bench", "enable.auto.commit": False})
        try:
            found = [TopicPartition(topic, p) for p in consumer.list_topics(topic, TIMEOUT_S).topics[topic].partitions]
            for partition in found:
                partition.offset = consumer.get_watermark_offsets(partition)[1]
            consumer.assign(found)
            consumer.poll(0.5)  # the connections
            began()
            delays: list[float] = []
            while len(delays) < count:
                messages = consumer.consume(10_000, 0.001)
                delays += delays_ms([_value(message) for message in messages], time.monotonic_ns())
            return delays
        finally:
            consumer.close()

    def _producer(self, linger_ms: int) -> Any:
        return Producer(
            {
                "bootstrap.servers": self._address,
                "acks": "all",
                "enable.idempotence": True,
                "linger.ms": linger_ms,
                "batch.size": 1_000_000,
                "compression.type": "lz4",
                "queue.buffering.max.messages": 2_000_000,
                "queue.buffering.max.kbytes": 1_000_000,
            }
        )

    def _check(self, topic: str, count: int) -> None:
        """Checks that the topic, which is the load's own, holds `count` records. Raises RuntimeError."""
        admin = AdminClient({"bootstrap.servers": self._address})
        partitions = admin.list_topics(topic, TIMEOUT_S).topics[topic].partitions
        asked = {TopicPartition(topic, partition): OffsetSpec.latest() for partition in partitions}
        held = sum(ends.result(TIMEOUT_S).offset for ends in admin.list_offsets(asked).values())
        if held != count:
            raise RuntimeError(f"{topic} holds {held:,} records, {count:,} were sent")


def _produce_and_wait(producer: Any, topic: str, value: bytes) -> None:
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failures.append(error)

    producer.produce(topic, value, on_delivery=delivered)
    _flush(producer)
    if failures:
        raise RuntimeError(f"not delivered: {failures[0]}")


def _flush(producer: Any) -> None:
    if producer.flush(TIMEOUT_S):
        raise RuntimeError("not everything was delivered")


def _value(message: Message) -> bytes:
    error = message.error()
    if error is not None:
        raise RuntimeError(f"consume: {error}")
    value = message.value()
    assert isinstance(value, bytes)
    return value
