"""streamhouse topic create | list | describe | configs | alter | delete | delete-records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

from streamhouse_cli.ask import ask
from streamhouse_cli.options import Number, bootstrap_option, json_option
from streamhouse_cli.output import confirm, print_json, print_table, show_bytes, show_time

if TYPE_CHECKING:
    from shproto.acks import Acks
    from streamhouse.cluster import LostRecords, OffsetRange, Topic, TopicDescription


class OrUnset(click.ParamType[int | Literal["unset"]]):
    """A number from `least` on, or the word "unset"."""

    name = "number or unset"

    def __init__(self, least: int) -> None:
        self._number = Number(min=least)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["unset"]:
        return "unset" if value == "unset" else int(self._number.convert(value, param, ctx))


@click.group(short_help="Create, list, describe, alter and delete topics.")
def topic() -> None:
    """Create, list, describe, alter and delete topics."""


@topic.command()
@click.argument("name")
@click.option("--partitions", type=Number(min=1), required=True, help="How many; may become more, never fewer.")
@click.option("--retention-ms", type=Number(min=1), help="Drop segments older than this. Default: keep.")
@click.option("--retention-bytes", type=Number(min=1), help="Keep so many bytes per partition. Default: all.")
@click.option(
    "--min-acks",
    type=click.Choice(["none", "wal", "durable"]),
    default="wal",
    show_default=True,
    help="The weakest acknowledgement a producer may ask for: none, in the leader's log, or on the object store.",
)
@click.option(
    "--unclean-recovery-after-ms",
    type=Number(min=0),
    metavar="MS",
    help="Declare lost what an agent that is gone had not uploaded, after this long. Default: never, readers wait.",
)
@click.option("--if-not-exists", is_flag=True, help="Leave a topic of that name as it is, and end with 0.")
@json_option
@bootstrap_option
def create(
    name: str,
    partitions: int,
    retention_ms: int | None,
    retention_bytes: int | None,
    min_acks: Acks,
    unclean_recovery_after_ms: int | None,
    if_not_exists: bool,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Create topic NAME."""
    from shproto.errors import TopicExists

    existing = None
    try:
        created = ask(
            bootstrap,
            lambda admin: admin.create_topic(
                name,
                partitions,
                retention_ms=retention_ms,
                retention_bytes=retention_bytes,
                min_acks=min_acks,
                unclean_recovery_after_ms=unclean_recovery_after_ms,
            ),
        )
    except TopicExists:
        if not if_not_exists:
            raise
        created = existing = ask(bootstrap, lambda admin: admin.describe_topic(name)).topic
    if as_json:
        print_json(asdict(created))
    elif existing is None:
        click.echo(f"created topic {created.topic} with {created.partitions} partition(s)")
    else:
        click.echo(f"topic {existing.topic} exists with {existing.partitions} partition(s)")
    if existing is not None:
        asked = {
            "partitions": partitions,
            "retention_ms": retention_ms,
            "retention_bytes": retention_bytes,
            "min_acks": min_acks,
            "unclean_recovery_after_ms": unclean_recovery_after_ms,
        }
        _warn_of_differences(existing, asked)


def _warn_of_differences(existing: Topic, asked: Mapping[str, int | str | None]) -> None:
    for name, value in asked.items():
        if (found := getattr(existing, name)) != value:
            click.echo(f"topic {existing.topic} has {name} {show_setting(found)}, not {show_setting(value)}", err=True)


def show_setting(value: int | str | None) -> str:
    """Returns a topic's setting as people read it; "none" is a value of min_acks, so a setting without a value is
    "unset"."""
    return "unset" if value is None else str(value)


