"""Selects a PostgreSQL server: a DSN may name a primary and its standbys."""

import logging
from typing import Any
from urllib.parse import parse_qs

import asyncpg

from streamhouse_coordinator.adapters.postgres_errors import FAILURES, UNUSABLE_DSN, is_away

log = logging.getLogger(__name__)

READ_WRITE = "target_session_attrs=read-write"


class Hosts:
    """The servers of a DSN, with the server that was reached last at the front."""

    def __init__(self, dsn: str) -> None:
        self._places = by_host(dsn)

    async def connect(self, *, timeout_s: float, **options: Any) -> Any:
        """Returns a connection to the first server that answers and, among several, accepts writes.

        Each server gets a share of `timeout_s`: asyncpg would wait for a machine that is gone, and does not even
        refuse, until no time is left for the standby. `options` are those of asyncpg.connect, as are the errors; with
        several servers, an OSError with the answer of each.
        """
        if len(self._places) == 1:
            return await asyncpg.connect(self._places[0][1], timeout=timeout_s, **options)
        answers = []
        for place in list(self._places):
            try:
                connection = await asyncpg.connect(place[1], timeout=timeout_s / len(self._places), **options)
            except UNUSABLE_DSN:
                raise
            except FAILURES as error:
                if not is_away(error):
                    raise
                answers.append(f"{place[0]}: {_what(error)}")
            else:
                self._prefer(place)
                return connection
        raise OSError("; ".join(answers))

    def _prefer(self, place: tuple[str, str]) -> None:
        if self._places[0] != place:
            log.info("PostgreSQL: %s is the primary now", place[0])
            self._places.remove(place)
            self._places.insert(0, place)


def by_host(dsn: str) -> list[tuple[str, str]]:
    """Returns (host:port, URI) for each server of a libpq URI, in its order; each URI names a single server.

    Among several only a server that accepts writes is of use, so this is requested unless `target_session_attrs` is
    given. https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS
    """
    scheme, slashes, rest = dsn.partition("//")
    at_end = min((rest.find(mark) for mark in "/?" if mark in rest), default=len(rest))
    authority, tail = rest[:at_end], rest[at_end:]
    credentials, at, hosts = authority.rpartition("@")
    if "," not in hosts:
        return [(hosts, dsn)]
    if "target_session_attrs" not in parse_qs(tail.partition("?")[2]):
        tail += ("&" if "?" in tail else "?") + READ_WRITE
    return [(host, f"{scheme}{slashes}{credentials}{at}{host}{tail}") for host in hosts.split(",")]


def _what(error: BaseException) -> str:
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return "takes no writes, a standby"
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
