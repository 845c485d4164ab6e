"""Classifies errors of PostgreSQL and asyncpg by the caller's next step: run the transaction again, retry later,
correct the settings. Any other error belongs to a statement that should not have been sent, a defect of ours.

The SQLSTATE decides (https://www.postgresql.org/docs/current/errcodes-appendix.html), not asyncpg's class: servers and
proxies answer with codes for which asyncpg has no class.
"""

import logging

import asyncpg
from opentelemetry import metrics
from shproto.errors import AWAY, Internal, StreamHouseError, Unavailable
from shruntime.counters import counter

log = logging.getLogger(__name__)

CONFLICTS = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.UniqueViolationError,  # two transactions inserted the same row; the second finds it when run again
    asyncpg.InvalidCachedStatementError,  # a newer coordinator has migrated the table
)
REFUSED = (  # by a server that may still be in setup, and lacks its users or databases
    asyncpg.InvalidAuthorizationSpecificationError,  # wrong password, unknown user, no entry in pg_hba.conf
    asyncpg.InvalidCatalogNameError,  # no such database
    asyncpg.InsufficientPrivilegeError,  # not yet granted
)
DAMAGED = (asyncpg.DataCorruptedError, asyncpg.IndexCorruptedError)
"""Pages of the server's that its checksums, or what should be in them, prove wrong."""

UNUSABLE_DSN = (
    asyncpg.ClientConfigurationError,
    asyncpg.UndefinedObjectError,  # an option of the DSN that is no parameter of the server either
    asyncpg.InvalidParameterValueError,
    asyncpg.CantChangeRuntimeParamError,
)
DATABASE_FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,  # the connection was closed while in use
    asyncpg.InternalClientError,  # the server closed the connection in the middle of a handshake
)
FAILURES = (OSError, TimeoutError, *DATABASE_FAILURES)
"""All that a call of asyncpg may raise when the database does not do what it is asked."""

# Classes of SQLSTATE that concern the server, its machine or the network, not the statement. The same statement may
# succeed later, on this server or its successor.
AWAY_CLASSES = {
    "08": "the connection broke",
    "40": "rolled back, and not known why, or whether it was committed",
    "53": "disk or memory full, too many connections",
    "55": "rows are locked for longer than lock_timeout, a database is being dropped",
    "57": "shut down, crashed, starting, or the statement took longer than statement_timeout",
    "58": "the operating system failed a read or a write",
    "F0": "its configuration is locked or broken",
    "XX": "its own data or code: damaged pages, files that are missing",
}
AWAY_STATES = {
    "25006": "a standby, until it is promoted",
    "25P03": "the transaction was idle for longer than idle_in_transaction_session_timeout",
    "25P04": "transaction_timeout, of servers that have one",
    "26000": "a pooler gave the transaction another connection",
    "42P05": "the same: a statement of another client has the name",
}
_POOLER_STATES = ("26000", "42P05")
_WAIT_STATES = ("55P03", "57014")  # lock_timeout, statement_timeout

_absences = counter(
    metrics.get_meter("streamhouse.coordinator"),
    "streamhouse_coordinator_postgres_errors_total",
    "commands that PostgreSQL did not answer",
)


def is_away(error: BaseException) -> bool:
    """Returns True if `error`, an instance of FAILURES, does not concern the statement, which may succeed later."""
    if not isinstance(error, asyncpg.PostgresError) or isinstance(error, REFUSED):
        return True
    state = error.sqlstate or ""
    return state[:2] in AWAY_CLASSES or state in AWAY_STATES


def waits_too_long(error: BaseException) -> bool:
    """Returns True if the server has ended a statement that ran, or waited for a lock, for too long."""
    return _sqlstate(error) in _WAIT_STATES


def cannot_be_stored(error: BaseException) -> bool:
    """Returns True for values that no column can hold: a text with a NUL, a number beyond int8."""
    by_client = isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError)
    return isinstance(error, asyncpg.DataError) or (by_client and not isinstance(error, UNUSABLE_DSN))


def translated(error: BaseException) -> StreamHouseError:
    """Returns the error to raise instead of an instance of FAILURES: Unavailable, or Internal for a statement that
    should not have been sent."""
    if is_away(error):
        return unavailable(error)
    log.error("PostgreSQL refused a statement of ours", exc_info=error)
    return Internal(f"PostgreSQL refused a statement of the coordinator: {error}", sqlstate=_sqlstate(error))


def unavailable(error: BaseException) -> Unavailable:
    _absences.add(1)
    what = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
    if _sqlstate(error) in _POOLER_STATES:
        what = (
            f"{what.splitlines()[0]} (if a pooler that gives out transactions is in between: pg_pooler = transaction)"
        )
    does = "refuses us" if isinstance(error, REFUSED) else "does not answer"
    return Unavailable(f"PostgreSQL {does}: {what}", retry_after_ms=1000, database=AWAY)


def _sqlstate(error: BaseException) -> str:
    return (getattr(error, "sqlstate", None) or "") if isinstance(error, asyncpg.PostgresError) else ""
