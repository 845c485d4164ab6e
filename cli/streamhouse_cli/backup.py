"""streamhouse backup: the metadata, into the object store."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from streamhouse_cli.failures import CliError, one_line
from streamhouse_cli.metadata import metadata_of
from streamhouse_cli.options import Number, json_option
from streamhouse_cli.output import print_json, print_table, show_bytes, show_time
from streamhouse_cli.process import run

if TYPE_CHECKING:
    from streamhouse_coordinator.recovery.backup_format import Manifest


@click.command(short_help="Back the metadata up into the object store.")
@click.option("--list", "only_list", is_flag=True, help="Only list the backups there are.")
@click.option("--keep", type=Number(min=1), help="Delete older backups, so that this many are left.")
@click.option(
    "--data-dir", type=click.Path(exists=True, file_okay=False), help="Of `streamhouse serve`, on this machine."
)
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="TOML file with settings.")
@json_option
def backup(only_list: bool, keep: int | None, data_dir: str | None, config: str | None, as_json: bool) -> None:
    """Write all metadata, as of one moment, into the object store: below backup/, beside the records.

    Everything may go on running. Needs PostgreSQL and the store, but no service: --data-dir, or what a coordinator and
    a segmenter are given (STREAMHOUSE_PG_DSN; STREAMHOUSE_S3_* or STREAMHOUSE_STORE_DIR). `streamhouse restore` brings
    it back.
    """
    from streamhouse_coordinator.recovery.backup_format import BackupDamaged

    if only_list and keep is not None:
        raise click.UsageError("--list deletes nothing: leave out --keep")
    try:
        if only_list:
            _print_list(run(lambda: _list(data_dir, config)), as_json)
            return
        manifest, gone = run(lambda: _take(data_dir, config, keep))
    except BackupDamaged as error:
        raise CliError(one_line(str(error))) from error
    if as_json:
        print_json({**_summary(manifest), "deleted": gone})
        return
    click.echo(
        f"{manifest.name}: {manifest.position:,} events, {show_bytes(manifest.size_bytes)} in "
        f"{len(manifest.chunks):,} objects"
    )
    for name in gone:
        click.echo(f"deleted {name}")


async def _take(data_dir: str | None, config: str | None, keep: int | None) -> tuple[Manifest, list[str]]:
    from streamhouse_coordinator.wiring import prune_backups, take_backup

    async with metadata_of(data_dir, config, alone=False) as metadata:
        manifest = await take_backup(metadata.pg_dsn, metadata.store)
        gone = await prune_backups(metadata.store, keep) if keep is not None else []
        return manifest, gone


async def _list(data_dir: str | None, config: str | None) -> list[Manifest]:
    from streamhouse_coordinator.wiring import read_backups

    async with metadata_of(data_dir, config, alone=False) as metadata:
        return await read_backups(metadata.store)


def _summary(manifest: Manifest) -> dict[str, object]:
    values = {name: value for name, value in asdict(manifest).items() if name != "chunks"}
    return {**values, "objects": len(manifest.chunks), "size_bytes": manifest.size_bytes}


def _print_list(manifests: list[Manifest], as_json: bool) -> None:
    if as_json:
        print_json([_summary(manifest) for manifest in manifests])
        return
    rows = [
        (item.name, show_time(item.created_ms), item.position, show_bytes(item.size_bytes), item.history_id)
        for item in manifests
    ]
    print_table("backups", ["backup", "taken", "events#", "size#", "history"], rows)
