"""The socket that PostgreSQL's clients connect to. Only the standard library and settings are imported here: `serve`
opens the socket, and hands it to the process that runs SQL, which takes over a second to import."""

from __future__ import annotations

import logging
import os
import socket

from shruntime.server import ListenError

from streamhouse_sql.settings import SqlSettings

log = logging.getLogger(__name__)

BACKLOG = 128


def open_listener(settings: SqlSettings) -> socket.socket | None:
    """Returns a socket that listens on `sql_pg_listen`; None if that is empty.

    The default port is often PostgreSQL's own second server: None if it is taken, with a warning. Raises ListenError
    for an address that the settings name."""
    if not settings.sql_pg_listen:
        return None
    try:
        return _listener(settings.sql_pg_listen)
    except ListenError as error:
        if "sql_pg_listen" in settings.model_fields_set:
            raise
        log.warning(
            "%s: PostgreSQL's clients cannot connect; set sql_pg_listen (STREAMHOUSE_SQL_PG_LISTEN) to another "
            "address, port 0 for any that is free, or to nothing to switch it off",
            error,
        )
        return None


def address_of(listener: socket.socket, settings: SqlSettings) -> str:
    """Returns host:port of the socket, the host as in the settings."""
    return f"{settings.sql_pg_listen.rpartition(':')[0]}:{listener.getsockname()[1]}"


def _listener(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    try:
        family, _, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        return socket.create_server(target[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else str(error)
        raise ListenError(f"cannot listen on {listen} (sql_pg_listen): {reason}") from error
