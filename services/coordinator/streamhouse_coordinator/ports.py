"""Ports of the service: the store and its transactions. adapters/postgres.py implements them for production,
adapters/memory.py for unit tests and simulations."""

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

# wait: until no other transaction holds the rows. skip: omits rows that others hold. share: rows must not be deleted.
Lock = Literal["", "wait", "skip", "share"]


@dataclass(frozen=True, slots=True)
class In:
    """Condition: the column is among these values."""

    values: Collection[Any]


@dataclass(frozen=True, slots=True)
class AtMost:
    """Condition: the column is not null and at most `value`."""

    value: int


@dataclass(frozen=True, slots=True)
class Above:
    """Condition: the column is not null and above `value`."""

    value: int


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition over several columns, stated twice: for SQL and for rows in memory."""

    sql: str
    test: Callable[[Any], bool]


def _unfinished(row: RangeRow) -> bool:
    return row.unfinished


# Ranges in which registration may go on, served by an index of the same condition.
UNFINISHED = Predicate("status <> 'lost' AND registered_end IS DISTINCT FROM end_offset", _unfinished)
# Ranges without a leader and a known end, served by an index of the same condition.
ORPHANED_RANGES = Predicate("status = 'orphaned'", lambda row: row.status == ORPHANED)
LOST_RANGES = Predicate("status = 'lost'", lambda row: row.status == LOST)
# Sealed buffers after a failed hand-over.
FAILED_BUFFERS = Predicate("last_reason <> ''", lambda row: row.last_reason != "")
# Segments that stand for lost records.
LOST_SEGMENTS = Predicate("lost_reason <> ''", lambda row: row.lost_reason != "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Selects the rows that meet all given conditions: columns with `equals` (a value, In, AtMost or Above), the
    predicate, `keys` columns among `key_rows`, a primary key after `after`."""

    equals: Mapping[str, Any]
    predicate: Predicate | None = None
    keys: tuple[str, ...] = ()
    key_rows: Collection[tuple[Any, ...]] = ()
    after: tuple[Any, ...] | None = None


def where(predicate: Predicate | None = None, **equals: Any) -> Where:
    """Returns the conditions on single columns and a predicate."""
    return Where(equals=equals, predicate=predicate)


def where_keys(keys: tuple[str, ...], key_rows: Collection[tuple[Any, ...]], **equals: Any) -> Where:
    """Returns the condition that the `keys` columns are among `key_rows`, with further conditions on single columns."""
    return Where(equals=equals, predicate=None, keys=keys, key_rows=key_rows)


