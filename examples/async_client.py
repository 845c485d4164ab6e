"""Writes and reads at the same time, in one event loop: the client with async.

A consumer follows the topic while a producer writes to it; the records are there some milliseconds after they were
acknowledged. It is ended by what it reads, as a service would be by a signal.

    python examples/async_client.py
"""

import argparse
import asyncio
import time

from streamhouse import Admin, Consumer, Producer, json_deserializer, json_serializer

TOPIC = "example-ticks"
TICKS = 50


async def write(server: str, run: str) -> None:
    """Sends TICKS records, and returns once all are acknowledged."""
    async with Producer(server, value_serializer=json_serializer) as producer:
        futures = []
        for number in range(TICKS):
            tick = {"run": run, "number": number, "sent_ns": time.time_ns()}
            futures.append(await producer.send(TOPIC, tick))  # waits only while the buffer is full
            await asyncio.sleep(0.01)
        await asyncio.gather(*futures)
    print(f"{TICKS} ticks acknowledged")


async def read(consumer: Consumer, run: str) -> None:
    """Reads until all ticks of this run have come."""
    latencies_ms: list[float] = []
    async for record in consumer:
        tick = record.value
        assert isinstance(tick, dict), "what the deserializer makes of each value"
        if tick["run"] == run:
            latencies_ms.append((time.time_ns() - tick["sent_ns"]) / 1e6)
        if len(latencies_ms) == TICKS:
            break
    print(f"{len(latencies_ms)} ticks read, {sorted(latencies_ms)[TICKS // 2]:.1f} ms after they were sent (median)")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    server = parser.parse_args().server

    async with Admin(server) as admin:
        await admin.create_topic(TOPIC, partitions=1, if_not_exists=True)
    run = f"{time.time_ns():x}"
    # Entering the consumer finds the end of the topic: nothing written from then on is missed.
    async with (
        Consumer(server, [TOPIC], start="latest", value_deserializer=json_deserializer) as consumer,
        asyncio.timeout(60),
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(read(consumer, run))
        tasks.create_task(write(server, run))


if __name__ == "__main__":
    asyncio.run(main())
