"""What asyncpg's errors mean for a caller: try the transaction again, come back later, or correct the settings."""

import asyncpg
from opentelemetry import metrics
from shproto.errors import AWAY, Unavailable

CONFLICTS = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.UniqueViolationError,  # two transactions inserted the same row; the second finds it when run again
)
REFUSED = (  # by a server that may be about to be set up: it gets its users and databases after its start
    asyncpg.InvalidAuthorizationSpecificationError,  # wrong password, unknown user, nothing in pg_hba.conf
    asyncpg.InvalidCatalogNameError,  # no such database
    asyncpg.InsufficientPrivilegeError,  # not yet granted
)
ABSENT = (
    *REFUSED,
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shut down by an administrator, crashed, or still starting
    asyncpg.InsufficientResourcesError,  # too many connections, out of memory, disk full
    asyncpg.ReadOnlySQLTransactionError,  # a standby, until it is promoted
    asyncpg.InterfaceError,  # the connection was closed under our feet
    asyncpg.InternalClientError,  # the server closed it in the middle of a handshake
)

UNUSABLE_DSN = (
    asyncpg.ClientConfigurationError,
    asyncpg.UndefinedObjectError,  # an option of the DSN that is no parameter of the server's either
    asyncpg.InvalidParameterValueError,
    asyncpg.CantChangeRuntimeParamError,
)

_absences = metrics.get_meter("streamhouse.coordinator").create_counter(
    "streamhouse_coordinator_postgres_errors_total", description="commands that PostgreSQL did not answer"
)


def unavailable(error: BaseException) -> Unavailable:
    _absences.add(1)
    what = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
    does = "refuses us" if isinstance(error, REFUSED) else "does not answer"
    return Unavailable(f"PostgreSQL {does}: {what}", retry_after_ms=1000, database=AWAY)
