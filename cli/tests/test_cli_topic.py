"""streamhouse topic: what it prints, and what it asks for."""

import json

import pytest
from click.testing import CliRunner
from streamhouse.sync import Producer
from streamhouse_cli.app import cli
from streamhouse_coordinator.core.tables import PARTITIONS


@pytest.fixture
def run(server):
    def run(*arguments, code=0):
        result = CliRunner().invoke(cli, [*arguments, "--bootstrap", server.address])
        assert result.exit_code == code, result.stderr
        return result

    return run


def log_starts(server, topic):
    """The first offset of each partition, by partition."""
    topic_id = server.topic_id(topic).hex()
    rows = [row for row in server.rows(PARTITIONS) if row.topic_id == topic_id]
    return [row.log_start_offset for row in sorted(rows, key=lambda row: row.partition)]


def test_a_topic_that_exists_stays_as_it_is_and_differences_are_named(server, run):
    server.create_topic("t", 2, retention_ms=1000)
    create = ["topic", "create", "t", "--if-not-exists"]
    result = run(*create, "--partitions", "3")
    assert result.stdout == "topic t exists with 2 partition(s)\n"
    assert result.stderr == "topic t has partitions 2, not 3\ntopic t has retention_ms 1000, not unset\n"
    same = run(*create, "--partitions", "2", "--retention-ms", "1000", "--json")
    assert (json.loads(same.stdout)["partitions"], same.stderr) == (2, "")
    assert run("topic", "create", "u", "--partitions", "1", "--if-not-exists").stdout.startswith("created topic u")
    assert run("topic", "create", "t", "--partitions", "2", code=1).stderr.endswith("(TOPIC_EXISTS)\n")


def test_settings_are_altered_one_by_one_and_unset(server, run):
    server.create_topic("t", 2)
    shown = run("topic", "alter", "t", "--retention-ms", "1000", "--min-acks", "none").stdout
    assert "2 partition(s); min acks none; retention 1,000 ms, any size" in shown
    altered = run("topic", "alter", "t", "--retention-ms", "unset", "--unclean-recovery-after-ms", "0", "--json")
    assert json.loads(altered.stdout)["retention_ms"] is None
    assert json.loads(altered.stdout)["unclean_recovery_after_ms"] == 0
    assert json.loads(run("topic", "configs", "t", "--json").stdout) == [
        {"name": "partitions", "value": 2, "default": 1, "alterable": "more"},
        {"name": "min_acks", "value": "none", "default": "wal", "alterable": "not to or from durable"},
        {"name": "retention_ms", "value": None, "default": None, "alterable": "yes"},
        {"name": "retention_bytes", "value": None, "default": None, "alterable": "yes"},
        {"name": "unclean_recovery_after_ms", "value": 0, "default": None, "alterable": "yes"},
    ]
    assert "unset" in run("topic", "configs", "t").stdout


def test_partitions_are_added_after_a_question(server, run):
    server.create_topic("t", 2)
    assert "Give topic t 3 partitions?" in run("topic", "alter", "t", "--partitions", "3", code=1).stderr
    assert server.partitions("t") == 2
    assert run("topic", "alter", "t", "--partitions", "3", "--yes").exit_code == 0
    assert server.partitions("t") == 3


def test_a_question_that_nobody_answers_names_the_option_for_scripts(server, run):
    server.create_topic("t", 2)
    for asking in (["topic", "delete", "t"], ["topic", "alter", "t", "--partitions", "3"], ["group", "delete", "g"]):
        message = run(*asking, code=1).stderr
        assert message.endswith(
            "\nerror: stdin ended before there was an answer, nothing was done; --yes is for scripts\n"
        )
    assert server.partitions("t") == 2


@pytest.mark.parametrize(
    ("option", "value", "unit"),
    [
        ("--retention-ms", "7d", " of milliseconds"),
        ("--retention-bytes", "1GB", " of bytes"),
        ("--partitions", "3x", ""),
    ],
)
def test_a_number_that_is_none_is_named_with_its_unit(server, run, option, value, unit):
    error = f"Error: Invalid value for '{option}': '{value}' is not a whole number{unit}\n"
    server.create_topic("t", 2)
    assert error in run("topic", "create", "u", "--partitions", "3", option, value, code=2).stderr
    assert error in run("topic", "alter", "t", option, value, code=2).stderr


@pytest.mark.parametrize("wrong", [[], ["--retention-ms", "never"], ["--retention-ms", "0"], ["--partitions", "0"]])
def test_an_alteration_that_says_nothing_or_nonsense_is_a_usage_error(run, wrong):
    run("topic", "alter", "t", *wrong, code=2)


def test_records_are_deleted_after_a_question_in_the_partition_named(server, run):
    server.create_topic("t", 2)
    server.create_topic("one", 1)
    with Producer(server.address, acks="durable") as producer:
        producer.send_many("t", [b"x"] * 10, partition=1)
        producer.send_many("one", [b"x"] * 4)
    delete = ["topic", "delete-records", "t", "--before", "7"]
    assert "has 2 partitions: name one with --partition" in run(*delete, code=2).stderr
    assert "Delete all records of t/1 below offset 7?" in run(*delete, "--partition", "1", code=1).stderr
    assert log_starts(server, "t") == [0, 0]
    assert run(*delete, "--partition", "1", "--yes").stdout.startswith("t/1 starts at offset 7; ")
    assert log_starts(server, "t") == [0, 7]
    again = run("topic", "delete-records", "one", "--before", "3", "--yes", "--json")
    assert json.loads(again.stdout) == {
        "topic": "one",
        "partition": 0,
        "log_start_offset": 3,
        "segments_removed": 0,
        "bytes_removed": 0,
    }
