"""Serializers and deserializers between an application's objects and the bytes of records, and the pair for JSON.

None is never passed to a callable: a null key stays null, and a null value a tombstone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from reprlib import repr as short
from typing import Any

from shproto.errors import SerializationError

from streamhouse.core.options import ConsumerOptions, Deserializer, ProducerOptions, Serializer
from streamhouse.core.record_checks import Bytes, count_of
from streamhouse.records import Record, RecordBatch, TopicPartition, records_of


def json_serializer(item: Any) -> bytes:
    """Returns the object as JSON in UTF-8, without spaces and with sorted names: equal objects give equal bytes, so
    that equal keys go to the same partition. Raises TypeError, ValueError (NaN and infinity are not JSON)."""
    text = json.dumps(item, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)
    return text.encode()


def json_deserializer(data: bytes) -> Any:
    """Returns the object of a JSON text in UTF-8. Raises ValueError."""
    return json.loads(data)


class Serializers:
    """Both serializers of a producer."""

    def __init__(self, key: Serializer | None, value: Serializer | None) -> None:
        self._key = key
        self._value = value

    @classmethod
    def of(cls, options: ProducerOptions) -> "Serializers | None":
        """Returns the serializers of the options; None if there is none."""
        pair = options.key_serializer, options.value_serializer
        return cls(*pair) if any(pair) else None

    def one(self, topic: str, value: Any, key: Any) -> tuple[Bytes | None, Bytes | None]:
        """Returns value and key of a record as bytes. Raises SerializationError."""
        if self._value is not None and value is not None:
            value = _serialized(self._value, "value", value, topic)
        if self._key is not None and key is not None:
            key = _serialized(self._key, "key", key, topic)
        return value, key

    def many(
        self, topic: str, values: Sequence[Any], keys: Sequence[Any] | None
    ) -> tuple[Sequence[Bytes | None], Sequence[Bytes | None] | None]:
        """Returns values and keys of records as bytes. Raises SerializationError with the record's position, TypeError
        for values or keys that are no list."""
        if self._value is not None:
            values = _column(self._value, "value", values, topic)
        if self._key is not None and keys is not None:
            keys = _column(self._key, "key", keys, topic)
        return values, keys


class Deserializers:
    """Both deserializers of a consumer."""

    def __init__(self, key: Deserializer | None, value: Deserializer | None) -> None:
        self._key = key
        self._value = value

    @classmethod
    def of(cls, options: ConsumerOptions) -> "Deserializers | None":
        """Returns the deserializers of the options; None if there is none."""
        pair = options.key_deserializer, options.value_deserializer
        return cls(*pair) if any(pair) else None

    def record(self, record: Record) -> Record:
        """Returns the record with its key and value as objects. Raises SerializationError with the unchanged record."""
        key: Any = record.key
        value: Any = record.value
        field = "key"
        try:
            if self._key is not None and key is not None:
                key = self._key(key)
            field = "value"
            if self._value is not None and value is not None:
                value = self._value(value)
        except Exception as cause:
            topic, partition, offset = record[:3]
            error = SerializationError(
                f"{topic}/{partition}: {field}_deserializer failed on the record at offset {offset}: "
                f"{type(cause).__name__}: {cause}",
                topic=topic,
                partition=partition,
                offset=offset,
                field=field,
            )
            error.record = record
            raise error from cause
        return record._replace(key=key, value=value)

    def polled(
        self, batches: Mapping[TopicPartition, Sequence[RecordBatch]]
    ) -> tuple[dict[TopicPartition, list[Record]], dict[TopicPartition, int], SerializationError | None]:
        """Returns the records of a poll, for each partition up to the first record on which a deserializer fails, and
        the offsets from which records have to be given back.

        If the very first record fails, returns no records but its error: that record counts as handed over, and all
        others have to be given back. So a failing record becomes the first of a poll in the end, however many records
        other partitions have.
        """
        records: dict[TopicPartition, list[Record]] = {}
        back: dict[TopicPartition, int] = {}
        for where, found in batches.items():
            good: list[Record] = []
            try:
                for batch in found:
                    for record in batch:
                        good.append(self.record(record))
            except SerializationError as error:
                back[where] = error.record.offset
                if not good and not records and len(back) == 1:
                    others = {other: int(its[0].offsets[0]) for other, its in batches.items() if other != where}
                    return {}, {where: error.record.offset + 1, **others}, error
            if good:
                records[where] = good
        return records, back, None


def records_of_poll(
    deserializers: Deserializers | None,
    batches: Mapping[TopicPartition, Sequence[RecordBatch]],
    give_back: Callable[[Mapping[TopicPartition, int]], object],
) -> dict[TopicPartition, list[Record]]:
    """Returns the records of a poll, deserialized. Calls `give_back` with the offsets from which records have to be
    handed over later. Raises SerializationError; see `Deserializers.polled`."""
    if deserializers is None:
        return records_of(batches)
    records, back, error = deserializers.polled(batches)
    if back:
        give_back(back)
    if error is not None:
        raise error
    return records


def _column(serialize: Callable[[Any], Any], field: str, items: Sequence[Any], topic: str) -> list[Bytes | None]:
    count_of(f"{field}s", items)
    return [
        None if item is None else _serialized(serialize, field, item, topic, position)
        for position, item in enumerate(items)
    ]


def _serialized(
    serialize: Callable[[Any], Any], field: str, item: Any, topic: str, position: int | None = None
) -> Bytes | None:
    where = f"a record for topic {topic!r}" if position is None else f"record {position} for topic {topic!r}"
    try:
        data = serialize(item)
    except Exception as cause:
        text = f"{field}_serializer failed on {where}: {type(cause).__name__}: {cause}"
        raise _error(text, topic, field, position) from cause
    if data is not None and not isinstance(data, bytes | bytearray | memoryview):
        text = f"{field}_serializer returned {short(data)} ({type(data).__name__}) for {where}, must return bytes"
        raise _error(text, topic, field, position)
    return data


def _error(text: str, topic: str, field: str, position: int | None) -> SerializationError:
    if position is None:
        return SerializationError(text, topic=topic, field=field)
    return SerializationError(text, topic=topic, field=field, position=position)
