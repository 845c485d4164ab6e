"""Queries a topic with SQL: a small result as rows, a large one batch by batch, an error with its place.

A query reads the topic up to its end at that moment, and ends. Batches are Arrow's and come while the query runs: a
result of any size takes little memory.

    pip install '.[sql]'
    python examples/sql_queries.py
"""

import argparse

from streamhouse import json_serializer
from streamhouse.errors import InvalidStatement
from streamhouse.sync import Admin, Producer, Sql

TOPIC = "example-rides"


def fill(server: str) -> None:
    """Creates the topic, and sends 10,000 rides if it is empty."""
    with Admin(server) as admin:
        admin.create_topic(TOPIC, partitions=2, if_not_exists=True)
        is_empty = not any(end.offset for end in admin.offsets(TOPIC, "latest").values())
    if is_empty:
        rides = [{"city": ("Oslo", "Bergen", "Bodø")[n % 3], "km": n % 50 / 2} for n in range(10_000)]
        with Producer(server, value_serializer=json_serializer) as producer:
            producer.send_many(TOPIC, rides, keys=[b"bike-%d" % (n % 20) for n in range(10_000)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    arguments = parser.parse_args()
    fill(arguments.server)

    with Sql(arguments.server) as sql:
        # A topic has the columns _key, _value, _partition, _offset, _timestamp and _headers.
        cities = sql(f"""
            SELECT _value ->> '$.city' AS city, count(*) AS rides, sum((_value ->> '$.km')::DOUBLE) AS km
            FROM "{TOPIC}" GROUP BY city ORDER BY city
        """)
        for row in cities.to_pylist():
            print(f"{row['city']}: {row['rides']} rides, {row['km']} km")
        stats = cities.stats
        assert stats is not None, "the whole result was read"
        print(f"{stats.records_scanned} records scanned for {stats.rows} rows")

        long_rides = 0
        for batch in sql(f"""SELECT _key, _offset FROM "{TOPIC}" WHERE (_value ->> '$.km')::DOUBLE >= 20"""):
            long_rides += batch.num_rows  # a pyarrow.RecordBatch: columns, no object per row
        print(f"{long_rides} long rides")

        try:
            sql("SELECT city FROM example_ride").to_pylist()
        except InvalidStatement as error:
            print(f"line {error.details['line']}, column {error.details['column']} is wrong")


if __name__ == "__main__":
    main()
