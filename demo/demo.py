"""The whole of StreamHouse on real data, in one go: `make demo`.

Starts `streamhouse serve` on a temporary directory; sends 336,776 flights; waits until every one is in a segment on
the object store; stops the platform and starts it again, so that memory and caches are cold; reads everything back
through a consumer group and compares it with what was sent, record by record; asks for the flights by SQL, and compares
the answers with its own; sends them once more while a window query runs over them, whose result is drawn again as it
changes, and compares that, too. Exit code 0 when all is as it should be.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ask import ask
from check import Expectation, Mismatch, Sent
from flights import NoFlights, read_flights
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from shruntime.signals import restore_sigint, run_until_sigterm
from streamhouse import Admin, Consumer, Producer, SendResult
from streamhouse.errors import StreamHouseError
from streamhouse_cli.output import show_bytes
from streamhouse_cli.serve_process import ServeFailed, ServeProcess
from streamhouse_cli.status import collect_status
from watch import watch

TOPIC = "flights"
PARTITIONS = 4
GROUP = "demo"
# Enough in flight that nobody waits for the network, few enough that acks measure the platform, not our own queue.
CHUNK_RECORDS = 1_000
CHUNKS_IN_FLIGHT = 8
# A buffer is sealed after 10 s by itself; ten times that means that something is stuck.
SEGMENTS_TIMEOUT_S = 100.0
READ_STALL_TIMEOUT_S = 60.0
STATUS_INTERVAL_S = 0.25

console = Console()


class Stalled(Exception):
    """Something did not go on."""


@dataclass
class Figures:
    """What the table shows. Times in seconds."""

    size_bytes: int = 0
    in_s: float = 0.0
    out_s: float = 0.0
    segmented_s: float = 0.0
    ack_s: list[float] = field(default_factory=list)
    segments: int = 0
    segment_bytes: int = 0
    raw_bytes: int = 0
    cache: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    try:
        with console.status("reading the flights"):
            values, keys = read_flights()
        with tempfile.TemporaryDirectory(prefix="streamhouse-demo-") as folder:
            run(Path(folder), values, keys)
    except KeyboardInterrupt:
        console.print("stopped; nothing is left running")
        return 130
    except Mismatch as error:
        console.print(f"[bold red]MISMATCH[/] {error}", highlight=False)
        return 1
    except (NoFlights, ServeFailed, StreamHouseError, Stalled) as error:
        console.print(f"[bold red]failed:[/] {error}", highlight=False)
        return 1
    return 0


def run(folder: Path, values: list[bytes], keys: list[bytes | None]) -> None:
    """Raises Mismatch, ServeFailed, StreamHouseError, Stalled."""
    figures = Figures(size_bytes=sum(map(len, values)) + sum(len(key) for key in keys if key))
    platform = ServeProcess(folder / "data", folder / "serve.log")
    with platform:
        console.print(f"streamhouse serve listens on {platform.address}, data in {folder}", soft_wrap=True)
        sent = asyncio.run(fill(platform.address, values, keys, figures))
        expectation = Expectation(sent, PARTITIONS)
    console.print("stopped; starting again with cold memory and caches")
    with platform:
        asyncio.run(read_back(platform.address, expectation, figures))
        with console.status("asking by SQL"):
            answers = asyncio.run(ask(platform.address, values))
        print_figures(len(values), figures)
        console.print(answers)
        asyncio.run(watch(platform.address, values, keys, console))


# ---- in


async def fill(address: str, values: list[bytes], keys: list[bytes | None], figures: Figures) -> Sent:
    """Creates the topic, sends everything, waits until all of it is in segments."""
    async with Admin(address) as admin:
        await admin.create_topic(TOPIC, partitions=PARTITIONS)
    sent = await send_all(address, values, keys, figures)
    await wait_for_segments(address, len(values), figures)
    return sent


async def send_all(address: str, values: list[bytes], keys: list[bytes | None], figures: Figures) -> Sent:
    partitions = np.full(len(values), -1, np.int64)
    offsets = np.full(len(values), -1, np.int64)
    room = asyncio.Semaphore(CHUNKS_IN_FLIGHT)
    began_s = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("sending", total=len(values))

        async def acknowledged(start: int, result: SendResult, sent_s: float) -> None:
            try:
                placed = await result
            finally:
                room.release()
            figures.ack_s.append(time.perf_counter() - sent_s)
            partitions[start : start + len(result)] = placed.partitions
            offsets[start : start + len(result)] = placed.offsets
            bar.update(task, advance=len(result))

        async with Producer(address, acks="wal", compression="lz4") as producer:
            tasks = []
            for start in range(0, len(values), CHUNK_RECORDS):
                await room.acquire()
                stop = start + CHUNK_RECORDS
                sent_s = time.perf_counter()
                result = await producer.send_many(TOPIC, values[start:stop], keys=keys[start:stop])
                tasks.append(asyncio.create_task(acknowledged(start, result, sent_s)))
            await asyncio.gather(*tasks)
    figures.in_s = time.perf_counter() - began_s
    return Sent(values, keys, partitions, offsets)


async def wait_for_segments(address: str, count: int, figures: Figures) -> None:
    """Until the registered end of every partition is its acknowledged end. Nothing is hurried: the agent seals what
    it has when it is `seal_age_ms` old, a segmenter builds, uploads and registers it."""
    began_s = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("in segments", total=count)
        while True:
            partitions = (await collect_status(address))["partitions"]
            registered = sum(entry["registered_end"] - entry["start_offset"] for entry in partitions)
            bar.update(task, completed=registered)
            if registered == count and all(entry["registered_end"] == entry["end_offset"] for entry in partitions):
                break
            if time.perf_counter() - began_s > SEGMENTS_TIMEOUT_S:
                raise Stalled(f"after {SEGMENTS_TIMEOUT_S:.0f} s only {registered:,} of {count:,} are in segments")
            await asyncio.sleep(STATUS_INTERVAL_S)
    figures.segmented_s = time.perf_counter() - began_s


# ---- out


async def read_back(address: str, expectation: Expectation, figures: Figures) -> None:
    """Reads everything through the group, compares it, commits, and asks for the figures of the store and cache."""
    count = await topic_figures(address, figures)
    began_s = time.perf_counter()
    async with Consumer(address, [TOPIC], group=GROUP, start="earliest") as consumer:
        with progress_bar() as bar:
            task = bar.add_task("reading and comparing", total=count)
            batches = consumer.batches()
            while expectation.taken < count:
                try:
                    batch = await asyncio.wait_for(anext(batches), READ_STALL_TIMEOUT_S)
                except TimeoutError as error:
                    expectation.finish()
                    raise Stalled(f"no record for {READ_STALL_TIMEOUT_S:.0f} s") from error
                expectation.take(batch)
                bar.update(task, completed=expectation.taken)
        figures.out_s = time.perf_counter() - began_s
        await consumer.commit()
    expectation.finish()
    await check_group(address, count)
    figures.cache = (await collect_status(address))["query_services"][0]


async def topic_figures(address: str, figures: Figures) -> int:
    """Records in segments."""
    async with Admin(address) as admin:
        partitions = (await admin.describe_topic(TOPIC)).partitions
    figures.segments = sum(partition.segment_count for partition in partitions)
    figures.segment_bytes = sum(partition.size_bytes for partition in partitions)
    figures.raw_bytes = sum(partition.raw_bytes for partition in partitions)
    return sum(partition.record_count for partition in partitions)


async def check_group(address: str, count: int) -> None:
    async with Admin(address) as admin:
        committed = {found.partition: found.offset for found in await admin.group_offsets(GROUP)}
        ends = {place.partition: found.offset for place, found in (await admin.offsets(TOPIC, "latest")).items()}
    if committed != ends:
        raise Mismatch(f"the group {GROUP} has committed {committed}, the partitions end at {ends}")


# ---- the table


def progress_bar() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def print_figures(count: int, figures: Figures) -> None:
    table = Table(
        title=f"{count:,} flights, every one back as it was sent", title_style="bold green", show_header=False
    )
    table.add_column()
    table.add_column(justify="right")
    for name, shown in rows(count, figures):
        table.add_row(name, shown)
    console.print(table)


def rows(count: int, figures: Figures) -> Sequence[tuple[str, str]]:
    p50_ms, p99_ms = np.percentile(figures.ack_s, [50, 99]) * 1000
    cache = figures.cache
    return (
        ("records", f"{count:,}"),
        ("bytes of keys and values", show_bytes(figures.size_bytes)),
        ("records/s in (acks=wal, fsynced)", f"{count / figures.in_s:,.0f}"),
        ("records/s out (cold, group, compared)", f"{count / figures.out_s:,.0f}"),
        (
            f"ack p50 / p99, {CHUNKS_IN_FLIGHT} x {CHUNK_RECORDS:,} records in flight",
            f"{p50_ms:.1f} / {p99_ms:.1f} ms",
        ),
        ("all in segments after", f"{figures.segmented_s:.1f} s"),
        ("segments", f"{figures.segments}, {show_bytes(figures.segment_bytes)}"),
        ("compression ratio", f"{figures.raw_bytes / figures.segment_bytes:.2f}"),
        ("cache hits / misses", f"{cache['cache_hits']:,} / {cache['cache_misses']:,}"),
        ("downloads from the object store", f"{cache['downloads']:,}, {show_bytes(cache['download_bytes'])}"),
    )


if __name__ == "__main__":
    restore_sigint()
    sys.exit(run_until_sigterm(main))
