"""SQL workers over a whole cluster in memory, and their deaths."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from shcluster.agent_checks import AgentChecks
from shcluster.peers import Peers
from shcluster.session import SessionKeeper
from shformat import decode_batch
from shproto.v1 import coordinator_pb2 as pb
from shread.engine import build_engine
from shruntime.clock import SystemClock
from shruntime.server import RpcServer
from shruntime.tasks import cancel_and_wait
from streamhouse import Producer
from streamhouse_coordinator.core import tables as t
from streamhouse_sql.jobs.run import JobParts, PlannedJob
from streamhouse_sql.jobs.wiring import build_worker
from streamhouse_sql.pg_listener import open_listener
from streamhouse_sql.settings import SqlSettings
from streamhouse_sql.wiring import build

from services.sql.tests.crash_points import CrashPoint
from services.sql.tests.start_sql import Sql
from tests.platform.cluster import Cluster
from tests.platform.coordinator_peer import CoordinatorPeer

SETTINGS: dict[str, Any] = {
    "sql_gather_ms": 1,
    "sql_gather_rows_max": 40,
    "sql_checkpoint_interval_ms": 30,
    "sql_job_tick_ms": 10,
    "sql_job_memory_bytes_max": 1 << 26,
    "sql_idle_after_ms": 100,
}


class Worker:
    """A worker with its session. `kill` ends it as a crash does: nothing is stored or given back."""

    def __init__(self, world: JobWorld, name: str, settings: SqlSettings, store: Any, point: CrashPoint | None) -> None:
        self.coordinator = CoordinatorPeer(world.cluster.service.api)
        self.peers = Peers(world.cluster.address, 5_000)
        clock = SystemClock()
        self._session = SessionKeeper(
            self.coordinator, clock, AgentChecks(world.cluster.ingest_at), role="sql", agent_id=name
        )
        self._session.start("127.0.0.1:2")
        coordinator: Any = self.coordinator
        if point is not None:
            coordinator = point.of(
                coordinator, "coordinator", "claim_sql_jobs", "append_sql_journal", "store_sql_checkpoint"
            )
            store = point.of(store, "store", "put", "get", "delete")
        self.jobs = build_worker(
            settings, coordinator, world.cluster.query.engine.reads, store, self.peers, lambda: self._session.token
        )
        if point is not None:
            self.jobs.parts = _with_points(self.jobs.parts, point)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._session.open()
        self._tasks = [asyncio.create_task(self._session.run()), asyncio.create_task(self.jobs.run())]

    async def kill(self) -> None:
        """Ends the worker in the middle of what it does; its session ends, as time does."""
        await self.silence()
        await self.lose_session()

    async def silence(self) -> None:
        """Ends the worker; its leases stay."""
        await cancel_and_wait(*self._tasks)
        await self.peers.close()

    async def lose_session(self) -> None:
        """Ends the session at the coordinator; the worker may go on, as one does that has not heard of it."""
        world = self.coordinator.api
        await world.close_session(pb.CloseSessionRequest(session_token=self._session.token))

    async def stop(self) -> None:
        """Ends the worker as a service that is stopped does."""
        await self.jobs.stop()
        await cancel_and_wait(*self._tasks)
        await self._session.close()
        await self.peers.close()

    def check(self) -> None:
        """Raises the error of a part that died."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()


