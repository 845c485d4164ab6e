"""streamhouse verify: compares the object store with the registry."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from streamhouse_cli.ask import open_peers
from streamhouse_cli.failures import CliError
from streamhouse_cli.options import CONFIG_FILE, Number, bootstrap_option, json_option
from streamhouse_cli.output import print_json, print_table, show_bytes, show_time
from streamhouse_cli.process import is_terminal, run
from streamhouse_cli.store_option import objects_of, store_of

if TYPE_CHECKING:
    from streamhouse_cli.registry_check import Finding
    from streamhouse_cli.verify_store import VerifyReport

# The default time that segmenters wait before an object counts as an orphan: it may still be registered.
GRACE_MS = 3_600_000
ROWS_MAX = 100

Bar = tuple[Callable[[int], None], Callable[[int], None]]


@click.command(short_help="Read every segment, and compare it with the registry.")
@click.option("--topic", help="Only this topic. Default: all, and objects that no topic owns.")
@click.option(
    "--data-dir", type=click.Path(exists=True, file_okay=False), help="Of `streamhouse serve`, on this machine."
)
@click.option("--store-dir", type=click.Path(exists=True, file_okay=False), help="Local object store.")
@click.option("--config", type=CONFIG_FILE, help="TOML file with store settings.")
@click.option(
    "--grace-ms",
    type=Number(min=0),
    default=GRACE_MS,
    show_default=True,
    help="Objects that are not registered count as findings when they are older than this.",
)
@json_option
@bootstrap_option
def verify(
    topic: str | None,
    data_dir: str | None,
    store_dir: str | None,
    config: str | None,
    grace_ms: int,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Read every registered segment, check every checksum, decode it, and compare it with the registry.

    Reports segments that are missing, damaged or different, overlaps, gaps inside an epoch, objects without
    a registration, metadata that is older than the store has seen, and rows that differ from their events. Exit 1 if
    there is any. Needs a coordinator and the store: --data-dir, --store-dir or STREAMHOUSE_S3_*. Changes nothing;
    changes by the running platform, and objects that wait for the sweep, are no findings.
    """
    if data_dir is not None and store_dir is not None:
        raise click.UsageError("--data-dir and --store-dir exclude each other")
    directory = objects_of(data_dir) if data_dir is not None else store_dir
    report = run(lambda: _verify(bootstrap, topic, directory, config, grace_ms))
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)
    if report.findings:
        raise CliError(f"{len(report.findings)} finding{'s' if len(report.findings) > 1 else ''}")


async def _verify(
    bootstrap: str, topic: str | None, directory: str | None, config: str | None, grace_ms: int
) -> VerifyReport:
    from streamhouse_segmenter.ports import Ports
    from streamhouse_segmenter.settings import SegmenterSettings
    from streamhouse_segmenter.sweeper import OrphanSweeper

    from streamhouse_cli.registry_check import Finding
    from streamhouse_cli.services import environ_with
    from streamhouse_cli.verify_store import Verifier

    store = store_of("say where the object store is", directory, config)
    settings = SegmenterSettings.load(environ_with(store_dir=directory, config=config))
    # Listing a snapshot of many segments takes a while; this is the wait for each answer.
    peers = open_peers(bootstrap, 60_000)
    try:
        await store.check()
        with _progress() as (started, progress):
            verifier = Verifier(
                peers.coordinator, store, topic=topic, grace_ms=grace_ms, started=started, progress=progress
            )
            report = await verifier.run()
        history = await OrphanSweeper(
            Ports(coordinator=peers.coordinator, store=store, ingest_at=peers.ingest), settings
        ).check_history()
        if history.unreadable:
            report.findings.insert(0, Finding(kind="damaged", what=history.refused))
        elif history.refused:
            what = f"{history.refused}. Agents and sweeps refuse it: bring the metadata back with `streamhouse restore`"
            report.findings.insert(0, Finding(kind="outdated", what=what))
        elif time.time_ns() // 1_000_000 < history.mark.sweep_from_ms:
            report.rest_until(history.mark.sweep_from_ms)
        return report
    finally:
        await peers.close()
        await store.close()


@contextmanager
def _progress() -> Iterator[Bar]:
    """Yields functions that take the total of bytes and the bytes read since, drawn on stderr if that is a terminal."""
    if not is_terminal(sys.stderr):
        yield (lambda total: None), (lambda size_bytes: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify", total=None)
        yield (
            (lambda total: bar.update(task, total=total)),
            (lambda size_bytes: bar.update(task, advance=size_bytes)),
        )


def _print_report(report: VerifyReport) -> None:
    click.echo(
        f"{report.segments:,} segments read, {report.records:,} records, {show_bytes(report.size_bytes)}; "
        f"{report.objects:,} objects listed"
    )
    if report.metadata_rows:
        click.echo(f"{report.metadata_rows:,} rows of metadata compared with the events")
    for count, what in (
        (report.lost_spans, "spans are registered as lost: there is nothing to read"),
        (report.replaced, "segments were replaced or removed meanwhile"),
        (report.young_objects, "objects are not registered, and too new to say that they will not be"),
        (report.waiting_objects, "objects wait for the sweep: nothing refers to them any more"),
        (
            report.resting_objects,
            f"objects are not registered, and rest until {show_time(report.resting_until_ms)}, after a restore",
        ),
    ):
        if count:
            click.echo(f"{count:,} {what}")
    if report.findings:
        click.echo()
        columns = ["finding", "topic", "partition#", "from offset#", "to#", "object", "at#", ""]
        print_table("findings", columns, map(_row, report.findings[:ROWS_MAX]))
    if len(report.findings) > ROWS_MAX:
        click.echo(f"… {len(report.findings) - ROWS_MAX:,} more, shown with --json")


def _row(finding: Finding) -> tuple[object, ...]:
    numbers = (finding.partition, finding.base_offset, finding.end_offset, finding.object_at)
    partition, base, end, at = (None if number < 0 else number for number in numbers)
    return finding.kind, finding.topic, partition, base, end, finding.object_key, at, finding.what
