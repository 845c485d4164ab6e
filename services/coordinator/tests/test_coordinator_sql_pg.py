"""Tables and continuous queries of SQL, against a real PostgreSQL."""

import json
from dataclasses import replace
from typing import Any

import pytest
from shcluster.snapshot import SnapshotBuilder
from shproto.errors import (
    Fenced,
    InvalidArgument,
    JobExists,
    Overloaded,
    StreamHouseError,
    TableExists,
    UnknownJob,
    UnknownTable,
    UnknownTopic,
)
from shproto.events import event_from_json
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.api import CoordinatorApi
from streamhouse_coordinator.core import sql_jobs
from streamhouse_coordinator.core.tables import SqlJobLeaseRow, SqlJobRow
from streamhouse_coordinator.service import sql_jobs as service_sql_jobs
from streamhouse_coordinator.wiring import CoordinatorService

pytestmark = pytest.mark.long

TEXT = "CREATE TABLE flights (carrier TEXT) WITH (topic='flights')"


@pytest.fixture
async def api(coordinator: CoordinatorService) -> CoordinatorApi:
    return coordinator.api


async def check_projections(api: CoordinatorApi) -> None:
    parts = [part async for part in api.check_projections(pb.CheckProjectionsRequest())]
    assert not parts[-1].differences


async def create_table(api: CoordinatorApi, table: str = "flights", definition: str = TEXT) -> pb.SqlTableInfo:
    return await api.create_sql_table(pb.CreateSqlTableRequest(table=table, definition=definition))


@pytest.mark.smoke
async def test_a_table_is_declared_followed_and_dropped(api: CoordinatorApi, all_events: Any) -> None:
    made = await create_table(api)
    assert (made.table, made.definition) == ("flights", TEXT)
    with pytest.raises(TableExists) as exists:
        await create_table(api)
    assert exists.value.details == {"table": "flights"}
    builder = SnapshotBuilder()
    async for part in api.get_snapshot(pb.GetSnapshotRequest()):
        builder.add(part)
    assert builder.cluster.sql_tables["flights"].definition == TEXT
    (event,) = await all_events(api, "SqlTableCreated")
    assert json.loads(event.payload_json)["definition"] == TEXT
    dropped = await api.drop_sql_table(pb.DropSqlTableRequest(table="flights"))
    assert dropped.table_id == made.table_id
    with pytest.raises(UnknownTable):
        await api.drop_sql_table(pb.DropSqlTableRequest(table="flights"))
    for event in await all_events(api, "SqlTableDropped"):
        builder.cluster.position = event.position - 1
        builder.cluster.apply(event.position, event_from_json(event.type, event.payload_json))
    assert builder.cluster.sql_tables == {}
    await check_projections(api)


