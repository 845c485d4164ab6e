"""streamhouse segment inspect, streamhouse wal inspect: contents of segments and logs, byte by byte, with damage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from streamhouse_cli.failures import CliError, is_installed_with_server
from streamhouse_cli.inspect_files import describe_segment_file, describe_segment_object, describe_wal
from streamhouse_cli.options import CONFIG_FILE, json_option
from streamhouse_cli.output import print_json, print_table, show_bytes, show_time
from streamhouse_cli.process import run
from streamhouse_cli.store_option import objects_of, store_of

ROWS_MAX = 40

all_option = click.option("--all", "show_all", is_flag=True, help=f"Show every row, not the first {ROWS_MAX}.")


@click.group(short_help="Show the contents of segments.")
def segment() -> None:
    """Show the contents of segments."""


@segment.command("inspect", short_help="Show blocks and damage of a segment.")
@click.argument("source", type=click.UNPROCESSED, metavar="FILE|KEY")
@click.option(
    "--data-dir", type=click.Path(exists=True, file_okay=False), help="Of `streamhouse serve`, on this machine."
)
@click.option("--store-dir", type=click.Path(file_okay=False), help="Local object store that holds KEY.")
@click.option("--config", type=CONFIG_FILE, help="TOML file with store settings.")
@all_option
@json_option
def inspect_segment(
    source: str, data_dir: str | None, store_dir: str | None, config: str | None, show_all: bool, as_json: bool
) -> None:
    """Show header, blocks and damage of a segment; exit 1 when it is damaged.

    A FILE that exists is read from disk. Anything else is the KEY of an object in the store that --data-dir,
    --store-dir, STREAMHOUSE_STORE_DIR or the STREAMHOUSE_S3_* variables name. Every byte is read and checked.
    """
    if data_dir is not None and store_dir is not None:
        raise click.UsageError("--data-dir and --store-dir exclude each other")
    path = Path(source)
    if path.is_file():
        described = describe_segment_file(path)
    else:
        described = _from_store(source, store_dir if data_dir is None else objects_of(data_dir), config)
    if not described["segments"]:
        raise CliError(f"{source} is empty: no segment")
    if not any(item["header"] or item["blocks"] for item in described["segments"]):
        raise CliError(f"{source} is no segment, or nothing of it can be read: {_first_damage(described['segments'])}")
    if as_json:
        print_json(described)
    else:
        _print_object(described, None if show_all else ROWS_MAX)
    _exit_if_damaged(sum(len(item["damage"]) for item in described["segments"]), source)


def _from_store(key: str, store_dir: str | None, config: str | None) -> dict[str, Any]:
    async def call() -> dict[str, Any]:
        try:
            store = store_of(f"{key} is no file here; for an object key say where the store is", store_dir, config)
        except ModuleNotFoundError as error:
            if not is_installed_with_server(error.name or ""):
                raise
            from shformat import MissingExtra

            what = f"{key} is no file here; for a key of the object store this command"
            raise MissingExtra(what, error.name or "", "server") from error
        try:
            return await describe_segment_object(key, store)
        finally:
            await store.close()

    return run(call)


@click.group(short_help="Show the contents of write-ahead logs.")
def wal() -> None:
    """Show the contents of write-ahead logs."""


@wal.command("inspect", short_help="Show frames and damage of a write-ahead log.")
@click.argument("source", metavar="DIR|FILE", type=click.Path(exists=True, path_type=Path))
@all_option
@json_option
def inspect_wal(source: Path, show_all: bool, as_json: bool) -> None:
    """Show files, frames and damage of a write-ahead log; exit 1 when it is damaged.

    DIR is an agent's log directory, FILE a file in there. The end of the newest file may be a torn write of a
    crash: that write was never acknowledged, and the agent cuts it off at its start. While an agent runs, its newest
    frame may look torn for a moment.
    """
    described = describe_wal(source)
    if not any(item["header"] or item["frames"] for item in described["files"]):
        what = _first_damage(described["files"])
        raise CliError(f"{source} is no write-ahead log, or nothing of it can be read: {what}")
    if as_json:
        print_json(described)
    else:
        for file in described["files"]:
            _print_wal_file(file, None if show_all else ROWS_MAX)
    _exit_if_damaged(sum(len(item["damage"]) for item in described["files"]), str(source))


def _first_damage(described: Sequence[dict[str, Any]]) -> str:
    return next((str(entry["what"]) for item in described for entry in item["damage"]), "it is empty")


def _exit_if_damaged(count: int, source: str) -> None:
    if count:
        raise CliError(f"{source} is damaged in {count} place{'s' if count > 1 else ''}")


# ---- for people


def _print_object(described: dict[str, Any], rows_max: int | None) -> None:
    segments = described["segments"]
    click.echo(f"{described['source']}: {described['size_bytes']:,} bytes, {len(segments)} segment(s)")
    for item in segments:
        _print_segment(item, rows_max)


def _print_segment(item: dict[str, Any], rows_max: int | None) -> None:
    header = item["header"]
    click.echo(f"\nsegment at byte {item['object_at']:,}, {item['size_bytes']:,} bytes")
    if header is None:
        click.echo("  header: damaged")
    else:
        click.echo(
            f"  topic id {header['topic_id']}, partition {header['partition']}, epoch {header['epoch']}\n"
            f"  offsets {header['base_offset']:,} to {header['end_offset']:,} (exclusive), "
            f"{header['record_count']:,} records, codec {header['codec']}"
        )
    index = "intact" if item["index_intact"] else "damaged: blocks found by walking"
    click.echo(
        f"  {show_bytes(item['raw_bytes'])} before compression, ratio {item['compression_ratio']}; "
        f"footer at {item['footer_at']:,}, index {index}"
    )
    columns = [
        "block#",
        "at#",
        "bytes#",
        "first offset#",
        "end offset#",
        "records#",
        "epoch#",
        "raw#",
        "first time",
        "",
    ]
    blocks = item["blocks"]
    rows = [
        (
            position,
            block["at"],
            block["size_bytes"],
            block["first_offset"],
            block["end_offset"],
            block["record_count"],
            block["epoch"],
            block["uncompressed_bytes"],
            show_time(block["first_timestamp_ms"]),
            "" if block["intact"] else "DAMAGED",
        )
        for position, block in enumerate(blocks)
    ]
    _print_rows("blocks", columns, rows, rows_max)
    for entry in item["damage"]:
        at, start = entry["at"], item["object_at"]
        click.echo(f"  damage at byte {at:,} of the segment, {start + at:,} of the object: {entry['what']}")


def _print_wal_file(item: dict[str, Any], rows_max: int | None) -> None:
    header = item["header"]
    shown = "header damaged" if header is None else f"log {header['wal_id']}, sequence {header['sequence']}"
    click.echo(f"{item['file']}: {item['size_bytes']:,} bytes, {shown}")
    click.echo(f"  {len(item['frames']):,} frames, {item['record_count']:,} records")
    columns = ["at#", "bytes#", "topic id", "partition#", "epoch#", "base offset#", "records#", "codec", ""]
    rows = [
        (
            frame["at"],
            frame["size_bytes"],
            frame["topic_id"],
            frame["partition"],
            frame["epoch"],
            frame["base_offset"],
            frame["record_count"],
            frame.get("batch", {}).get("codec"),
            "" if frame["intact"] else "DAMAGED",
        )
        for frame in item["frames"]
    ]
    _print_rows("frames", columns, rows, rows_max)
    if item["space_ahead_bytes"]:
        click.echo(f"  {item['space_ahead_bytes']:,} bytes of zeros for the frames to come")
    for entry in item["damage"]:
        click.echo(
            f"  damage at byte {entry['at']:,}, {entry['size_bytes']:,} bytes: {entry['what']}{_lost(entry['lost'])}"
        )
    if item["ends_in_damage"]:
        click.echo("  the damage reaches the end of the file: in the newest file a torn write, never acknowledged")


def _lost(lost: dict[str, Any] | None) -> str:
    if lost is None:
        return ""
    end = lost["base_offset"] + lost["record_count"]
    return f"; lost: {lost['topic_id']}/{lost['partition']} offsets {lost['base_offset']:,} to {end:,} (exclusive)"


def _print_rows(title: str, columns: list[str], rows: Sequence[Sequence[object]], rows_max: int | None) -> None:
    """Prints the first `rows_max` rows, and damaged rows beyond, which the user is looking for."""
    kept = [row for at, row in enumerate(rows) if rows_max is None or at < rows_max or row[-1]]
    if rows:
        print_table(title, columns, kept)
    if len(kept) < len(rows):
        click.echo(f"  … {len(rows) - len(kept):,} more, shown with --all")