@topic.command("list")
@json_option
@bootstrap_option
def list_topics(as_json: bool, bootstrap: str) -> None:
    """List all topics."""
    topics = sorted(ask(bootstrap, lambda admin: admin.list_topics()), key=lambda info: info.topic)
    if as_json:
        print_json([asdict(info) for info in topics])
        return
    columns = ["topic", "partitions#", "min acks", "retention ms#", "retention bytes#", "created"]
    rows = [
        (
            info.topic,
            info.partitions,
            info.min_acks,
            info.retention_ms,
            info.retention_bytes,
            show_time(info.created_ms),
        )
        for info in topics
    ]
    print_table("topics", columns, rows)


@topic.command()
@click.argument("name")
@json_option
@bootstrap_option
def describe(name: str, as_json: bool, bootstrap: str) -> None:
    """Show partitions of topic NAME: leaders, offsets, segments."""
    described = ask(bootstrap, lambda admin: admin.describe_topic(name))
    if as_json:
        print_json(asdict(described))
    else:
        show_description(described)


@topic.command()
@click.argument("name")
@json_option
@bootstrap_option
def configs(name: str, as_json: bool, bootstrap: str) -> None:
    """Show the settings of topic NAME."""
    found = ask(bootstrap, lambda admin: admin.topic_configs(name))
    if as_json:
        print_json([asdict(config) for config in found])
        return
    rows = [(item.name, show_setting(item.value), show_setting(item.default), item.alterable) for item in found]
    print_table(f"settings of topic {name}", ["setting", "value", "default", "alterable"], rows)


