"""Operators' commands end to end: groups and `verify`, as processes against one `streamhouse serve`.

`partition settle` needs an agent that is gone while another leads: tests/integration/test_takeover.py.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from shformat import TIMESTAMP_MS_MAX
from shproto.v1 import coordinator_pb2
from streamhouse.cluster import BufferFailure, LostRecords, Partition, Topic, TopicDescription, UnreachableAgent
from streamhouse.sync import Admin, Consumer, Producer
from streamhouse_cli.ask import open_peers
from streamhouse_cli.serve_process import ServeProcess
from streamhouse_cli.status import show_doubt, show_failure
from streamhouse_cli.topic import show_description
from streamhouse_embedded.postgres import EmbeddedPostgres
from streamhouse_segmenter.core.history import HistoryMark

pytestmark = pytest.mark.integration
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("operators")
    with ServeProcess(folder / "data", folder / "serve.log", {"STREAMHOUSE_SEAL_AGE_MS": "300"}) as process:
        yield process


@pytest.fixture(scope="module")
def data_dir(serve: ServeProcess) -> Path:
    return serve.data_dir


class Cli:
    def __init__(self, address: str) -> None:
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("STREAMHOUSE_")}
        self.environ["STREAMHOUSE_BOOTSTRAP"] = address

    def run(self, *arguments: str, code: int = 0, given: bytes = b"") -> tuple[str, str]:
        command = [sys.executable, "-m", "streamhouse_cli", *arguments]
        done = subprocess.run(
            command, env=self.environ, input=given, capture_output=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == code, done.stderr.decode(errors="replace")
        return done.stdout.decode(), done.stderr.decode()

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code)[0])


@pytest.fixture
def cli(serve: ServeProcess) -> Cli:
    return Cli(serve.address)


@pytest.fixture
def topic(serve: ServeProcess) -> str:
    """Two partitions, ten records in each, at timestamps 0 to 9."""
    name = f"t-{uuid4().hex[:12]}"
    with Admin(serve.address) as admin:
        admin.create_topic(name, partitions=2)
    with Producer(serve.address) as producer:
        for partition in range(2):
            values = [b"%d" % n for n in range(10)]
            producer.send_many(name, values, timestamps_ms=list(range(10)), partition=partition).result()
    return name


def registered(serve: ServeProcess, topic: str, count: int) -> None:
    deadline = time.monotonic() + 30
    with Admin(serve.address) as admin:
        while sum(part.record_count for part in admin.describe_topic(topic).partitions) < count:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# ---- topics


def test_a_topic_shows_everything_it_was_made_with(cli: Cli) -> None:
    name = f"t-{uuid4().hex[:12]}"
    options = ["--retention-ms", "86400000", "--retention-bytes", "1000000", "--unclean-recovery-after-ms", "0"]
    created = cli.json("topic", "create", name, "--partitions", "1", "--min-acks", "none", *options)
    assert (created["min_acks"], created["retention_bytes"]) == ("none", 1_000_000)
    assert created["unclean_recovery_after_ms"] == 0
    shown, _ = cli.run("topic", "describe", name)
    for text in ("min acks none", "86,400,000 ms", "1,000,000 bytes", "give it up after 0 ms", "created 20"):
        assert text in shown


def test_what_is_lost_for_good_is_shown_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    topic = Topic(
        topic="orders",
        topic_id="id",
        partitions=1,
        retention_ms=None,
        retention_bytes=None,
        min_acks="wal",
        unclean_recovery_after_ms=None,
        created_ms=0,
    )
    lost = LostRecords(epoch=3, base_offset=1_000, end_offset=1_004, reason="damaged in the write-ahead log")
    show_description(
        TopicDescription(
            topic,
            (
                Partition(
                    partition=0,
                    leader_agent_id="a",
                    leader_address="",
                    epoch=4,
                    log_start_offset=0,
                    registered_end=2_000,
                    segment_count=2,
                    size_bytes=9,
                    raw_bytes=9,
                    record_count=1_996,
                    ranges=(),
                    lost=(lost,),
                ),
            ),
        )
    )
    title, _, _, row = capsys.readouterr().out.splitlines()[-4:]
    assert title.strip() == "lost for good"
    assert row.split(maxsplit=4) == ["0", "3", "1,000", "1,004", "damaged in the write-ahead log"]


# ---- status


def test_a_buffer_that_the_store_refuses_stands_out_from_one_that_is_late() -> None:
    def shown(reason: str) -> str:
        failure = BufferFailure(buffer_id="b-1", agent_id="a", attempt=19, reason=reason, size_bytes=2048)
        return show_failure(asdict(failure) | {"refused": failure.refused})

    refused = "THE OBJECT STORE REFUSES buffer b-1 of agent a (2.0 KiB), attempt 19: refused: InvalidPart"
    assert shown("refused: InvalidPart") == refused
    assert shown("store: timeout").startswith("not handed over yet: buffer b-1 ")


def test_an_agent_that_workers_cannot_reach_is_shown_with_who_cannot() -> None:
    def shown(cut_off: bool, failing: tuple[str, ...], reaching: tuple[str, ...] = ()) -> str:
        since_ms = 1_700_000_000_000 if failing else 0
        return show_doubt(
            asdict(
                UnreachableAgent(
                    agent_id="a",
                    address="10.0.0.7:7012",
                    cut_off=cut_off,
                    failing=failing,
                    reaching=reaching,
                    since_ms=since_ms,
                )
            )
        )

    one = shown(False, ("s1",), ("s2", "q"))
    assert one.startswith("agent a at 10.0.0.7:7012 cannot be reached by s1 since 2023-11-1")
    assert one.endswith("; reached by s2, q")
    assert shown(True, ("s1", "s2")).endswith(": OTHERS LEAD ITS PARTITIONS")
    assert "can be reached again by all" in shown(True, ())


# ---- groups


def test_a_group_is_described_moved_and_deleted(cli: Cli, serve: ServeProcess, topic: str) -> None:
    group = f"g-{uuid4().hex[:8]}"
    with Consumer(serve.address, [topic], group=group) as consumer:
        for _ in range(4):
            next(consumer)
        consumer.commit()
        described = cli.json("group", "describe", group)
        assert (described["group"]["state"], described["group"]["members"]) == ("stable", 1)
        assert sum(position["lag"] for position in described["positions"] if position["offset"] is not None) >= 6
        (member,) = described["members"]
        assert member["owned"] == [[topic, 0], [topic, 1]]
        assert "GROUP_NOT_EMPTY" in cli.run("group", "reset-offsets", group, "--to", "earliest", "--execute", code=1)[1]
        assert "GROUP_NOT_EMPTY" in cli.run("group", "delete", group, "--yes", code=1)[1]
    listed = {item["group"]: item for item in cli.json("group", "list")}
    assert listed[group]["state"] == "empty"
    assert group in cli.run("group", "list")[0]
    with Admin(serve.address) as admin:
        admin.commit_group_offsets(group, {(topic, 0): 4, (topic, 1): 7})
    shown, _ = cli.run("group", "describe", group)
    assert "lag: 9 records in 2 of 2 partitions" in shown
    check_reset(cli, group, topic)
    refused = cli.run("group", "delete", group, given=b"n\n", code=1)[1]
    assert refused.endswith("error: not confirmed, nothing was done\n")
    assert cli.run("group", "delete", group, "--yes")[0] == f"deleted group {group}\n"
    assert "UNKNOWN_GROUP" in cli.run("group", "describe", group, code=1)[1]
    assert "UNKNOWN_GROUP" in cli.run("group", "reset-offsets", group, "--to", "latest", code=1)[1]


def check_reset(cli: Cli, group: str, topic: str) -> None:
    def reset(*arguments: str) -> list[tuple[int, Any, int, bool]]:
        report = cli.json("group", "reset-offsets", group, *arguments)
        assert report["executed"] is ("--execute" in arguments)
        return [(p["partition"], p["before"], p["offset"], p["clamped"]) for p in report["partitions"]]

    def committed() -> list[int]:
        return [position["offset"] for position in cli.json("group", "describe", group)["positions"]]

    shown, said = cli.run("group", "reset-offsets", group, "--to", "earliest")
    assert "nothing was changed; add --execute to do it" in said and topic in shown
    assert reset("--to", "earliest") == [(0, 4, 0, False), (1, 7, 0, False)]
    assert committed() == [4, 7], "a dry run changes nothing"
    assert reset("--to", "99", "--execute") == [(0, 4, 10, True), (1, 7, 10, True)]
    assert reset("--to", "@3", "--topic", topic, "--execute") == [(0, 10, 3, False), (1, 10, 3, False)]
    assert reset("--to", "latest", "--topic", topic, "--partition", "1", "--execute") == [(1, 3, 10, False)]
    assert committed() == [3, 10]
    assert "UNKNOWN_TOPIC" in cli.run("group", "reset-offsets", group, "--to", "0", "--topic", "nope", code=1)[1]
    cli.run("group", "reset-offsets", group, "--to", "0", "--partition", "1", code=2)


def test_a_group_can_be_placed_before_its_first_consumer(cli: Cli, serve: ServeProcess, topic: str) -> None:
    group = f"g-{uuid4().hex[:8]}"
    cli.run("group", "reset-offsets", group, "--to", "8", "--topic", topic, "--execute")
    with Consumer(serve.address, [topic], group=group, stop_at_end=True) as consumer:
        assert [record.offset for record in consumer] == [8, 9, 8, 9]


# ---- partition settle


def test_a_partition_without_orphans_has_nothing_to_settle(cli: Cli, topic: str) -> None:
    assert "no orphaned range" in cli.run("partition", "settle", topic, "0", "--lost", "--yes", code=1)[1]
    assert "UNKNOWN_PARTITION" in cli.run("partition", "settle", topic, "9", "--lost", "--yes", code=1)[1]
    cli.run("partition", "settle", topic, "0", "--yes", code=2)


# ---- verify


def test_a_sound_platform_verifies(cli: Cli, serve: ServeProcess, data_dir: Path, topic: str) -> None:
    registered(serve, topic, 20)
    report = cli.json("verify", "--data-dir", str(data_dir))
    assert report["findings"] == [] and report["records"] >= 20 and report["objects"] > 0
    shown, _ = cli.run("verify", "--store-dir", str(data_dir / "objects"), "--topic", topic)
    assert "20 records" in shown


def test_verify_asks_the_coordinator_that_is_there(cli: Cli, serve: ServeProcess, data_dir: Path, topic: str) -> None:
    """It reads a stream, and begins it at the first address."""
    bootstrap = f"127.0.0.1:1,{serve.address}"
    report = cli.json("verify", "--data-dir", str(data_dir), "--topic", topic, "--bootstrap", bootstrap)
    assert report["findings"] == []


def test_verify_needs_a_store_and_a_topic_that_is_there(cli: Cli, data_dir: Path) -> None:
    assert "--data-dir (of `streamhouse serve`), --store-dir or STREAMHOUSE_S3_" in cli.run("verify", code=1)[1]
    assert "UNKNOWN_TOPIC" in cli.run("verify", "--data-dir", str(data_dir), "--topic", "nope", code=1)[1]


def test_verify_finds_metadata_that_its_events_do_not_give(
    cli: Cli, serve: ServeProcess, data_dir: Path, topic: str
) -> None:
    """A bit of a row, as damage on PostgreSQL's disk would change it, and a segment that is not there any more."""
    registered(serve, topic, 20)
    dsn = EmbeddedPostgres(data_dir / "postgres").running_dsn()

    async def change(statement: str) -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute(statement)
        await connection.close()

    place = ("verify", "--data-dir", str(data_dir))
    sound = cli.json(*place)
    assert sound["findings"] == [] and sound["metadata_rows"] > 0
    of_topic = f"topic_id = (SELECT topic_id FROM topics WHERE topic = '{topic}')"
    flip = f"UPDATE ranges SET registered_end = registered_end # 4 WHERE {of_topic} AND partition = 0"
    asyncio.run(change(flip))
    found = [item["what"] for item in cli.json(*place, code=1)["findings"] if item["kind"] == "metadata"]
    assert len(found) == 1 and found[0].startswith('table ranges: {"') and '"registered_end": 10' in found[0]
    asyncio.run(change(flip))
    asyncio.run(change(f"CREATE TABLE aside AS SELECT * FROM segments WHERE {of_topic}"))
    asyncio.run(change(f"DELETE FROM segments WHERE {of_topic}"))
    shown, _ = cli.run(*place, code=1)
    assert "metadata" in shown and "no such row" in shown
    asyncio.run(change("INSERT INTO segments SELECT * FROM aside; DROP TABLE aside"))
    assert cli.json(*place)["findings"] == []


