"""Applies the coordinator's grants and events of this agent's ranges to the held logs.

Owns: the lost spans that were logged and counted already. Does not own: the logs, which the writer appends to.
Invariants: leadership starts and ends only here and in the transfers. A log is settled or dropped after the group that
is being written; records of older epochs are fenced before newer epochs lead.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from shproto.keys import RangeKey
from shproto.v1 import coordinator_pb2 as pb

from streamhouse_ingest.leadership.transfers import LeadershipTransfers
from streamhouse_ingest.log.logs import HeldLog, Logs
from streamhouse_ingest.log.partition_log import OffsetSpan, PartitionLog
from streamhouse_ingest.log.producers import SnapshotError, decode_snapshot
from streamhouse_ingest.metrics import IngestMetrics
from streamhouse_ingest.produce.writer import Writer

log = logging.getLogger(__name__)

LOST = "lost"
LOST_REASON = "damaged in the write-ahead log"
POSSIBLY_LOST_REASON = (
    "possibly lost: the write-ahead log is damaged, and what it held of this range beyond here is unknown"
)


@dataclass(frozen=True, slots=True)
class GrantResult:
    """Ranges to request again after an answer. `finished`: finished by events that are newer than the answer. `rest`:
    not applied, because the producers' state did not fit into the answer."""

    finished: Sequence[RangeKey] = ()
    rest: Sequence[RangeKey] = ()


