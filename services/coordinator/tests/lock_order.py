"""Watches that every transaction takes its locks in the order that service/common.py writes down.

Two transactions deadlock only if they meet in opposite orders at the same moment, which a test hits by luck. A
transaction out of order is found each time it runs, alone or not: so every test of the coordinator looks for that.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from streamhouse_coordinator.adapters.postgres_transaction import PostgresRebuilding, PostgresTransaction
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.core.projection import Put, RowOp, Set, coalesce
from streamhouse_coordinator.ports import EVERYTHING, Where, where_keys
from streamhouse_coordinator.service.common import CLUSTER_LOCK

Key = tuple[Any, ...]


class Locks:
    """Those of one transaction, and what was wrong with their order."""

    def __init__(self, violations: list[str]) -> None:
        self._violations = violations
        self._advisory = ""
        self._rows: dict[str, set[Key]] = {}
        self._inserted: set[tuple[str, Key]] = set()
        self._highest = -1
        self._numbered = False

    def advisory(self, name: str) -> None:
        if self._advisory not in ("", name):
            self._violations.append(f"lock {name!r} while {self._advisory!r} is held")
        if self._rows and not self._advisory:
            self._violations.append(f"lock {name!r} while rows of {sorted(self._rows)} are held")
        self._advisory = name

    def rows(self, table: t.Table[Any], keys: Iterable[Key], *, waits: bool) -> None:
        """One statement locks these."""
        rank = t.lock_rank(table)
        held = set(self._rows.get(table.name, ()))
        new = {key for key in keys if key not in held and (table.name, key) not in self._inserted}
        if rank == len(t.LOCK_ORDER) or not new:
            return
        self._rows.setdefault(table.name, set()).update(new)
        alone = self._advisory == CLUSTER_LOCK
        if waits and self._numbered:
            self._violations.append(f"rows of {table.name} after the event position")
        if table is t.SESSION_LEASES and alone:
            return
        if table is t.SESSION_LEASES and (len(held | new) > 1 or self._highest >= 0):
            self._violations.append("several session leases, or one beside other rows, without the cluster lock")
        if waits and rank < self._highest:
            self._violations.append(f"rows of {table.name} after rows of {t.LOCK_ORDER[self._highest].name}")
        if waits and held and min(new) < max(held) and not (table is t.PARTITIONS and alone):
            self._violations.append(f"rows of {table.name} {min(new)} after {max(held)} by another statement")
        if table is t.PARTITIONS and not alone and len(held | new) > 1:
            self._violations.append("several partitions without the cluster lock")
        self._highest = max(self._highest, rank)

    def inserted(self, table: t.Table[Any], keys: Iterable[Key]) -> None:
        """Rows that others cannot see yet."""
        self._inserted.update((table.name, key) for key in keys)

    def numbered(self) -> None:
        self._numbered = True


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the violations of all transactions from now on, as they come. A rebuild and a restore are alone with
    the projections."""
    violations: list[str] = []
    of_transaction: WeakKeyDictionary[PostgresTransaction, Locks] = WeakKeyDictionary()

    def locks(tx: PostgresTransaction) -> Locks:
        return of_transaction.setdefault(tx, Locks([] if isinstance(tx, PostgresRebuilding) else violations))

    lock, select, apply, number = (
        PostgresTransaction.lock,
        PostgresTransaction.select,
        PostgresTransaction.apply,
        PostgresTransaction._number,
    )

    async def watched_lock(tx: PostgresTransaction, name: str) -> None:
        locks(tx).advisory(name)
        await lock(tx, name)

    async def watched_select(
        tx: PostgresTransaction, table: t.Table[Any], where: Where = EVERYTHING, **options: Any
    ) -> list[Any]:
        rows = await select(tx, table, where, **options)
        if how := options.get("lock", ""):
            locks(tx).rows(table, map(table.key_of, rows), waits=how != "skip")
        return rows

    async def watched_apply(tx: PostgresTransaction, ops: Sequence[RowOp]) -> None:
        for group in coalesce(ops):
            table = group[0].table
            keys = [table.key_of(row) for where in _touched(group) for row in await select(tx, table, where)]
            locks(tx).rows(table, keys, waits=True)
            locks(tx).inserted(table, {table.key_of(op.row) for op in group if isinstance(op, Put)} - set(keys))
        await apply(tx, ops)

    async def watched_number(tx: PostgresTransaction, pending: Collection[Any]) -> int:
        locks(tx).numbered()
        return await number(tx, pending)  # type: ignore[arg-type]

    replaced: dict[str, Callable[..., Any]] = {
        "lock": watched_lock,
        "select": watched_select,
        "apply": watched_apply,
        "_number": watched_number,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(PostgresTransaction, name, function)
    return violations


def _touched(group: Sequence[RowOp]) -> list[Where]:
    """Conditions for the rows that are there already and that the group, one statement, changes or removes."""
    table = group[0].table
    keys = [table.key_of(op.row) if isinstance(op, Put) else op.key for op in group if isinstance(op, Put | Set)]
    removed = [Where(equals=op.where) for op in group if not isinstance(op, Put | Set)]
    return [where_keys(table.key, keys), *removed] if keys else removed
