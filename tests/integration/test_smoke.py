"""The one test of `make test` that runs everything together, as processes: what all others trust in parts."""

from pathlib import Path

import pytest
from streamhouse.sync import Admin, Consumer, Producer
from streamhouse_cli.serve_process import ServeProcess

pytestmark = [pytest.mark.integration, pytest.mark.smoke, pytest.mark.timeout(120)]
RECORDS = 10_000
PARTITIONS = 3


def test_ten_thousand_records_are_read_back_by_the_next_start(tmp_path: Path) -> None:
    """Acknowledged by both levels, sealed, uploaded, registered, and read with nothing in memory or cache: each key's
    records are there once, in the order they were sent."""
    keys = [b"key-%d" % (number % 97) for number in range(RECORDS)]
    values = [b"%d" % number for number in range(RECORDS)]
    with ServeProcess(tmp_path / "data", tmp_path / "serve.log", {"STREAMHOUSE_SEAL_AGE_MS": "500"}) as serve:
        with Admin(serve.address) as admin:
            admin.create_topic("smoke", partitions=PARTITIONS)
        half = RECORDS // 2
        with Producer(serve.address, acks="wal") as producer:
            producer.send_many("smoke", values[:half], keys=keys[:half]).result()
        with Producer(serve.address, acks="durable") as producer:
            producer.send_many("smoke", values[half:], keys=keys[half:]).result()
    with (
        ServeProcess(tmp_path / "data", tmp_path / "serve.log") as serve,
        Consumer(serve.address, ["smoke"], group="smoke", start="earliest", stop_at_end=True) as consumer,
    ):
        read = [(record.key, int(record.value or b"")) for record in consumer]
    assert len(read) == RECORDS
    of_key = {key: [number for at, number in read if at == key] for key in set(keys)}
    assert of_key == {b"key-%d" % key: list(range(key, RECORDS, 97)) for key in range(97)}
