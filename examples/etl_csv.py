"""Loads a CSV file into a topic: one JSON record per row, keyed by a column.

The header row names the fields. Every value loses the spaces around it, and an empty value becomes null. Rows with
equal keys go to the same partition, in the order of the file. A row that does not fit the header ends the program;
the chunks before it are written. A second run appends the rows again.

    python examples/etl_csv.py                                   # a small file of its own
    python examples/etl_csv.py --csv sales.csv --key order_id --topic sales
"""

import argparse
import csv
import io
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TextIO

from streamhouse import json_serializer
from streamhouse.sync import Admin, Producer

SAMPLE = """order_id,customer,city,amount
1001,astrid,Bergen,12.50
1002,bjørn,Oslo,7.00
1003,astrid,Bergen,
1004,camilla,Bodø,99.90
1005,bjørn, Oslo ,3.20
"""
# Enough rows that the cost of a call is spread over many, few enough that memory stays small.
CHUNK_ROWS = 10_000


def read_rows(file: TextIO) -> Iterator[dict[str, str | None]]:
    """Yields the rows as dicts. Raises SystemExit for a row with more or fewer fields than the header."""
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        if None in row or None in row.values():
            raise SystemExit(
                f"line {reader.line_num} does not have the {len(reader.fieldnames or ())} fields of the header"
            )
        yield {name: value.strip() or None for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:7070", help="address of streamhouse serve, or of coordinators")
    parser.add_argument("--topic", default="example-orders")
    parser.add_argument("--csv", help="the file; without it five rows are loaded")
    parser.add_argument("--key", default="customer", help="the column that is the key")
    arguments = parser.parse_args()

    with Admin(arguments.server) as admin:
        admin.create_topic(arguments.topic, partitions=4, if_not_exists=True)

    per_partition: Counter[int] = Counter()
    with (
        open(arguments.csv, newline="", encoding="utf-8") if arguments.csv else io.StringIO(SAMPLE) as file,
        Producer(arguments.server, key_serializer=str.encode, value_serializer=json_serializer) as producer,
    ):
        rows = read_rows(file)
        while chunk := list(islice(rows, CHUNK_ROWS)):
            if arguments.key not in chunk[0]:
                raise SystemExit(f"there is no column {arguments.key!r}, only {', '.join(chunk[0])}")
            sent = producer.send_many(arguments.topic, chunk, keys=[row[arguments.key] for row in chunk]).result()
            per_partition.update(sent.partitions.tolist())

    print(f"{per_partition.total()} rows acknowledged in {arguments.topic}")
    for partition, count in sorted(per_partition.items()):
        print(f"  partition {partition}: {count}")


if __name__ == "__main__":
    main()
