"""streamhouse restore: the metadata out of a backup, and newer segments out of the object store."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from streamhouse_cli.ask import open_peers
from streamhouse_cli.failures import CliError, one_line
from streamhouse_cli.metadata import metadata_of
from streamhouse_cli.options import bootstrap_option, json_option
from streamhouse_cli.output import confirm, print_json, print_table
from streamhouse_cli.process import is_terminal, run

if TYPE_CHECKING:
    from shproto.v1.coordinator_pb2 import CompleteRestoreResponse
    from shstore import ObjectStore
    from streamhouse_coordinator.core.tables import EventRow
    from streamhouse_coordinator.recovery.restore import PartitionReport, RestoreReport

ROWS_MAX = 100


@click.command(short_help="Bring the metadata back from a backup.")
@click.option("--backup", "name", help="Which one; `backup --list` shows them.  [default: latest]")
@click.option("--dry-run", is_flag=True, help="Only say what would come back; the database stays empty.")
@click.option("--accept-holes", is_flag=True, help="Also take segments behind holes; the holes count as lost.")
@click.option("--complete", is_flag=True, help="All agents are back: let readers pass what is left of a restore.")
@click.option(
    "--lost", is_flag=True, help="With --complete: some are not; readers get DATA_LOSS for records that may be lost."
)
@click.option("--reason", default="", help="With --complete --lost: why, for those who read the event later.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--data-dir", type=click.Path(exists=True, file_okay=False), help="Of `streamhouse serve`, on this machine."
)
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="TOML file with settings.")
@json_option
@bootstrap_option
def restore(
    name: str | None,
    dry_run: bool,
    accept_holes: bool,
    complete: bool,
    lost: bool,
    reason: str,
    yes: bool,
    data_dir: str | None,
    config: str | None,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Restore the metadata into an EMPTY database, while no service runs.

    Segments that were registered after the backup are found in the object store and come back as well. Then start
    everything, with the agents' write-ahead logs as they are: records that only these have come back, too. Readers wait
    where records may be missing until all agents are back and `streamhouse restore --complete` says so.
    docs/backup.md has the whole story.
    """
    if complete:
        if name is not None or accept_holes or data_dir is not None or config is not None:
            raise click.UsageError("--complete takes --lost, --reason, --dry-run and --yes only: it asks a coordinator")
        _complete(bootstrap, lost=lost, dry_run=dry_run, reason=reason, yes=yes, as_json=as_json)
        return
    if lost or reason:
        raise click.UsageError("--lost and --reason go with --complete")
    name = name or "latest"
    if not (dry_run or yes):
        confirm(f"Restore the {name} backup? No service may be running.")
    from streamhouse_coordinator.adapters.migrate import DatabaseRefused
    from streamhouse_coordinator.recovery.backup_format import BackupDamaged

    try:
        report = run(lambda: _restore(name, dry_run, accept_holes, data_dir, config))
    except (BackupDamaged, DatabaseRefused) as error:
        raise CliError(one_line(str(error))) from error
    if as_json:
        print_json({**asdict(report), "dry_run": dry_run})
    else:
        _print_report(report, dry_run)


async def _restore(
    name: str, dry_run: bool, accept_holes: bool, data_dir: str | None, config: str | None
) -> RestoreReport:
    from streamhouse_coordinator.wiring import restore_backup

    async with metadata_of(data_dir, config, alone=True) as metadata:
        with _progress() as progress:
            report, last = await restore_backup(
                metadata.pg_dsn,
                metadata.store,
                name,
                dry_run=dry_run,
                accept_holes=accept_holes,
                progress=progress,
            )
        if not dry_run:
            await _mark_history(metadata.store, last)
    return report


