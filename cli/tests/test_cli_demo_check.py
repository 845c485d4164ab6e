"""The demo's comparison notices every way in which records may come back wrong: a check that cannot fail is none."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from shformat import Records
from shformat.murmur2 import partition_of
from streamhouse.records import RecordBatch

pytestmark = pytest.mark.quick

PARTITIONS = 3
COUNT = 60


def _load(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "demo" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"streamhouse_demo_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = _load("check")


def sent(change: Callable[[np.ndarray, np.ndarray], None] = lambda partitions, offsets: None):  # type: ignore[no-untyped-def]
    keys = [None if at % 10 == 0 else b"key-%d" % (at % 7) for at in range(COUNT)]
    partitions = np.array([0 if key is None else partition_of(key, PARTITIONS) for key in keys], np.int64)
    offsets = np.empty(COUNT, np.int64)
    for number in range(PARTITIONS):
        mine = partitions == number
        offsets[mine] = 100 * number + np.arange(mine.sum())
    change(partitions, offsets)
    return check.Sent([b"value-%d" % at for at in range(COUNT)], keys, partitions, offsets)


def came(records, number: int, start: int = 0, stop: int | None = None, **wrong: object) -> RecordBatch:  # type: ignore[no-untyped-def]
    mine = np.flatnonzero(records.partitions == number)[start:stop].tolist()
    values = [wrong.get("value", records.values[at]) for at in mine]
    keys = [wrong.get("key", records.keys[at]) for at in mine]
    offsets = records.offsets[mine] + wrong.get("shift", 0)
    return RecordBatch("t", number, Records.from_lists(values, keys, timestamps_ms=0, offsets=offsets))


def test_everything_back_in_pieces_is_fine() -> None:
    records = sent()
    expectation = check.Expectation(records, PARTITIONS)
    for number in range(PARTITIONS):
        expectation.take(came(records, number, 0, 3))
        expectation.take(came(records, number, 3))
    expectation.finish()
    assert expectation.taken == COUNT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value": b"other"}, "value is b'other'"),
        ({"value": None}, "value is None"),
        ({"key": b""}, "key is b''"),
        ({"shift": 1}, "came where"),
    ],
)
def test_a_changed_record_is_named(wrong: dict[str, object], message: str) -> None:
    records = sent()
    expectation = check.Expectation(records, PARTITIONS)
    with pytest.raises(check.Mismatch, match=message):
        expectation.take(came(records, 1, 0, 4, **wrong))


def test_a_record_twice_or_skipped_is_named() -> None:
    records = sent()
    expectation = check.Expectation(records, PARTITIONS)
    expectation.take(came(records, 1, 0, 4))
    with pytest.raises(check.Mismatch, match="offset 103 came where 104 was due"):
        expectation.take(came(records, 1, 3, 5))
    with pytest.raises(check.Mismatch, match="offset 105 came where 104 was due"):
        expectation.take(came(records, 1, 5, 6))


def test_a_record_too_many_is_named() -> None:
    records = sent()
    expectation = check.Expectation(records, PARTITIONS)
    expectation.take(came(records, 2))
    with pytest.raises(check.Mismatch, match="a record too many"):
        expectation.take(came(records, 2, 0, 1))


def test_a_missing_record_is_named() -> None:
    records = sent()
    expectation = check.Expectation(records, PARTITIONS)
    expectation.take(came(records, 0))
    expectation.take(came(records, 1, 0, 2))
    with pytest.raises(check.Mismatch, match="offset 102, did not come back"):
        expectation.finish()


def test_acknowledgements_out_of_order_are_named() -> None:
    def swap(partitions: np.ndarray, offsets: np.ndarray) -> None:
        first, second = np.flatnonzero(partitions == 1)[:2]
        offsets[[first, second]] = offsets[[second, first]]

    with pytest.raises(check.Mismatch, match="not after the one before"):
        check.Expectation(sent(swap), PARTITIONS)


def test_a_key_on_another_partition_is_named() -> None:
    def move(partitions: np.ndarray, offsets: np.ndarray) -> None:
        partitions[1] = (partitions[1] + 1) % PARTITIONS

    with pytest.raises(check.Mismatch, match="is on partition"):
        check.Expectation(sent(move), PARTITIONS)
