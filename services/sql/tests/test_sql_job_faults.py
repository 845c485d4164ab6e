"""Workers among faults: lost answers, services that are away, and workers that do not know that they are replaced."""

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from shproto.errors import Unavailable
from shproto.v1 import coordinator_pb2 as pb
from shstore import FaultKind, FaultyStore, RandomFaults
from streamhouse import Producer
from streamhouse_sql.jobs.micro_batch import Checkpoint

from services.sql.tests.crash_points import AFTER, BEFORE, CrashPoint
from services.sql.tests.job_world import JobWorld, by_number, job_world
from services.sql.tests.test_sql_job_crashes import RECORDS, begin, check

pytestmark = pytest.mark.long

MORE = 60
RATES = {FaultKind.UNAVAILABLE: 0.3, FaultKind.TIMEOUT_DONE: 0.2, FaultKind.TRUNCATED_BODY: 0.2}


async def produce_more(world: JobWorld) -> None:
    await world.produce("source", [{"n": n} for n in range(RECORDS, RECORDS + MORE)], ["k1"] * MORE)


@pytest.mark.smoke
async def test_a_zombie_that_goes_on_changes_nothing(tmp_path: Path) -> None:
    """Its session is over and its job taken over, and it hears of neither: no tick of its own comes through."""
    async with job_world(tmp_path) as world:
        await begin(world)
        zombie = await world.start_worker()
        await world.until_values("out", 40)
        held = zombie.coordinator.hold("claim_sql_jobs")
        await world.until(lambda: held.requests)
        await zombie.lose_session()
        other = await world.start_worker()
        await world.until(lambda: other.jobs.runs)
        await produce_more(world)
        await check(world, RECORDS + MORE)
        held.release()


@pytest.mark.long
@pytest.mark.parametrize("operation", ["writer.write", "coordinator.append_sql_journal", "store.put"])
async def test_a_zombie_that_wakes_up_late_changes_nothing(tmp_path: Path, operation: str) -> None:
    """It stands still within a call, as a process does that is stopped, and goes on after another has its job."""
    async with job_world(tmp_path) as world:
        await begin(world)
        point = CrashPoint(operation, AFTER, 2)
        await world.start_worker(point=point)
        await world.until(point.reached.is_set)
        zombie = world.workers[0]
        await zombie.lose_session()
        other = await world.start_worker()
        await world.until(lambda: other.jobs.runs)
        point.wake()
        await produce_more(world)
        await check(world, RECORDS + MORE)
        await world.until(lambda: not zombie.jobs.runs)


@pytest.mark.parametrize(
    "method",
    [
        "append_sql_journal",
        pytest.param("store_sql_checkpoint", marks=pytest.mark.long),
        pytest.param("claim_sql_jobs", marks=pytest.mark.long),
    ],
)
async def test_answers_of_the_coordinator_are_lost(tmp_path: Path, method: str) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        worker = await world.start_worker()
        worker.coordinator.lose_answers(method, 3)
        await world.until_values("out", 60)
        worker.coordinator.lose_answers(method, 3)
        await produce_more(world)
        await check(world, RECORDS + MORE)