@topic.command()
@click.argument("name")
@click.option("--partitions", type=Number(min=1), help="So many from now on; never fewer than there are.")
@click.option("--retention-ms", type=OrUnset(1), metavar="MS|unset", help="Drop segments older than this.")
@click.option("--retention-bytes", type=OrUnset(1), metavar="BYTES|unset", help="Keep so many bytes per partition.")
@click.option(
    "--min-acks",
    type=click.Choice(["none", "wal", "durable"]),
    help="The weakest acknowledgement a producer may ask for. durable cannot be given to a topic or taken from it.",
)
@click.option(
    "--unclean-recovery-after-ms",
    type=OrUnset(0),
    metavar="MS|unset",
    help="Declare lost what an agent that is gone had not uploaded, after this long.",
)
@click.option("--yes", is_flag=True, help="Do not ask before partitions are added.")
@json_option
@bootstrap_option
def alter(
    name: str,
    partitions: int | None,
    retention_ms: int | Literal["unset"] | None,
    retention_bytes: int | Literal["unset"] | None,
    min_acks: Acks | None,
    unclean_recovery_after_ms: int | Literal["unset"] | None,
    yes: bool,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Change settings of topic NAME; other settings stay.

    More partitions: written records stay in their partitions and readable, but keys are spread over all partitions from
    then on, so newer records of a key may lie in another partition than older ones. This cannot be undone.
    """
    changes = (partitions, retention_ms, retention_bytes, min_acks, unclean_recovery_after_ms)
    if all(change is None for change in changes):
        raise click.UsageError("name a setting to change; `streamhouse topic configs NAME` shows them")
    if partitions is not None and not yes:
        confirm(f"Give topic {name} {partitions} partitions? Keys move between partitions, and it cannot be undone.")
    altered = ask(
        bootstrap,
        lambda admin: admin.alter_topic(
            name,
            partitions=partitions,
            retention_ms=retention_ms,
            retention_bytes=retention_bytes,
            min_acks=min_acks,
            unclean_recovery_after_ms=unclean_recovery_after_ms,
        ),
    )
    if as_json:
        print_json(asdict(altered))
    else:
        _print_settings(altered)


@topic.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@bootstrap_option
def delete(name: str, yes: bool, as_json: bool, bootstrap: str) -> None:
    """Delete topic NAME and all its records."""
    if not yes:
        confirm(f"Delete topic {name} and all its records?")
    topic_id = ask(bootstrap, lambda admin: admin.delete_topic(name))
    if as_json:
        print_json({"topic": name, "topic_id": topic_id})
    else:
        click.echo(f"deleted topic {name}")


@topic.command("delete-records")
@click.argument("name")
@click.option("--before", "before_offset", type=Number(min=0), metavar="OFFSET", required=True)
@click.option("--partition", type=Number(min=0), help="Needed where the topic has several.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@bootstrap_option
def delete_records(
    name: str, before_offset: int, partition: int | None, yes: bool, as_json: bool, bootstrap: str
) -> None:
    """Delete records of topic NAME below OFFSET."""
    if partition is None:
        count = ask(bootstrap, lambda admin: admin.describe_topic(name)).topic.partitions
        if count != 1:
            raise click.UsageError(f"topic {name} has {count} partitions: name one with --partition")
        partition = 0
    if not yes:
        confirm(f"Delete all records of {name}/{partition} below offset {before_offset}?")
    found = ask(bootstrap, lambda admin: admin.delete_records(name, partition, before_offset))
    if as_json:
        print_json({"topic": name, "partition": partition} | asdict(found))
    else:
        size = show_bytes(found.bytes_removed)
        removed = f"{found.segments_removed:,} segments removed ({size})"
        click.echo(f"{name}/{partition} starts at offset {found.log_start_offset}; {removed}")


def show_description(described: TopicDescription) -> None:
    """Prints settings, partitions and ranges of a topic for people."""
    _print_settings(described.topic)
    columns = ["partition#", "leader", "address", "epoch#", "start#", "registered end#", "records#", "segments#"]
    rows = [
        (
            partition.partition,
            partition.leader_agent_id or "none",
            partition.leader_address,
            partition.epoch,
            partition.log_start_offset,
            partition.registered_end,
            partition.record_count,
            partition.segment_count,
            show_bytes(partition.size_bytes),
            show_bytes(partition.raw_bytes),
        )
        for partition in described.partitions
    ]
    title = "partitions (in segments; newer records are in the leader's log)"
    print_table(title, [*columns, "size#", "raw#"], rows)
    unfinished = [(part.partition, owned) for part in described.partitions for owned in part.ranges]
    _print_ranges([(number, owned) for number, owned in unfinished if owned.status != "open"])
    _print_lost([(part.partition, span) for part in described.partitions for span in part.lost])


def _print_settings(info: Topic) -> None:
    age = "for ever" if info.retention_ms is None else f"{info.retention_ms:,} ms"
    size = "any size" if info.retention_bytes is None else f"{info.retention_bytes:,} bytes per partition"
    patience = info.unclean_recovery_after_ms
    lost = "wait for it" if patience is None else f"give it up after {patience:,} ms"
    click.echo(
        f"topic {info.topic} ({info.topic_id}), created {show_time(info.created_ms)}\n"
        f"{info.partitions} partition(s); min acks {info.min_acks}; retention {age}, {size}; "
        f"what only a lost agent has: {lost}"
    )


def _print_ranges(ranges: list[tuple[int, OffsetRange]]) -> None:
    """Prints the newest epoch of each partition, and older epochs that are not over."""
    if not ranges:
        return
    rows = [
        (
            number,
            owned.epoch,
            owned.agent_id,
            owned.status,
            owned.start_offset,
            owned.registered_end,
            owned.end_offset,
            owned.limit_offset,
            show_time(owned.orphaned_ms or None),
        )
        for number, owned in ranges
    ]
    columns = ["partition#", "epoch#", "agent", "status", "start#", "registered end#", "end#", "limit#", "orphaned"]
    click.echo()
    print_table("ranges that are not led", columns, rows)


def _print_lost(spans: list[tuple[int, LostRecords]]) -> None:
    """Prints lost records, also those that are only possibly lost, which the reason says."""
    if spans:
        rows = [(number, span.epoch, span.base_offset, span.end_offset, span.reason) for number, span in spans]
        click.echo()
        print_table("lost for good", ["partition#", "epoch#", "from#", "to#", "reason"], rows)
