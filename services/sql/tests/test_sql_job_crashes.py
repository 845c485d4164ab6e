"""A worker dies at each point of its work; the next one goes on, and the output is there once.

Quotes docs/sql-guarantees.md: the output topic holds exactly the rows that running the journalled micro-batches once,
in order, gives, whatever dies when.
"""

import uuid
from pathlib import Path

import pytest
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_sql.jobs.takeover import CRASHES_MAX

from services.sql.tests.crash_points import AFTER, BEFORE, CrashPoint
from services.sql.tests.job_world import JobWorld, by_number, job_world

COPY = "INSERT INTO out SELECT CAST(_value ->> '$.n' AS BIGINT) AS n, _key FROM source"
RECORDS = 300
POINTS = [
    ("coordinator.claim_sql_jobs", AFTER, 1),
    ("writer.fence", BEFORE, 1),
    ("writer.fence", AFTER, 2),
    ("coordinator.store_sql_checkpoint", BEFORE, 1),
    ("coordinator.store_sql_checkpoint", AFTER, 1),
    ("coordinator.append_sql_journal", BEFORE, 1),
    ("coordinator.append_sql_journal", AFTER, 1),
    ("coordinator.append_sql_journal", BEFORE, 3),
    ("coordinator.append_sql_journal", AFTER, 4),
    ("pipeline.step", BEFORE, 1),
    ("pipeline.step", AFTER, 1),
    ("pipeline.step", BEFORE, 3),
    ("pipeline.step", AFTER, 4),
    ("writer.write", BEFORE, 1),
    ("writer.write", AFTER, 1),
    ("writer.write", AFTER, 3),
    ("pipeline.state", BEFORE, 1),
    ("pipeline.state", AFTER, 1),
    ("store.put", BEFORE, 1),
    ("store.put", AFTER, 1),
    ("store.put", AFTER, 2),
    ("coordinator.store_sql_checkpoint", BEFORE, 2),
    ("coordinator.store_sql_checkpoint", AFTER, 2),
    ("store.delete", BEFORE, 1),
    ("store.delete", AFTER, 1),
]
# Points of a worker that takes a job over.
SECOND_POINTS = [
    ("store.get", BEFORE, 1),
    ("store.get", AFTER, 1),
    ("pipeline.restore", BEFORE, 1),
    ("pipeline.restore", AFTER, 1),
    ("pipeline.step", AFTER, 1),
    ("writer.fence", AFTER, 1),
    ("writer.write", AFTER, 1),
    ("coordinator.append_sql_journal", AFTER, 1),
]
QUICK = {("pipeline.step", AFTER, 4), ("store.put", AFTER, 1), ("coordinator.append_sql_journal", AFTER, 1)}


def marked(points: list[tuple[str, str, int]], quick: set[tuple[str, str, int]] = QUICK) -> list[object]:
    return [
        pytest.param(*point, marks=() if point in quick else pytest.mark.long, id="-".join(map(str, point)))
        for point in points
    ]


async def begin(world: JobWorld) -> None:
    await world.cluster.create_topic("source", 2)
    await world.cluster.create_topic("out", 2)
    await world.produce("source", [{"n": n} for n in range(RECORDS)], [f"k{n % 7}" for n in range(RECORDS)])
    await world.create(COPY, "out")


async def check(world: JobWorld, records: int) -> None:
    """Every record is there once, those of a key in their order."""
    values = await world.until_values("out", records)
    assert sorted(by_number(values)) == list(range(records))
    for rows in await world.records("out"):
        for key in {row["key"] for row in rows}:
            of_key = [row["value"]["n"] for row in rows if row["key"] == key]
            assert of_key == sorted(of_key), key
    # What was written is explained: a worker that takes over finds neither more nor less.
    for worker in world.workers[-1:]:
        await worker.stop()
    job = await world.job()
    assert (job.state, job.worker_id) == ("running", "")
    assert job.journal_number == job.checkpoint_number, "a worker that is stopped leaves nothing to repeat"


async def die_at(world: JobWorld, operation: str, when: str, nth: int) -> None:
    point = CrashPoint(operation, when, nth)
    worker = await world.start_worker(point=point)
    await world.until(point.reached.is_set)
    await worker.kill()
    world.workers.remove(worker)


@pytest.mark.parametrize(("operation", "when", "nth"), marked(POINTS))
async def test_a_worker_dies_anywhere_and_the_next_one_goes_on(
    tmp_path: Path, operation: str, when: str, nth: int
) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        await die_at(world, operation, when, nth)
        await world.start_worker()
        await world.produce("source", [{"n": n} for n in range(RECORDS, RECORDS + 10)], ["k0"] * 10)
        await check(world, RECORDS + 10)


@pytest.mark.parametrize(
    ("operation", "when", "nth"), marked(SECOND_POINTS, {("pipeline.restore", AFTER, 1), ("writer.write", AFTER, 1)})
)
async def test_a_worker_that_takes_over_dies_too(tmp_path: Path, operation: str, when: str, nth: int) -> None:
    async with job_world(tmp_path) as world:
        await begin(world)
        await die_at(world, "coordinator.store_sql_checkpoint", AFTER, 3)
        await world.produce("source", [{"n": n} for n in range(RECORDS, RECORDS + 90)], ["k0"] * 90)
        await die_at(world, operation, when, nth)
        await world.start_worker()
        await check(world, RECORDS + 90)


@pytest.mark.long
async def test_a_job_that_was_given_up_after_crashes_is_tried_again_once_it_is_resumed(tmp_path: Path) -> None:
    """Its state and place stay: RESUME goes on with them, however many workers have died."""
    async with job_world(tmp_path) as world:
        await begin(world)
        await die_at(world, "coordinator.append_sql_journal", AFTER, 1)
        api = world.cluster.service.api
        asked = pb.OpenSessionRequest(
            role="sql", agent_id="dies", address="127.0.0.1:2", session_token=str(uuid.uuid4())
        )
        token = (await api.open_session(asked)).session_token
        for _ in range(CRASHES_MAX):
            # Granted, and not held in the next call: as of a process that starts anew again and again.
            assert (await api.claim_sql_jobs(pb.ClaimSqlJobsRequest(session_token=token))).granted
        await api.close_session(pb.CloseSessionRequest(session_token=token))
        await world.start_worker()

        async def has_failed() -> bool:
            return (await world.job()).state == "failed"

        await world.until(has_failed)
        assert "memory is short" in (await world.job()).reason
        await api.alter_sql_job(pb.AlterSqlJobRequest(job="job", state="running"))
        await check(world, RECORDS)
