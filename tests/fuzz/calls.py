"""A fuzz input as a sequence of calls: how it is written as bytes, and how messages are changed field by field.

A string or bytes field that says `$`, and a whole number REMEMBERED, stand for what the services last answered in a
field of that name: a session id, a generation, a claim. So an input means the same in every run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from shproto.v1 import coordinator_pb2, ingest_pb2, query_pb2

from tests.fuzz.bytes_mutator import edge, mutate_bytes
from tests.fuzz.checksums import repair_batches
from tests.fuzz.format_mutators import mutate_batches
from tests.fuzz.target import GOLDEN

REMEMBERED = 77_077
CALLS_MAX = 8
_ITEMS_MAX = 64
_HEAD = struct.Struct("<BI")

_SERVICES = (
    coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"],
    ingest_pb2.DESCRIPTOR.services_by_name["Ingest"],
    query_pb2.DESCRIPTOR.services_by_name["Query"],
)
METHODS: dict[str, MethodDescriptor] = {
    f"{service.name}/{method.name}": method for service in _SERVICES for method in service.methods
}
_INTEGERS = {
    FieldDescriptor.TYPE_INT64: (64, True),
    FieldDescriptor.TYPE_UINT64: (64, False),
    FieldDescriptor.TYPE_INT32: (32, True),
    FieldDescriptor.TYPE_UINT32: (32, False),
    FieldDescriptor.TYPE_ENUM: (31, False),
}
_TEXTS = (
    "$", "", "orders", "fuzzed", "ingest", "query", "segmenter", "coordinator", "member", "..", "a/b", "ä€😀", "\0",
    "%s%n{}", "x" * 249, "x" * 250, "y" * 5_000, "00000000-0000-4000-8000-000000000001", "TopicCreated", "localhost:1",
)  # fmt: skip


class Call(NamedTuple):
    """`Service/Method` and its request."""

    method: str
    request: Message


# ---- as bytes


def encode_calls(calls: Sequence[Call]) -> bytes:
    """Each call: length of the name u8, length of the request u32 (little-endian), name, request."""
    parts = []
    for method, request in calls:
        payload = request.SerializeToString()
        parts += [_HEAD.pack(len(method), len(payload)), method.encode(), payload]
    return b"".join(parts)


def decode_calls(data: bytes) -> list[Call]:
    """The calls up to the first that is none: an unknown name, or bytes that gRPC would refuse itself."""
    calls: list[Call] = []
    at = 0
    while at + _HEAD.size <= len(data) and len(calls) < CALLS_MAX:
        name_size, size = _HEAD.unpack_from(data, at)
        payload_at = at + _HEAD.size + name_size
        name = data[at + _HEAD.size : payload_at].decode("ascii", "replace")
        if name not in METHODS:
            break
        try:
            calls.append(Call(name, request_type(name).FromString(data[payload_at : payload_at + size])))
        except DecodeError:
            break
        at = payload_at + size
    return calls


def request_type(method: str) -> type[Message]:
    return GetMessageClass(METHODS[method].input_type)


# ---- what answers are remembered for


def fields_of(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Every field that is set, with the message it is in, nested ones too."""
    for field, value in message.ListFields():
        yield message, field
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in (value if field.is_repeated else [value])[:_ITEMS_MAX]:
                yield from fields_of(part)


def remember(response: Message, memory: dict[str, Any]) -> None:
    """Keeps the latest value of every plain field of the response, by name; an empty text is none."""
    messages = {id(message): message for message, _ in fields_of(response)}
    for message in messages.values():
        fields: Sequence[Any] = message.DESCRIPTOR.fields
        for field in fields:
            value = getattr(message, field.name)
            if field.is_repeated:
                value = value[0] if field.message_type is None and value else None
            if field.message_type is None and value not in (None, "", b""):
                memory[field.name] = value


def fill_in(request: Message, memory: Mapping[str, Any]) -> None:
    """Puts remembered values in place of their stand-ins; those nobody has answered yet stay."""
    for message, field in list(fields_of(request)):
        known = memory.get(field.name)
        if known is None or field.is_repeated:
            continue
        if getattr(message, field.name) in ("$", b"$", REMEMBERED) and isinstance(
            known, type(getattr(message, field.name))
        ):
            setattr(message, field.name, known)


