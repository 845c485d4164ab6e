"""Who leads which partition: grants for partitions without a leader, moves when the load is uneven.

Balanced means that any two agents' numbers of partitions differ by at most one once the moves are done; as few
partitions as possible move.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence

from shproto.events import EpochGranted, Event, MoveRequested

from streamhouse_coordinator.core.tables import OPEN, SETTLED, PartitionRow, RangeRow, SessionRow

PartitionKey = tuple[str, int]


def assign(
    topics: Mapping[str, str],
    partitions: Sequence[PartitionRow],
    latest: Mapping[PartitionKey, RangeRow],
    sessions: Sequence[SessionRow],
    width_offsets: int,
) -> list[Event]:
    """Grants and moves that are due.

    `topics`: name by topic_id. `latest`: each partition's newest range. `sessions`: the live ingest sessions; an open
    range belongs to one of them.
    """
    if not sessions:
        return []
    ordered = sorted(partitions, key=lambda row: (row.topic_id, row.partition))
    held = _held(latest.values(), sessions)
    waiting = [row for row in ordered if not _led(latest.get((row.topic_id, row.partition)))]
    chosen = _choose(waiting, latest, held, sessions, len(partitions))
    grants: list[Event] = [
        _grant(topics[row.topic_id], row, latest.get((row.topic_id, row.partition)), session, width_offsets)
        for row, session in chosen
    ]
    loads = {session_id: len(ranges) for session_id, ranges in held.items()}
    for _, session in chosen:
        loads[session.session_id] += 1
    return grants + _moves(topics, held, loads, sessions, len(partitions))


def start_of_next(previous: RangeRow | None) -> int:
    """Where the next epoch begins: without a gap if the end of the previous one is known, else past all it may hold."""
    if previous is None:
        return 0
    if previous.status == SETTLED:
        assert previous.end_offset is not None
        return previous.end_offset
    return previous.limit_offset


def _led(latest: RangeRow | None) -> bool:
    return latest is not None and latest.status == OPEN


def _held(latest: Iterable[RangeRow], sessions: Sequence[SessionRow]) -> dict[str, list[RangeRow]]:
    """Per session the ranges it keeps; those on the move are as good as gone."""
    held: dict[str, list[RangeRow]] = {session.session_id: [] for session in sessions}
    for row in latest:
        if row.status == OPEN and not row.moving and row.session_id in held:
            held[row.session_id].append(row)
    return held


def _choose(
    waiting: Sequence[PartitionRow],
    latest: Mapping[PartitionKey, RangeRow],
    held: Mapping[str, Sequence[RangeRow]],
    sessions: Sequence[SessionRow],
    total: int,
) -> list[tuple[PartitionRow, SessionRow]]:
    """A session for each partition: the one whose log has its past if that has room, else the least loaded."""
    least, extra = divmod(total, len(sessions))
    loads = {session.session_id: len(held[session.session_id]) for session in sessions}
    by_wal = {session.wal_id: session for session in sessions}
    chosen: list[tuple[PartitionRow, SessionRow]] = []
    rest = []
    above = sum(load > least for load in loads.values())
    for row in waiting:
        past = latest.get((row.topic_id, row.partition))
        session = by_wal.get(past.wal_id) if past is not None else None
        load = loads[session.session_id] if session is not None else 0
        if session is not None and (load < least or (load == least and above < extra)):
            above += load == least
            loads[session.session_id] += 1
            chosen.append((row, session))
        else:
            rest.append(row)
    by_load = [(loads[session.session_id], session.agent_id, at) for at, session in enumerate(sessions)]
    heapq.heapify(by_load)
    for row in rest:
        load, agent_id, at = by_load[0]
        heapq.heapreplace(by_load, (load + 1, agent_id, at))
        chosen.append((row, sessions[at]))
    return chosen


def _grant(
    topic: str, row: PartitionRow, previous: RangeRow | None, session: SessionRow, width_offsets: int
) -> EpochGranted:
    start = start_of_next(previous)
    return EpochGranted(
        topic_id=row.topic_id,
        topic=topic,
        partition=row.partition,
        epoch=row.epoch + 1,
        session_id=session.session_id,
        agent_id=session.agent_id,
        wal_id=session.wal_id,
        start_offset=start,
        limit_offset=start + width_offsets,
    )


def _moves(
    topics: Mapping[str, str],
    held: Mapping[str, Sequence[RangeRow]],
    loads: Mapping[str, int],
    sessions: Sequence[SessionRow],
    total: int,
) -> list[Event]:
    """What the fullest agents hold above their share; the ones with the most keep the larger shares."""
    least, extra = divmod(total, len(sessions))
    moves: list[Event] = []
    fullest = sorted(sessions, key=lambda session: (-loads[session.session_id], session.agent_id))
    for rank, session in enumerate(fullest):
        excess = loads[session.session_id] - (least + (rank < extra))
        ranges = sorted(held[session.session_id], key=lambda row: row.key)
        for row in ranges[len(ranges) - min(excess, len(ranges)) :] if excess > 0 else ():
            moves.append(
                MoveRequested(
                    row.topic_id, topics[row.topic_id], row.partition, row.epoch, row.session_id, row.agent_id
                )
            )
    return moves
