"""streamhouse sweep: deletes objects without a registered segment, or lists them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import click

from streamhouse_cli.ask import open_peers
from streamhouse_cli.failures import CliError
from streamhouse_cli.options import CONFIG_FILE, Number, bootstrap_option, json_option
from streamhouse_cli.output import confirm, print_json, print_table, show_bytes, show_span, show_time
from streamhouse_cli.process import run
from streamhouse_cli.store_option import objects_of, store_of
from streamhouse_cli.verify import ROWS_MAX

if TYPE_CHECKING:
    from streamhouse_segmenter.core.sweep import Orphan
    from streamhouse_segmenter.sweeper import SweepReport

# Kept in memory and printed with --json: some 50 MB. All are counted.
OBJECTS_MAX = 100_000


@dataclass(slots=True, kw_only=True)
class Found:
    """Unreferenced objects: all are counted, the first ROWS_MAX kept."""

    confirm_ms: int
    objects: list[Orphan] = field(default_factory=list)
    count: int = 0
    size_bytes: int = 0
    deletable: int = 0
    deletable_bytes: int = 0

    def add(self, orphan: Orphan) -> None:
        self.count += 1
        self.size_bytes += orphan.size_bytes
        if orphan.deletable:
            self.deletable += 1
            self.deletable_bytes += orphan.size_bytes
        if len(self.objects) < OBJECTS_MAX:
            self.objects.append(orphan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Object store, coordinators that know its objects, and the times that a sweep waits."""

    bootstrap: str
    store_dir: str | None
    config: str | None
    prefix: str
    patience: dict[str, int]


@click.command(short_help="Delete objects that no segment lies in.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted, and why.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--prefix", default="", help="Only objects whose keys begin so: data/… or mixed/… Default: all.")
@click.option(
    "--data-dir", type=click.Path(exists=True, file_okay=False), help="Of `streamhouse serve`, on this machine."
)
@click.option("--store-dir", type=click.Path(exists=True, file_okay=False), help="Local object store.")
@click.option("--config", type=CONFIG_FILE, help="TOML file with store and segmenter settings.")
@click.option(
    "--grace-ms",
    type=Number(min=1_000),
    help="Objects and uploads that are younger are left alone. Default: the segmenters' orphan_grace_ms.",
)
@click.option(
    "--confirm-ms",
    type=Number(min=0),
    help="Time for readers from noticing an orphan to deleting it. Default: the segmenters' orphan_confirm_ms.",
)
@json_option
@bootstrap_option
def sweep(
    dry_run: bool,
    yes: bool,
    prefix: str,
    data_dir: str | None,
    store_dir: str | None,
    config: str | None,
    grace_ms: int | None,
    confirm_ms: int | None,
    as_json: bool,
    bootstrap: str,
) -> None:
    """Delete objects without a registered segment, as segmenters do by and by: once, now, and asking first.

    Shows each with the reason, its size, its age and the time since which nothing refers to it. The coordinator decides
    about every object, and refuses those that are part of the log or are being uploaded; nothing can be registered in
    an object from then on. An object not noticed before is deleted by a later sweep, --confirm-ms after. Refuses (exit
    1) when PostgreSQL holds an earlier state than the store has seen: a restored backup.
    """
    if data_dir is not None and store_dir is not None:
        raise click.UsageError("--data-dir and --store-dir exclude each other")
    directory = objects_of(data_dir) if data_dir is not None else store_dir
    given = {"orphan_grace_ms": grace_ms, "orphan_confirm_ms": confirm_ms}
    patience = {name: value for name, value in given.items() if value is not None}
    place = Place(bootstrap=bootstrap, store_dir=directory, config=config, prefix=_checked(prefix), patience=patience)
    # First without deleting, so that the question names what would go.
    report, found = _sweep(place, dry_run=True)
    if not as_json:
        _print_found(found, report)
    if not dry_run:
        if found.deletable and not yes:
            question = f"Delete {found.deletable:,} objects, {show_bytes(found.deletable_bytes)}, for good?"
            confirm(question)
        # Looked at anew: what was registered while the question stood is not deleted.
        report, found = _sweep(place, dry_run=False)
    if as_json:
        print_json({"dry_run": dry_run, **asdict(report), "objects": [_described(item) for item in found.objects]})
    elif not dry_run:
        click.echo(f"{report.deleted:,} objects deleted, {show_bytes(report.deleted_bytes)}; {report.waiting:,} later")


def _checked(prefix: str) -> str:
    """Returns the prefix. Raises UsageError for a prefix under which segmenters put no objects."""
    if prefix and not prefix.startswith(("data/", "mixed/")):
        raise click.UsageError(f"--prefix must begin with data/ or mixed/, got {prefix!r}")
    return prefix


def _sweep(place: Place, *, dry_run: bool) -> tuple[SweepReport, Found]:
    """Runs one sweep; returns its report and the orphans found. Raises CliError when the sweep refuses."""
    from streamhouse_segmenter.sweeper import refusal

    report, found = run(lambda: _run(place, dry_run))
    if report.refused:
        raise CliError(refusal(report.refused))
    if report.resting_until_ms:
        until = show_time(report.resting_until_ms)
        raise CliError(f"the metadata was restored not long ago: nothing is deleted before {until}")
    return report, found


async def _run(place: Place, dry_run: bool) -> tuple[SweepReport, Found]:
    from shproto.v1 import coordinator_pb2
    from streamhouse_segmenter.ports import Ports
    from streamhouse_segmenter.settings import SegmenterSettings
    from streamhouse_segmenter.sweeper import OrphanSweeper

    from streamhouse_cli.services import environ_with

    store = store_of("say where the object store is", place.store_dir, place.config)
    settings = SegmenterSettings.load(
        environ_with(store_dir=place.store_dir, config=place.config), **place.patience, orphan_dry_run=dry_run
    )
    found = Found(confirm_ms=settings.orphan_confirm_ms)
    peers = open_peers(place.bootstrap, settings.rpc_timeout_ms)
    try:
        await store.check()
        await peers.coordinator.get_status(coordinator_pb2.GetStatusRequest())  # a sweep of an empty store asks nothing
        sweeper = OrphanSweeper(Ports(coordinator=peers.coordinator, store=store, ingest_at=peers.ingest), settings)
        return await sweeper.run(place.prefix, found.add), found
    finally:
        await peers.close()
        await store.close()


def _described(orphan: Orphan) -> dict[str, Any]:
    return {**asdict(orphan), "why": orphan.why}


def _print_found(found: Found, report: SweepReport) -> None:
    if found.objects:
        now_ms = time.time_ns() // 1_000_000
        columns = ["object", "size#", "age#", "unreferenced since", "deletable", "why"]
        rows = (
            (
                item.key,
                show_bytes(item.size_bytes),
                show_span(now_ms - item.modified_ms),
                show_time(item.since_ms),
                "now" if item.deletable else f"in {show_span(item.since_ms + found.confirm_ms - now_ms)}",
                item.why,
            )
            for item in found.objects[:ROWS_MAX]
        )
        print_table("orphans", columns, rows)
    if found.count > ROWS_MAX:
        click.echo(f"… {found.count - ROWS_MAX:,} more, shown with --json")
    click.echo(
        f"{found.count:,} objects that no segment lies in, {show_bytes(found.size_bytes)}; "
        f"{found.deletable:,} may be deleted now, {show_bytes(found.deletable_bytes)}"
    )
    if report.in_upload:
        click.echo(f"{report.in_upload:,} old objects are being uploaded, and may still be registered")