# ---- changes


def mutator(universe: Sequence[str]) -> Callable[[bytes, Random], bytes]:
    """Changes sequences of calls of these methods."""

    def mutate(data: bytes, rng: Random) -> bytes:
        calls = decode_calls(data)
        if not calls or rng.random() < 0.15:
            calls.insert(rng.randrange(len(calls) + 1), _new_call(rng.choice(universe), rng))
        elif rng.random() < 0.1 and len(calls) > 1:
            del calls[rng.randrange(len(calls))]
        elif rng.random() < 0.1:
            calls.append(rng.choice(calls))
        else:
            _change_message(rng.choice(calls).request, rng, 3)
        return encode_calls(calls[:CALLS_MAX])

    return mutate


def _new_call(method: str, rng: Random) -> Call:
    request = request_type(method)()
    fields: Sequence[Any] = request.DESCRIPTOR.fields
    for field in fields:
        if rng.random() < 0.8:
            _change_field(request, field, rng, 2, likely=True)
    return Call(method, request)


def _change_message(message: Message, rng: Random, depth: int) -> None:
    fields: Sequence[Any] = message.DESCRIPTOR.fields
    if fields:
        _change_field(message, rng.choice(fields), rng, depth)


def _change_field(message: Message, field: FieldDescriptor, rng: Random, depth: int, *, likely: bool = False) -> None:
    """Another value for one field; `likely` prefers one that the service takes."""
    if not likely and rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.is_repeated:
        _change_repeated(getattr(message, field.name), field, rng, depth, likely=likely)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if depth:
            _fill(getattr(message, field.name), rng, depth, likely=likely)
    else:
        setattr(message, field.name, _value(field, getattr(message, field.name), rng, likely=likely))


def _fill(message: Message, rng: Random, depth: int, *, likely: bool) -> None:
    message.SetInParent()
    if not likely and message.ListFields():
        _change_message(message, rng, depth - 1)
        return
    fields: Sequence[Any] = message.DESCRIPTOR.fields
    for field in fields:
        _change_field(message, field, rng, depth - 1, likely=likely)


def _change_repeated(items: Any, field: FieldDescriptor, rng: Random, depth: int, *, likely: bool) -> None:
    if items and rng.random() < 0.2:
        del items[rng.randrange(len(items))]
        return
    if len(items) >= _ITEMS_MAX:
        return
    if field.type != FieldDescriptor.TYPE_MESSAGE:
        items.append(_value(field, field.default_value or _zero(field), rng, likely=likely))
    elif depth:
        if items and rng.random() < 0.5:
            _fill(rng.choice(items), rng, depth, likely=False)
        elif items and rng.random() < 0.3:
            items.add().CopyFrom(rng.choice(items))
        else:
            _fill(items.add(), rng, depth, likely=True)


def _zero(field: FieldDescriptor) -> Any:
    return {FieldDescriptor.TYPE_STRING: "", FieldDescriptor.TYPE_BYTES: b""}.get(field.type, 0)


def _value(field: FieldDescriptor, old: Any, rng: Random, *, likely: bool) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        if likely and rng.random() < 0.8:
            return "orders" if field.name in ("topic", "topics") else "$"
        return rng.choice(_TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _bytes(field.name, old, rng, likely=likely)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type not in _INTEGERS:
        return old
    if likely and rng.random() < 0.8:
        return rng.choice((0, 1, 2)) if field.type == FieldDescriptor.TYPE_ENUM else rng.choice((0, 1, 10, REMEMBERED))
    size_bits, signed = _INTEGERS[field.type]
    return edge(rng, old, size_bits, signed=signed)


def _bytes(name: str, old: bytes, rng: Random, *, likely: bool) -> bytes:
    if name == "batch":
        batch = old or (GOLDEN / f"batch_v1_plain_{rng.choice(('none', 'lz4', 'zstd', 'gzip'))}.bin").read_bytes()
        return batch if likely else repair_batches(mutate_batches(batch, rng))
    if likely:
        return b"$"
    return rng.choice((b"", b"$", bytes(16), b"\1" * 16, b"\1" * 15, mutate_bytes(old, rng)))
