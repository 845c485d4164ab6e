"""Removes objects that no segment refers to: left over from crashes, compaction, retention, deleted topics.

Nothing else is ever deleted. Three belts: the object is older than any upload that could still be registered
(orphan_grace_ms; handovers stop registering at half of it), it was unreferenced in two looks orphan_confirm_ms
apart, and the metadata's history is the one that was there before (core/history.py).
"""

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from shproto.errors import Unavailable
from shproto.v1 import coordinator_pb2
from shstore import ObjectMissing

from streamhouse_segmenter import telemetry
from streamhouse_segmenter.builder import each_within
from streamhouse_segmenter.core.history import MARK_KEY, HistoryMark, went_back
from streamhouse_segmenter.core.keys import DATA_PREFIX, MIXED_PREFIX
from streamhouse_segmenter.core.sweep import StoredObject, judge, old_enough
from streamhouse_segmenter.ports import Ports
from streamhouse_segmenter.settings import SegmenterSettings

log = logging.getLogger(__name__)
# S3 lists and deletes this many per request.
PAGE_KEYS = 1000
# Objects handled in one sweep: some 20 MB of keys. What is beyond is found by the next one.
SUSPECTS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class SweepReport:
    """`refused` says why nothing was looked at; empty: it was."""

    suspects: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    refused: str = ""


class Sweeper:
    def __init__(self, ports: Ports, settings: SegmenterSettings) -> None:
        self._ports = ports
        self._settings = settings
        self._suspects: dict[str, int] = {}
        self._marked = 0

    async def run(self) -> SweepReport:
        """One look over the whole store. Raises StreamHouseError, StoreError; what was deleted by then is gone."""
        refused = await self._history_fault()
        if refused:
            log.error(
                "orphan sweep refused, the metadata went back in time: %s. If segments were lost with it, recover them"
                " first; then delete %s",
                refused,
                MARK_KEY,
            )
            telemetry.sweeps_refused.add(1)
            return SweepReport(refused=refused)
        unreferenced = await self._unreferenced()
        verdict = judge(
            unreferenced,
            self._suspects,
            now_ms=self._ports.clock.monotonic_ms(),
            confirm_ms=self._settings.orphan_confirm_ms,
        )
        self._suspects = verdict.suspects
        if self._settings.orphan_dry_run:
            for item in verdict.delete:
                log.info("orphan (dry run): %s, %d bytes", item.key, item.size_bytes)
            return SweepReport(len(verdict.suspects) + len(verdict.delete))
        await self._delete(verdict.delete)
        return SweepReport(len(verdict.suspects), len(verdict.delete), sum(item.size_bytes for item in verdict.delete))

    async def mark_history(self) -> None:
        """Notes in the store where the metadata's history stands, unless it went back. Raises as `run`."""
        if await self._history_fault():
            return
        status = await self._ports.coordinator.get_status(coordinator_pb2.GetStatusRequest())
        if status.events_position == self._marked:
            return
        event = await self._event_at(status.events_position)
        if event is not None:
            await self._ports.store.put(MARK_KEY, [event.encode()], if_absent=False)
            self._marked = event.position

    async def _unreferenced(self) -> list[StoredObject]:
        found: list[StoredObject] = []
        for prefix in (DATA_PREFIX, MIXED_PREFIX):
            async for page in self._old_pages(prefix):
                request = coordinator_pb2.FilterUnreferencedRequest(object_keys=[item.key for item in page])
                answer = set((await self._ports.coordinator.filter_unreferenced(request)).object_keys)
                found += [item for item in page if item.key in answer]
                if len(found) >= SUSPECTS_MAX:
                    log.warning("orphan sweep: more than %d suspects, the rest next time", SUSPECTS_MAX)
                    return found[:SUSPECTS_MAX]
        return found

    async def _old_pages(self, prefix: str) -> AsyncIterator[list[StoredObject]]:
        page: list[StoredObject] = []
        async for info in self._ports.store.list(prefix):
            item = StoredObject(info.key, info.size_bytes, info.modified_ms)
            page += old_enough([item], now_ms=self._ports.clock.wall_ms(), grace_ms=self._settings.orphan_grace_ms)
            if len(page) == PAGE_KEYS:
                yield page
                page = []
        if page:
            yield page

    async def _delete(self, orphans: Sequence[StoredObject]) -> None:
        for start in range(0, len(orphans), PAGE_KEYS):
            page = orphans[start : start + PAGE_KEYS]
            await self._ports.store.delete([item.key for item in page])
            size_bytes = sum(item.size_bytes for item in page)
            telemetry.orphans_deleted.add(len(page))
            telemetry.orphan_deleted_bytes.add(size_bytes)
            log.info("orphan sweep: %d objects deleted, %d bytes, first %s", len(page), size_bytes, page[0].key)

    async def _history_fault(self) -> str:
        """Why the feed is not the one that was marked; empty when it is, or nothing was marked yet."""
        try:
            mark = HistoryMark.decode(await self._ports.store.get(MARK_KEY))
        except ObjectMissing:
            return ""
        except ValueError as error:
            return f"{MARK_KEY} is unreadable: {error}"
        return went_back(mark, await self._event_at(mark.position))

    async def _event_at(self, position: int) -> HistoryMark | None:
        """The event at `position`; None when the feed does not reach it or has a hole there."""
        status = await self._ports.coordinator.get_status(coordinator_pb2.GetStatusRequest())
        if not 0 < position <= status.events_position:
            return None
        feed = each_within(
            self._ports.coordinator.follow_events(coordinator_pb2.FollowEventsRequest(after_position=position - 1)),
            self._settings.rpc_timeout_ms,
        )
        async for event in feed:
            return HistoryMark.of(event) if event.position == position else None
        raise Unavailable(f"the event feed ended before position {position}")