def test_verify_finds_what_is_wrong(cli: Cli, serve: ServeProcess, data_dir: Path) -> None:
    """Missing, damaged, cut short, unregistered: each at its place; exit 1."""
    topics = [f"v{number}-{uuid4().hex[:8]}" for number in range(3)]
    with Admin(serve.address) as admin:
        for name in topics:
            admin.create_topic(name)
    for name in topics:  # one after the other, so that each has an object of its own
        with Producer(serve.address) as producer:
            producer.send_many(name, [os.urandom(100) for _ in range(50)]).result()
        registered(serve, name, 50)
    objects = data_dir / "objects" / "objects"
    missing, damaged, cut = (next(objects.glob(f"data/{name}.*/0/*.seg")) for name in topics)
    for path in (missing, damaged, cut):
        path.chmod(0o600)
    contents = bytearray(damaged.read_bytes())
    contents[len(contents) // 2] ^= 1
    damaged.write_bytes(contents)
    os.truncate(cut, 200)
    kept = missing.read_bytes()
    missing.unlink()
    stray = missing.with_name("00000000000000000099-1-stray.seg")
    stray.write_bytes(kept)
    try:
        report = cli.json("verify", "--data-dir", str(data_dir), "--grace-ms", "0", code=1)
        found = {(item["kind"], item["topic"], item["object_key"]) for item in report["findings"]}
        keys = [str(path.relative_to(objects)) for path in (missing, damaged, cut, stray)]
        assert ("missing", topics[0], keys[0]) in found
        assert ("damaged", topics[1], keys[1]) in found
        assert ("missing", topics[2], keys[2]) in found
        assert ("unregistered", "", keys[3]) in found
        shown, said = cli.run("verify", "--data-dir", str(data_dir), "--topic", topics[1], code=1)
        assert "damaged" in shown and said == "error: 1 finding\n"
        young = cli.json("verify", "--data-dir", str(data_dir), "--topic", topics[0], code=1)
        assert [item["kind"] for item in young["findings"]] == ["missing"] and young["young_objects"] == 1
    finally:
        with Admin(serve.address) as admin:
            for name in topics:
                admin.delete_topic(name)


def test_what_waits_for_the_sweep_is_no_finding(cli: Cli, serve: ServeProcess, data_dir: Path, topic: str) -> None:
    registered(serve, topic, 20)
    with Admin(serve.address) as admin:
        topic_id = admin.describe_topic(topic).topic.topic_id
    objects = data_dir / "objects" / "objects"
    stray = objects / "data" / f"{topic}.{topic_id[:8]}" / "0" / "00000000000000000099-1-stray.seg"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"left over")
    os.utime(stray, (1, 1))
    mine = ("--data-dir", str(data_dir), "--topic", topic)
    assert [item["kind"] for item in cli.json("verify", *mine, code=1)["findings"]] == ["unregistered"]
    prefix = str(stray.parent.relative_to(objects))
    assert cli.json("sweep", "--data-dir", str(data_dir), "--prefix", prefix, "--yes")["waiting"] == 1
    report = cli.json("verify", *mine)
    assert report["findings"] == [] and report["waiting_objects"] == 1 and report["young_objects"] == 0
    assert "1 objects wait for the sweep" in cli.run("verify", *mine)[0]
    stray.unlink()


