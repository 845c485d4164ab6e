"""Removes objects that no segment refers to: left over from crashes, compaction, retention, deleted topics.

Nothing else is ever deleted (decision 0007). Before an object goes, the coordinator begins its deletion: it refuses
objects that are part of the log or may become so, and from then on nothing can be registered in the object. Before that
the metadata's history must be the one that was there before (core/history.py).

Owns: the mark of the history in the store. Does not own: the verdict on an object, which is the coordinator's.
Invariants: no object is deleted whose deletion the coordinator has not begun. Nothing is deleted while the metadata's
history is not the mark's, or the mark cannot be read.
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from shproto.errors import MetadataWentBack, Unavailable
from shproto.v1 import coordinator_pb2
from shstore import KeysRefused, ObjectMissing

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.core.history import MARK_KEY, NO_MARK, HistoryMark, went_back
from streamhouse_segmenter.core.keys import DATA_PREFIX, MIXED_PREFIX
from streamhouse_segmenter.core.sweep import Orphan, StoredObject, judge, old_enough
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)
# S3 lists and deletes this many per request.
PAGE_KEYS = 1000
PREFIXES = (DATA_PREFIX, MIXED_PREFIX)
# Reads of the mark. Damage on the way differs each time: a read with a right checksum settles it, and two equal reads
# of a mark without a checksum.
MARK_READS = 3
WENT_BACK = "the metadata went back in time"
_WAY_OUT = f"Bring it back with `streamhouse restore`, or, if nothing was lost with it, delete {MARK_KEY}"
_WAY_OUT_UNREADABLE = (
    f"Nothing says that the metadata went back. If the mark stays unreadable, delete {MARK_KEY}, unless an older dump "
    "was put in PostgreSQL's place since: the next one is written within a minute"
)


def refusal(why: str) -> str:
    """Returns a refused sweep's reason and remedy, for people."""
    return f"orphan sweep refused: {why}"


@dataclass(frozen=True, slots=True)
class HistoryCheck:
    """`refused`: why nothing may be deleted; empty if the metadata's history is the mark's. `unreadable`: the mark
    cannot be read, so that nothing is known."""

    mark: HistoryMark
    refused: str = ""
    unreadable: bool = False


@dataclass(slots=True, kw_only=True)
class SweepReport:
    """Result of a sweep.

    `waiting`: unreferenced, to be deleted by a later sweep (all of them, in a dry run). `in_upload`: declared, and
    perhaps registered soon. `cleared`: uploads that left nothing behind, and deletions that another sweep did not
    finish. `refused`: why the sweep stopped deleting, or empty. `resting_until_ms`: nothing was deleted, because the
    metadata was restored not long ago; since 1970.
    """

    waiting: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    in_upload: int = 0
    cleared: int = 0
    refused: str = ""
    resting_until_ms: int = 0


def _missing(head: coordinator_pb2.GetHeadResponse) -> str:
    if not head.missing_position:
        return ""
    return (
        f"{WENT_BACK}: event {head.missing_position} of history {head.history_id} was seen, and is not there any more."
        " Bring it back with `streamhouse restore`"
    )


def _ignore(orphan: Orphan) -> None:
    """Default for `found`: does nothing."""


