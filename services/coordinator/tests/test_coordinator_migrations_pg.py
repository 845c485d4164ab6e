"""Migrations are only added: what is applied once stays as it was, and every database ends with the same tables."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from shproto.v1 import coordinator_pb2 as pb
from streamhouse_coordinator.adapters import migrate
from streamhouse_coordinator.core import tables as t
from streamhouse_coordinator.wiring import build

pytestmark = pytest.mark.long

# Add a line for each new migration. Never change one: databases out there have the migration as it is.
SHA256 = {
    "0001_tables": "8af54d370564940c8413af425116f1052539730684792e5e0403dcedde89b709",
    "0002_orphaned_ranges": "17c89fcf705505c10c2e270a058bb921a49e1337fc9419ac3e55b04484b72233",
    "0003_histories": "e7c0ca5944d2328abe3c4dc6fec1edb122cec66a38229cf27d280ebca93c9911",
    "0004_deletions": "72dfbf75e6321f8aec0b724b575e31ea5e1a523735755ba642dbfb4912908d9e",
    "0005_forks": "28f2c985b902828f31247fab9dc8779707f3ff71aa167719775b400856fc72af",
    "0006_acknowledged_end": "f18ffcddd2afc8095f55ea33555215c1c913c24f4a525f8ecafd622c341a8a8a",
    "0007_log_full": "5acb2ef08c09e3f7048a0b2a26f24c7eda322f16decb243c8e8138b66aad036a",
    "0008_tables_of_early_databases": "0ce156194b7be5df179497387ddc9020e2bc700283efe07c44b84588bf9bef32",
    "0009_cut_off_agents": "c5ac9afc3645c44c881cd8e8eb54043fc0448b0b0dbe6973938231c17688c559",
    "0010_outbox_claim": "6e04876fba9b679ce13c583e33f0f33dc917ec0bfcb7aa7f52ce05e248dc31d5",
    "0011_pruned_events": "23b462107a5fddffadbfbb87cc5438d5817dc8b5dc701f787f0fa8b1ad6a95a5",
    "0012_sql_tables": "ccb0125978d1104638e27481d96c06342e33b1b161653d30640b354bf8e825c8",
    "0013_sql_jobs": "02e748e6f1434dcd16a1e7935c08ec9c1ca87e9fd6b88b5a359aa0aa99d06c17",
    "0014_producer_fences": "9a9bb27849542c5149f9117571dd8d3ac813188fc66152c81b4478b0598dc659",
    "0015_sql_job_definitions": "f57b40dd114ead7aeed26db3fc08768024c53ab8e3db91c8595a9e381ba64450",
    "0016_named_producers": "16a5d9dc94debd23d597ba91159e905f9151b70ea6b32328c89774b5b98460c2",
    "0017_ended_epochs": "ef6c2a5e285f87b14eb521afbe7a50b93964eb8ece901d27d4591232636733d6",
}

# Two were changed before this test was there. Databases that have them as they were are brought to the same tables.
AS_THEY_WERE = Path(__file__).with_name("migrations_as_they_were")
FIRST_TABLES, SECOND_TABLES = "0001_tables_first", "0001_tables_second"
FIRST_ORPHANED = "0002_orphaned_ranges_first"


@pytest.mark.smoke
def test_no_migration_is_changed_or_taken_back() -> None:
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in migrate.available().items()}
    assert hashes == SHA256
    numbers = [name.split("_")[0] for name in hashes]
    assert numbers == [f"{number:04d}" for number in range(1, len(numbers) + 1)]


async def schema(connection: asyncpg.Connection) -> list[tuple[Any, ...]]:
    """Tables, columns, indexes, constraints and sequences, without the order in which they were made."""
    queries = (
        "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
        "WHERE table_schema = 'public'",
        "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace",
        "SELECT sequence_name FROM information_schema.sequences WHERE sequence_schema = 'public'",
    )
    found = [tuple(row.values()) for query in queries for row in await connection.fetch(query)]
    return sorted(found, key=repr)


@pytest.mark.parametrize(
    "applied",
    [
        [FIRST_TABLES],
        [SECOND_TABLES],
        ["0001_tables"],
        ["0001_tables", FIRST_ORPHANED],
        ["0001_tables", FIRST_ORPHANED, "0004_deletions"],
        ["0001_tables", "0002_orphaned_ranges", "0003_histories", "0004_deletions", "0005_forks"],
    ],
    ids=lambda names: names[-1],
)
async def test_a_database_of_any_time_gets_the_tables_of_a_new_one(
    dsn: str, new_database: Callable[[], Any], fast: Callable[..., Any], applied: list[str]
) -> None:
    old = await asyncpg.connect(dsn)
    await old.execute("CREATE TABLE migrations (name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())")
    for name in applied:
        changed = AS_THEY_WERE / f"{name}.sql"
        await old.execute(changed.read_text() if changed.exists() else migrate.available()[name])
        known = name.removesuffix("_first").removesuffix("_second")
        await old.execute("INSERT INTO migrations (name) VALUES ($1)", known)
    service = build(fast(dsn))
    await service.start()  # its sweeps look at what was missing
    await service.api.join_group(pb.JoinGroupRequest(group="g", topics=["orders"]))
    await service.stop()
    fresh = await asyncpg.connect(await new_database())
    await migrate.migrate(fresh)
    assert await schema(old) == await schema(fresh)
    await old.close()
    await fresh.close()


@pytest.mark.smoke
async def test_the_base_of_a_projection_has_its_columns(dsn: str) -> None:
    """A migration that changes one has to change the other."""
    connection = await asyncpg.connect(dsn)
    await migrate.migrate(connection)
    columns = (
        "SELECT column_name, data_type, is_nullable FROM information_schema.columns "
        "WHERE table_schema = 'public' AND table_name = $1 ORDER BY ordinal_position"
    )
    for table in t.PROJECTIONS:
        of_base = [tuple(row) for row in await connection.fetch(columns, t.base_of(table).name)]
        assert of_base == [tuple(row) for row in await connection.fetch(columns, table.name)], table.name
    await connection.close()
