"""Follows the result of a SQL query while records come in: changes instead of answers, applied to a dict.

A query with EMIT CHANGES does not end. It begins at the first record, and gives what each group of records changes in
its result: +I and +U set the row of a key, -D deletes it; -U is the row before an update. Nothing is stored: a program
that is started again gets the result from the beginning.

    pip install '.[sql]'
    python examples/sql_live.py
"""

import argparse
import asyncio

from streamhouse import Admin, Producer, Sql, json_serializer

TOPIC = "example-live-trips"
CITIES = ("Oslo", "Bergen", "Bodø")
BY_CITY = f"""
SELECT _value ->> '$.city' AS city, count(*) AS trips, sum((_value ->> '$.km')::DOUBLE) AS km
FROM "{TOPIC}" GROUP BY 1 EMIT CHANGES"""


async def produce(server: str) -> None:
    """Sends 300 trips, a few at a time."""
    async with Producer(server, value_serializer=json_serializer) as producer:
        for n in range(300):
            await producer.send(TOPIC, {"city": CITIES[n % 3], "km": n % 10 / 2}, key=b"bike-%d" % (n % 20))
            if n % 30 == 29:
                await asyncio.sleep(0.05)


async def follow(server: str, trips: int) -> None:
    """Prints the result as it changes, until all trips are in it."""
    cities: dict[str, tuple[int, float]] = {}
    async with Sql(server) as sql:
        async for batch in sql(BY_CITY):  # a pyarrow.RecordBatch of changes
            for change in batch.to_pylist():
                if change["_op"] in ("+I", "+U"):
                    cities[change["city"]] = change["trips"], change["km"]
                elif change["_op"] == "-D":
                    del cities[change["city"]]
            print(", ".join(f"{city}: {count} trips, {km} km" for city, (count, km) in sorted(cities.items())))
            if sum(count for count, _ in cities.values()) == trips:
                return  # leaving the loop ends the query on the server


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    arguments = parser.parse_args()
    async with Admin(arguments.server) as admin:
        await admin.create_topic(TOPIC, partitions=2, if_not_exists=True)
        before = sum(end.offset for end in (await admin.offsets(TOPIC, "latest")).values())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(follow(arguments.server, before + 300))
        tasks.create_task(produce(arguments.server))


if __name__ == "__main__":
    asyncio.run(main())
