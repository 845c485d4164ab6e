"""The command line end to end: every command as a process against one `streamhouse serve`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from streamhouse_cli.serve_process import ServeFailed, ServeProcess

pytestmark = pytest.mark.integration
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("serve")
    # Segments within a second, so that tests see both ends of the platform.
    process = ServeProcess(folder / "data", folder / "serve.log", {"STREAMHOUSE_SEAL_AGE_MS": "500"})
    with process:
        yield process


class Cli:
    """Runs commands with the platform's address in the environment."""

    def __init__(self, address: str) -> None:
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("STREAMHOUSE_")}
        self.environ["STREAMHOUSE_BOOTSTRAP"] = address

    def start(self, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "streamhouse_cli", *arguments]
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            command, env=self.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    def run(self, *arguments: str, given: bytes = b"", code: int = 0) -> bytes:
        """Standard output; standard error where the exit code is to be another than 0."""
        process = self.start(*arguments)
        out, err = process.communicate(given, TIMEOUT_S)
        assert process.returncode == code, err.decode(errors="replace")
        return err if code else out

    def json(self, *arguments: str, given: bytes = b"") -> object:
        return json.loads(self.run(*arguments, "--json", given=given))


@pytest.fixture
def cli(serve: ServeProcess) -> Cli:
    return Cli(serve.address)


@pytest.fixture
def topic(cli: Cli) -> str:
    name = f"t-{uuid4().hex[:12]}"
    cli.run("topic", "create", name, "--partitions", "3")
    return name


# ---- topics, status, health


def test_topics_come_and_go(cli: Cli) -> None:
    name = f"t-{uuid4().hex[:12]}"
    created = cli.json(
        "topic", "create", name, "--partitions", "2", "--retention-ms", "86400000", "--min-acks", "durable"
    )
    assert (created["topic"], created["partitions"], created["retention_ms"]) == (name, 2, 86_400_000)  # type: ignore[index]
    assert created["min_acks"] == "durable"  # type: ignore[index]
    assert created in cli.json("topic", "list")  # type: ignore[operator]
    assert name in cli.run("topic", "list").decode()
    described = cli.json("topic", "describe", name)
    assert described["topic"] == created  # type: ignore[index]
    assert [part["partition"] for part in described["partitions"]] == [0, 1]  # type: ignore[index]
    assert cli.run("topic", "create", name, "--partitions", "2", code=1).endswith(b"(TOPIC_EXISTS)\n")
    assert cli.run("topic", "delete", name, given=b"n\n", code=1).endswith(b"error: not confirmed, nothing was done\n")
    cli.run("topic", "delete", name, "--yes")
    assert cli.run("topic", "describe", name, code=1).endswith(b"(UNKNOWN_TOPIC)\n")


def test_partitions_are_added_while_records_are_there(cli: Cli) -> None:
    name = f"t-{uuid4().hex[:12]}"
    cli.run("topic", "create", name, "--partitions", "2")
    lines = b"".join(b"k%d=before\n" % at for at in range(100))
    cli.run("produce", name, "--key-separator", "=", given=lines)
    cli.run("topic", "alter", name, "--partitions", "5", "--retention-ms", "86400000", "--min-acks", "none", "--yes")
    configs = {item["name"]: item["value"] for item in cli.json("topic", "configs", name)}  # type: ignore[attr-defined]
    assert (configs["partitions"], configs["retention_ms"], configs["min_acks"]) == (5, 86_400_000, "none")
    cli.run("produce", name, "--key-separator", "=", given=lines.replace(b"before", b"after"))
    records = [json.loads(line) for line in cli.run("consume", name, "--json").splitlines()]
    assert sorted((item["key"], item["value"]) for item in records) == sorted(
        (f"k{at}", value) for at in range(100) for value in ("before", "after")
    )
    assert {item["partition"] for item in records if item["value"] == "before"} == {0, 1}
    assert {item["partition"] for item in records if item["value"] == "after"} == {0, 1, 2, 3, 4}
    assert cli.run("topic", "alter", name, "--partitions", "4", "--yes", code=1).endswith(b"(INVALID_ARGUMENT)\n")


def test_records_are_deleted_inside_a_segment(cli: Cli) -> None:
    name = f"t-{uuid4().hex[:12]}"
    cli.run("topic", "create", name, "--partitions", "1")
    cli.run("produce", name, given=b"".join(b"%d\n" % at for at in range(100)))
    deadline = time.monotonic() + TIMEOUT_S
    while cli.json("topic", "describe", name)["partitions"][0]["registered_end"] < 100:  # type: ignore[index]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cli.run("topic", "delete-records", name, "--before", "60", "--yes")
    assert cli.run("consume", name).split() == [b"%d" % at for at in range(60, 100)]
    assert cli.run("consume", name, "--from", "59", code=1).endswith(b"(OFFSET_BELOW_START)\n")
    assert b"before_offset is 101" in cli.run("topic", "delete-records", name, "--before", "101", "--yes", code=1)