class OrphanSweeper:
    """Deletes orphans (`run`), and keeps the mark of the metadata's history in the store (`mark_history`)."""

    def __init__(self, ports: Ports, settings: SegmenterSettings) -> None:
        self._ports = ports
        self._settings = settings
        self._marked = 0

    async def run(self, prefix: str = "", found: Callable[[Orphan], None] = _ignore) -> SweepReport:
        """Goes through the store, or the keys below `prefix`, and returns a report; calls `found` with every orphan.

        Raises StreamHouseError, StoreError; objects deleted by then are gone.
        """
        history = await self.check_history()
        if history.refused:
            telemetry.sweeps_refused.add(1)
            return SweepReport(refused=history.refused)
        # After a restore, objects that it left out may be needed once more: for a second restore with other options.
        if not self._settings.orphan_dry_run and self._ports.clock.wall_ms() < history.mark.sweep_from_ms:
            log.info("no orphan sweep yet: the metadata was restored not long ago (docs/backup.md)")
            return SweepReport(resting_until_ms=history.mark.sweep_from_ms)
        report = SweepReport()
        try:
            await self._sweep(prefix, found, report)
        except MetadataWentBack as error:  # noticed by other sweeps: the mark is older than the missing events
            telemetry.sweeps_refused.add(1)
            report.refused = error.message
        telemetry.orphans_waiting.set(report.waiting)
        return report

    async def _sweep(self, prefix: str, found: Callable[[Orphan], None], report: SweepReport) -> None:
        for part in (prefix,) if prefix else PREFIXES:
            async for page in self._old_pages(part):
                for orphan in await self._sweep_page(page, report):
                    found(orphan)
        if not (prefix or self._settings.orphan_dry_run):
            await self._clear(report)

    async def mark_history(self) -> None:
        """Marks in the store the position of the metadata's history, unless it went back. Raises as `run`."""
        head = await self._ports.coordinator.get_head(coordinator_pb2.GetHeadRequest())
        # The mark in the store names this event already.
        if head.events_position == self._marked:
            return
        marked = await self._ports.coordinator.mark_history(coordinator_pb2.MarkHistoryRequest())
        # Last: a history that is right then was right before, when the event was read. An old dump put in PostgreSQL's
        # place in between must not become the store's mark.
        history = await self.check_history()
        if marked.HasField("event") and not history.refused:
            event = HistoryMark.of(marked.event)
            kept = replace(event, sweep_from_ms=history.mark.sweep_from_ms)
            await self._ports.store.put(MARK_KEY, [kept.encode()], if_absent=False)
            self._marked = event.position

    async def _old_pages(self, prefix: str) -> AsyncIterator[list[StoredObject]]:
        page: list[StoredObject] = []
        async for info in self._ports.store.list(prefix):
            item = StoredObject(info.key, info.size_bytes, info.modified_ms)
            # By the clock of this machine, to ask less: the coordinator decides with its own times (decision 0007).
            page += old_enough([item], now_ms=self._ports.clock.wall_ms(), grace_ms=self._settings.orphan_grace_ms)
            if len(page) == PAGE_KEYS:
                yield page
                page = []
        if page:
            yield page

    async def _sweep_page(self, page: Sequence[StoredObject], report: SweepReport) -> list[Orphan]:
        judged = judge(page, await self._begin([item.key for item in page]))
        report.in_upload += judged.declared
        # Uploads under way are not part of the log yet, and may be within moments.
        if judged.declared:
            telemetry.deletions_refused.add(judged.declared, {"reason": "in_upload"})
        if self._settings.orphan_dry_run:
            report.waiting += len(judged.orphans)
            for item in judged.orphans:
                log.info("orphan (dry run): %s, %d bytes, %s", item.key, item.size_bytes, item.why)
            return judged.orphans
        deleted = await self._delete([item.key for item in judged.orphans if item.deletable])
        gone = [item for item in judged.orphans if item.key in deleted]
        size_bytes = sum(item.size_bytes for item in gone)
        report.waiting += len(judged.orphans) - len(gone)
        report.deleted += len(gone)
        report.deleted_bytes += size_bytes
        if gone:
            telemetry.orphans_deleted.add(len(gone))
            telemetry.orphan_deleted_bytes.add(size_bytes)
            log.info("orphan sweep: %d objects deleted, %d bytes, first %s", len(gone), size_bytes, gone[0].key)
        return judged.orphans

    async def _clear(self, report: SweepReport) -> None:
        """Clears entries that no listing shows: uploads that left nothing behind, deletions of objects that are gone
        already."""
        request = coordinator_pb2.ListDeletionsRequest(
            grace_ms=self._settings.orphan_grace_ms, confirm_ms=self._settings.orphan_confirm_ms, limit=PAGE_KEYS
        )
        while keys := list((await self._ports.coordinator.list_deletions(request)).object_keys):
            deletions = (await self._begin(keys)).objects
            if refused := sum(item.verdict == coordinator_pb2.DELETION_VERDICT_REFERENCED for item in deletions):
                telemetry.deletions_refused.add(refused, {"reason": "referenced"})
            begun = [item.object_key for item in deletions if item.verdict == coordinator_pb2.DELETION_VERDICT_BEGUN]
            deleted = await self._delete(begun)
            # Keys that the store keeps refusing are listed again and again.
            if not deleted:
                break
            report.cleared += len(deleted)

    async def _begin(self, keys: Sequence[str]) -> coordinator_pb2.BeginDeletionResponse:
        return await self._ports.coordinator.begin_deletion(
            coordinator_pb2.BeginDeletionRequest(
                object_keys=keys,
                grace_ms=self._settings.orphan_grace_ms,
                confirm_ms=self._settings.orphan_confirm_ms,
                dry_run=self._settings.orphan_dry_run,
            )
        )

    async def _delete(self, begun: Sequence[str]) -> set[str]:
        """Deletes objects whose deletion was begun, and reports it. A crash in between costs a repetition.

        Returns the keys that are gone. An object that the store does not release (a lock, say) does not stop the
        others: it stays begun, and the next sweep tries again. Raises StoreError, as `run`, if the store refuses the
        call as a whole: an operator has to mend that, and every other key would be refused as well.
        """
        # The store first: a deletion that stays begun is repeated, an object without its row would be noticed anew.
        deleted = await self._delete_from_store(begun) if begun else []
        if deleted:
            await self._ports.coordinator.finish_deletion(coordinator_pb2.FinishDeletionRequest(object_keys=deleted))
        return set(deleted)

    async def _delete_from_store(self, keys: Sequence[str]) -> list[str]:
        """Deletes with one call and logs failures with one line: some stores report a missing permission for each key.

        Returns the keys that are gone. Raises StoreError.
        """
        try:
            await self._ports.store.delete(keys)
        except KeysRefused as error:
            log.error("the store does not delete %d of %d objects: %s", len(error.keys), len(keys), error)
            telemetry.failures.add(len(error.keys), {"reason": "deletion"})
            refused = frozenset(error.keys)
            return [key for key in keys if key not in refused]
        return list(keys)

    async def check_history(self) -> HistoryCheck:
        """Returns the mark, and why the feed is not the marked one, or lacks events that were seen. Raises as `run`."""
        try:
            mark = await self._read_mark()
        except ObjectMissing:
            mark = NO_MARK
        except ValueError as error:
            refused = f"{MARK_KEY} is unreadable, read {MARK_READS} times: {error}. {_WAY_OUT_UNREADABLE}"
            return HistoryCheck(NO_MARK, refused, unreadable=True)
        # After the mark was read, as other processes renew it.
        head = await self._ports.coordinator.get_head(coordinator_pb2.GetHeadRequest(event_position=mark.position))
        if mark is NO_MARK:
            return HistoryCheck(mark, _missing(head))
        # A coordinator that ignores event_position answers without an event: every mark would look like a rollback.
        if not head.HasField("pruned_position"):
            raise Unavailable("the coordinator is of an older version, which is not asked about history marks")
        current = HistoryMark.of(head.event) if head.HasField("event") else None
        why = went_back(mark, current, head)
        return HistoryCheck(mark, f"{WENT_BACK}: {why}. {_WAY_OUT}" if why else _missing(head))

    async def _read_mark(self) -> HistoryMark:
        """Returns the mark. Raises ValueError for a damaged mark, ObjectMissing, StoreError."""
        unchecked: HistoryMark | None = None
        damage = ValueError("it has no checksum, and no two reads agree")
        for _ in range(MARK_READS):
            body = await self._ports.store.get(MARK_KEY)
            try:
                mark, is_checked = HistoryMark.decode(body)
            except ValueError as error:
                log.info("%s is read again: %s", MARK_KEY, error)
                damage = error
                continue
            if is_checked or mark == unchecked:
                return mark
            unchecked = mark
        raise damage
