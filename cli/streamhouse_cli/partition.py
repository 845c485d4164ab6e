"""streamhouse partition settle: declares lost the records that only an agent that is gone has."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from streamhouse_cli.ask import ask
from streamhouse_cli.failures import CliError
from streamhouse_cli.options import Number, bootstrap_option, json_option
from streamhouse_cli.output import confirm, print_json, print_table, show_span, show_time

if TYPE_CHECKING:
    from streamhouse.cluster import OffsetRange


@click.group(short_help="Settle what readers of a partition wait for.")
def partition() -> None:
    """Settle ranges that readers of a partition wait for."""


@partition.command(short_help="Declare lost what only an agent that is gone has.")
@click.argument("topic")
@click.argument("number", metavar="PARTITION", type=Number(min=0))
@click.option("--lost", is_flag=True, required=True, help="Declare lost what only an agent that is gone has.")
@click.option("--epoch", "epochs", type=Number(min=1), multiple=True, help="Only these. Default: all orphaned.")
@click.option("--reason", default="", help="Why, for those who read the event later.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@bootstrap_option
def settle(
    topic: str, number: int, lost: bool, epochs: tuple[int, ...], reason: str, yes: bool, as_json: bool, bootstrap: str
) -> None:
    """Declare lost the unregistered records of TOPIC's PARTITION whose agent is gone, so that readers can go on.

    For good: if the agent comes back, its records are kept out. Bring the agent back with its log first if that is
    possible; nothing is lost then. Readers get DATA_LOSS at the gap, with the offset where records go on; consumers
    with on_data_loss="skip" go on by themselves.
    """
    assert lost, "required"
    orphaned = ask(bootstrap, lambda admin: admin.orphaned_ranges(topic, number))
    ranges = [owned for owned in orphaned if not epochs or owned.epoch in epochs]
    if not ranges:
        which = f" of epoch {', '.join(map(str, epochs))}" if epochs else ""
        raise CliError(f"{topic}/{number} has no orphaned range{which}: there is nothing to declare lost")
    if not (yes and as_json):
        _print_ranges(topic, number, ranges)
    if not yes:
        confirm("Declare these records lost for good?")
    asked = [owned.epoch for owned in ranges]
    done = ask(bootstrap, lambda admin: admin.declare_lost(topic, number, asked, reason))
    if as_json:
        print_json({"topic": topic, "partition": number, "ranges": [asdict(owned) for owned in done]})
        return
    for owned in done:
        _print_outcome(owned)


def _print_ranges(topic: str, number: int, ranges: list[OffsetRange]) -> None:
    """Prints the ranges that will be declared lost to stderr, as part of the question."""
    now_ms = time.time_ns() // 1_000_000
    rows = [
        (
            owned.epoch,
            owned.agent_id,
            owned.registered_end,
            owned.limit_offset,
            show_time(owned.orphaned_ms or None),
            show_span(now_ms - owned.orphaned_ms) if owned.orphaned_ms else "",
        )
        for owned in ranges
    ]
    columns = ["epoch#", "agent", "registered up to#", "range ends at#", "orphaned since", "ago#"]
    print_table(f"declared lost in {topic}/{number}", columns, rows, err=True)
    click.echo(
        "Every record from `registered up to` on that the agent acknowledged and did not upload; how many it has, "
        "only its write-ahead log knows.",
        err=True,
    )


def _print_outcome(owned: OffsetRange) -> None:
    if owned.status == "lost":
        click.echo(
            f"epoch {owned.epoch}: lost from offset {owned.registered_end:,} on; "
            f"records go on at {owned.end_offset:,} or behind"
        )
    else:
        click.echo(f"epoch {owned.epoch}: {owned.status} meanwhile; nothing of it was declared lost")