def test_what_sweeps_leave_alone_after_a_restore_is_no_finding(
    cli: Cli, serve: ServeProcess, data_dir: Path, topic: str
) -> None:
    registered(serve, topic, 20)
    with Admin(serve.address) as admin:
        topic_id = admin.describe_topic(topic).topic.topic_id
    objects = data_dir / "objects" / "objects"
    mine = ("--data-dir", str(data_dir), "--topic", topic)
    stray = objects / "data" / f"{topic}.{topic_id[:8]}" / "0" / "00000000000000000099-1-stray.seg"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"replaced before the restore")
    os.utime(stray, (1, 1))
    mark = HistoryMark.of(asyncio.run(first_event(serve.address)))
    path = objects / "control" / "history-mark.json"
    before = path.read_bytes() if path.exists() else b""
    try:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(replace(mark, sweep_from_ms=TIMESTAMP_MS_MAX).encode())
        report = cli.json("verify", *mine)
        assert report["findings"] == [] and report["resting_objects"] == 1
        assert report["resting_until_ms"] == TIMESTAMP_MS_MAX
        assert "rest until 9999-12-31" in cli.run("verify", *mine)[0]
    finally:
        path.unlink()
        if before:
            path.write_bytes(before)
        stray.unlink()


async def first_event(address: str) -> coordinator_pb2.Event:
    peers = open_peers(address, 10_000)
    try:
        return (await peers.coordinator.get_head(coordinator_pb2.GetHeadRequest(event_position=1))).event
    finally:
        await peers.close()


