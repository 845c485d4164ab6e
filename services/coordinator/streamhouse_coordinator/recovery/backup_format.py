"""Bytes of a backup: objects with rows, and a manifest that names them all and is written last. Pure.

docs/backup.md is the page for readers. A set of objects without a readable manifest is no backup.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from shproto.errors import InvalidArgument

from streamhouse_coordinator.core import tables as t

PREFIX = "backup/"
MANIFEST = "manifest.json"
VERSION = 2
# Version 1 has all events from the first on, and no bases.
VERSIONS_READ = (1, 2)
# A restore needs the projections as of the last pruned event, and the events since. Leases, claims, members and sweeps
# belong to processes that are gone by then; producers' state is left out (see restore_plan.py), and so are the
# journals and checkpoints of SQL jobs, which continue it.
BASES: dict[str, t.Table[Any]] = {base.name: base for base in map(t.base_of, t.PROJECTIONS)}
TABLES: tuple[t.Table[Any], ...] = (*BASES.values(), t.EVENTS, t.HISTORIES, t.LOST_SPANS, t.GROUP_OFFSETS)
# Rows of an object, some 400 bytes each: 8 MB in memory at once, and a request of a second or two.
CHUNK_ROWS = 20_000
# Limits of a reader: 20,000 rows, some of which name thousands of segments.
CHUNK_BYTES_MAX = 256 * 1024 * 1024
CHUNK_RAW_BYTES_MAX = 2 * 1024 * 1024 * 1024
# A million objects hold 2 * 10^10 rows.
MANIFEST_BYTES_MAX = 256 * 1024 * 1024

_NAME = re.compile(r"\d{8}T\d{6}Z-\d{12,19}")
BY_NAME = {table.name: table for table in TABLES}


class BackupDamaged(ValueError):
    """Bytes that are no part of a backup, or differ from the bytes that the manifest names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """An object with rows of a table. `sha256` and `size_bytes` are of the object, `raw_bytes` of its uncompressed
    content."""

    key: str
    table: str
    rows: int
    size_bytes: int
    raw_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of a backup. `position`: of its last event. `pruned_position`: of the event before its first; 0: the
    backup has all events. `producer_id`: the last that was allocated."""

    version: int
    name: str
    created_ms: int
    position: int
    history_id: str
    producer_id: int
    migrations: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    pruned_position: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all chunks together."""
        return sum(chunk.size_bytes for chunk in self.chunks)


def backup_name(time_text: str, position: int) -> str:
    """Returns the name of a backup. `time_text`: yyyymmddThhmmssZ."""
    return f"{time_text}-{position:012d}"


def check_name(name: str) -> str:
    """Returns `name`. Raises InvalidArgument unless `name` has the form of a backup's name."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name[:100]!r} is not a name of a backup", field="backup", value=name[:100])
    return name


def manifest_key(name: str) -> str:
    """Returns the object key of a backup's manifest."""
    return f"{PREFIX}{name}/{MANIFEST}"


def chunk_key(name: str, table: str, nth: int) -> str:
    """Returns the object key of the `nth` chunk of a table."""
    return f"{PREFIX}{name}/{table}-{nth:06d}.jsonl.gz"


def name_of(key: str) -> str:
    """Returns the name of the backup to which an object belongs; empty if there is none."""
    parts = key.removeprefix(PREFIX).split("/")
    return parts[0] if len(parts) == 2 and _NAME.fullmatch(parts[0]) else ""


def encode_chunk(key: str, table: t.Table[Any], rows: Sequence[Any]) -> tuple[Chunk, bytes]:
    """Returns the chunk and its bytes: gzip of a JSON array per row, with the columns in the order of the table."""
    lines = [json.dumps([getattr(row, name) for name in table.columns], separators=(",", ":")) for row in rows]
    raw = "".join(line + "\n" for line in lines).encode()
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    body = packer.compress(raw) + packer.flush()
    digest = hashlib.sha256(body).hexdigest()
    return Chunk(
        key=key, table=table.name, rows=len(rows), size_bytes=len(body), raw_bytes=len(raw), sha256=digest
    ), body


def decode_chunk(chunk: Chunk, body: bytes) -> list[Any]:
    """Returns the rows of a chunk. Raises BackupDamaged if the manifest names other bytes than `body`."""
    if len(body) != chunk.size_bytes or hashlib.sha256(body).hexdigest() != chunk.sha256:
        raise BackupDamaged(f"{chunk.key}: not the bytes that the manifest names")
    unpacker = zlib.decompressobj(31)
    try:
        # A byte more than the manifest says, to see if there are more: a damaged chunk cannot exhaust the memory.
        raw = unpacker.decompress(body, chunk.raw_bytes + 1)
        table = BY_NAME[chunk.table]
        rows = [table.row_of(json.loads(line)) for line in raw.splitlines()]
    except (zlib.error, KeyError, ValueError, TypeError) as error:
        raise BackupDamaged(f"{chunk.key}: {error}") from error
    if len(raw) != chunk.raw_bytes or len(rows) != chunk.rows:
        raise BackupDamaged(f"{chunk.key}: {len(rows)} rows, the manifest says {chunk.rows}")
    return rows


def encode_manifest(manifest: Manifest) -> bytes:
    """Returns the bytes of a manifest, with a checksum."""
    body = json.dumps(asdict(manifest), separators=(",", ":"), sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "backup": body}).encode()


def decode_manifest(key: str, data: bytes) -> Manifest:
    """Returns the manifest. Raises BackupDamaged if `data` is none, or of a version that this program cannot read."""
    try:
        outer = json.loads(data)
        body = outer["backup"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise BackupDamaged(f"{key}: its checksum does not fit")
        values = json.loads(body)
        if values["version"] not in VERSIONS_READ:
            known = " and ".join(map(str, VERSIONS_READ))
            raise BackupDamaged(f"{key}: version {values['version']}, this program reads {known}")
        chunks = tuple(_chunk(key, item) for item in values.pop("chunks"))
        migrations = tuple(values.pop("migrations"))
        return Manifest(**values, chunks=chunks, migrations=migrations)
    except BackupDamaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupDamaged(f"{key}: not a manifest of a backup: {error}") from error


def _chunk(key: str, values: dict[str, Any]) -> Chunk:
    chunk = Chunk(**values)
    if chunk.table not in BY_NAME or name_of(chunk.key) != name_of(key):
        raise BackupDamaged(f"{key}: names {chunk.key} of table {chunk.table}, which is not of this backup")
    if not 0 <= chunk.size_bytes <= CHUNK_BYTES_MAX or not 0 <= chunk.raw_bytes <= CHUNK_RAW_BYTES_MAX:
        raise BackupDamaged(f"{chunk.key}: {chunk.size_bytes} bytes, of {chunk.raw_bytes}; too large")
    return chunk


def complete(names: Iterable[str], with_manifest: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the names of complete backups, and of those without a manifest, each oldest first."""
    whole = set(with_manifest)
    return sorted(whole), sorted(set(names) - whole)


assert all(item.type is not bytes for table in TABLES for item in fields(table.row)), "rows are JSON as they are"  # type: ignore[arg-type]
