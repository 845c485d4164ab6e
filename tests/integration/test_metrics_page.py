"""docs/metrics.md lists what a running platform really measures: no more, no less, with the same words."""

import asyncio
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from shread.counters import Counters
from streamhouse import Admin, Consumer, Producer

from tests.integration.processes import EmbeddedProcess, free_ports

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "metrics.md"
NAME = re.compile(r'"(streamhouse_(?:server|ingest|segmenter|coordinator|query|sql)_\w+)"')
# Gauges and times of what has to happen first, and does not in this test.
RARE = {
    "streamhouse_coordinator_events_kept",
    "streamhouse_query_fetch_duration_ms",
    "streamhouse_segmenter_orphans_waiting",
    "streamhouse_sql_statement_duration_ms",
}


def documented() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| `(streamhouse_\w+)` \| (\w+) \| (.+) \|$", PAGE.read_text(), re.M)
    return {name: (kind, text) for name, kind, text in rows}


def measured(text: str) -> dict[str, tuple[str, str]]:
    helps = dict(re.findall(r"^# HELP (streamhouse_\w+) (.*)$", text, re.M))
    return {name: (kind, helps[name]) for name, kind in re.findall(r"^# TYPE (streamhouse_\w+) (\w+)$", text, re.M)}


def labels(text: str) -> dict[str, set[str]]:
    """Returns the names of the labels of each metric of a scrape, without those that the exporter adds to all."""
    found: dict[str, set[str]] = {}
    for name, pairs in re.findall(r"^(streamhouse_\w+)\{(.*)\} \S+$", text, re.M):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', pairs))
    return found


def instruments() -> Iterator[str]:
    """Yields the names of all instruments in the services' code. The exporter shows none that was never used."""
    for path in (*ROOT.glob("services/*/streamhouse_*/**/*.py"), *ROOT.glob("libs/*/sh*/**/*.py")):
        yield from NAME.findall(path.read_text())
    yield from (f"streamhouse_query_{item.name}" for item in fields(Counters))


def test_the_page_has_all_instruments_in_the_code() -> None:
    """Also those of rare events, which a healthy platform never shows."""
    named = {name.removesuffix("_total") for name in documented()}
    assert {name.removesuffix("_total") for name in instruments()} == named


async def test_the_page_and_the_platform_agree(tmp_path: Path) -> None:
    ports = free_ports(2)

    def scrape_one(port: int) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            return str(response.read().decode())

    def scrape() -> str:
        return "".join(map(scrape_one, ports))

    environ = {
        "STREAMHOUSE_PROMETHEUS_LISTEN": f"127.0.0.1:{ports[0]}",
        "STREAMHOUSE_SQL_PROMETHEUS_LISTEN": f"127.0.0.1:{ports[1]}",
        "STREAMHOUSE_SEAL_AGE_MS": "200",
        "STREAMHOUSE_GROUP_LAG_INTERVAL_MS": "100",
    }
    server = EmbeddedProcess(tmp_path / "data", tmp_path, environ)
    await server.start_serving()
    try:
        idle = {name for name, (kind, _) in measured(await asyncio.to_thread(scrape)).items() if kind == "counter"}
        async with Admin(server.address) as admin:
            await admin.create_topic("measured", partitions=1)
        async with Producer(server.address, acks="durable") as producer:
            await (await producer.send_many("measured", [b"value"] * 100))
        async with Consumer(server.address, ["measured"], start="earliest", stop_at_end=True) as consumer:
            assert sum([len(batch) async for batch in consumer.batches()]) == 100
        async with Consumer(
            server.address, ["measured"], group="readers", start="earliest", stop_at_end=True
        ) as consumer:
            assert sum([len(batch) async for batch in consumer.batches()]) == 100
            await consumer.commit()
        async with Producer(server.address, acks="durable") as producer:
            await (await producer.send_many("measured", [b"value"] * 50))
        lag = re.compile(r'streamhouse_query_group_lag_records\{group="readers",.*topic="measured"\} 50\.0')
        async with asyncio.timeout(30):
            while not lag.search(await asyncio.to_thread(scrape)):
                await asyncio.sleep(0.1)
        scraped = await asyncio.to_thread(scrape)
        found = measured(scraped)
    finally:
        code = await server.stop()
    assert code == 0, server.log_tail()
    page, named = documented(), labels(scraped)
    for name, (_, what) in found.items():
        if by := re.search(r", by (\w+)$", what):
            assert named[name] >= {by[1]}, f"the label of {name} has the name that its description says"
    counters = {name for name, (kind, _) in page.items() if kind == "counter"}
    assert idle == counters, "every counter is there at 0 before anything happened"
    assert {name: page.get(name) for name in found} == found
    assert page.keys() - found.keys() <= RARE
