"""streamhouse status: everything that runs, on a screen."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from streamhouse_cli.ask import open_admin
from streamhouse_cli.failures import is_unreachable, one_line
from streamhouse_cli.options import bootstrap_option, json_option
from streamhouse_cli.output import print_json, print_table, show_bytes, show_share, show_time
from streamhouse_cli.process import run

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from google.protobuf.message import Message
    from shcluster.peers import Peers
    from streamhouse.cluster import ClusterStatus, Session


# People wait in front of a terminal: shorter than the timeouts between services.
TIMEOUT_MS = 5_000
# Lines about partitions with waiting readers: an agent that is gone may have led thousands, with the same line each.
WAITS_SHOWN = 10


@click.command(short_help="Agents, logs, caches, topics; partitions with --topic or --all.")
@click.option("--topic", metavar="TOPIC", help="Show the partitions of this topic, and no other's.")
@click.option("--all", "show_all", is_flag=True, help="Show the partitions of all topics.")
@json_option
@bootstrap_option
def status(topic: str | None, show_all: bool, as_json: bool, bootstrap: str) -> None:
    """Show sessions, write-ahead logs, caches and a line for each topic, and problems.

    --json has every partition, as with --all, unless --topic names a topic.
    """
    if topic is not None and show_all:
        raise click.UsageError("--topic and --all exclude each other")
    report = run(lambda: collect_status(bootstrap))
    if topic is not None:
        _keep_topic(report, topic)
    if as_json:
        print_json(report)
    else:
        _print_report(report, partitions=show_all or topic is not None)


def _keep_topic(report: dict[str, Any], topic: str) -> None:
    from shproto.errors import UnknownTopic

    report["partitions"] = [entry for entry in report["partitions"] if entry["topic"] == topic]
    if not report["partitions"]:
        raise UnknownTopic(f"topic {topic!r} does not exist", topic=topic)


async def collect_status(bootstrap: str) -> dict[str, Any]:
    """Returns the status of the coordinator, every ingest agent and every query service. Raises StreamHouseError if no
    coordinator answers; an agent that does not answer is in the report with its `error`."""
    import asyncio

    from shcluster.peers import Peers

    async with open_admin(bootstrap) as admin:
        answer = await admin.status()
    ingest = [session for session in answer.sessions if session.role == "ingest"]
    query = [session for session in answer.sessions if session.role == "query"]
    peers = Peers(bootstrap, TIMEOUT_MS)
    try:
        agents, caches = await asyncio.gather(
            asyncio.gather(*(_describe_agent(peers, session) for session in ingest)),
            asyncio.gather(*(_describe_query(peers, session) for session in query)),
        )
    finally:
        await peers.close()
    return {
        "sessions": [asdict(session) for session in answer.sessions],
        "agents": agents,
        "query_services": caches,
        "partitions": _partitions(answer, agents),
        "buffers": {
            "waiting": answer.buffers_waiting,
            "waiting_bytes": answer.buffers_waiting_bytes,
            "claimed": answer.buffers_claimed,
        },
        "events_position": answer.events_position,
        "outbox_position": answer.outbox_position,
        "missing_position": answer.missing_position,
        "unreachable_agents": [asdict(item) for item in answer.unreachable_agents],
        "buffer_failures": [asdict(item) | {"refused": item.refused} for item in answer.buffer_failures],
    }


async def _describe_agent(peers: Peers, session: Session) -> dict[str, Any]:
    from shproto.v1 import ingest_pb2

    return await _ask(session, peers.ingest(session.address).describe_agent(ingest_pb2.DescribeAgentRequest()))


async def _describe_query(peers: Peers, session: Session) -> dict[str, Any]:
    from shproto.v1 import query_pb2

    return await _ask(session, peers.query([session.address]).describe_query(query_pb2.DescribeQueryRequest()))


async def _ask(session: Session, call: Awaitable[Any]) -> dict[str, Any]:
    """Returns every field of the answer, or `error` if there is no answer."""
    from shproto.errors import StreamHouseError

    head = {"agent_id": session.agent_id, "address": session.address, "error": None}
    try:
        answer = await call
    except StreamHouseError as error:
        unreachable = f"cannot be reached at {session.address}"
        return head | {"error": unreachable if is_unreachable(error) else one_line(error.message)}
    fields = _fields(answer)
    if "partitions" in fields:
        fields["partitions"] = [_fields(item) for item in fields["partitions"]]
        fields["wal_id"] = fields["wal_id"].hex()
    return head | fields | {"agent_id": session.agent_id}


def _fields(message: Message) -> dict[str, Any]:
    return {descriptor.name: getattr(message, descriptor.name) for descriptor in message.DESCRIPTOR.fields}


def _partitions(answer: ClusterStatus, agents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns an entry per lease; `end_offset` is the acknowledged end according to the leader, None if not known."""
    led = {
        (part["topic"], part["partition"], part["epoch"]): part
        for agent in agents
        for part in agent.get("partitions", ())
    }
    entries = []
    for lease in sorted(answer.leases, key=lambda lease: (lease.topic, lease.partition)):
        own = led.get((lease.topic, lease.partition, lease.epoch))
        entries.append(
            {
                "topic": lease.topic,
                "partition": lease.partition,
                "agent_id": lease.agent_id or None,
                "epoch": lease.epoch,
                "status": lease.status,
                "start_offset": lease.log_start_offset,
                "registered_end": lease.registered_end,
                "end_offset": own["high_watermark"] if own else None,
                "buffered_bytes": own["buffered_bytes"] if own else None,
                "unsettled": [asdict(owned) for owned in lease.unsettled],
            }
        )
    return entries