EVERYTHING = Where(equals={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Number of rows of a group, with the sums and maxima of the requested columns; a column of bytes counts by
    length."""

    group: tuple[Any, ...]
    count: int
    sums: tuple[int, ...] = ()
    maxima: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Outbox:
    """State of the outbox. `position`: of the last event that RabbitMQ has confirmed. `seen_ms`: when a publishing
    coordinator last ran; 0: never."""

    position: int
    seen_ms: int


class Transaction(Protocol):
    """A transaction, all or nothing.

    Invariants: a statement locks its rows in key order; service/common.py has the order of the statements. The commit
    takes the lock that orders the events, as the last lock. `locked`: name of the held lock; empty: none.
    """

    locked: str

    async def now_ms(self) -> int:
        """Returns the database's time in ms since 1970, read once per transaction."""

    async def select(
        self,
        table: Table[RowT],
        where: Where = EVERYTHING,
        *,
        order: Sequence[str] = (),
        limit: int | None = None,
        lock: Lock = "",
    ) -> list[RowT]:
        """Returns the selected rows, in the order of the columns `order`, at most `limit`."""

    async def totals(
        self,
        table: Table[Any],
        where: Where,
        *,
        by: Sequence[str] = (),
        sums: Sequence[str] = (),
        maxima: Sequence[str] = (),
    ) -> list[Totals]:
        """Returns the totals of each group; groups without rows have no maxima."""

    async def append(self, events: Sequence[Event], trace_context: str = "") -> None:
        """Applies the events' row operations now; the commit assigns their positions, in the order appended."""

    def with_position(self, ops: Callable[[int], Sequence[RowOp]]) -> None:
        """Registers row operations on state tables that need the position of the transaction's last event: the commit
        builds and applies them. The caller locks the rows before if other transactions may hold them."""

    async def apply(self, ops: Sequence[RowOp]) -> None:
        """Applies row operations on state tables."""

    async def position(self) -> int:
        """Returns the position of the last committed event; the transaction's own events have none yet."""

    async def outbox(self) -> Outbox:
        """Returns the state of the outbox."""

    async def note_publisher(self) -> None:
        """Records that a coordinator that publishes to RabbitMQ runs now: events are kept for the relay."""

    def wake_group(self, group: str) -> None:
        """Wakes, after the commit, the calls that wait for a change of this group, on every coordinator."""

    def notify_sealed(self, buffer_id: str) -> None:
        """Notifies the followers on every coordinator, after the commit, that this buffer was sealed. Best effort."""


# Differing rows that a check reports of each table: a few hundred bytes each.
DIFFERENCES_MAX = 100


@dataclass(frozen=True, slots=True)
class Difference:
    """A differing row of `table` in JSON, as found and as the events give it; empty if there is none."""

    table: str
    found: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionCheck:
    """Progress of a check: `events_done` of `events_total` events are applied. With `done`, the result."""

    events_done: int
    events_total: int
    done: bool = False
    rows: int = 0
    differing_rows: int = 0
    differences: tuple[Difference, ...] = ()


class Store(Protocol):
    """Database of the control plane. Calls raise Unavailable if the database does not answer in time, and Overloaded if
    too many calls wait for the database or for the same lock; nothing has begun then."""

    def for_clients(self) -> "Store":
        """Returns the same store for calls of clients and operators, with a limited share of the connections; the rest
        stays for leases, registrations and sweeps."""

    async def run(self, work: Callable[[Transaction], Awaitable[ResultT]], *, lock: str = "") -> ResultT:
        """Runs `work` in a transaction and returns its result. After a conflict with another transaction `work` runs
        again, so it must have no effects outside its transaction. `lock`: name of a lock held from the first statement
        to the end, empty: none; calls wait for it in order of arrival, without a connection."""

    def snapshot(self) -> AbstractAsyncContextManager[Transaction]:
        """Returns a read-only transaction that sees a single moment for as long as it is open."""

    async def renew_session(self, session_id: str, ttl_ms: int) -> int | None:
        """Extends the lease; returns the grants_version, or None if there is no such session. Updates a single row."""

    async def renew_member(self, group: str, member_id: str, generation: int, owned: str) -> int | None:
        """Extends a group member's lease by its session_timeout_ms and returns that time, if the group has this
        generation and the member is recorded as complete with exactly these `owned`; else returns None and changes
        nothing. Updates a single row."""

    async def next_producer_id(self) -> int:
        """Returns a producer id that was never allocated before."""

    async def read_events(self, after_position: int, limit: int) -> list[EventRow]:
        """Returns the next events, at most `limit`. Raises EventsPruned if some of them are pruned."""

    async def head(self) -> Head:
        """Returns the last event's position and its history, with a single statement."""

    async def rebuild(self) -> None:
        """Rebuilds the projections in a single transaction: from the bases and every kept event."""

    def check_projections(self) -> AsyncIterator[ProjectionCheck]:
        """Builds the projections again beside the existing ones, as of a single moment, and compares. Yields the
        progress now and then, and at last the result, with at most DIFFERENCES_MAX rows of each table. Raises
        Unavailable, also if there are events of a newer version, which cannot be applied."""


class Snapshot(Transaction, Protocol):
    """Reads of a backup: everything as of a single moment."""

    async def producer_id(self) -> int:
        """Returns a producer id that is not below the last allocated."""

    async def migrations(self) -> list[str]:
        """Returns the names of the applied migrations, in order."""


class RestoreTransaction(Transaction, Protocol):
    """Writes of a restore, all or nothing. No other transaction uses the database, so events get their positions at
    once."""

    async def found(self) -> list[str]:
        """Returns, for people, the kinds of data that the database holds already; none if it is empty."""

    async def set_position(self, position: int) -> None:
        """Sets the position of the last event, for the feed and the outbox alike."""

    async def fill_from_bases(self) -> None:
        """Copies the rows of the bases into the projections, which are empty."""

    async def set_producer_id(self, producer_id: int) -> None:
        """Sets the last allocated producer id."""
