"""What a cluster with 10,000 partitions costs while nothing is written: `python -m bench.idle`.

One coordinator, three agents, a query service and a segmenter as processes over an embedded PostgreSQL and a local
directory, default settings. Measured: how long it takes until all partitions have leaders; over some idle time the CPU
of each process (from /proc, so a busy machine distorts it little) and the statements PostgreSQL gets (its own log, by
kind); the same with an agent more, which shows what one costs; how long it takes until others lead what an agent led
that is killed.
"""

import argparse
import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
from shproto.rpc import Connection
from shproto.services import IngestClient
from shproto.v1 import ingest_pb2
from shruntime.signals import restore_sigint
from streamhouse import Admin
from streamhouse_embedded.postgres import EmbeddedPostgres

from bench.clusters import cluster_running, until
from bench.common import Usage, console, load_average, print_table, run, usage, write_json
from tests.integration.cluster import Cluster

AGENTS = 3
# One line per statement; those of a prepared one come as "execute <name>: ...".
STATEMENT = re.compile(r" LOG:  (?:statement|execute [^:]+): ([^\n]*)")
QUIET_S = 15.0
"""After a change, before idleness is measured: everybody has taken in what changed."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Of one stretch of time: per process the part of a core in percent, per kind of statement how many per second."""

    cpu_percent: dict[str, float]
    statements_per_s: dict[str, float]
    load: float

    @property
    def statements(self) -> float:
        return sum(self.statements_per_s.values())


class Bench:
    def __init__(self, cluster: Cluster, postgres: EmbeddedPostgres, dsn: str, options: argparse.Namespace) -> None:
        self._cluster = cluster
        self._postgres = postgres
        self._dsn = dsn
        self._options = options
        self.partitions = options.topics * options.partitions

    # ---- what the cluster looks like

    def usages(self) -> dict[str, Usage]:
        """Of the services that run, by name."""
        return {name: usage(process.pid) for name, process in self._cluster.services.items() if process.is_running()}

    async def led(self, agent: str) -> int:
        """Partitions that the agent itself says it leads: it accepts batches for them."""
        connection = Connection([self._cluster.addresses[agent]])
        try:
            described = await IngestClient(connection).describe_agent(ingest_pb2.DescribeAgentRequest())
        finally:
            await connection.close()
        return len(described.partitions)

    async def all_led_s(self, since_s: float, agents: list[str]) -> float:
        """Seconds until these agents lead everything, evenly."""

        async def look() -> list[int]:
            return [await self.led(agent) for agent in agents]

        def even(counts: list[int]) -> bool:
            return sum(counts) == self.partitions and max(counts) - min(counts) <= 1

        await until(look, even, f"{agents} lead all partitions", interval_s=0.2)
        return time.monotonic() - since_s

    # ---- steps

    async def create_topics(self) -> float:
        """Seconds until the last topic is created."""
        began_s = time.monotonic()
        async with Admin(self._cluster.bootstrap) as admin:
            for number in range(self._options.topics):
                await admin.create_topic(f"idle-{number}", partitions=self._options.partitions)
        return time.monotonic() - began_s

    async def idle(self) -> Idle:
        """Measures for the time asked."""
        await asyncio.sleep(QUIET_S)
        log_at = self._postgres.log_path.stat().st_size
        await self._log_statements("all")
        before, began_s = self.usages(), time.monotonic()
        await asyncio.sleep(self._options.seconds)
        after, seconds = self.usages(), time.monotonic() - began_s
        await self._log_statements("none")
        text = self._postgres.log_path.read_bytes()[log_at:].decode(errors="replace")
        kinds = Counter(kind_of(found) for found in STATEMENT.findall(text) if "pg_reload_conf" not in found)
        cpu = {name: 100 * (after[name].cpu_s - before[name].cpu_s) / seconds for name in before}
        return Idle(cpu, {kind: count / seconds for kind, count in kinds.items()}, load_average())

    async def _log_statements(self, which: str) -> None:
        connection = await asyncpg.connect(self._dsn)
        try:
            await connection.execute(f"ALTER SYSTEM SET log_statement = '{which}'")
            await connection.execute("SELECT pg_reload_conf()")
        finally:
            await connection.close()
        await asyncio.sleep(1)  # every session takes it in before its next statement

    async def take_over_s(self, victim: str, others: list[str]) -> float:
        """Seconds from kill -9 until the others lead everything."""
        self._cluster.services[victim].kill()
        return await self.all_led_s(time.monotonic(), others)

    async def start_s(self, agent: str, agents: list[str]) -> float:
        """Seconds from the start of its process until it leads its share."""
        began_s = time.monotonic()
        self._cluster.services[agent].start()
        await self._cluster.services[agent].wait_serving(self._cluster.addresses[agent])
        return await self.all_led_s(began_s, agents)