# ---- for people


def _print_report(report: dict[str, Any], *, partitions: bool) -> None:
    sessions = [
        (item["role"], item["agent_id"], item["address"], f"{item['expires_in_ms'] / 1000:.1f} s")
        for item in report["sessions"]
    ]
    print_table("sessions", ["role", "agent", "address", "expires in#"], sessions)
    click.echo()
    print_table(
        "write-ahead logs", ["agent", "log", "memory", "sealed#", "unregistered#"], map(_wal_row, report["agents"])
    )
    columns = ["service", "cache", "hits#", "misses#", "downloads#", "downloaded#", "segments indexed#"]
    click.echo()
    print_table("caches", columns, map(_cache_row, report["query_services"]))
    if partitions:
        _print_partitions(report["partitions"])
    else:
        _print_topics(report["partitions"])
    click.echo()
    _print_waits(report, most=None if partitions else WAITS_SHOWN)


def _print_partitions(entries: list[dict[str, Any]]) -> None:
    columns = ["topic", "partition#", "agent", "epoch#", "status", "start#", "registered end#", "end#", "buffered#"]
    click.echo()
    print_table("partitions", columns, map(_partition_row, entries))


def _print_topics(entries: list[dict[str, Any]]) -> None:
    by_topic: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_topic.setdefault(entry["topic"], []).append(entry)
    columns = ["topic", "partitions#", "led#", "moving#", "readers wait#", "not in segments#", "buffered#"]
    click.echo()
    print_table("topics (partitions: --topic TOPIC or --all)", columns, map(_topic_row, by_topic.items()))


def _topic_row(item: tuple[str, list[dict[str, Any]]]) -> tuple[object, ...]:
    """Returns the row of a topic: numbers of partitions, then the acknowledged offsets that are in no segment yet (with
    `?`, and without those of leaders that did not answer), then bytes."""
    topic, entries = item
    known = [entry for entry in entries if entry["end_offset"] is not None]
    pending = f"{sum(max(0, entry['end_offset'] - entry['registered_end']) for entry in known):,}"
    return (
        topic,
        len(entries),
        sum(entry["status"] != "unassigned" for entry in entries),
        sum(entry["status"] == "moving" for entry in entries),
        sum(bool(entry["unsettled"]) for entry in entries),
        pending if len(known) == len(entries) else f"{pending}?",
        show_bytes(sum(entry["buffered_bytes"] or 0 for entry in entries)),
    )


def _wal_row(agent: dict[str, Any]) -> tuple[object, ...]:
    if agent["error"]:
        return agent["agent_id"], agent["error"], "", "", ""
    return (
        agent["agent_id"],
        show_share(agent["wal_bytes"], agent["wal_bytes_max"]),
        show_share(agent["memory_bytes"], agent["memory_bytes_max"]),
        show_bytes(agent["sealed_bytes"]),
        show_bytes(agent["unregistered_bytes"]),
    )


