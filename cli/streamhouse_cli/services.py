"""streamhouse ingest | segmenter | query | coordinator: one service of a distributed platform, in this process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import click
from shruntime import signals

from streamhouse_cli import process
from streamhouse_cli.failures import CliError, one_line
from streamhouse_cli.options import HostPort, advertise_option

SETTINGS_MODULES = ("ingest", "segmenter", "query", "sql", "coordinator", "embedded")


def load_all_settings() -> None:
    """Makes the settings of every service known, so that one file and one set of variables may serve them all."""
    for name in SETTINGS_MODULES:
        importlib.import_module(f"streamhouse_{name}.settings")


def service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the command with --config, --listen, --advertise and --bootstrap, which come before the variables."""
    options = (
        click.option(
            "--config", type=click.Path(exists=True, dir_okay=False), help="TOML file  [env: STREAMHOUSE_CONFIG]"
        ),
        click.option("--listen", type=HostPort(port_min=0), help="Address to listen on  [env: STREAMHOUSE_LISTEN]"),
        advertise_option,
        click.option("--bootstrap", type=HostPort(many=True), help="Coordinators  [env: STREAMHOUSE_BOOTSTRAP]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def environ_with(**options: str | None) -> dict[str, str]:
    """Returns the environment, with the given options in place of their variables."""
    given = {f"STREAMHOUSE_{name.upper()}": value for name, value in options.items() if value is not None}
    return {**os.environ, **given}


@click.command(short_help="Run an ingest agent.")
@service_options
def ingest(**options: str | None) -> None:
    """Run an ingest agent: takes records into its write-ahead log.

    Settings come from STREAMHOUSE_* variables and a TOML file; docs/settings.md lists them.
    """
    load_all_settings()
    from streamhouse_ingest.settings import IngestSettings

    settings = IngestSettings.load(environ_with(**options))
    from streamhouse_ingest.ports import WalBroken, WalDamaged, WalDirectoryError
    from streamhouse_ingest.wiring import run

    run_service(lambda: run(settings), WalDirectoryError, WalDamaged, WalBroken)


@click.command(short_help="Run a query service.")
@service_options
def query(**options: str | None) -> None:
    """Run a query service: serves reads from segments, through its disk cache.

    Settings come from STREAMHOUSE_* variables and a TOML file; docs/settings.md lists them.
    """
    load_all_settings()
    from streamhouse_query.settings import QuerySettings

    settings = QuerySettings.load(environ_with(**options))
    from streamhouse_query.wiring import run

    run_service(lambda: run(settings))


@click.command("sql-worker", short_help="Run a SQL service.")
@service_options
def sql_worker(**options: str | None) -> None:
    """Run a SQL service: runs SQL statements over topics; as many as wanted.

    Settings come from STREAMHOUSE_* variables and a TOML file; docs/settings.md lists them.
    """
    load_all_settings()
    from streamhouse_sql.settings import SqlSettings

    settings = SqlSettings.load(environ_with(**options))
    from streamhouse_sql.wiring import run

    run_service(lambda: run(settings))


@click.command(short_help="Run a coordinator.")
@service_options
def coordinator(**options: str | None) -> None:
    """Run a coordinator: topics, leases, segments and groups, in PostgreSQL.

    Settings come from STREAMHOUSE_* variables and a TOML file; docs/settings.md lists them.
    """
    load_all_settings()
    from streamhouse_coordinator.settings import CoordinatorSettings

    settings = CoordinatorSettings.load(environ_with(**options))
    from streamhouse_coordinator.adapters.migrate import DatabaseRefused
    from streamhouse_coordinator.wiring import run

    run_service(lambda: run(settings), DatabaseRefused)


@click.command(short_help="Run a segmenter.")
@service_options
def segmenter(**options: str | None) -> None:
    """Run a segmenter: builds segments, uploads and registers them, keeps house.

    Settings come from STREAMHOUSE_* variables and a TOML file; docs/settings.md lists them.
    """
    environ = environ_with(**options)
    if importlib.util.find_spec("nameko") is None:  # here, where the error becomes a line
        from shformat import MissingExtra

        raise MissingExtra("streamhouse segmenter", "nameko", "server")
    # nameko wants eventlet's patching before anything else is imported: too late in this process, so replace it.
    environ["EVENTLET_HUB"] = "asyncio"
    sys.stdout.flush()
    sys.stderr.flush()
    signals.hold_back()
    os.execve(sys.executable, [sys.executable, "-m", "streamhouse_segmenter"], environ)


def run_service(service: Callable[[], Coroutine[Any, Any, None]], *expected: type[Exception]) -> None:
    """Runs a service, which handles SIGINT and SIGTERM itself, until it stops. `expected`: errors of the service,
    besides those of every command, that an operator gets as a line and not as a traceback."""
    import uvloop

    os.umask(0o077)  # logs, caches and data directories hold records, which other users must not read
    try:
        process.run(service, uvloop.new_event_loop)
    except expected as error:
        raise CliError(one_line(str(error))) from error