def kind_of(statement: str) -> str:
    """Without its values and what follows the table's name."""
    text = " ".join(statement.split())
    found = re.match(
        r"(?:with .*?)?(select|insert into|update|delete from)\b.*?(?:from |into |update )?(\w+)", text, re.I
    )
    table = re.search(r"\b(?:from|into|update|FROM|INTO|UPDATE) +(\w+)", text)
    if found is None or table is None:
        return text[:50]
    return f"{found[1].upper()} {table[1]}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topics", type=int, default=100, help="how many (%(default)s)")
    parser.add_argument("--partitions", type=int, default=100, help="of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of idleness that are measured (%(default)s)")
    parser.add_argument("--coordinators", type=int, default=1, help="how many run (%(default)s)")
    parser.add_argument("--no-takeover", dest="takeover", action="store_false", help="leave out kill -9 of an agent")
    parser.add_argument("--dir", type=Path, help="where the data goes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if min(options.topics, options.partitions, options.seconds, options.coordinators) <= 0:
        parser.error("all numbers must be positive")
    return options


async def measure(options: argparse.Namespace) -> None:
    # The last agent is started for the second measurement only.
    agents = [f"ingest-{number + 1}" for number in range(AGENTS + 1)]
    replicas = {"coordinator": options.coordinators, "ingest": AGENTS + 1, "query": 1, "segmenter": 1}
    async with cluster_running(replicas, {}, options.dir) as (cluster, postgres, dsn):
        assert await cluster.services[agents[-1]].stop() == 0
        bench = Bench(cluster, postgres, dsn, options)
        figures = await steps(bench, agents, options)
    report(figures, bench.partitions)
    write_json(options.json, vars(options), figures)


async def steps(bench: Bench, agents: list[str], options: argparse.Namespace) -> dict[str, Any]:
    first, added = agents[:AGENTS], agents[AGENTS]
    created_s = await bench.create_topics()
    figures: dict[str, Any] = {"topics_created_s": created_s}
    figures["all_led_s"] = created_s + await bench.all_led_s(time.monotonic(), first)
    console.print(
        f"created in {created_s:.1f} s, all led after {figures['all_led_s']:.1f} s, load {load_average():.1f}"
    )
    three = await bench.idle()
    figures["memory_mib"] = {name: found.private_mib for name, found in bench.usages().items()}
    figures["fourth_agent_s"] = await bench.start_s(added, agents)
    console.print(f"a fourth agent leads its share after {figures['fourth_agent_s']:.1f} s")
    four = await bench.idle()
    figures |= {"idle": shown(three), "idle_with_one_more": shown(four)}
    figures["statements_of_one_agent"] = four.statements - three.statements
    if options.takeover:
        figures["takeover_s"] = await bench.take_over_s(added, first)
        console.print(f"others lead what it led {figures['takeover_s']:.1f} s after kill -9")
    return figures


def shown(idle: Idle) -> dict[str, Any]:
    return {
        "cpu_percent": idle.cpu_percent,
        "statements_per_s": dict(sorted(idle.statements_per_s.items(), key=lambda item: -item[1])),
        "load": idle.load,
    }


def report(figures: dict[str, Any], partitions: int) -> None:
    idle = figures["idle"]
    rows = [
        (name, f"{percent:.1f} %", f"{figures['memory_mib'][name]:.0f} MiB")
        for name, percent in idle["cpu_percent"].items()
    ]
    print_table(f"{partitions:,} partitions, idle; goal: coordinator < 5 %", ("", "of a core", "memory"), rows)
    total = sum(idle["statements_per_s"].values())
    kinds = [(kind, f"{rate:.2f}") for kind, rate in idle["statements_per_s"].items()]
    kinds += [
        ("all", f"{total:.2f}"),
        ("all, per agent of three", f"{total / AGENTS:.2f}"),
        ("one agent more", f"{figures['statements_of_one_agent']:.2f}"),
    ]
    print_table("statements to PostgreSQL; goal < 5/s per agent", ("", "per second"), kinds)


def main() -> int:
    options = parse_options()
    return run(lambda: measure(options))


if __name__ == "__main__":
    restore_sigint()
    raise SystemExit(main())