def _cache_row(service: dict[str, Any]) -> tuple[object, ...]:
    if service["error"]:
        return service["agent_id"], service["error"], "", "", "", "", ""
    return (
        service["agent_id"],
        show_share(service["cache_bytes"], service["cache_bytes_max"]),
        service["cache_hits"],
        service["cache_misses"],
        service["downloads"],
        show_bytes(service["download_bytes"]),
        service["segments_indexed"],
    )


def _partition_row(entry: dict[str, Any]) -> tuple[object, ...]:
    return (
        entry["topic"],
        entry["partition"],
        entry["agent_id"] or "none",
        entry["epoch"],
        entry["status"],
        entry["start_offset"],
        entry["registered_end"],
        "?" if entry["end_offset"] is None else entry["end_offset"],
        show_bytes(entry["buffered_bytes"]),
    )


def _print_waits(report: dict[str, Any], most: int | None) -> None:
    """Prints problems; of partitions with waiting readers at most `most` lines, or all."""
    buffers = report["buffers"]
    click.echo(
        f"sealed buffers: {buffers['waiting']} waiting ({show_bytes(buffers['waiting_bytes'])}), "
        f"{buffers['claimed']} claimed; events: {report['events_position']}, relayed: {report['outbox_position']}"
    )
    if position := report["missing_position"]:
        click.echo(
            f"THE METADATA WENT BACK: event {position} was seen, and is not there any more. No "
            "object is deleted, and agents may be refused: bring it back with `streamhouse restore` (docs/backup.md)"
        )
    for session in report["sessions"]:
        if session["log_full"]:
            click.echo(
                f"THE LOG OF AGENT {session['agent_id']} HAS NO ROOM: others lead instead, as far as there are any"
            )
    for item in report["unreachable_agents"]:
        click.echo(show_doubt(item))
    for item in report["buffer_failures"]:
        click.echo(show_failure(item))
    waits = [(entry, owned) for entry in report["partitions"] for owned in entry["unsettled"]]
    for entry, owned in waits[:most]:
        went_back = bool(report["missing_position"])
        lacks = "" if went_back else _lacks(owned["acknowledged_end"])
        status = f"{owned['status']}{_since(owned['orphaned_ms'], went_back=went_back)}{lacks}"
        click.echo(
            f"readers of {entry['topic']}/{entry['partition']} wait at offset {owned['registered_end']}: "
            f"epoch {owned['epoch']} of agent {owned['agent_id']} is {status}"
        )
    if most is not None and len(waits) > most:
        click.echo(f"{len(waits) - most:,} more ranges that readers wait for, shown with --all")


def show_doubt(item: dict[str, Any]) -> str:
    """Returns the line about an agent that workers cannot reach."""
    agent = f"agent {item['agent_id']} at {item['address']}"
    if not item["failing"]:
        return f"{agent} can be reached again by all; it leads once that has lasted"
    reaching = f"; reached by {', '.join(item['reaching'])}" if item["reaching"] else ""
    failing = f"cannot be reached by {', '.join(item['failing'])} since {show_time(item['since_ms'])}{reaching}"
    return f"{agent} {failing}" + (": OTHERS LEAD ITS PARTITIONS" if item["cut_off"] else "")


def show_failure(item: dict[str, Any]) -> str:
    """Returns the line about a buffer whose last hand-over failed."""
    what = "THE OBJECT STORE REFUSES" if item["refused"] else "not handed over yet:"
    size = show_bytes(item["size_bytes"])
    return (
        f"{what} buffer {item['buffer_id']} of agent {item['agent_id']} ({size}), attempt {item['attempt']}: "
        f"{one_line(item['reason'])}"
    )


def _lacks(acknowledged_end: int | None) -> str:
    if acknowledged_end is None:
        return ""
    return (
        f". THE AGENT CAME BACK WITHOUT ALL THAT IT HAD ACKNOWLEDGED, up to offset {acknowledged_end}: over an older "
        "copy of its log, or one that lost its end. Start it over the right disk, or give the rest up"
    )


def _since(orphaned_ms: int, *, went_back: bool) -> str:
    """Returns the time since which a range has no agent, and a remedy. With metadata that went back the agent cannot
    work, and settling would give up records that a restore brings back."""
    if not orphaned_ms:
        return ""
    helps = "restore the metadata first" if went_back else "bring the agent back, or see `partition settle`"
    return f" since {show_time(orphaned_ms)}; {helps}"