@pytest.mark.long
async def test_answers_of_the_leader_are_lost(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        await world.start_worker()
        for after in (1, 2, 3):
            world.cluster.faults.cut("produce", after)
            await world.until_values("out", after * 40)
        world.cluster.faults.fail("fence_producer", Unavailable("away"), 3)
        world.cluster.faults.cut("produce", 0, request_arrives=False)
        await produce_more(world)
        await check(world, RECORDS + MORE)


@pytest.mark.smoke
async def test_the_coordinator_is_away_for_a_while(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        worker = await world.start_worker()
        await world.until_values("out", 40)
        worker.coordinator.down = True
        before = (await world.job()).journal_number
        await produce_more(world)
        await world.until(lambda: worker.coordinator.refused["append_sql_journal"] > 2)
        assert (await world.job()).journal_number == before, "nothing runs that is not journalled"
        worker.coordinator.down = False
        await check(world, RECORDS + MORE)


@pytest.mark.long
async def test_the_store_is_away_while_the_job_goes_on(tmp_path: Path) -> None:
    """Checkpoints wait; the journal has the micro-batches until then."""
    async with job_world(tmp_path) as world:
        await begin(world)
        store = FaultyStore(world.cluster.objects, RandomFaults(random.Random(7), RATES))
        # A worker that is stopped stores its state, however often the store refuses.
        await world.start_worker(store=store, sql_job_stop_ms=600_000)
        await produce_more(world)
        await check(world, RECORDS + MORE)


@pytest.mark.long
async def test_the_leader_of_the_output_changes(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        await world.start_worker()
        await world.until_values("out", 40)
        await world.cluster.change_leader("out")
        await produce_more(world)
        await check(world, RECORDS + MORE)


@pytest.mark.long
async def test_a_job_moves_to_a_worker_that_comes(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        await world.cluster.create_topic("out2", 1)
        await world.create("INSERT INTO out2 SELECT CAST(_value ->> '$.n' AS BIGINT) AS n FROM source", "out2", "two")
        first = await world.start_worker()
        await world.until(lambda: len(first.jobs.runs) == 2)
        second = await world.start_worker()
        await world.until(lambda: len(second.jobs.runs) == 1 and len(first.jobs.runs) == 1)
        await produce_more(world)
        for topic in ("out", "out2"):
            values = await world.until_values(topic, RECORDS + MORE)
            assert sorted(by_number(values)) == list(range(RECORDS + MORE)), topic
        jobs = (await world.cluster.service.api.list_sql_jobs(pb.ListSqlJobsRequest())).jobs
        assert {job.worker_id for job in jobs} == {"worker-0", "worker-1"}


async def test_a_job_that_fails_at_the_same_micro_batch_is_stopped_with_its_place(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        worker = await world.start_worker()
        await world.until_values("out", RECORDS)
        await world.produce("source", [{"n": "no number"}], ["k1"])

        async def has_failed() -> bool:
            return (await world.job()).state == "failed"

        await world.until(has_failed)
        job = await world.job()
        assert "micro-batch" in job.reason and "source/" in job.reason and "no number" in job.reason, job.reason
        assert job.epoch == 3, "three attempts"
        assert len(await world.values("out")) == RECORDS
        assert not worker.jobs.runs
        # It is resumed, and fails again: the record is still there. Others are not harmed.
        await world.cluster.service.api.alter_sql_job(pb.AlterSqlJobRequest(job="job", state="running"))
        await world.until(has_failed)


@pytest.mark.smoke
async def test_a_damaged_state_object_stops_the_job(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        worker = await world.start_worker()
        await world.until_values("out", RECORDS)
        await worker.stop()
        world.workers.clear()
        keys = [info.key async for info in world.cluster.objects.list("sql/")]
        assert keys, "a checkpoint has objects"
        data = bytearray(await world.cluster.objects.get(keys[0]))
        data[len(data) // 2] ^= 1
        await world.cluster.objects.put(keys[0], [bytes(data)], if_absent=False)
        await world.start_worker()

        async def has_failed() -> bool:
            return (await world.job()).state == "failed"

        await world.until(has_failed)
        assert keys[0] in (await world.job()).reason


@pytest.mark.long
async def test_objects_of_former_owners_and_dropped_jobs_go(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        worker = await world.start_worker()
        await world.until_values("out", RECORDS)
        job = await world.job()
        await worker.stop()
        world.workers.clear()
        left = f"sql/{job.job_id}/{job.epoch:010d}-{7:019d}/000.parquet"
        await world.cluster.objects.put(left, [b"half a checkpoint"])
        second = await world.start_worker()
        await world.until(lambda: second.jobs.runs)

        async def keys() -> list[str]:
            return [info.key async for info in world.cluster.objects.list("sql/")]

        async def is_swept() -> bool:
            return left not in await keys()

        await world.until(is_swept)
        assert len(await keys()) <= 2, "those of one checkpoint"
        await world.cluster.service.api.drop_sql_job(pb.DropSqlJobRequest(job="job"))

        async def is_empty() -> bool:
            return not await keys()

        await world.until(is_empty)


@pytest.mark.long
async def test_partitions_that_are_added_are_read_and_written(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        worker = await world.start_worker()
        await world.until_values("out", RECORDS)
        for topic in ("source", "out"):
            await world.cluster.service.api.alter_topic(pb.AlterTopicRequest(topic=topic, partitions=5))
            await world.cluster.led(topic)
        await world.produce("source", [{"n": n} for n in range(RECORDS, RECORDS + 100)], [f"x{n}" for n in range(100)])
        values = await world.until_values("out", RECORDS + 100)
        assert sorted(by_number(values)) == list(range(RECORDS + 100))
        await worker.kill()
        world.workers.clear()
        await world.start_worker()
        await world.produce("source", [{"n": n} for n in range(RECORDS + 100, RECORDS + 120)], ["y"] * 20)
        values = await world.until_values("out", RECORDS + 120)
        assert sorted(by_number(values)) == list(range(RECORDS + 120))


class _ListingHangs:
    """A store that lists nothing while it is away."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.back = asyncio.Event()
        self.back.set()
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def list(self, *args: Any, **more: Any) -> AsyncIterator[Any]:
        self.asked += 1
        await self.back.wait()
        async for item in self._store.list(*args, **more):
            yield item


async def test_a_job_is_dropped_while_the_store_is_away_and_others_start(tmp_path: Path) -> None:
    """Its objects are cleared away beside the ticks, which other jobs, moves and views need."""
    async with job_world(tmp_path) as world:
        await begin(world)
        store = _ListingHangs(world.cluster.objects)
        worker = await world.start_worker(store=store)
        await world.until_values("out", RECORDS)
        asked = store.asked
        store.back.clear()
        await world.cluster.service.api.drop_sql_job(pb.DropSqlJobRequest(job="job"))
        await world.until(lambda: store.asked > asked)
        await world.cluster.create_topic("late", 1)
        await world.create("INSERT INTO late SELECT CAST(_value ->> '$.n' AS BIGINT) AS n FROM source", "late", "late")
        await world.until(lambda: "late" in worker.jobs.runs)
        store.back.set()


async def test_two_claims_tell_of_the_same_job_when_a_worker_is_stopped(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        worker = await world.start_worker()
        await world.until_values("out", RECORDS)
        before = worker.coordinator.hold("claim_sql_jobs")
        await world.until(lambda: before.requests)
        worker.jobs.runs["job"].stop()
        await world.until(lambda: not worker.jobs.runs)
        held = worker.coordinator.hold("claim_sql_jobs")
        before.release()
        await world.until(lambda: held.requests)
        stopping = asyncio.create_task(worker.stop())
        await world.until(lambda: len(held.requests) == 2)
        assert all(request.released for request in held.requests)
        held.release()
        await stopping
        world.workers.clear()
        await world.start_worker()
        await check(world, RECORDS)


async def test_a_job_that_is_granted_to_a_worker_that_leaves_does_not_start(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        api = world.cluster.service.api
        await api.alter_sql_job(pb.AlterSqlJobRequest(job="job", state="paused"))
        worker = await world.start_worker()
        before = worker.coordinator.hold("claim_sql_jobs")
        await world.until(lambda: before.requests)
        await api.alter_sql_job(pb.AlterSqlJobRequest(job="job", state="running"))
        held = worker.coordinator.hold_answers("claim_sql_jobs")
        before.release()
        await world.until(lambda: any(answer.granted for answer in worker.coordinator.answers["claim_sql_jobs"]))
        asked = worker.coordinator.calls["claim_sql_jobs"]
        stopping = asyncio.create_task(worker.jobs.stop())
        await world.until(lambda: worker.coordinator.calls["claim_sql_jobs"] == asked + 1)
        held.release()
        await stopping
        await world.until(lambda: not worker.coordinator.answers["claim_sql_jobs"][-1].granted)
        assert not worker.jobs.runs
        await worker.stop()
        world.workers.clear()
        await world.start_worker()
        await check(world, RECORDS)


async def test_partitions_that_come_while_a_job_begins_are_none_of_its_first(tmp_path: Path) -> None:
    """The next owner makes the program for the partitions that the checkpoint names, and must get the same one."""
    async with job_world(tmp_path) as world:
        await begin(world)
        point = CrashPoint("writer.fence", BEFORE, 1)
        worker = await world.start_worker(point=point)
        await world.until(point.reached.is_set)
        api = world.cluster.service.api
        await api.alter_topic(pb.AlterTopicRequest(topic="source", partitions=3))
        index = worker.jobs.parts.reads.index
        await world.until(lambda: index.topics()["source"].partitions == 3)
        point.wake()
        await check(world, RECORDS)
        asked = pb.OpenSessionRequest(
            role="sql", agent_id="next", address="127.0.0.1:2", session_token=str(uuid.uuid4())
        )
        token = (await api.open_session(asked)).session_token
        (grant,) = (await api.claim_sql_jobs(pb.ClaimSqlJobsRequest(session_token=token))).granted
        assert Checkpoint.decode(grant.checkpoint).inputs["source"].first_partitions == 2
        await api.close_session(pb.CloseSessionRequest(session_token=token))
        world.workers.clear()
        await world.start_worker()
        await produce_more(world)
        await check(world, RECORDS + MORE)


async def test_records_of_a_later_partition_that_retention_took_are_reported(tmp_path: Path) -> None:
    """It came while no worker ran: the next owner reads it from its first record, not from the log start of now."""
    async with job_world(tmp_path) as world:
        await begin(world)
        await world.start_worker()
        await check(world, RECORDS)
        world.workers.clear()
        await world.cluster.service.api.alter_topic(pb.AlterTopicRequest(topic="source", partitions=3))
        await world.until(lambda: world.cluster.partitions("source") == 3)
        await world.cluster.led("source")
        async with Producer(world.cluster.address, acks="durable") as producer:
            for n in range(10):
                await producer.send_and_wait("source", json.dumps({"n": n}).encode(), partition=2)
        await world.cluster.delete_records("source", 2, 5)
        index = world.cluster.query.engine.reads.index
        await world.until(lambda: index.find("source", 2).log_start_offset == 5)
        await world.start_worker()

        async def has_failed() -> bool:
            return (await world.job()).state == "failed"

        await world.until(has_failed)
        assert "source/2" in (await world.job()).reason