def test_a_running_member_of_a_group_gets_new_partitions(cli: Cli, topic: str) -> None:
    reader = cli.start("consume", topic, "--group", f"g-{topic}", "--follow")
    try:
        cli.run("produce", topic, given=b"before\n")
        assert reader.stdout is not None and reader.stdout.readline() == b"before\n"
        cli.run("topic", "alter", topic, "--partitions", "4", "--yes")
        cli.run("produce", topic, "--format", "json", given=b'{"partition":3,"value":"new"}\n')
        assert reader.stdout.readline() == b"new\n"
    finally:
        reader.kill()
        reader.communicate()


def test_an_illegal_topic_name_is_refused(cli: Cli) -> None:
    error = cli.run("topic", "create", "no spaces", "--partitions", "1", code=1)
    assert error.startswith(b"error: ") and error.count(b"\n") == 1
    assert b"INVALID_ARGUMENT" in error


def test_health_of_the_platform(cli: Cli, serve: ServeProcess) -> None:
    assert cli.run("health", serve.address) == b"SERVING\n"
    assert cli.run("health", serve.address, "--service", "streamhouse.v1.Ingest") == b"SERVING\n"
    assert b"no service 'nobody' here" in cli.run("health", serve.address, "--service", "nobody", code=1)


def test_status_shows_every_partition_up_to_its_segments(cli: Cli, topic: str) -> None:
    cli.run("produce", topic, "--key-separator", "=", given=b"".join(b"k%d=v\n" % at for at in range(1000)))
    deadline = time.monotonic() + 30
    while True:
        report = cli.json("status")
        partitions = [part for part in report["partitions"] if part["topic"] == topic]  # type: ignore[index]
        if all(part["registered_end"] == part["end_offset"] for part in partitions):
            break
        assert time.monotonic() < deadline, partitions
    assert sum(part["end_offset"] for part in partitions) == 1000
    assert {part["status"] for part in partitions} == {"active"}
    roles = {session["role"] for session in report["sessions"]}  # type: ignore[index]
    assert {"ingest", "query"} <= roles
    (agent,) = report["agents"]  # type: ignore[index]
    assert agent["error"] is None and agent["wal_bytes"] > 0
    text = cli.run("status").decode()
    for shown in (topic, "write-ahead logs", "caches", "not in segments"):
        assert shown in text
    assert "active" not in text, "no partition is shown unless asked for"
    assert cli.run("status", "--all").count(b" active ") >= 3
    assert cli.run("status", "--topic", topic).count(b" active ") == 3


# ---- produce and consume


def test_lines_come_back_as_they_went_in(cli: Cli, topic: str, tmp_path: Path) -> None:
    lines = [b"", b"plain", "é".encode(), b"with\ttab\r", b"x" * 100_000, b"last"]
    file = tmp_path / "lines"
    file.write_bytes(b"\n".join(lines))
    summary = cli.json("produce", topic, "--file", str(file))
    assert summary["records"] == len(lines)  # type: ignore[index]
    assert summary["bytes"] == sum(map(len, lines))  # type: ignore[index]
    assert sorted(cli.run("consume", topic).split(b"\n")[:-1]) == sorted(lines)


def test_keys_by_field_decide_the_partition(cli: Cli, topic: str) -> None:
    lines = [json.dumps({"user": f"u{at % 50}", "at": at}).encode() for at in range(5000)]
    cli.run("produce", topic, "--key-field", "user", given=b"\n".join(lines))
    records = [json.loads(line) for line in cli.run("consume", topic, "--json").splitlines()]
    assert len(records) == 5000
    homes: dict[str, set[int]] = {}
    order: dict[str, list[int]] = {}
    for record in records:
        value = json.loads(record["value"])
        assert record["key"] == value["user"]
        homes.setdefault(record["key"], set()).add(record["partition"])
        order.setdefault(record["key"], []).append(value["at"])
    assert all(len(partitions) == 1 for partitions in homes.values())
    assert all(ats == sorted(ats) for ats in order.values())


def test_bytes_that_are_no_text(cli: Cli, topic: str) -> None:
    cli.run("produce", topic, "--key-separator", ":", given=b"\xff:\x00\xfe\n")
    assert cli.run("consume", topic) == b"\x00\\xfe\n"
    (record,) = map(json.loads, cli.run("consume", topic, "--format", "json").splitlines())
    assert (record["key_base64"], record["value_base64"], record["headers"]) == ("/w==", "AP4=", [])