class Ranges:
    """`trim` is called when files of the log may have become free. `closing`: no log starts to lead any more."""

    def __init__(
        self,
        logs: Logs,
        writer: Writer,
        transfers: LeadershipTransfers,
        metrics: IngestMetrics,
        trim: Callable[[], None],
    ) -> None:
        self._logs = logs
        self._writer = writer
        self._transfers = transfers
        self._metrics = metrics
        self._trim = trim
        self._reported: set[tuple[RangeKey, OffsetSpan]] = set()
        self.closing = False

    async def resume(self, grants: Sequence[pb.RangeGrant]) -> GrantResult:
        """Applies the grants of a session that was just opened: all older ranges are settled, and finished if they are
        not named. Returns the rest, which must be applied before anything is announced.
        """
        await self._writer.barrier()
        for held in self._logs:
            held.producers_reported = held.end_confirmed = False  # another history may say otherwise
        return GrantResult(rest=self._apply(grants))

    async def apply_grants(self, grants: Sequence[pb.RangeGrant], only: Collection[RangeKey] = ()) -> GrantResult:
        """Applies an answer, which names the unfinished ranges of this log, or of `only` if not empty. Drops the other
        logs of `only`. Returns the ranges to request again."""
        for grant in grants:
            held = self._logs.get(grant_key(grant))
            # No append is decided from here on, and the barrier waits for those decided before: then the end of the log
            # is final.
            if held is not None and grant.status not in ("open", "moving"):
                self._logs.stop_leading(held)
        await self._writer.barrier()
        rest = self._apply(grants, only)
        keys = map(grant_key, grants)
        finished = [key for key in keys if (held := self._logs.get(key)) is not None and _is_finished(held)]
        return GrantResult(finished, rest)

    def _apply(self, grants: Sequence[pb.RangeGrant], only: Collection[RangeKey] = ()) -> list[RangeKey]:
        """Returns the rest. None of their fields is applied: settling depends on the producers' state, too."""
        kept = [grant for grant in grants if grant.status != LOST]
        for grant in grants:
            held = self._logs.get(grant_key(grant))
            if grant.status == LOST and held is not None:
                self._drop_lost(held, grant)
        # Older epochs first: their fenced records may lie at the offsets of newer epochs, whose producer snapshots must
        # not contain them, and cannot be fenced any more once a newer epoch leads.
        self._drop_others(kept, only)
        rest = [grant_key(grant) for grant in kept if self._must_wait(grant)]
        waiting = set(rest)
        for grant in sorted(kept, key=lambda grant: grant.epoch):
            if grant_key(grant) not in waiting:
                self._update(self._logs.get(grant_key(grant)) or self._hold(grant), grant)
        return rest

    def _must_wait(self, grant: pb.RangeGrant) -> bool:
        held = self._logs.get(grant_key(grant))
        return grant.snapshot_omitted and (held is None or not held.producers_reported)

    def _drop_lost(self, held: HeldLog, grant: pb.RangeGrant) -> None:
        """Drops the log of a range that was declared lost while this agent was away: registration would fence the rest
        of its records."""
        held.log.name(grant.topic, grant.start_offset, grant.min_acks)
        self._logs.register(held, grant.registered_end)
        buffers = [*held.log.sealed, *([] if held.log.open is None else [held.log.open])]
        records = sum(buffer.record_count for buffer in buffers)
        self._metrics.fenced_records.add(records)
        log.error(
            "%s was declared lost at offset %d: %d records beyond, %d bytes, are dropped",
            held.log.describe(),
            grant.registered_end,
            records,
            held.log.unregistered_bytes,
        )
        self._logs.drop(held, "the range was declared lost")

    def _hold(self, grant: pb.RangeGrant) -> HeldLog:
        key = grant_key(grant)
        producers = self._logs.producers(key.partition_key)
        return self._logs.hold(PartitionLog(key, grant.topic, grant.start_offset, grant.limit_offset, producers))

    def _update(self, held: HeldLog, grant: pb.RangeGrant) -> None:
        """Applies a grant to its log. Only leadership depends on the state of the log."""
        log_ = held.log
        log_.name(grant.topic, grant.start_offset, grant.min_acks)
        log_.extend(grant.limit_offset)
        self._merge_producers(held, grant)
        self._logs.register(held, grant.registered_end)
        if grant.HasField("end_offset"):
            self._settle(held, grant.end_offset)
        elif grant.status in ("open", "moving") and not self.closing and log_.settled_end is None:
            # A log that is being transferred has stopped on purpose: an older grant must not make it lead again.
            if not log_.leading and not self._transfers.is_under_way(held):
                self._logs.lead(held)
                log.info("leading %s from offset %d", log_.describe(), log_.next_offset)
            if grant.status == "moving":
                self._transfers.start(held, at_once=grant.at_once)
        elif grant.status not in ("open", "moving"):
            self._logs.stop_leading(held)
        self._trim()

    def _merge_producers(self, held: HeldLog, grant: pb.RangeGrant) -> None:
        """Merges the coordinator's state of the partition's producers; only before the first append of the epoch, since
        the state is older than appends."""
        if not held.log.leading:
            for fence in grant.fences:
                held.log.raise_fence(fence.producer_id, fence.producer_epoch)
        if held.log.leading or grant.snapshot_omitted:
            return
        try:
            states = decode_snapshot(grant.producer_snapshot)
            held.log.producers.merge(states)
            held.log.note_reported(states)
        except SnapshotError as error:
            # Without the state, retries that are under way now are written twice; a refusal would cost all writes.
            log.error("%s: %s", held.log.describe(), error)
        held.producers_reported = True
        for older in self._logs.of_partition(*held.log.key.partition_key):
            if older.log.key.epoch < held.log.key.epoch:
                older.log.forget_lost()

    def _settle(self, held: HeldLog, end_offset: int) -> None:
        held.end_confirmed = True
        if held.log.settled_end == end_offset:
            return
        fenced = self._logs.settle(held, end_offset)
        if fenced:
            self._metrics.fenced_records.add(fenced)
            log.error("%s was settled at %d: %d records beyond are dropped", held.log.describe(), end_offset, fenced)

    def _held(self, only: Collection[RangeKey]) -> list[HeldLog]:
        """Returns the held logs among `only`, or all held logs if `only` is empty."""
        return [held for key in only if (held := self._logs.get(key)) is not None] if only else list(self._logs)

    def _drop_others(self, grants: Iterable[pb.RangeGrant], only: Collection[RangeKey]) -> None:
        named = {grant_key(grant) for grant in grants}
        for held in self._held(only):
            if held.log.key not in named:
                self._logs.drop(held, "the range is finished or its topic deleted")
        self._trim()

    # ---- from the feed

    def registered(self, key: RangeKey, end_offset: int) -> bool:
        """Notes that segments cover the log up to `end_offset`. Returns True if the range is finished with that."""
        held = self._logs.get(key)
        if held is None:
            return False
        self._logs.register(held, end_offset)
        self._trim()
        return _is_finished(held)

    def settled(self, key: RangeKey, end_offset: int) -> bool:
        """Confirms that the range ends at `end_offset`. Returns False if the log was not settled there: the next answer
        then settles the log, after the group that is being written."""
        held = self._logs.get(key)
        if held is None or held.log.settled_end != end_offset:
            return False
        held.end_confirmed = True
        return True

    def drop_finished(self, key: RangeKey) -> None:
        """Drops the log if its range is finished. No answer may be under way: an older answer would hold the range
        anew, as a log without records."""
        held = self._logs.get(key)
        if held is not None and _is_finished(held):
            self._logs.drop(held, "the range is finished")
            self._trim()

    def extend(self, key: RangeKey, limit_offset: int) -> None:
        """Widens a range up to `limit_offset`, if its log is held."""
        held = self._logs.get(key)
        if held is not None:
            held.log.extend(limit_offset)

    # ---- damage

    def lost_spans(self, only: Collection[RangeKey] = ()) -> list[pb.LostSpan]:
        """Returns the spans of all logs, or of `only`, that were acknowledged and cannot be read back. Logs and counts
        each span once."""
        spans = []
        for held in self._held(only):
            for span in held.log.lost_spans():
                # Settled at its limit, without records there: the end of the log is unknown.
                unknown = span.end_offset == held.log.limit_offset
                reason = POSSIBLY_LOST_REASON if unknown else LOST_REASON
                spans.append(_lost_span(held.log.key, span, reason))
                if (held.log.key, span) not in self._reported:
                    self._reported.add((held.log.key, span))
                    (self._metrics.possibly_lost if unknown else self._metrics.lost_records).add(
                        1 if unknown else span.end_offset - span.base_offset
                    )
                    log.error("%s: offsets %d to %d: %s", held.log.describe(), *span, reason)
        return spans


def _is_finished(held: HeldLog) -> bool:
    """Returns True if the coordinator has the end and all segments of the range. The end of a transfer counts once the
    coordinator has confirmed it: until then, the next session must still declare it."""
    log_ = held.log
    return held.end_confirmed and log_.settled_end is not None and log_.registered_end >= log_.settled_end


def grant_key(grant: pb.RangeGrant) -> RangeKey:
    """Returns the key of the granted range."""
    return RangeKey(grant.topic_id, grant.partition, grant.epoch)


def _lost_span(key: RangeKey, span: OffsetSpan, reason: str) -> pb.LostSpan:
    return pb.LostSpan(
        topic_id=key.topic_id,
        partition=key.partition,
        epoch=key.epoch,
        base_offset=span.base_offset,
        end_offset=span.end_offset,
        reason=reason,
    )