# ---- sweep


def test_a_sweep_shows_asks_and_deletes(cli: Cli, serve: ServeProcess, data_dir: Path, topic: str) -> None:
    registered(serve, topic, 20)
    objects = data_dir / "objects" / "objects"
    kept = next(objects.glob(f"*/{topic}.*/*/*.seg"), None) or next(objects.glob("mixed/*/*.seg"))
    strays = [objects / "data" / f"{topic}.stray" / "0" / f"{number:020d}-1-a.seg" for number in range(2)]
    strays[0].parent.mkdir(parents=True)
    for stray in strays:
        stray.write_bytes(b"left over")
        os.utime(stray, (1, 1))
    keys = [str(stray.relative_to(objects)) for stray in strays]
    mine = ("sweep", "--data-dir", str(data_dir), "--prefix", f"data/{topic}.stray/")

    shown = cli.json(*mine, "--dry-run", "--confirm-ms", "0")
    assert [(item["key"], item["size_bytes"], item["deletable"]) for item in shown["objects"]] == [
        (key, 9, True) for key in keys
    ]
    assert all("no segment" in item["why"] and item["since_ms"] for item in shown["objects"])
    assert not cli.json(*mine, "--dry-run")["objects"][0]["deletable"], "it was not noticed before"
    table, _ = cli.run(*mine, "--dry-run")
    assert keys[0] in table and "18 B; 0 may be deleted now" in table
    cli.run(*mine, "--confirm-ms", "0", code=1)  # nobody says yes
    assert all(stray.exists() for stray in strays)

    done, _ = cli.run(*mine, "--confirm-ms", "0", "--yes")
    assert "2 objects deleted, 18 B; 0 later" in done
    assert not any(stray.exists() for stray in strays) and kept.exists()
    assert cli.json(*mine, "--yes")["objects"] == []
    assert cli.json("sweep", "--data-dir", str(data_dir), "--dry-run")["refused"] == ""
    assert "must begin with data/" in cli.run("sweep", "--prefix", "control/", code=2)[1]


def test_a_sweep_refuses_metadata_older_than_the_store(cli: Cli, data_dir: Path) -> None:
    mark = data_dir / "objects" / "objects" / "control" / "history-mark.json"
    before = mark.read_bytes() if mark.exists() else None
    mark.parent.mkdir(exist_ok=True)
    mark.unlink(missing_ok=True)
    mark.write_bytes(
        b'{"position": 1000000, "stream_id": "topic/x", "version": 1, "type": "TopicCreated", "created_ms": 1}'
    )
    try:
        for options in (["--dry-run"], ["--yes"]):
            said = cli.run("sweep", "--data-dir", str(data_dir), *options, code=1)[1]
            assert (
                "refused" in said
                and "PostgreSQL stands at event" in said
                and "has seen event 1000000" in said
                and "history-mark.json" in said
            )
        shown, _ = cli.run("verify", "--data-dir", str(data_dir), code=1)
        assert "outdated" in shown
    finally:
        mark.unlink()
        if before is not None:
            mark.write_bytes(before)
