"""Jobs over a whole cluster in memory: output that is there once, whatever dies."""

from pathlib import Path

from services.sql.tests.job_world import by_number, job_world

COPY = (
    "INSERT INTO out SELECT CAST(_value ->> '$.n' AS BIGINT) AS n, _key FROM source "
    "WHERE CAST(_value ->> '$.n' AS BIGINT) % 2 = 0"
)


async def test_a_job_writes_what_its_query_gives(tmp_path: Path) -> None:
    async with job_world(tmp_path) as world:
        await world.cluster.create_topic("source", 3)
        await world.cluster.create_topic("out", 2)
        await world.produce("source", [{"n": n} for n in range(100)], [f"k{n % 7}" for n in range(100)])
        await world.create(COPY, "out")
        await world.start_worker()
        values = await world.until_values("out", 50)
        assert sorted(by_number(values)) == list(range(0, 100, 2))
        await world.produce("source", [{"n": n} for n in range(100, 120)], [f"k{n % 7}" for n in range(20)])
        values = await world.until_values("out", 60)
        assert sorted(by_number(values)) == list(range(0, 120, 2))