async def _mark_history(store: ObjectStore, last: EventRow) -> None:
    """Writes the mark by which segmenters recognise this history as the right one; they delete nothing for a while."""
    from streamhouse_segmenter.core.history import MARK_KEY, RESTORE_GRACE_MS, HistoryMark

    from_ms = time.time_ns() // 1_000_000 + RESTORE_GRACE_MS
    mark = HistoryMark(
        position=last.position,
        stream_id=last.stream_id,
        version=last.version,
        type=last.type,
        created_ms=last.created_ms,
        sweep_from_ms=from_ms,
    )
    await store.put(MARK_KEY, [mark.encode()], if_absent=False)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function of (step, count, total or 0) that draws on stderr if that is a terminal."""
    if not is_terminal(sys.stderr):
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("restore", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)


def _print_report(report: RestoreReport, dry_run: bool) -> None:
    click.echo(
        f"{report.backup}{' (dry run, nothing is written)' if dry_run else ''}: {report.events:,} events, "
        f"{report.topics:,} topics, {report.partitions:,} partitions, {report.segments:,} segments; "
        f"{report.adopted_segments:,} segments with {report.adopted_records:,} records came after it and were found"
    )
    if report.changed:
        columns = ["topic", "partition#", "found#", "records#", "missing#", "log begins at#", "lost#", "left out#"]
        print_table("not as in the backup", columns, map(_row, report.changed[:ROWS_MAX]))
    if len(report.changed) > ROWS_MAX:
        click.echo(f"… {len(report.changed) - ROWS_MAX:,} more, shown with --json")
    for text in [*report.warnings, *report.damaged_objects]:
        click.echo(f"warning: {text}")
    if not dry_run:
        waiting = (
            f" ({report.unrecovered_ranges:,} unrecovered ranges, where readers wait)"
            if report.unrecovered_ranges
            else ""
        )
        click.echo(
            "\nNext: start everything, the agents with their write-ahead logs as they are. When all agents are back"
            f"{waiting}:\n  streamhouse restore --complete"
        )


def _row(part: PartitionReport) -> tuple[object, ...]:
    moved = part.log_start_moved[1] if part.log_start_moved else None
    return (
        part.topic,
        part.partition,
        part.adopted_segments,
        part.adopted_records,
        part.missing_segments,
        moved,
        sum(end - base for _, base, end in part.lost),
        len(part.stranded),
    )


# ---- afterwards


def _complete(bootstrap: str, *, lost: bool, dry_run: bool, reason: str, yes: bool, as_json: bool) -> None:
    waiting = run(lambda: _call(bootstrap, lost, True, reason))
    if not waiting.unrecovered_ranges:
        click.echo("no unrecovered ranges are left: readers wait for no agent", err=as_json)
    elif not (yes and as_json):
        rows = [
            (item.topic, item.partition, item.range.registered_end) for item in waiting.unrecovered_ranges[:ROWS_MAX]
        ]
        print_table("readers wait at", ["topic", "partition#", "offset#"], rows, err=True)
        if len(waiting.unrecovered_ranges) > ROWS_MAX:
            click.echo(f"… and at {len(waiting.unrecovered_ranges) - ROWS_MAX:,} more ranges", err=True)
        click.echo(f"Agents that are back: {', '.join(waiting.agents) or 'none'}", err=True)
    if waiting.unrecovered_ranges and not dry_run:
        if not yes:
            what = "Records there that other agents have acknowledged are declared lost"
            effect = "readers get DATA_LOSS" if lost else "readers get no error"
            confirm(f"{what}, and {effect}. Go on?")
        run(lambda: _call(bootstrap, lost, False, reason))
    if as_json:
        ranges = [
            {"topic": item.topic, "partition": item.partition, "offset": item.range.registered_end}
            for item in waiting.unrecovered_ranges
        ]
        print_json({"agents": list(waiting.agents), "unrecovered_ranges": ranges, "lost": lost, "dry_run": dry_run})
    elif waiting.unrecovered_ranges and not dry_run:
        click.echo(f"{len(waiting.unrecovered_ranges):,} unrecovered ranges are ended: readers go on")


async def _call(bootstrap: str, lost: bool, dry_run: bool, reason: str) -> CompleteRestoreResponse:
    from shproto.v1 import coordinator_pb2

    # Thousands of partitions in one transaction take a while.
    peers = open_peers(bootstrap, 60_000)
    try:
        request = coordinator_pb2.CompleteRestoreRequest(lost=lost, dry_run=dry_run, reason=reason)
        return await peers.coordinator.complete_restore(request)
    finally:
        await peers.close()
