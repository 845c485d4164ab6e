"""Which of several PostgreSQL servers to talk to: a DSN may name a primary and its standbys."""

import logging
from typing import Any
from urllib.parse import parse_qs

import asyncpg

from streamhouse_coordinator.adapters.postgres_errors import FAILURES, UNUSABLE_DSN, is_away

log = logging.getLogger(__name__)

READ_WRITE = "target_session_attrs=read-write"


class Hosts:
    """The servers of one DSN, the one that was reached last before the others."""

    def __init__(self, dsn: str) -> None:
        self._places = by_host(dsn)

    async def connect(self, *, timeout_s: float, **options: Any) -> Any:
        """A connection to the first server that answers, and takes writes if there are several.

        Each gets its share of `timeout_s`: asyncpg would wait for a machine that is gone, and does not even refuse,
        until there is no time left for its standby. `options` are those of asyncpg.connect, whose errors are raised;
        with several servers, OSError saying what each answered.
        """
        if len(self._places) == 1:
            return await asyncpg.connect(self._places[0][1], timeout=timeout_s, **options)
        said = []
        for place in list(self._places):
            try:
                connection = await asyncpg.connect(place[1], timeout=timeout_s / len(self._places), **options)
            except UNUSABLE_DSN:
                raise
            except FAILURES as error:
                if not is_away(error):
                    raise
                said.append(f"{place[0]}: {_what(error)}")
            else:
                self._prefer(place)
                return connection
        raise OSError("; ".join(said))

    def _prefer(self, place: tuple[str, str]) -> None:
        if self._places[0] != place:
            log.info("PostgreSQL: %s is the primary now", place[0])
            self._places.remove(place)
            self._places.insert(0, place)


def by_host(dsn: str) -> list[tuple[str, str]]:
    """For each server of a libpq URI, in its order: host:port, and a URI that names only this one.

    Of several only one that takes writes is of use, so that is asked for unless `target_session_attrs` is given.
    https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS
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
