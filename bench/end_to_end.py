"""Figures of the embedded platform on this machine: `make bench`.

Produces 100-byte records in batches of about 100 KB with fsynced acknowledgements for a bounded time, then reads all
of them back: cold after a restart, then cached, by batches and by single records. Then the loads of bench/loads: 1 KiB
records, 16 producers, single records, delays from send to receive. Repeats, and shows medians. Clients and platform
are processes that share the machine's cores.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
from shruntime.signals import restore_sigint, run_until_sigterm
from streamhouse import Admin, Consumer, Producer
from streamhouse_cli.serve_process import ServeProcess

from bench.common import Wrong, children, console, print_table, usage
from bench.loads.records import make_records
from bench.loads.streamhouse import flood
from bench.loads.turns import LOADS, Row, turn
from bench.peers.streamhouse import StreamHouseServer

TOPIC = "bench"
RECORD_BYTES = 100
BATCH_BYTES = 100_000
BATCH_RECORDS = BATCH_BYTES // RECORD_BYTES

# name, unit, digits shown
FIGURES = (
    ("produce", "records/s", 0),
    ("produce_bytes", "MB/s", 1),
    ("produce_cpu_serve", "CPU s per M", 2),
    ("produce_cpu_client", "CPU s per M", 2),
    ("ack_p50", "ms", 2),
    ("ack_p99", "ms", 2),
    ("peak_memory_serve", "MiB", 0),
    ("peak_memory_children", "MiB", 0),
    ("consume_cold_batches", "records/s", 0),
    ("consume_cached_batches", "records/s", 0),
    ("consume_cached_records", "records/s", 0),
    ("compression_ratio", "", 2),
)
Run = dict[str, float]


def main() -> int:
    options = parse_options()
    values = make_records(RECORD_BYTES)
    runs: list[Run] = []
    loads: list[Row] = []
    for number in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="streamhouse-bench-", dir=options.dir) as folder:
            runs.append(run_once(Path(folder), values, options))
            if options.loads:
                loads.append(turn(StreamHouseServer(Path(folder) / "loads"), list(LOADS), options.seconds))
        shown = runs[-1]
        console.print(
            f"run {number + 1} of {options.runs}: {shown['produce']:,.0f} records/s in, "
            f"{shown['consume_cached_batches']:,.0f} out"
        )
    medians = {name: statistics.median(run[name] for run in runs) for name, _, _ in FIGURES}
    title = f"median of {len(runs)} run(s)"
    print_runs(title, [(name.replace("_", " "), [run[name] for run in runs], n, unit) for name, unit, n in FIGURES])
    if loads:
        rows = [(name, [row[name] for row in loads], 2, "") for name in loads[0]]
        print_runs(f"{title}, each load a client process of its own", rows)
    codec = codec_figures() if options.codec else {}
    if codec:
        print_codec(codec)
    if options.json:
        write_json(options.json, options, medians, runs, loads, codec)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="repetitions, of which medians are shown (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long a run produces (%(default)s)")
    parser.add_argument("--partitions", type=int, default=4, help="of the topic (%(default)s)")
    parser.add_argument("--keys", type=int, default=0, help="different keys; 0: none, a batch has one partition")
    parser.add_argument("--in-flight", type=int, default=16, help="batches waiting for their ack (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where the data goes; the disk under it is what is measured")
    parser.add_argument("--json", type=Path, help="also write the figures here, e.g. bench/results/latest.json")
    parser.add_argument("--no-loads", dest="loads", action="store_false", help="leave out the loads of bench/loads")
    parser.add_argument("--no-codec", dest="codec", action="store_false", help="leave out bench/codec.py")
    options = parser.parse_args()
    if options.runs < 1 or options.seconds <= 0 or options.partitions < 1 or options.in_flight < 1:
        parser.error("--runs, --seconds, --partitions and --in-flight must be positive")
    if options.keys < 0:
        parser.error("--keys must not be negative")
    return options


def run_once(folder: Path, values: list[bytes], options: argparse.Namespace) -> Run:
    """Returns the figures of one run on a fresh data directory."""
    serve = ServeProcess(folder / "data", folder / "serve.log", {"STREAMHOUSE_LOG_LEVEL": "WARNING"})
    run: Run = {}
    with serve:
        count = asyncio.run(produce(serve.address, serve.pid, values, options, run))
        run["peak_memory_serve"], run["peak_memory_children"] = peak_memory_mib(serve.pid)
    with serve:
        run["compression_ratio"] = asyncio.run(compression_ratio(serve.address))
        run["consume_cold_batches"] = count / asyncio.run(timed(serve.address, count, read_batches))
        run["consume_cached_batches"] = count / asyncio.run(timed(serve.address, count, read_batches))
        run["consume_cached_records"] = count / asyncio.run(timed(serve.address, count, read_records))
        memory = peak_memory_mib(serve.pid)
        run["peak_memory_serve"] = max(run["peak_memory_serve"], memory[0])
        run["peak_memory_children"] = max(run["peak_memory_children"], memory[1])
    return run


async def produce(address: str, pid: int, values: list[bytes], options: argparse.Namespace, run: Run) -> int:
    """Sends for the time asked; returns how many records were acknowledged."""
    async with Admin(address) as admin:
        await admin.create_topic(TOPIC, partitions=options.partitions)
    keys = [b"key-%d" % (number * 7919 % options.keys) for number in range(BATCH_RECORDS)] if options.keys else None
    async with Producer(address, acks="wal", linger_ms=2, compression="lz4") as producer:
        await (await producer.send_many(TOPIC, values[:BATCH_RECORDS], keys))  # connections, idempotent id, first fsync
        cpu_s = usage(pid).cpu_s, time.process_time()
        sent = await flood(
            producer,
            TOPIC,
            values,
            batch_records=BATCH_RECORDS,
            in_flight=options.in_flight,
            seconds=options.seconds,
            keys=keys,
        )
    run["produce"] = sent.records / sent.seconds
    run["produce_bytes"] = sent.records * RECORD_BYTES / sent.seconds / 1e6
    run["produce_cpu_serve"] = (usage(pid).cpu_s - cpu_s[0]) / sent.records * 1e6
    run["produce_cpu_client"] = (time.process_time() - cpu_s[1]) / sent.records * 1e6
    run["ack_p50"], run["ack_p99"] = (np.percentile(sent.acks_s, [50, 99]) * 1000).tolist()
    return sent.records + BATCH_RECORDS


async def timed(address: str, count: int, read: Callable[[Consumer], Awaitable[int]]) -> float:
    """Seconds until everything was read from the start."""
    began_s = time.perf_counter()
    async with Consumer(address, [TOPIC], start="earliest", stop_at_end=True) as consumer:
        got = await read(consumer)
    if got != count:
        raise SystemExit(f"read {got:,} records, {count:,} were acknowledged")
    return time.perf_counter() - began_s


async def read_batches(consumer: Consumer) -> int:
    count = 0
    async for batch in consumer.batches():
        count += len(batch)
    return count


async def read_records(consumer: Consumer) -> int:
    count = 0
    async for _ in consumer:
        count += 1
    return count


async def compression_ratio(address: str) -> float:
    async with Admin(address) as admin:
        partitions = (await admin.describe_topic(TOPIC)).partitions
    return sum(part.raw_bytes for part in partitions) / max(1, sum(part.size_bytes for part in partitions))


# ---- memory


def peak_memory_mib(pid: int) -> tuple[float, float]:
    """Largest resident size so far of the process, and the sum of those of its descendants (PostgreSQL, which
    share pages with each other: the sum is more than they take)."""
    return high_water_mib(pid), sum(high_water_mib(child) for child in descendants(pid))


def high_water_mib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:  # ended meanwhile
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) / 1024


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


# ---- results


def print_runs(title: str, rows: Sequence[tuple[str, list[float], int, str]]) -> None:
    """Prints median, lowest and highest of each figure: (name, one value per run, digits shown, unit)."""
    columns = ("figure", "median", "lowest", "highest", "")
    cells = [
        (name, *(f"{value:,.{digits}f}" for value in (statistics.median(every), min(every), max(every))), unit)
        for name, every, digits, unit in rows
    ]
    print_table(title, columns, cells)


def write_json(
    path: Path,
    options: argparse.Namespace,
    medians: Run,
    runs: list[Run],
    loads: list[Row],
    codec: dict[str, float],
) -> None:
    """Writes the figures, the options and the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "options": {
            "seconds": options.seconds,
            "partitions": options.partitions,
            "keys": options.keys,
            "in_flight": options.in_flight,
        },
        "units": {name: unit for name, unit, _ in FIGURES},
        "medians": medians,
        "runs": runs,
        "loads": loads,
        "codec": codec,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def codec_figures() -> dict[str, float]:
    """Returns the figures of bench/codec.py: the codec alone, on one core. Raises CalledProcessError."""
    command = [sys.executable, str(Path(__file__).with_name("codec.py")), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def print_codec(figures: dict[str, float]) -> None:
    rows = [
        (name.replace("_per_s", "/s").replace("_", " "), f"{value:,.0f}" if value >= 100 else f"{value:,.2f}")
        for name, value in figures.items()
    ]
    print_table("codec, one core", ("figure", ""), rows)


if __name__ == "__main__":
    restore_sigint()
    try:
        # Unwinds, so that the platform that was started is ended and its directory removed.
        sys.exit(run_until_sigterm(main))
    except Wrong as error:
        sys.exit(f"wrong: {error}")
