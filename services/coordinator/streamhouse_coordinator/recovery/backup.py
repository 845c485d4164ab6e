"""Takes, lists, prunes and reads backups of the metadata in the object store.

Owns: the order of writes. Invariants: the manifest is written last and deleted first, so a backup is complete at any
moment at which its manifest exists.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from shproto.errors import InvalidArgument
from shstore import ObjectExists, ObjectMissing, ObjectStore

from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.ports import Snapshot, Where
from streamhouse_coordinator.recovery import backup_format as fmt

log = logging.getLogger(__name__)

# A backup of 10^9 events is written in a few hours; a set of chunks without a manifest after a day never gets its
# manifest.
HALF_MADE_MS = 24 * 3_600_000
# S3 deletes this many keys per request.
PAGE_KEYS = 1000


@dataclass(frozen=True, slots=True)
class Listed:
    """Names of backups, oldest first. `half_made`: names without a manifest, of a backup that is being written or was
    cut off."""

    backups: list[str]
    half_made: list[str]


async def take(snapshot: Snapshot, store: ObjectStore, now_ms: int) -> fmt.Manifest:
    """Writes a backup, the chunks before the manifest, and returns its manifest. Raises Unavailable, StoreError; chunks
    written by then form no backup, and prune() removes them later."""
    # The snapshot is of a single moment, so the position holds for all chunks.
    position = await snapshot.position()
    time_text = datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%Y%m%dT%H%M%SZ")
    name = fmt.backup_name(time_text, position)
    histories = await snapshot.select(t.HISTORIES, order=("nth",))
    chunks: list[fmt.Chunk] = []
    for table in fmt.TABLES:
        nth = 0
        async for rows in _pages(snapshot, table):
            key = fmt.chunk_key(name, table.name, nth)
            chunk, body = await asyncio.to_thread(fmt.encode_chunk, key, table, rows)
            await _put_once(store, chunk.key, body)
            chunks.append(chunk)
            nth += 1
    manifest = fmt.Manifest(
        version=fmt.VERSION,
        name=name,
        created_ms=now_ms,
        position=position,
        history_id=histories[-1].history_id,
        producer_id=await snapshot.producer_id(),
        migrations=tuple(await snapshot.migrations()),
        chunks=tuple(chunks),
        pruned_position=(await snapshot.select(t.PRUNED))[0].position,
    )
    # Last: without it the chunks are no backup, so a crash before this leaves nothing that a restore could take.
    await _put_once(store, fmt.manifest_key(name), fmt.encode_manifest(manifest))
    return manifest


async def _put_once(store: ObjectStore, key: str, body: bytes) -> None:
    try:
        await store.put(key, [body])
    except ObjectExists:
        text = f"{key} is there already: another backup began in the same second; try again"
        raise InvalidArgument(text, field="backup", value=key) from None


async def _pages(snapshot: Snapshot, table: t.Table[Any]) -> AsyncIterator[Sequence[Any]]:
    """Yields a table's rows in the order of the key, a page in memory at a time."""
    after: tuple[Any, ...] | None = None
    while rows := await snapshot.select(table, Where(equals={}, after=after), order=table.key, limit=fmt.CHUNK_ROWS):
        yield rows
        # By key, not by number: each page is an index scan, however large the table.
        after = table.key_of(rows[-1])


async def list_backups(store: ObjectStore) -> Listed:
    """Returns the names of complete and of half-made backups, oldest first."""
    names: set[str] = set()
    whole: set[str] = set()
    async for info in store.list(fmt.PREFIX):
        if name := fmt.name_of(info.key):
            names.add(name)
            if info.key == fmt.manifest_key(name):
                whole.add(name)
    return Listed(*fmt.complete(names, whole))


async def read_manifest(store: ObjectStore, name: str) -> fmt.Manifest:
    """Returns the manifest of a backup. `name`: its name, or "latest". Raises InvalidArgument if there is none,
    BackupDamaged, StoreError."""
    if name == "latest":
        listed = await list_backups(store)
        if not listed.backups:
            raise InvalidArgument("there is no backup in this object store", field="backup", value=name)
        name = listed.backups[-1]
    key = fmt.manifest_key(fmt.check_name(name))
    try:
        info = await store.head(key)
    except ObjectMissing:
        raise InvalidArgument(f"there is no backup {name} in this object store", field="backup", value=name) from None
    if info.size_bytes > fmt.MANIFEST_BYTES_MAX:
        raise fmt.BackupDamaged(f"{key} has {info.size_bytes} bytes, over the limit of {fmt.MANIFEST_BYTES_MAX}")
    return fmt.decode_manifest(key, await store.get(key))


async def read_chunk(store: ObjectStore, chunk: fmt.Chunk) -> list[Any]:
    """Returns the rows of a chunk. Raises BackupDamaged, StoreError."""
    try:
        info = await store.head(chunk.key)
    except ObjectMissing:
        raise fmt.BackupDamaged(f"{chunk.key} is missing") from None
    if info.size_bytes != chunk.size_bytes:
        raise fmt.BackupDamaged(f"{chunk.key} has {info.size_bytes} bytes, the manifest says {chunk.size_bytes}")
    return await asyncio.to_thread(fmt.decode_chunk, chunk, await store.get(chunk.key))


async def prune(store: ObjectStore, keep: int, now_ms: int) -> list[str]:
    """Deletes all but the `keep` newest backups, and half-made backups without a write for a day. Returns the names of
    the deleted backups."""
    listed = await list_backups(store)
    gone = listed.backups[: max(0, len(listed.backups) - keep)]
    for name in gone:
        await store.delete([fmt.manifest_key(name)])  # first: the rest must never look like a backup
    for name in [*gone, *listed.half_made]:
        infos = [info async for info in store.list(f"{fmt.PREFIX}{name}/")]
        if name in listed.half_made:
            if any(now_ms - info.modified_ms < HALF_MADE_MS for info in infos):
                continue
            gone.append(name)
        for first in range(0, len(infos), PAGE_KEYS):
            await store.delete([info.key for info in infos[first : first + PAGE_KEYS]])
    return gone
