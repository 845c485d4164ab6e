"""Who leads which partition: grants for partitions without a leader, moves when the load is uneven.

An agent that cannot write, because its log's disk is full, leads only what nobody else can. Balanced means that any two
of the others' numbers of partitions differ by at most one once the moves are done; as few partitions as possible move.
"""

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from shproto.events import EpochGranted, Event, MoveRequested, RangeLost, RangeOrphaned, RangeSettled, TopicCreated

from streamhouse_coordinator.core.tables import SETTLED, PartitionRow, RangeRow, SessionRow

PartitionKey = tuple[str, int]


def left_without_leader(events: Iterable[Event]) -> Iterator[PartitionKey]:
    """The partitions that nobody leads any more, or yet, because of these events."""
    for event in events:
        match event:
            case RangeSettled() | RangeOrphaned() | RangeLost():
                yield event.topic_id, event.partition
            case TopicCreated():
                yield from ((event.topic_id, number) for number in range(event.partitions))


def grant(
    topics: Mapping[str, str],
    waiting: Sequence[PartitionRow],
    latest: Mapping[PartitionKey, RangeRow],
    loads: Mapping[str, int],
    sessions: Sequence[SessionRow],
    total: int,
    width_offsets: int,
) -> list[EpochGranted]:
    """A leader for each partition that has none; nobody to lead them: no grants.

    `topics`: name by topic_id. `waiting`: the partitions without a leader; `latest`: the newest range of each that has
    had one. `sessions`: the live ingest sessions; `loads`: by their ids, how many partitions each leads that are not on
    the move. `total`: of all partitions there are.
    """
    if not sessions:
        return []
    ordered = sorted(waiting, key=lambda row: (row.topic_id, row.partition))
    return [
        _grant(topics[row.topic_id], row, latest.get((row.topic_id, row.partition)), session, width_offsets)
        for row, session in _choose(ordered, latest, loads, sessions, total)
    ]


def able_to_lead(sessions: Sequence[SessionRow], full: Collection[str]) -> list[SessionRow]:
    """Returns the sessions that partitions may be given to: those not in `full`, or all if that leaves nobody."""
    return [row for row in sessions if row.session_id not in full] or list(sessions)


def excess(
    loads: Mapping[str, int], sessions: Sequence[SessionRow], total: int, full: Collection[str] = ()
) -> dict[str, int]:
    """By session id, how many partitions are to move away; the sessions with the most keep the larger shares, those in
    `full` nothing, unless that leaves nobody."""
    if not sessions:
        return {}
    able = able_to_lead(sessions, full)
    least, extra = divmod(total, len(able))
    fullest = sorted(able, key=lambda session: (-loads[session.session_id], session.agent_id))
    shares = {row.session_id: least + (rank < extra) for rank, row in enumerate(fullest)}
    over = {row.session_id: loads[row.session_id] - shares.get(row.session_id, 0) for row in sessions}
    return {session_id: count for session_id, count in over.items() if count > 0}


def move(topics: Mapping[str, str], held: Sequence[RangeRow], over: Mapping[str, int]) -> list[MoveRequested]:
    """The moves that `excess` asks for. `held`: the open ranges of those sessions that are not on the move yet."""
    moves = []
    for session_id, count in over.items():
        ranges = sorted((row for row in held if row.session_id == session_id), key=lambda row: row.key)
        for row in ranges[-count:]:
            name = topics[row.topic_id]
            moves.append(MoveRequested(row.topic_id, name, row.partition, row.epoch, row.session_id, row.agent_id))
    return moves


def start_of_next(previous: RangeRow | None) -> int:
    """Where the next epoch begins: without a gap if the end of the previous one is known, else past all it may hold."""
    if previous is None:
        return 0
    if previous.status == SETTLED:
        assert previous.end_offset is not None
        return previous.end_offset
    return previous.limit_offset


def _choose(
    waiting: Sequence[PartitionRow],
    latest: Mapping[PartitionKey, RangeRow],
    held: Mapping[str, int],
    sessions: Sequence[SessionRow],
    total: int,
) -> list[tuple[PartitionRow, SessionRow]]:
    """A session for each partition: the one whose log has its past if that has room, else the least loaded."""
    least, extra = divmod(total, len(sessions))
    loads = {session.session_id: held[session.session_id] for session in sessions}
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
