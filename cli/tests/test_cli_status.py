"""streamhouse status: a summary, and what it leaves out unless asked."""

import copy

import pytest
from streamhouse_cli import status
from streamhouse_cli.app import cli

LOST = {"epoch": 1, "agent_id": "gone", "status": "orphaned", "registered_end": 7, "orphaned_ms": 0}


def partition(topic, number, **changes):
    entry = {"topic": topic, "partition": number, "agent_id": "a", "epoch": 2, "status": "active", "start_offset": 0}
    return entry | {"registered_end": 10, "end_offset": 1_500, "buffered_bytes": 1024, "unsettled": []} | changes


REPORT = {
    "sessions": [],
    "agents": [],
    "query_services": [],
    "partitions": [
        partition("orders", 0),
        partition("orders", 1, status="moving"),
        partition("orders", 2, status="unassigned", end_offset=None, buffered_bytes=None),
        *(partition("wide", at, unsettled=[LOST | {"acknowledged_end": None}]) for at in range(30)),
    ],
    "buffers": {"waiting": 0, "waiting_bytes": 0, "claimed": 0},
    "events_position": 1,
    "outbox_position": 0,
    "missing_position": 0,
    "unreachable_agents": [],
    "buffer_failures": [],
}


@pytest.fixture
def shown(monkeypatch, capsys):
    async def collect(bootstrap):
        return copy.deepcopy(REPORT)

    monkeypatch.setattr(status, "collect_status", collect)

    def run(*arguments):
        cli(["status", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return run


def rows(text, topic):
    return [line.split() for line in text.splitlines() if line.startswith(f"{topic} ")]


def test_a_topic_is_one_line_and_waits_are_few(shown):
    text = shown()
    assert rows(text, "orders") == [["orders", "3", "2", "1", "0", "2,980?", "2.0", "KiB"]]
    assert rows(text, "wide") == [["wide", "30", "30", "0", "30", "44,700", "30.0", "KiB"]]
    assert text.count("readers of wide/") == status.WAITS_SHOWN
    assert "20 more ranges that readers wait for, shown with --all" in text


def test_partitions_are_shown_when_asked_for(shown):
    text = shown("--all")
    assert (len(rows(text, "orders")), len(rows(text, "wide")), text.count("readers of wide/")) == (3, 30, 30)
    text = shown("--topic", "orders")
    assert (len(rows(text, "orders")), "wide" in text) == (3, False)


def test_json_has_every_partition(shown):
    assert shown("--json").count('"partition"') == 33
    assert shown("--json", "--topic", "orders").count('"partition"') == 3


def test_a_topic_that_is_not_there_is_an_error(shown):
    with pytest.raises(Exception, match="topic 'nope' does not exist"):
        shown("--topic", "nope")
