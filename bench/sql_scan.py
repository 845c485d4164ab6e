"""How fast bounded SQL reads topics: `python -m bench.sql_scan`.

A topic of JSON records of 221 bytes, all of it in segments and in the disk cache of `streamhouse serve`. Each statement
runs once to warm up, then `--runs` times, in turns with the others. Shown are medians of records per CPU second of the
platform's process, reading and decoding included, and of records per second.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from shruntime.signals import restore_sigint
from streamhouse import Admin, Producer, Sql
from streamhouse_cli.serve_process import ServeProcess
from streamhouse_cli.status import collect_status

from bench.common import Wrong, console, print_table, run, usage, write_json
from bench.loads.records import make_records

TOPIC = "events"
RECORD_BYTES = 221
PARTITIONS = 4
BATCH_RECORDS = 1_000
POLL_S = 0.25
DECLARED = f"CREATE TABLE declared (kind VARCHAR, cents BIGINT, \"user\" BIGINT) WITH (topic = '{TOPIC}')"
STATEMENTS = {
    "count": f"SELECT count(*) FROM {TOPIC}",
    "bytes": f"SELECT sum(octet_length(_value_bytes)) FROM {TOPIC}",
    "json_predicate": f"SELECT count(*) FROM {TOPIC} WHERE _value ->> '$.kind' = 'order'",
    "declared_predicate": "SELECT count(*) FROM declared WHERE kind = 'order'",
    "declared_group": "SELECT kind, count(*), avg(cents) FROM declared GROUP BY kind",
}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=2_000_000, help="in the topic (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="of each statement, of which medians are shown")
    parser.add_argument("--dir", type=Path, help="where the data goes; the disk under it is what is measured")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.records < BATCH_RECORDS or options.runs < 1:
        parser.error(f"--records must be at least {BATCH_RECORDS}, --runs positive")
    return options


async def measure(options: argparse.Namespace) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="streamhouse-bench-", dir=options.dir) as folder,
        ServeProcess(Path(folder) / "data", Path(folder) / "serve.log") as platform,
    ):
        await fill(platform.address, options.records)
        figures = await scan(platform.address, platform.pid, options)
    rows = [
        (name, f"{figures[name]['per_cpu_s'] / 1e6:.2f}", f"{figures[name]['per_s'] / 1e6:.2f}") for name in STATEMENTS
    ]
    title = f"bounded SQL, {options.records:,} records of {RECORD_BYTES} bytes"
    print_table(title, ("statement", "M records per CPU s", "M records/s"), rows)
    write_json(options.json, vars(options), figures)


async def fill(address: str, count: int) -> None:
    """Sends the records, and waits until all of them are in segments."""
    values = make_records(RECORD_BYTES)
    async with Admin(address) as admin:
        await admin.create_topic(TOPIC, partitions=PARTITIONS)
    async with Producer(address) as producer:
        for number in range(count // BATCH_RECORDS):
            start = number * BATCH_RECORDS % (len(values) - BATCH_RECORDS)
            await producer.send_many(TOPIC, values[start : start + BATCH_RECORDS], partition=number % PARTITIONS)
        await producer.flush()
    while True:
        partitions = (await collect_status(address))["partitions"]
        if all(entry["registered_end"] == entry["end_offset"] for entry in partitions):
            return
        await asyncio.sleep(POLL_S)


async def scan(address: str, pid: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the medians of each statement. Raises Wrong if a statement did not read all records."""
    count = options.records // BATCH_RECORDS * BATCH_RECORDS
    per_cpu_s: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    per_s: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    async with Sql(address) as sql:
        await sql(DECLARED).to_arrow()
        for turn in range(options.runs + 1):
            for name, statement in STATEMENTS.items():
                cpu_s, began_s = usage(pid).cpu_s, time.perf_counter()
                result = sql(statement)
                await result.to_arrow()
                elapsed_s, cpu_s = time.perf_counter() - began_s, usage(pid).cpu_s - cpu_s
                if result.stats is None or result.stats.records_scanned != count:
                    raise Wrong(f"{name} read {result.stats}, there are {count} records")
                if turn:
                    per_cpu_s[name].append(count / cpu_s)
                    per_s[name].append(count / elapsed_s)
            console.print(f"turn {turn} of {options.runs}")
    return {
        name: {"per_cpu_s": statistics.median(per_cpu_s[name]), "per_s": statistics.median(per_s[name])}
        for name in STATEMENTS
    }


if __name__ == "__main__":
    restore_sigint()
    options = parse_options()
    raise SystemExit(run(lambda: measure(options)))