@pytest.mark.parametrize("table", ["", "Flights", "1a", "a b", "a" * 129, "a-b"])
async def test_a_table_with_an_illegal_name_is_refused(api: CoordinatorApi, table: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await create_table(api, table)
    assert refused.value.details["field"] == "table"


async def test_a_definition_has_a_limit(api: CoordinatorApi) -> None:
    with pytest.raises(InvalidArgument, match="definition"):
        await create_table(api, definition="x" * (256 * 1024 + 1))


# ---- jobs


async def create_job(api: CoordinatorApi, job: str = "copy", kind: str = "insert") -> pb.SqlJobInfo:
    return await api.create_sql_job(
        pb.CreateSqlJobRequest(
            job=job, kind=kind, statement="INSERT INTO out SELECT 1", output_topic="out", definitions=[TEXT]
        )
    )


class Worker:
    """A SQL worker with its session."""

    def __init__(self, api: CoordinatorApi, name: str, role: str = "sql") -> None:
        self.api = api
        self.name = name
        self.role = role
        self.token = ""
        self.held: dict[str, pb.SqlJobHold] = {}

    async def open(self) -> "Worker":
        request = pb.OpenSessionRequest(agent_id=self.name, role=self.role, address="127.0.0.1:2")
        self.token = (await self.api.open_session(request)).session_token
        return self

    async def claim(self, released: tuple[pb.SqlJobInfo, ...] = ()) -> pb.ClaimSqlJobsResponse:
        for job in released:
            self.held.pop(job.job_id)
        gone = [pb.SqlJobHold(job_id=job.job_id, epoch=job.epoch) for job in released]
        request = pb.ClaimSqlJobsRequest(session_token=self.token, held=self.held.values(), released=gone)
        answer = await self.api.claim_sql_jobs(request)
        for grant in answer.granted:
            self.held[grant.job.job_id] = pb.SqlJobHold(job_id=grant.job.job_id, epoch=grant.job.epoch)
        return answer

    async def append(self, job: pb.SqlJobInfo, number: int, entry: bytes = b"x") -> None:
        answer = await self.append_all([(job, number, entry)])
        for refused in answer.refused:
            raise StreamHouseError.from_detail(refused.error)

    async def append_all(self, entries: list[tuple[pb.SqlJobInfo, int, bytes]]) -> pb.AppendSqlJournalResponse:
        return await self.api.append_sql_journal(
            pb.AppendSqlJournalRequest(
                session_token=self.token,
                entries=[
                    pb.SqlJobEntry(
                        job_id=job.job_id, epoch=job.epoch, entry=pb.SqlJournalEntry(number=number, entry=entry)
                    )
                    for job, number, entry in entries
                ],
            )
        )

    async def store(self, job: pb.SqlJobInfo, number: int, checkpoint: bytes = b"c") -> None:
        await self.api.store_sql_checkpoint(
            pb.StoreSqlCheckpointRequest(
                session_token=self.token, job_id=job.job_id, epoch=job.epoch, number=number, checkpoint=checkpoint
            )
        )

    async def close(self) -> None:
        await self.api.close_session(pb.CloseSessionRequest(session_token=self.token))


@pytest.fixture
async def with_topic(api: CoordinatorApi) -> CoordinatorApi:
    await api.create_topic(pb.CreateTopicRequest(topic="out", partitions=1))
    return api


async def test_a_job_needs_its_topic_and_a_name_of_its_own(api: CoordinatorApi) -> None:
    with pytest.raises(UnknownTopic):
        await create_job(api)
    topic = await api.create_topic(pb.CreateTopicRequest(topic="out", partitions=1))
    first = await create_job(api)
    assert (first.state, first.epoch, first.worker_id, first.kind) == ("running", 0, "", "insert")
    assert (first.output_topic_id, list(first.definitions)) == (topic.topic_id, [TEXT])
    with pytest.raises(JobExists):
        await create_job(api)
    second = await create_job(api, "other")
    assert first.producer_id != second.producer_id
    listed = await api.list_sql_jobs(pb.ListSqlJobsRequest())
    assert [job.job for job in listed.jobs] == ["copy", "other"]
    with pytest.raises(InvalidArgument, match="kind"):
        await create_job(api, "third", kind="table")
    await check_projections(api)


async def test_a_view_and_a_table_do_not_share_a_name(with_topic: CoordinatorApi) -> None:
    await create_table(with_topic, "flights")
    with pytest.raises(TableExists):
        await create_job(with_topic, "flights", kind="view")
    await create_job(with_topic, "delays", kind="view")
    with pytest.raises(TableExists):
        await create_table(with_topic, "delays")


@pytest.mark.smoke
async def test_workers_share_the_jobs_and_take_over_those_of_a_worker_that_left(with_topic: CoordinatorApi) -> None:
    for number in range(4):
        await create_job(with_topic, f"j{number}")
    a, b = await Worker(with_topic, "a").open(), await Worker(with_topic, "b").open()
    of_a, of_b = await a.claim(), await b.claim()
    assert len(of_a.granted) == len(of_b.granted) == 2
    assert not {grant.job.job for grant in of_a.granted} & {grant.job.job for grant in of_b.granted}
    assert not (await a.claim()).granted
    await a.append(of_a.granted[0].job, 1, b"first")
    await a.close()
    taken = (await b.claim()).granted
    assert {grant.job.epoch for grant in taken} == {2}
    assert {grant.job.worker_id for grant in taken} == {"b"} and taken[0].job.worker_address == "127.0.0.1:2"
    assert [list(grant.journal) for grant in taken if grant.job.job_id == of_a.granted[0].job.job_id] == [
        [pb.SqlJournalEntry(number=1, entry=b"first", epoch=1)]
    ]
    assert not (await b.claim()).stop


async def test_a_worker_that_comes_gets_jobs_once_the_others_have_stopped_them(with_topic: CoordinatorApi) -> None:
    for number in range(3):
        await create_job(with_topic, f"j{number}")
    a = await Worker(with_topic, "a").open()
    granted = (await a.claim()).granted
    assert len(granted) == 3
    b = await Worker(with_topic, "b").open()
    assert not (await b.claim()).granted  # three held, two for each at most: one has to move first
    (stop,) = (await a.claim()).stop
    assert stop.why == "moving"
    moving = next(grant.job for grant in granted if grant.job.job_id == stop.job_id)
    await a.append(moving, 1)  # still its holder
    await a.claim(released=(moving,))
    (taken,) = (await b.claim()).granted
    assert (taken.job.job_id, taken.job.epoch, len(taken.journal)) == (moving.job_id, 2, 1)
    with pytest.raises(Fenced):
        await a.append(moving, 2)


async def test_a_grant_whose_answer_was_lost_is_given_again(with_topic: CoordinatorApi) -> None:
    await create_job(with_topic)
    a = await Worker(with_topic, "a").open()
    first = (await a.claim()).granted[0].job
    a.held.clear()  # the answer did not arrive
    again = (await a.claim()).granted[0].job
    assert (first.epoch, again.epoch) == (1, 2)


async def test_only_sql_workers_hold_jobs(with_topic: CoordinatorApi) -> None:
    await create_job(with_topic)
    query = await Worker(with_topic, "q", role="query").open()
    with pytest.raises(InvalidArgument, match="role"):
        await query.claim()
    assert (await (await Worker(with_topic, "a").open()).claim()).granted  # the query service counts for no share


@pytest.mark.smoke
async def test_a_worker_that_was_replaced_changes_nothing(with_topic: CoordinatorApi) -> None:
    await create_job(with_topic)
    a = await Worker(with_topic, "a").open()
    old = (await a.claim()).granted[0].job
    await a.append(old, 1)
    await a.close()
    b = await Worker(with_topic, "b").open()
    new = (await b.claim()).granted[0].job
    for call in (a.append(old, 2), a.store(old, 1), b.append(old, 2)):
        with pytest.raises(Fenced):
            await call
    await b.append(new, 2)
    await b.store(new, 2, b"covers two")
    await b.close()
    c = await Worker(with_topic, "c").open()
    (grant,) = (await c.claim()).granted
    assert (grant.checkpoint, list(grant.journal), grant.job.checkpoint_number) == (b"covers two", [], 2)


@pytest.mark.smoke
async def test_the_journal_has_no_gap_and_a_repeated_call_no_effect(with_topic: CoordinatorApi) -> None:
    await create_job(with_topic)
    a = await Worker(with_topic, "a").open()
    job = (await a.claim()).granted[0].job
    await a.append(job, 1)
    await a.append(job, 1)  # the first answer was lost
    with pytest.raises(InvalidArgument, match="other boundaries"):
        await a.append(job, 1, b"other")
    with pytest.raises(InvalidArgument, match="must be 2"):
        await a.append(job, 3)
    await a.append(job, 2)
    with pytest.raises(InvalidArgument, match="number is 3"):
        await a.store(job, 3)
    await a.store(job, 1)
    with pytest.raises(InvalidArgument, match="must be 3"):
        await a.append(job, 1)
    with pytest.raises(InvalidArgument, match="entry"):
        await a.append(job, 3, bytes(256 * 1024 + 1))
    await a.store(job, 2)
    with pytest.raises(InvalidArgument, match="number is 1"):
        await a.store(job, 1)


async def test_a_refused_entry_leaves_those_of_other_jobs(with_topic: CoordinatorApi) -> None:
    for name in ("one", "two"):
        await create_job(with_topic, name)
    a = await Worker(with_topic, "a").open()
    one, two = sorted((grant.job for grant in (await a.claim()).granted), key=lambda job: job.job)
    answer = await a.append_all([(one, 7, b"x"), (two, 1, b"y")])
    assert [(refused.job_id, refused.error.reason) for refused in answer.refused] == [(one.job_id, "INVALID_ARGUMENT")]
    listed = {job.job: job.journal_number for job in (await with_topic.list_sql_jobs(pb.ListSqlJobsRequest())).jobs}
    assert listed == {"one": 0, "two": 1}
    with pytest.raises(InvalidArgument, match="at most one of a job"):
        await a.append_all([(one, 1, b"x"), (one, 2, b"x")])


@pytest.mark.smoke
async def test_a_job_is_paused_resumed_failed_and_dropped(with_topic: CoordinatorApi, all_events: Any) -> None:
    api = with_topic
    await create_job(api)
    a = await Worker(api, "a").open()
    job = (await a.claim()).granted[0].job
    paused = await api.alter_sql_job(pb.AlterSqlJobRequest(job="copy", state="paused"))
    assert (paused.state, paused.worker_id) == ("paused", "")
    assert [stop.why for stop in (await a.claim()).stop] == ["paused"]
    with pytest.raises(Fenced):
        await a.append(job, 1)
    a.held.clear()
    await api.alter_sql_job(pb.AlterSqlJobRequest(job="copy", state="running"))
    job = (await a.claim()).granted[0].job
    assert job.epoch == 2
    await api.fail_sql_job(
        pb.FailSqlJobRequest(session_token=a.token, job_id=job.job_id, epoch=job.epoch, reason="value at offset 7")
    )
    (listed,) = (await api.list_sql_jobs(pb.ListSqlJobsRequest())).jobs
    assert (listed.state, listed.reason, listed.worker_id) == ("failed", "value at offset 7", "")
    claimed = await a.claim()
    assert not claimed.granted and [stop.why for stop in claimed.stop] == ["failed"]
    with pytest.raises(InvalidArgument, match="state"):
        await api.alter_sql_job(pb.AlterSqlJobRequest(job="copy", state="asleep"))
    await api.drop_sql_job(pb.DropSqlJobRequest(job="copy"))
    assert [stop.why for stop in (await a.claim()).stop] == ["dropped"]
    with pytest.raises(UnknownJob):
        await api.drop_sql_job(pb.DropSqlJobRequest(job="copy"))
    states = [json.loads(event.payload_json)["state"] for event in await all_events(api, "SqlJobAltered")]
    assert states == ["paused", "running", "failed"]
    await check_projections(api)


async def test_the_list_says_how_far_a_job_is(with_topic: CoordinatorApi) -> None:
    await create_job(with_topic)
    a = await Worker(with_topic, "a").open()
    job = (await a.claim()).granted[0].job
    a.held[job.job_id].progress.CopyFrom(pb.SqlJobProgress(lag_records=7, watermark_us=5, state_bytes=9))
    await a.claim()
    (listed,) = (await with_topic.list_sql_jobs(pb.ListSqlJobsRequest())).jobs
    assert (listed.progress.lag_records, listed.progress.watermark_us, listed.progress.state_bytes) == (7, 5, 9)
    a.held[job.job_id].progress.CopyFrom(pb.SqlJobProgress(lag_records=-1))
    with pytest.raises(InvalidArgument, match="lag_records"):
        await a.claim()


def lease(**changes: Any) -> SqlJobLeaseRow:
    return SqlJobLeaseRow(**{"job_id": "j", "session_id": "s", "epoch": 1, **changes})


@pytest.mark.parametrize(
    "full", [{"journal_number": 10_000}, {"journal_number": 1, "journal_bytes": sql_jobs.JOURNAL_BYTES_MAX}]
)
def test_a_journal_that_no_checkpoint_shortens_is_refused(full: dict[str, int]) -> None:
    held = lease(**full)
    asked = sql_jobs.AskedEntry(job_id="j", epoch=1, number=held.journal_number + 1, entry=b"x")
    assert isinstance(sql_jobs.check_entry(asked, held, "s"), Overloaded)


def job_rows(**changes: str) -> list[SqlJobRow]:
    values: dict[str, Any] = {
        "kind": "insert",
        "statement": "",
        "output_topic": "out",
        "output_topic_id": "",
        "producer_id": 1,
        "state": "running",
        "reason": "",
        "created_ms": 0,
        "definitions": "[]",
    }
    return [SqlJobRow(job=name, job_id=name, **(values | changes)) for name in "abc"]


@pytest.mark.parametrize(
    ("journal_bytes", "checkpoint_bytes", "texts"),
    [
        (6_000, 0, {}),
        (0, 6_000, {}),
        (0, 0, {"statement": "ä" * 3_000}),
        (0, 0, {"definitions": "x" * 6_000}),
        (0, 0, {"reason": "x" * 6_000}),
    ],
)
def test_jobs_that_fill_a_message_are_granted_one_by_one(
    journal_bytes: int, checkpoint_bytes: int, texts: dict[str, str]
) -> None:
    rows = job_rows(**texts)
    leases = {row.job_id: lease(job_id=row.job_id, session_id="", journal_bytes=journal_bytes) for row in rows}
    checkpoints = {row.job_id: checkpoint_bytes for row in rows}
    claims = sql_jobs.claims("s", {}, {"s"}, rows, leases, checkpoints, bytes_max=10_000)
    assert [granted.job_id for granted in claims.granted] == ["a"]
    assert len(sql_jobs.claims("s", {}, {"s"}, rows, leases, checkpoints, bytes_max=30_000).granted) == 3


def test_a_list_of_jobs_fits_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = job_rows(statement="SELECT 'äöü'" * 100, reason="away", definitions='["x"]')
    assert sql_jobs.listed(rows) == [replace(row, definitions="[]") for row in rows]
    monkeypatch.setattr(sql_jobs, "LISTED_BYTES_MAX", 600)
    for row in sql_jobs.listed(rows):
        assert len(row.statement.encode()) <= 100
        assert row.statement.startswith("SELECT 'äöü'SELECT")
        assert row.statement.endswith("…")
        assert row.reason == "away"


async def test_workers_are_told_of_large_checkpoints_in_several_answers(
    with_topic: CoordinatorApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_sql_jobs, "GRANTED_BYTES_MAX", 500_000)
    first = await Worker(with_topic, "w1").open()
    for name in ("one", "two"):
        await create_job(with_topic, name)
    for grant in (await first.claim()).granted:
        await first.append(grant.job, 1)
        await first.store(grant.job, 1, b"c" * 400_000)
    await first.close()
    second = await Worker(with_topic, "w2").open()
    assert [[grant.job.job for grant in (await second.claim()).granted] for _ in range(3)] == [["one"], ["two"], []]


async def test_a_job_is_looked_up_by_its_name(with_topic: CoordinatorApi) -> None:
    await create_job(with_topic)
    (listed,) = (await with_topic.list_sql_jobs(pb.ListSqlJobsRequest())).jobs
    (found,) = (await with_topic.list_sql_jobs(pb.ListSqlJobsRequest(job="copy"))).jobs
    assert (list(listed.definitions), list(found.definitions)) == ([], [TEXT])
    assert (listed.statement, listed.job_id) == (found.statement, found.job_id)
    assert not (await with_topic.list_sql_jobs(pb.ListSqlJobsRequest(job="none"))).jobs


async def test_the_texts_of_a_job_have_a_limit_together(with_topic: CoordinatorApi) -> None:
    request = pb.CreateSqlJobRequest(job="j", kind="insert", statement="x", output_topic="out")
    request.definitions.extend(["x" * 256 * 1024] * 4)
    with pytest.raises(InvalidArgument, match="1048577 bytes together") as refused:
        await with_topic.create_sql_job(request)
    assert refused.value.details["field"] == "definitions"
