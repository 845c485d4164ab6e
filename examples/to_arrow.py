"""Reads a topic as columns: an Arrow table, from it a Parquet file, a Polars frame and a DuckDB query.

`batches()` hands over columns as they were stored, without an object per record; `to_arrow()` copies no bytes. Here the
values are JSON: Arrow's reader takes them apart, all at once.

    pip install pyarrow           # if the extra `arrow` is not installed
    python examples/to_arrow.py
    pip install polars duckdb     # for the last two parts; the extra sql brings duckdb
"""

import argparse
import importlib.util

from streamhouse import json_serializer
from streamhouse.sync import Admin, Consumer, Producer

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.json
    import pyarrow.parquet
except ModuleNotFoundError:
    raise SystemExit("pyarrow is not here: pip install pyarrow") from None

TOPIC = "example-trips"


def fill(server: str) -> None:
    """Creates the topic, and sends 10,000 trips if it is empty."""
    with Admin(server) as admin:
        admin.create_topic(TOPIC, partitions=2, if_not_exists=True)
        is_empty = not any(end.offset for end in admin.offsets(TOPIC, "latest").values())
    if is_empty:
        trips = [{"city": ("Oslo", "Bergen", "Bodø")[n % 3], "km": n % 50 / 2} for n in range(10_000)]
        with Producer(server, value_serializer=json_serializer) as producer:
            producer.send_many(TOPIC, trips, keys=[b"car-%d" % (n % 20) for n in range(10_000)])


def read(server: str) -> pa.Table:
    """Returns the topic as a table with the columns partition, offset, timestamp, city and km."""
    as_json = pyarrow.json.ParseOptions(explicit_schema=pa.schema([("city", pa.string()), ("km", pa.float64())]))
    tables = []
    with Consumer(server, [TOPIC], stop_at_end=True) as consumer:
        for batch in consumer.batches():
            records = batch.to_arrow()  # offset, timestamp, key, value, headers
            records = records.filter(records["value"].is_valid())  # tombstones have none
            lines = pc.binary_join_element_wise(records["value"], b"", b"\n")  # each value and a newline
            values = pyarrow.json.read_json(pa.BufferReader(lines.buffers()[2]), parse_options=as_json)
            partition = pa.repeat(pa.scalar(batch.partition, pa.int32()), records.num_rows)
            columns = [partition, records["offset"], records["timestamp"], values["city"], values["km"]]
            tables.append(pa.table(columns, names=["partition", "offset", "timestamp", "city", "km"]))
    return pa.concat_tables(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    parser.add_argument("--parquet", default="trips.parquet", help="the file that is written")
    arguments = parser.parse_args()
    fill(arguments.server)

    trips = read(arguments.server)
    pyarrow.parquet.write_table(trips, arguments.parquet)
    print(f"{trips.num_rows} records, {trips.nbytes} bytes as columns, in {arguments.parquet}")
    print(trips.group_by("city").aggregate([("km", "sum")]).sort_by("city").to_pylist())

    if importlib.util.find_spec("polars"):
        import polars

        frame = polars.DataFrame(trips)
        print(frame.group_by("city").agg(polars.col("km").mean()).sort("city"))
    else:
        print("Polars is not here: pip install polars")
    if importlib.util.find_spec("duckdb"):
        import duckdb

        query = "SELECT city, count(*) AS trips, max(km) AS longest FROM trips GROUP BY city ORDER BY city"
        print(duckdb.sql(query))
    else:
        print("DuckDB is not here: pip install duckdb")


if __name__ == "__main__":
    main()