class JobWorld:
    """A cluster with workers."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self._directory = directory
        self.workers: list[Worker] = []
        self.coordinators: dict[str, CoordinatorPeer] = {}

    async def start_worker(self, store: Any = None, point: CrashPoint | None = None, **settings: Any) -> Worker:
        values = SETTINGS | {"cache_dir": self._directory / "cache", "sql_temp_dir": self._directory / "spill"}
        worker = Worker(
            self,
            f"worker-{len(self.workers)}",
            SqlSettings(**(values | settings)),
            store or self.cluster.objects,
            point,
        )
        self.workers.append(worker)
        await worker.start()
        return worker

    @asynccontextmanager
    async def sql(self, name: str = "sql", **settings: Any) -> AsyncIterator[Sql]:
        """Runs a whole SQL service, which others find. It reaches the coordinator by `coordinators[name]`."""
        values = SETTINGS | {
            "cache_dir": self._directory / name,
            "sql_temp_dir": self._directory / "spill",
            "sql_memory_bytes_max": 1 << 28,
            "sql_pg_listen": "127.0.0.1:0",
        }
        chosen = SqlSettings(**(values | settings))
        peer = self.coordinators[name] = CoordinatorPeer(self.cluster.service.api)
        engine = build_engine(
            chosen, peer, self.cluster.objects, self.cluster.ingest_at, SystemClock(), role="sql", agent_id=name
        )
        peers = Peers(self.cluster.address, 5_000)
        parts = build(chosen, peer, engine, self.cluster.objects, peers, {}, lambda: open_listener(chosen))
        server = RpcServer("127.0.0.1:0", parts.apis)
        await server.start()
        await parts.start(server.address)
        try:
            yield Sql(parts, engine)
        finally:
            await parts.stop()
            await server.stop(0)
            await peers.close()

    async def create(self, statement: str, topic: str, name: str = "job", kind: str = "insert", **more: Any) -> Any:
        """Creates a job; returns its row."""
        request = pb.CreateSqlJobRequest(job=name, kind=kind, statement=statement, output_topic=topic, **more)
        return await self.cluster.service.api.create_sql_job(request)

    async def job(self, name: str = "job") -> pb.SqlJobInfo:
        jobs = (await self.cluster.service.api.list_sql_jobs(pb.ListSqlJobsRequest())).jobs
        return next(job for job in jobs if job.job == name)

    async def produce(self, topic: str, values: Sequence[Any], keys: Sequence[str] | None = None) -> None:
        async with Producer(self.cluster.address) as producer:
            for at, value in enumerate(values):
                await producer.send(
                    topic, json.dumps(value).encode(), key=keys[at].encode() if keys is not None else None
                )

    async def records(self, topic: str) -> list[list[dict[str, Any]]]:
        """Returns the records of a topic, by partition: value, key, op."""
        found = []
        for partition in range(self.cluster.partitions(topic)):
            rows: list[dict[str, Any]] = []
            for batch in await self.cluster.batches(topic, partition):
                records = decode_batch(batch)
                headers = records.headers.to_list() if records.headers is not None else [[]] * len(records)
                for value, key, header in zip(records.values.to_list(), records.keys.to_list(), headers, strict=True):
                    rows.append(
                        {
                            "value": json.loads(value) if value is not None else None,
                            "key": key,
                            "op": dict(header).get("op"),
                        }
                    )
            found.append(rows)
        return found

    async def values(self, topic: str) -> list[Any]:
        """Returns the values of all partitions of a topic."""
        return [row["value"] for rows in await self.records(topic) for row in rows]

    async def until(self, condition: Callable[[], Any], timeout_s: float = 60) -> None:
        """Waits until the condition, which may be a coroutine function, holds."""
        async with asyncio.timeout(timeout_s):
            while True:
                found = condition()
                if asyncio.iscoroutine(found):
                    found = await found
                if found:
                    return
                for worker in self.workers:
                    worker.check()
                await asyncio.sleep(0.005)

    async def until_values(self, topic: str, count: int) -> list[Any]:
        """Returns the values of a topic once it has as many."""

        async def enough() -> bool:
            job = await self.job()
            assert job.state == "running", job.reason
            return len(await self.values(topic)) >= count

        await self.until(enough)
        return await self.values(topic)

    async def stop(self) -> None:
        for worker in self.workers:
            await worker.silence()


def _with_points(parts: JobParts, point: CrashPoint) -> JobParts:
    def plan_of(job: pb.SqlJobInfo, topics: Mapping[str, int]) -> PlannedJob:
        planned = parts.plan_of(job, topics)
        return replace(planned, new_pipeline=lambda: point.of_pipeline(planned.new_pipeline()))

    return replace(
        parts,
        plan_of=plan_of,
        new_writer=lambda job, partition: point.of(parts.new_writer(job, partition), "writer", "fence", "write"),
    )


@asynccontextmanager
async def job_world(directory: Path) -> AsyncIterator[JobWorld]:
    """Runs a cluster, and ends its workers with it."""
    async with Cluster(directory) as cluster:
        world = JobWorld(cluster, directory)
        try:
            yield world
        finally:
            await world.stop()


def by_number(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the column n of rows, in order."""
    return [row["n"] for row in rows]


__all__ = ["JobWorld", "Worker", "by_number", "job_world", "t"]