def test_a_bad_line_stops_behind_what_was_good(cli: Cli, topic: str) -> None:
    error = cli.run("produce", topic, "--key-field", "k", given=b'{"k":1}\n{"k":2}\nnonsense\n{"k":3}\n', code=1)
    assert error.startswith(b"error: line 3: not JSON")
    assert b"the 2 records before it were acknowledged, nothing after it was sent" in error
    assert sorted(cli.run("consume", topic).splitlines()) == [b'{"k":1}', b'{"k":2}']


def test_a_line_with_a_huge_key_is_named(cli: Cli, topic: str) -> None:
    huge = json.dumps({"k": "x" * 9_000_000}).encode()
    error = cli.run("produce", topic, "--key-field", "k", given=b'{"k":1}\n' + huge + b"\n", code=1)
    assert error.startswith(b"error: line 2: it has 9000009 bytes and its key 9000000")
    assert cli.run("consume", topic) == b'{"k":1}\n'


def test_produce_to_nowhere(cli: Cli) -> None:
    assert cli.run("produce", "no-such-topic", given=b"x\n", code=1).endswith(b"(UNKNOWN_TOPIC)\n")


def test_a_partition_and_an_offset(cli: Cli, topic: str) -> None:
    cli.run("produce", topic, given=b"".join(b"%d\n" % at for at in range(300)))
    everything = [json.loads(line) for line in cli.run("consume", topic, "--json").splitlines()]
    full = max(range(3), key=lambda number: sum(record["partition"] == number for record in everything))
    mine = [record for record in everything if record["partition"] == full]
    read = cli.run("consume", topic, "--partition", str(full), "--from", "7", "--max", "3", "--json").splitlines()
    assert [json.loads(line) for line in read] == mine[7:10]
    read = cli.run("consume", topic, "--from", "-5", "--json").splitlines()
    assert [record for line in read if (record := json.loads(line))["partition"] == full] == mine[-5:]
    bounds = ("--from", "7", "--to", "10")
    for more in ([], ["--follow"]):
        read = cli.run("consume", topic, "--partition", str(full), *bounds, "--json", *more).splitlines()
        assert [json.loads(line) for line in read] == mine[7:10]
    for wrong in ("latest", "earliest"):
        error = cli.run("consume", topic, "--to", wrong, code=2)
        assert b"is none of an offset (42), ms since 1970 (@1700000000000), a time (2013" in error
    error = cli.run("consume", topic, "--partition", str(full), "--from", "100000", code=1)
    assert error.endswith(b"(OFFSET_BEYOND_END)\n")
    assert cli.run("consume", topic, "--partition", "3", code=1).endswith(b"(UNKNOWN_PARTITION)\n")


def test_a_point_in_time(cli: Cli, topic: str) -> None:
    cli.run("produce", topic, given=b"before\n")
    before_ms = max(json.loads(line)["timestamp_ms"] for line in cli.run("consume", topic, "--json").splitlines())
    cli.run("produce", topic, given=b"after\n")
    assert cli.run("consume", topic, "--from", f"@{before_ms + 1}") == b"after\n"
    assert cli.run("consume", topic, "--from", "2013-01-31").count(b"\n") == 2
    assert cli.run("consume", topic, "--from", "latest") == b""
    assert cli.run("consume", topic, "--to", f"@{before_ms + 1}") == b"before\n"


def test_a_group_goes_on_where_it_stopped(cli: Cli, topic: str) -> None:
    cli.run("produce", topic, given=b"".join(b"%d\n" % at for at in range(100)))
    first = cli.run("consume", topic, "--group", f"g-{topic}", "--max", "33").splitlines()
    rest = cli.run("consume", topic, "--group", f"g-{topic}").splitlines()
    assert len(first) == 33
    assert sorted(map(int, first + rest)) == list(range(100))
    assert cli.run("consume", topic, "--group", f"g-{topic}") == b""


def test_follow_sees_what_comes_and_ends_with_ctrl_c(cli: Cli, topic: str) -> None:
    process = cli.start("consume", topic, "--follow")
    try:
        cli.run("produce", topic, given=b"now\n")
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, out, err) == (130, b"", b"")
    finally:
        process.kill()
        process.communicate()


def test_sigterm_commits_what_was_printed_and_leaves_the_group(cli: Cli, topic: str) -> None:
    cli.run("produce", topic, given=b"one\n")
    process = cli.start("consume", topic, "--group", f"g-{topic}", "--follow")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"one\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, out, err) == (143, b"", b"")
    finally:
        process.kill()
        process.communicate()
    assert cli.run("consume", topic, "--group", f"g-{topic}") == b""


