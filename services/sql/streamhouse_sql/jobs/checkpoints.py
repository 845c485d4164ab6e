"""State of jobs in the object store: written, read back, and deleted once no checkpoint needs it.

Owns: the objects below `sql/`. Does not own: the pointer to a checkpoint, which the coordinator keeps.
Invariants: an object is written once, under a name that no other owner of the job gives. A pointer names only objects
that are there. Objects of a checkpoint are deleted once the pointer has moved on. Nothing that is read back is used
before its size and its CRC are right.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from shproto.errors import DataLoss, Unavailable
from shproto.services import CoordinatorApi
from shproto.v1 import coordinator_pb2 as pb
from shstore import ObjectMissing, ObjectStore, StoreError
from shstore.errors import ObjectExists, RangeBeyondEnd

from streamhouse_sql.jobs import takeover
from streamhouse_sql.jobs.micro_batch import Checkpoint, StateObject
from streamhouse_sql.jobs.patience import until_available

log = logging.getLogger(__name__)

PREFIX = "sql/"
# Objects that are read or written at a time: each is in memory whole.
AT_ONCE = 4
DELETE_KEYS_MAX = 1_000


class Checkpoints:
    """Checkpoints of all jobs of a worker. `state_bytes_max`: of the objects of one, which are read into memory."""

    def __init__(
        self, store: ObjectStore, coordinator: CoordinatorApi, token: Callable[[], str], *, state_bytes_max: int
    ) -> None:
        self._store = store
        self._coordinator = coordinator
        self._token = token
        self._state_bytes_max = state_bytes_max

    async def write(self, job_id: str, epoch: int, number: int, state: Mapping[str, Any]) -> tuple[StateObject, ...]:
        """Writes the state tables after micro-batch `number` of an owner of the job; returns the objects. Raises
        Unavailable: any of them may be there then."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(position: int, name: str, table: Any) -> StateObject:
            async with slots:
                data = await asyncio.to_thread(_parquet, table)
                key = takeover.object_key(job_id, epoch, number, f"{position:03d}")
                try:
                    await self._store.put(key, [data])
                except ObjectExists:
                    # Of a try before, whose answer was lost: the same rows, since only this owner gives the name.
                    data = await self._store.get(key)
                return StateObject(table=name, key=key, size_bytes=len(data), crc32=zlib.crc32(data))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(one(position, name, state[name])) for position, name in enumerate(sorted(state))
                ]
        except ExceptionGroup as errors:
            raise _as_unavailable(errors) from errors
        return tuple(task.result() for task in tasks)

    async def read(self, objects: Sequence[StateObject]) -> dict[str, Any]:
        """Returns the state tables of a checkpoint as `pyarrow.Table`s. Raises DataLoss for an object that is missing
        or damaged, Unavailable."""
        size_bytes = sum(item.size_bytes for item in objects)
        if size_bytes > self._state_bytes_max:
            raise DataLoss(
                f"the checkpoint says that the state has {size_bytes} bytes, the limit is {self._state_bytes_max}"
            )
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(item: StateObject) -> Any:
            async with slots:
                try:
                    data = await self._store.get(item.key, at=0, size_bytes=item.size_bytes)
                except (ObjectMissing, RangeBeyondEnd) as error:
                    raise DataLoss(f"state object {item.key} is missing or too short: {error}") from error
                return await asyncio.to_thread(_table, item, data)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(item)) for item in objects]
        except ExceptionGroup as errors:
            raise _as_unavailable(errors) from errors
        return {item.table: task.result() for item, task in zip(objects, tasks, strict=True)}

    async def point(self, job_id: str, epoch: int, checkpoint: Checkpoint) -> None:
        """Moves the job's pointer to the checkpoint; asks again while no coordinator answers. Raises Fenced,
        InvalidArgument."""
        request = pb.StoreSqlCheckpointRequest(
            job_id=job_id, epoch=epoch, number=checkpoint.number, checkpoint=checkpoint.encode()
        )

        async def store() -> None:
            request.session_token = self._token()
            if not request.session_token:
                raise Unavailable("this worker has no session at the moment")
            await self._coordinator.store_sql_checkpoint(request)

        await until_available(
            store,
            lambda error: log.info(
                "job %s: checkpoint %d is not stored yet: %s", job_id, request.number, error.message
            ),
        )

    async def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects that no pointer names. What the store keeps now is deleted by the next owner of the job."""
        for first in range(0, len(keys), DELETE_KEYS_MAX):
            try:
                await self._store.delete(keys[first : first + DELETE_KEYS_MAX])
            except StoreError as error:
                log.warning("objects of former checkpoints are left until the job moves: %s", error)
                return

    async def sweep(self, job_id: str, checkpoint: Checkpoint | None, epoch: int) -> None:
        """Deletes objects that former owners of the job have left."""
        try:
            keys = [info.key async for info in self._store.list(takeover.prefix_of(job_id))]
        except StoreError as error:
            log.warning("job %s: objects of former owners are left until the job moves: %s", job_id, error)
            return
        await self.delete(takeover.orphans(keys, checkpoint, epoch))

    async def drop(self, job_id: str) -> None:
        """Deletes all objects of a job that was dropped."""
        try:
            keys = [info.key async for info in self._store.list(takeover.prefix_of(job_id))]
        except StoreError as error:
            log.warning("job %s: its objects are left for the next sweep: %s", job_id, error)
            return
        await self.delete(keys)

    async def sweep_dropped(self, known: Callable[[], Any]) -> None:
        """Deletes objects of jobs that are not among the ids that `known`, awaited, returns. They are listed before:
        the objects of a job come after the job."""
        try:
            keys = [info.key async for info in self._store.list(PREFIX)]
        except StoreError as error:
            log.warning("objects of dropped jobs are left for the next sweep: %s", error)
            return
        if not keys:
            return
        ids = set(await known())
        await self.delete([key for key in keys if takeover.epoch_of(key) is not None and key.split("/")[1] not in ids])


def _as_unavailable(errors: ExceptionGroup) -> Exception:
    """Returns the error that says most: a defect, DataLoss, or Unavailable for a store that does not answer."""
    found = next((error for error in errors.exceptions if not isinstance(error, StoreError)), errors.exceptions[0])
    if isinstance(found, StoreError):
        return Unavailable(f"the object store: {found}", retry_after_ms=1_000)
    return found


def _parquet(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _table(item: StateObject, data: bytes) -> Any:
    if zlib.crc32(data) != item.crc32:
        raise DataLoss(f"state object {item.key} is damaged: its CRC is not the one in the checkpoint")
    try:
        return pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataLoss(f"state object {item.key} cannot be read: {error}") from error
