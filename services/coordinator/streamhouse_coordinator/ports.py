"""What the service asks of a store. adapters/postgres.py is the real one, adapters/memory.py the one of unit tests."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from shproto.events import Event

from streamhouse_coordinator.core.projection import RowOp
from streamhouse_coordinator.core.tables import LOST, ORPHANED, EventRow, RangeRow, Table
from streamhouse_coordinator.recovery.histories import Head

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")

# wait: until nobody else holds the rows. skip: leave out the rows others hold. share: rows must not go away.
Lock = Literal["", "wait", "skip", "share"]


@dataclass(frozen=True, slots=True)
class In:
    """The column is one of these."""

    values: Collection[Any]


@dataclass(frozen=True, slots=True)
class AtMost:
    value: int


@dataclass(frozen=True, slots=True)
class Above:
    value: int


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition over several columns: the same said twice, for SQL and for rows in memory."""

    sql: str
    test: Callable[[Any], bool]


def _unfinished(row: RangeRow) -> bool:
    return row.unfinished


# Ranges that registration may still go on in. An index of the same condition serves it.
UNFINISHED = Predicate("status <> 'lost' AND registered_end IS DISTINCT FROM end_offset", _unfinished)
# Ranges whose leader is gone, and whose end nobody knows. An index of the same condition serves it.
ORPHANED_RANGES = Predicate("status = 'orphaned'", lambda row: row.status == ORPHANED)
LOST_RANGES = Predicate("status = 'lost'", lambda row: row.status == LOST)
# Sealed buffers whose last hand-over failed.
FAILED_BUFFERS = Predicate("last_reason <> ''", lambda row: row.last_reason != "")
# What stands for records that are gone.
LOST_SEGMENTS = Predicate("lost_reason <> ''", lambda row: row.lost_reason != "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Rows whose columns meet all of `equals` (a value, In, AtMost or Above), the predicate, if given, whose `keys`
    columns are one of `key_rows`, and whose primary key comes after `after`."""

    equals: Mapping[str, Any]
    predicate: Predicate | None = None
    keys: tuple[str, ...] = ()
    key_rows: Collection[tuple[Any, ...]] = ()
    after: tuple[Any, ...] | None = None


def where(predicate: Predicate | None = None, **equals: Any) -> Where:
    return Where(equals=equals, predicate=predicate)


def where_keys(keys: tuple[str, ...], key_rows: Collection[tuple[Any, ...]], **equals: Any) -> Where:
    return Where(equals=equals, predicate=None, keys=keys, key_rows=key_rows)


EVERYTHING = Where(equals={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The count of the rows of one group, and the sums and maxima of the columns asked for; where a column has bytes,
    the sum of their lengths."""

    group: tuple[Any, ...]
    count: int
    sums: tuple[int, ...] = ()
    maxima: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outbox:
    """`position`: of the last event that RabbitMQ has confirmed. `seen_ms`: when a coordinator that
    publishes was there last; 0: never."""

    position: int
    seen_ms: int


class Transaction(Protocol):
    """All or nothing. A statement locks its rows in key order; service/common.py has the order of the statements. The
    lock that orders the events is taken last, by the commit. `locked`: the named lock that is held; empty: none."""

    locked: str

    async def now_ms(self) -> int:
        """The database's clock, once per transaction."""

    async def select(
        self,
        table: Table[RowT],
        where: Where = EVERYTHING,
        *,
        order: Sequence[str] = (),
        limit: int | None = None,
        lock: Lock = "",
    ) -> list[RowT]: ...

    async def totals(
        self,
        table: Table[Any],
        where: Where,
        *,
        by: Sequence[str] = (),
        sums: Sequence[str] = (),
        maxima: Sequence[str] = (),
    ) -> list[Totals]:
        """Returns one per group; of `maxima`, groups without rows have none."""

    async def append(self, events: Sequence[Event], trace_context: str = "") -> None:
        """Applies the events' row operations now; their positions follow with the commit, in the order appended."""

    def with_position(self, ops: Callable[[int], Sequence[RowOp]]) -> None:
        """Row operations on state tables that name the position of the transaction's last event: made and applied by
        the commit. Rows that others may hold must be locked before."""

    async def apply(self, ops: Sequence[RowOp]) -> None:
        """Row operations on state tables."""

    async def position(self) -> int:
        """The position of the last event that was committed; the transaction's own have none yet."""

    async def outbox(self) -> Outbox: ...

    async def note_publisher(self) -> None:
        """Notes that a coordinator that publishes to RabbitMQ is there now: events are kept for it."""

    def wake_group(self, group: str) -> None:
        """After the commit, whoever waits for this group looks again, on every coordinator."""

    def notify_sealed(self, buffer_id: str) -> None:
        """Tells the followers on every coordinator, after the commit, that this buffer was sealed. Best effort."""


# Differing rows that a check of the projections shows of each table: a few hundred bytes each.
DIFFERENCES_MAX = 100


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one row of `table`: as it is and as the events give it, in JSON; empty where there is none."""

    table: str
    found: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionCheck:
    """How far a check is: of `events_total` events, `events_done` are applied. With `done`, what it found."""

    events_done: int
    events_total: int
    done: bool = False
    rows: int = 0
    differing_rows: int = 0
    differences: tuple[Difference, ...] = ()


class Store(Protocol):
    """The control plane's database. Calls raise Unavailable when the database does not answer in time, and
    Overloaded when too many others wait for it, or for the same lock: nothing was begun then."""

    def for_clients(self) -> "Store":
        """Returns the same store for calls of clients and operators, which keep no more than their share of the
        connections from those that the platform lives by: leases, registrations, sweeps."""

    async def run(self, work: Callable[[Transaction], Awaitable[ResultT]], *, lock: str = "") -> ResultT:
        """Runs `work` in one transaction, and returns its result. After a conflict with another transaction `work` is
        run again, so it must only act through its own. lock: name of a lock that is held from the first statement to
        the end; calls wait for it first come, first served, and without a connection. Empty: none."""

    def snapshot(self) -> AbstractAsyncContextManager[Transaction]:
        """A read-only transaction that sees one moment, for as long as it is open."""

    async def renew_session(self, session_id: str, ttl_ms: int) -> int | None:
        """Moves the expiry; returns the grants_version, or None when there is no such session. One row update."""

    async def renew_member(self, group: str, member_id: str, generation: int, owned: str) -> int | None:
        """Moves a group member's expiry by its session_timeout_ms and returns that, if the group has this generation
        and the member is recorded as complete with just this `owned`; else None and nothing. One row update."""

    async def next_producer_id(self) -> int: ...

    async def read_events(self, after_position: int, limit: int) -> list[EventRow]:
        """Returns the next events. Raises EventsPruned if some of them are not kept any more."""

    async def head(self) -> Head:
        """The last event and its history. One statement."""

    async def rebuild(self) -> None:
        """Empties the projections and builds them again: the bases, then every event that is kept. One transaction."""

    def check_projections(self) -> AsyncIterator[ProjectionCheck]:
        """Builds the projections once more beside those there are, as of one moment, and compares. Says now and then
        how far it is, and at last what it found, with at most DIFFERENCES_MAX rows of each table. Raises Unavailable,
        also if there are events of a newer version, which it cannot apply."""


class Snapshot(Transaction, Protocol):
    """What a backup reads: one moment of everything."""

    async def producer_id(self) -> int:
        """At least the last one given out."""

    async def migrations(self) -> list[str]: ...


class RestoreTransaction(Transaction, Protocol):
    """Writes of a restore, all or nothing. It is alone with the database: its events get their positions at once."""

    async def found(self) -> list[str]:
        """What the database holds already, for people; empty: nothing."""

    async def set_position(self, position: int) -> None:
        """Of the last event, for the feed and for the outbox alike."""

    async def fill_from_bases(self) -> None:
        """Puts the rows of the bases into the projections, which are empty."""

    async def set_producer_id(self, producer_id: int) -> None:
        """As if this was the last one given out."""
