"""Latency of acknowledgements with and without space ahead in the write-ahead log: `python -m bench.wal_ahead`.

Runs with `wal_ahead_bytes` 0 and with its default follow each other in turns, so that both meet the same disk and the
same load. Two producers, each on a fresh embedded platform with fsynced acknowledgements:

  single     one batch of ten 100-byte records at a time
  pipelined  batches of about 100 KB, 16 of them in flight

and the log's own writer alone, without a network: groups of 1, 50, 200 and 1,000 KB, synced one by one.
"""

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from shformat import Records, encode_batch, stamp_batch
from shproto.keys import RangeKey
from shruntime.signals import restore_sigint
from streamhouse import Admin, Producer
from streamhouse_cli.serve_process import ServeProcess
from streamhouse_ingest.adapters.wal import FileWal
from streamhouse_ingest.adapters.wal_directory import WalDirectory
from streamhouse_ingest.ports import Frame
from streamhouse_ingest.settings import IngestSettings

from bench.clusters import new_folder
from bench.common import Wrong, print_table, run, usage, write_json
from bench.loads.records import make_records
from bench.loads.streamhouse import flood

TOPIC = "ahead"
RECORD_BYTES = 100
SINGLE_RECORDS = 10
BATCH_RECORDS = 1_000
IN_FLIGHT = 16
GROUPS_BYTES = (1_000, 50_000, 200_000, 1_000_000)
KEY = RangeKey(bytes(15) + b"\1", 0, 1)

Figures = dict[str, float]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=5, help="of each of the two, of which medians are shown (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of one run (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the data goes; the disk under it is what is measured")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.runs < 1 or options.seconds <= 0:
        parser.error("--runs and --seconds must be positive")
    return options


async def measure(options: argparse.Namespace) -> None:
    values = make_records(RECORD_BYTES)
    settings = (0, IngestSettings.load({}).wal_ahead_bytes)
    runs: dict[tuple[str, int], list[Figures]] = {}
    for _ in range(options.runs):
        for ahead_bytes in settings:
            for name, records, in_flight in (("single", SINGLE_RECORDS, 1), ("pipelined", BATCH_RECORDS, IN_FLIGHT)):
                with new_folder(options.dir) as folder:
                    figures = await produce(folder, ahead_bytes, values, records, in_flight, options.seconds)
                runs.setdefault((name, ahead_bytes), []).append(figures)
            for group_bytes in GROUPS_BYTES:
                with new_folder(options.dir) as folder:
                    figures = await asyncio.to_thread(
                        write_groups, folder, ahead_bytes, group_bytes, options.seconds / 5
                    )
                runs.setdefault((f"writer, {group_bytes:,} bytes", ahead_bytes), []).append(figures)
    medians = {key: median_of(found) for key, found in sorted(runs.items())}
    columns = ["what", "wal_ahead_bytes", "ack p50, ms", "p99, ms", "MB/s", "CPU ms per MB"]
    rows = [
        [
            name,
            f"{ahead_bytes:,}",
            *(f"{figures[key]:,.2f}" for key in ("p50_ms", "p99_ms", "mb_per_s", "cpu_ms_per_mb")),
        ]
        for (name, ahead_bytes), figures in medians.items()
    ]
    print_table(f"median of {options.runs} runs in turns", columns, rows)
    flat: dict[str, Any] = {f"{name}, {ahead_bytes}": figures for (name, ahead_bytes), figures in medians.items()}
    write_json(options.json, vars(options), flat)


def median_of(runs: list[Figures]) -> Figures:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


async def produce(
    folder: Path, ahead_bytes: int, values: list[bytes], records: int, in_flight: int, seconds: float
) -> Figures:
    """Acks of a producer that keeps `in_flight` batches of so many records on their way."""
    environ = {"STREAMHOUSE_LOG_LEVEL": "WARNING", "STREAMHOUSE_WAL_AHEAD_BYTES": str(ahead_bytes)}
    with ServeProcess(folder / "data", folder / "serve.log", environ) as serve:
        async with Admin(serve.address) as admin:
            await admin.create_topic(TOPIC, partitions=4)
        batch_bytes = max(records * RECORD_BYTES * 5 // 4, 1024)
        async with Producer(serve.address, acks="wal", batch_bytes=batch_bytes, linger_ms=0) as producer:
            await (await producer.send_many(TOPIC, values[:records]))  # connections, idempotent id, first fsync
            cpu_s = usage(serve.pid).cpu_s
            sent = await flood(producer, TOPIC, values, batch_records=records, in_flight=in_flight, seconds=seconds)
            cpu_s = usage(serve.pid).cpu_s - cpu_s
    return figures_of(sent.acks_s, sent.records * RECORD_BYTES, sent.seconds, cpu_s)


def write_groups(folder: Path, ahead_bytes: int, group_bytes: int, seconds: float) -> Figures:
    """What FileWal.append takes for groups of one batch that does not compress."""
    batch = stamp_batch(encode_batch(Records.from_lists([os.urandom(group_bytes)])), 0, KEY.epoch)
    directory = WalDirectory.open(folder / "wal", "bench")
    file_bytes = IngestSettings.load({}).wal_file_bytes
    wal = FileWal(directory, 1, file_bytes=file_bytes, fsync_each=True, ahead_bytes=ahead_bytes)
    taken_s: list[float] = []
    cpu_s, began_s = time.thread_time(), time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        sent_s = time.perf_counter()
        (position,) = wal.append([Frame(key=KEY, base_offset=len(taken_s), record_count=1, batch=batch)])
        taken_s.append(time.perf_counter() - sent_s)
        if position.size_bytes != len(batch):
            raise Wrong(f"{position.size_bytes} bytes written of {len(batch)}")
    took_s, cpu_s = time.perf_counter() - began_s, time.thread_time() - cpu_s
    wal.close()
    directory.close()
    return figures_of(taken_s, len(taken_s) * len(batch), took_s, cpu_s)


def figures_of(latencies_s: list[float], size_bytes: int, seconds: float, cpu_s: float) -> Figures:
    p50_ms, p99_ms = (np.percentile(latencies_s, [50, 99]) * 1000).tolist()
    megabytes = size_bytes / 1e6
    return {
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "mb_per_s": megabytes / seconds,
        "cpu_ms_per_mb": cpu_s * 1000 / megabytes,
    }


if __name__ == "__main__":
    restore_sigint()
    options = parse_options()
    raise SystemExit(run(lambda: measure(options)))
