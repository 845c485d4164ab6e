"""Notes the boundaries of micro-batches before they run.

Owns: the call under way, the entries that wait for the next one. Does not own: the boundaries, the journal itself.
Invariants: one call at a time, with at most one entry of a job. An entry is noted once `append` has returned; after an
error it may be noted or not, and the next owner of the job runs it if it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from shproto.errors import InvalidArgument, StreamHouseError, Unavailable
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2 as pb

from streamhouse_sql.jobs.patience import until_available

log = logging.getLogger(__name__)

# Entries of one call: a quarter of the largest message.
CALL_BYTES_MAX = 16 * 1024 * 1024
CALL_JOBS_MAX = 1_000


class Journal:
    """Journals of all jobs of a worker. `token` returns that of its session, empty while there is none."""

    def __init__(self, coordinator: CoordinatorApi, token: Callable[[], str]) -> None:
        self._coordinator = coordinator
        self._token = token
        self._waiting: dict[str, tuple[pb.SqlJobEntry, asyncio.Future[None]]] = {}
        self._has_entries = asyncio.Event()

    async def append(self, job_id: str, epoch: int, number: int, entry: bytes) -> None:
        """Returns once the entry is noted; asks again while no coordinator answers, or the journal is full, which a
        checkpoint ends. Raises Fenced, InvalidArgument."""
        asked = pb.SqlJobEntry(job_id=job_id, epoch=epoch, entry=pb.SqlJournalEntry(number=number, entry=entry))
        if asked.ByteSize() > CALL_BYTES_MAX:
            raise InvalidArgument(
                f"micro-batch {number} has boundaries of {asked.ByteSize()} bytes, the limit is {CALL_BYTES_MAX}",
                field="entry",
                value=asked.ByteSize(),
                limit=CALL_BYTES_MAX,
            )
        await until_available(
            lambda: self._append(asked),
            lambda error: log.info(
                "job %s: micro-batch %d is not in the journal yet: %s", job_id, number, error.message
            ),
        )

    async def _append(self, asked: pb.SqlJobEntry) -> None:
        assert asked.job_id not in self._waiting, "a job notes one micro-batch after the other"
        done = asyncio.get_running_loop().create_future()
        self._waiting[asked.job_id] = (asked, done)
        self._has_entries.set()
        try:
            await done
        finally:
            if self._waiting.get(asked.job_id, (None, None))[1] is done:
                del self._waiting[asked.job_id]

    async def run(self) -> None:
        """Sends entries, all that have come meanwhile in one call, until cancelled."""
        while True:
            await self._has_entries.wait()
            taken = self._take()
            try:
                refused = await self._send([asked for asked, _ in taken])
            except StreamHouseError as error:
                for _, done in taken:
                    _fail(done, error)
            else:
                for asked, done in taken:
                    _fail(done, refused.get(asked.job_id))

    def _take(self) -> list[tuple[pb.SqlJobEntry, asyncio.Future[None]]]:
        taken: list[tuple[pb.SqlJobEntry, asyncio.Future[None]]] = []
        room_bytes = CALL_BYTES_MAX
        for job_id, (asked, done) in list(self._waiting.items()):
            room_bytes -= asked.ByteSize()
            if room_bytes < 0 or len(taken) == CALL_JOBS_MAX:
                return taken  # the rest is for the next call
            del self._waiting[job_id]
            taken.append((asked, done))
        self._has_entries.clear()
        return taken

    async def _send(self, entries: list[pb.SqlJobEntry]) -> dict[str, StreamHouseError]:
        token = self._token()
        if not token:
            raise Unavailable("this worker has no session at the moment")
        request = pb.AppendSqlJournalRequest(session_token=token, entries=entries)
        answer = await self._coordinator.append_sql_journal(request)
        return {refusal.job_id: StreamHouseError.from_detail(refusal.error) for refusal in answer.refused}


def _fail(done: asyncio.Future[None], error: StreamHouseError | None) -> None:
    """Ends a wait, with the error if there is one; the waiter may be gone."""
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
