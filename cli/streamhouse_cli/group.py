"""streamhouse group list | describe | reset-offsets | delete."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from streamhouse_cli.ask import ask
from streamhouse_cli.options import Number, bootstrap_option, json_option
from streamhouse_cli.output import confirm, print_json, print_table, show_time
from streamhouse_cli.position import PositionOption, PositionType

if TYPE_CHECKING:
    from streamhouse.group_admin import GroupDescription, OffsetReset
    from streamhouse.records import TopicPartition


@click.group(short_help="Show, move and delete consumer groups.")
def group() -> None:
    """Show, move and delete consumer groups."""


@group.command("list")
@json_option
@bootstrap_option
def list_groups(as_json: bool, bootstrap: str) -> None:
    """List all consumer groups."""
    groups = ask(bootstrap, lambda admin: admin.list_groups())
    if as_json:
        print_json([asdict(info) for info in groups])
        return
    columns = ["group", "state", "members#", "generation#", "committed partitions#"]
    rows = [(info.group, info.state, info.members, info.generation, info.committed_partitions) for info in groups]
    print_table("groups", columns, rows)


@group.command(short_help="Show members, positions and lag of a group.")
@click.argument("name")
@json_option
@bootstrap_option
def describe(name: str, as_json: bool, bootstrap: str) -> None:
    """Show members, assignment, committed offsets and lag of group NAME.

    Lag counts records, not offsets: offsets skipped between epochs do not count.
    """
    described = ask(bootstrap, lambda admin: admin.describe_group(name))
    if as_json:
        print_json(asdict(described))
    else:
        _print_description(described)


@group.command("reset-offsets")
@click.argument("name")
@click.option(
    "--to",
    "position",
    type=PositionType(),
    metavar="POSITION",
    required=True,
    help="earliest, latest, an offset (42), ms since 1970 (@1700000000000) or a time (2013-01-31T12:00:00Z, UTC "
    "unless it says otherwise).",
)
@click.option("--topic", help="Only this topic, all of its partitions. Default: what the group has committed.")
@click.option("--partition", type=Number(min=0), help="Only this partition of --topic.")
@click.option("--execute", is_flag=True, help="Do it. Default: only show what would be done.")
@json_option
@bootstrap_option
def reset_offsets(
    name: str,
    position: PositionOption,
    topic: str | None,
    partition: int | None,
    execute: bool,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Set where group NAME goes on. Shows the new positions; --execute commits them.

    Refused while the group has members: they would go on at their own offsets, and commit them.
    An offset below or beyond the records of a partition is moved to the nearest end.
    """
    if partition is not None and topic is None:
        raise click.UsageError("--partition needs --topic")
    plan = ask(
        bootstrap,
        lambda admin: admin.reset_offsets(name, position.start, topic=topic, partition=partition, execute=execute),
    )
    if as_json:
        print_json({"group": name, "executed": execute, "partitions": [asdict(reset) for reset in plan]})
        return
    _print_plan(plan)
    what = f"reset {len(plan)} partition(s)" if execute else "nothing was changed; add --execute to do it"
    click.echo(f"group {name}: {what}", err=True)


@group.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@bootstrap_option
def delete(name: str, yes: bool, as_json: bool, bootstrap: str) -> None:
    """Delete group NAME and its committed offsets. Refused while it has members."""
    if not yes:
        confirm(f"Delete group {name} and its committed offsets?")
    ask(bootstrap, lambda admin: admin.delete_group(name))
    if as_json:
        print_json({"group": name})
    else:
        click.echo(f"deleted group {name}")


# ---- for people


def _print_description(described: GroupDescription) -> None:
    info = described.group
    click.echo(f"group {info.group}: {info.state}, generation {info.generation}, {info.members} member(s)")
    if described.members:
        rows = [
            (
                member.member_id,
                member.client_id,
                _named(member.owned),
                _named([where for where in member.assigned if where not in member.owned]),
                f"{member.expires_in_ms / 1000:.1f} s",
            )
            for member in described.members
        ]
        click.echo()
        print_table("members", ["member", "client", "works on", "waits for", "expires in#"], rows)
    rows_ = [
        (
            position.topic,
            position.partition,
            position.member_id or "none",
            "none" if position.offset is None else position.offset,
            position.log_start_offset,
            "?" if position.end_offset is None else position.end_offset,
            _lag(position.lag, position.lag_exact),
            show_time(position.committed_ms or None),
        )
        for position in described.positions
    ]
    columns = ["topic", "partition#", "member", "committed#", "start#", "end#", "lag#", "committed at"]
    click.echo()
    print_table("offsets", columns, rows_)
    known = [position.lag for position in described.positions if position.lag is not None]
    click.echo(f"lag: {sum(known):,} records in {len(known)} of {len(described.positions)} partitions")


def _lag(lag: int | None, exact: bool) -> str:
    if lag is None:
        return ""
    return f"{lag:,}" if exact else f"at least {lag:,}"


def _named(partitions: list[TopicPartition] | tuple[TopicPartition, ...]) -> str:
    """Returns partitions by topic: orders 0,1,2; other 5."""
    by_topic: dict[str, list[int]] = {}
    for where in partitions:
        by_topic.setdefault(where.topic, []).append(where.partition)
    return "; ".join(f"{topic} {','.join(map(str, numbers))}" for topic, numbers in by_topic.items())


def _print_plan(plan: list[OffsetReset]) -> None:
    rows = [
        (
            reset.topic,
            reset.partition,
            "none" if reset.before is None else reset.before,
            reset.offset,
            reset.log_start_offset,
            reset.end_offset,
            "nearest there is" if reset.clamped else "",
        )
        for reset in plan
    ]
    print_table("offsets", ["topic", "partition#", "committed#", "new#", "start#", "end#", ""], rows)