def test_a_reader_that_goes_away_is_no_error(cli: Cli, topic: str) -> None:
    cli.run("produce", topic, given=b"some line of text\n" * 50_000)
    with cli.start("consume", topic) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10) == b"some line "
        process.stdout.close()
        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr.read() == b""


def test_typed_lines_are_sent_as_they_come(cli: Cli, topic: str) -> None:
    process = cli.start("produce", topic)
    try:
        assert process.stdin is not None
        process.stdin.write(b"typed\n")
        process.stdin.flush()
        deadline = time.monotonic() + 30
        while cli.run("consume", topic) != b"typed\n":
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 130 and err.startswith(b"stopped by Ctrl-C: 1 record acknowledged, ")
    finally:
        process.kill()
        process.communicate()


# ---- segments, logs, serve itself


def test_segments_and_logs_of_a_running_platform_are_sound(cli: Cli, serve: ServeProcess, topic: str) -> None:
    cli.run("produce", topic, "--acks", "durable", given=b"some line of text\n" * 1000)
    store_dir = serve.data_dir / "objects"
    file = next((store_dir / "objects").rglob("*.seg"))
    key = str(file.relative_to(store_dir / "objects"))
    described = cli.json("segment", "inspect", key, "--store-dir", str(store_dir))
    assert described["segments"][0]["damage"] == []  # type: ignore[index]
    assert "records" in cli.run("segment", "inspect", str(file)).decode()
    logs = cli.json("wal", "inspect", str(serve.data_dir / "wal"))
    assert all(not file["damage"] for file in logs["files"])  # type: ignore[index]


def test_a_second_serve_on_the_directory_is_refused(serve: ServeProcess, tmp_path: Path) -> None:
    second = ServeProcess(serve.data_dir, tmp_path / "second.log")
    with pytest.raises(ServeFailed, match=r"error: data directory .* is already served by process"):
        second.start()


def test_a_log_that_another_process_holds_is_one_clear_line(cli: Cli, serve: ServeProcess) -> None:
    cli.environ["STREAMHOUSE_WAL_DIR"] = str(serve.data_dir / "wal")
    last = cli.run("ingest", code=1).decode().splitlines()[-1]
    assert last.startswith(f"error: {serve.data_dir / 'wal'}: in use by another process")


def test_serve_says_what_to_try_and_drains_on_sigterm(tmp_path: Path) -> None:
    cli = Cli("127.0.0.1:1")
    cli.environ["STREAMHOUSE_SQL_PG_LISTEN"] = "127.0.0.1:0"
    process = cli.start("serve", "--data-dir", str(tmp_path / "data"), "--listen", "127.0.0.1:0")
    try:
        assert process.stdout is not None
        first = process.stdout.readline().decode()
        assert first.startswith("StreamHouse serves on 127.0.0.1:")
        address = first.split()[3].rstrip(",")
        hints = [process.stdout.readline().decode() for _ in range(6)]
        commands = [line for line in hints if "streamhouse " in line and "psql" not in line]
        assert len(commands) == 3 and all(f"--bootstrap {address}" in line for line in commands)
        (psql,) = [line for line in hints if "psql " in line]
        assert re.match(r"  psql -h 127\.0\.0\.1 -p [1-9]\d* -d streamhouse -c ", psql)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, err.decode()
    finally:
        process.kill()
        process.communicate()


def test_a_taken_port_is_one_clear_line(serve: ServeProcess, tmp_path: Path) -> None:
    cli = Cli("127.0.0.1:1")
    error = cli.run("serve", "--data-dir", str(tmp_path / "data"), "--listen", serve.address, code=1)
    assert error == f"error: cannot listen on {serve.address}: address already in use\n".encode()
    assert not (tmp_path / "data" / "postgres").exists()  # nobody waited for a database first


def test_who_listens_everywhere_is_reached_at_what_it_advertises(tmp_path: Path) -> None:
    cli = Cli("127.0.0.1:1")
    listens = ("--listen", "0.0.0.0:0", "--data-dir", str(tmp_path / "data"))
    process = cli.start("serve", *listens, "--json")
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert not ready["address"].startswith("0.0.0.0")
        there = Cli(f"127.0.0.1:{ready['address'].rpartition(':')[2]}")
        there.run("topic", "create", "t", "--partitions", "1")
        there.run("produce", "t", given=b"hello\n")
        assert there.run("consume", "t") == b"hello\n"
        addresses = {session["address"] for session in there.json("status")["sessions"]}  # type: ignore[index]
        assert addresses == {ready["address"]}
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
    error = cli.run("serve", *listens, "--advertise", "0.0.0.0:7070", code=1)
    assert b"advertise (STREAMHOUSE_ADVERTISE) = '0.0.0.0:7070'" in error
