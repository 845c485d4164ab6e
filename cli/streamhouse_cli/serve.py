"""streamhouse serve: the whole platform in one process."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from streamhouse_cli.options import HostPort, advertise_option
from streamhouse_cli.services import environ_with, load_all_settings, run_service

if TYPE_CHECKING:
    from streamhouse_embedded.wiring import Ready

DEFAULT_ADDRESS = "127.0.0.1:7070"


@click.command(short_help="Run the whole platform in one process.")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False),
    help="Directory that holds everything; made when missing. Default: ./streamhouse-data  [env: STREAMHOUSE_DATA_DIR]",
)
@click.option(
    "--listen",
    type=HostPort(port_min=0),
    help=f"Address to listen on, port 0 takes a free one. Default: {DEFAULT_ADDRESS}  [env: STREAMHOUSE_LISTEN]",
)
@advertise_option
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False), help="TOML file with settings  [env: STREAMHOUSE_CONFIG]"
)
@click.option("--json", "as_json", is_flag=True, help="Say where it listens as one JSON line, once it serves.")
def serve(data_dir: str | None, listen: str | None, advertise: str | None, config: str | None, as_json: bool) -> None:
    """Run the whole platform in this process, on a local directory: no other server is needed.

    Ctrl-C or SIGTERM stops it after sealing, uploading and registering what is in the log. SIGHUP does not: it opens
    the log file anew, if there is a log file. Other settings come from STREAMHOUSE_* variables and a TOML file;
    docs/settings.md lists them.
    """
    # The services read their own settings inside this process, so the options have to reach the variables.
    os.environ.update(environ_with(data_dir=data_dir, listen=listen, advertise=advertise, config=config))
    load_all_settings()
    from streamhouse_embedded.settings import EmbeddedSettings

    settings = EmbeddedSettings.load()
    from streamhouse_coordinator.adapters.migrate import DatabaseRefused
    from streamhouse_embedded.data_dir import DataDirError
    from streamhouse_embedded.postgres import PostgresError
    from streamhouse_embedded.wiring import serve as run
    from streamhouse_ingest.ports import WalBroken, WalDamaged, WalDirectoryError

    expected = (DataDirError, PostgresError, WalDirectoryError, WalDamaged, WalBroken, DatabaseRefused)
    run_service(lambda: run(settings, lambda ready: _announce_soon(ready, as_json)), *expected)


def _announce_soon(ready: Ready, as_json: bool) -> None:
    """Announces the address in the event loop's next turn: the signal handlers are in place then, so that a script
    which stops the process at the announcement still gets a drain."""
    import asyncio

    asyncio.get_running_loop().call_soon(_announce_json if as_json else _announce, ready)


def _announce(ready: Ready) -> None:
    at = "" if ready.address == DEFAULT_ADDRESS else f" --bootstrap {ready.address}"
    click.echo(
        f"StreamHouse serves on {ready.address}, data in {ready.data_dir}\n\n"
        "Try next, in another terminal:\n"
        f"  streamhouse topic create orders --partitions 4{at}\n"
        f"  echo hello | streamhouse produce orders{at}\n"
        f"  streamhouse consume orders --from earliest{at}\n{_psql_line(ready)}\n"
        "Ctrl-C stops it; nothing is lost."
    )


def _psql_line(ready: Ready) -> str:
    """Returns the line that runs a query with psql; empty if nothing listens for it."""
    if not ready.sql_pg_address:
        return ""
    host, _, port = ready.sql_pg_address.rpartition(":")
    return f"  psql -h {host.strip('[]')} -p {port} -d streamhouse -c 'SELECT _value FROM orders'\n"


def _announce_json(ready: Ready) -> None:
    said = {"address": ready.address, "data_dir": ready.data_dir, "pid": os.getpid()}
    click.echo(json.dumps(said | {"sql_pg_address": ready.sql_pg_address or None}))
