"""Protocol Buffers: columns have what Python's classes have, whatever the bytes are, and a bad value is bad alone."""

import base64
import random
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2, message_factory, timestamp_pb2, wrappers_pb2
from google.protobuf.message import DecodeError
from shproto.errors import InvalidStatement, StatementFailed, StatementLimit
from streamhouse_sql import decoding, protobuf
from streamhouse_sql.core.statement import parse

from services.sql.tests.declared import definition, rows_of
from services.sql.tests.start_sql import StartSql
from tests.platform.read_world import World

pytestmark = pytest.mark.timeout(600)

Field = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    "double": ("DOUBLE", Field.TYPE_DOUBLE), "float": ("FLOAT", Field.TYPE_FLOAT),
    "int32": ("INTEGER", Field.TYPE_INT32),
    "int64": ("BIGINT", Field.TYPE_INT64), "uint32": ("UINTEGER", Field.TYPE_UINT32),
    "uint64": ("UBIGINT", Field.TYPE_UINT64), "sint32": ("INTEGER", Field.TYPE_SINT32),
    "sint64": ("BIGINT", Field.TYPE_SINT64), "fixed32": ("UINTEGER", Field.TYPE_FIXED32),
    "fixed64": ("UBIGINT", Field.TYPE_FIXED64), "sfixed32": ("INTEGER", Field.TYPE_SFIXED32),
    "sfixed64": ("BIGINT", Field.TYPE_SFIXED64), "bool": ("BOOLEAN", Field.TYPE_BOOL),
    "string": ("VARCHAR", Field.TYPE_STRING), "bytes": ("BLOB", Field.TYPE_BYTES),
}  # fmt: skip


def schema() -> descriptor_pb2.FileDescriptorSet:
    """Returns a message with a field of each kind."""
    file = descriptor_pb2.FileDescriptorProto(name="all.proto", package="shop.v1", syntax="proto3")
    color = file.enum_type.add(name="Color")
    color.value.add(name="RED", number=0)
    color.value.add(name="GREEN", number=1)
    leaf = file.message_type.add(name="Leaf")
    leaf.field.add(name="x", number=1, type=Field.TYPE_INT32, label=1)
    leaf.field.add(name="y", number=2, type=Field.TYPE_STRING, label=1)
    leaf.field.add(name="deeper", number=3, type=Field.TYPE_MESSAGE, type_name=".shop.v1.Leaf", label=1)
    everything = file.message_type.add(name="All")
    for number, (name, (_, kind)) in enumerate(SCALARS.items(), 1):
        everything.field.add(name=f"a_{name}", number=number, type=kind, label=1)
        everything.field.add(name=f"many_{name}", number=20 + number, type=kind, label=3)
    everything.field.add(name="color", number=50, type=Field.TYPE_ENUM, type_name=".shop.v1.Color", label=1)
    everything.field.add(name="leaf", number=51, type=Field.TYPE_MESSAGE, type_name=".shop.v1.Leaf", label=1)
    everything.field.add(name="leaves", number=52, type=Field.TYPE_MESSAGE, type_name=".shop.v1.Leaf", label=3)
    everything.field.add(name="maybe", number=53, type=Field.TYPE_INT32, label=1, proto3_optional=True, oneof_index=1)
    everything.field.add(name="either", number=54, type=Field.TYPE_INT32, label=1, oneof_index=0)
    everything.field.add(name="other", number=55, type=Field.TYPE_STRING, label=1, oneof_index=0)
    everything.oneof_decl.add(name="choice")
    everything.oneof_decl.add(name="_maybe")
    entry = everything.nested_type.add(name="CountsEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=Field.TYPE_STRING, label=1)
    entry.field.add(name="value", number=2, type=Field.TYPE_INT64, label=1)
    everything.field.add(
        name="counts", number=56, type=Field.TYPE_MESSAGE, type_name=".shop.v1.All.CountsEntry", label=3
    )
    for number, name in enumerate(("Timestamp", "Duration", "Int64Value"), 57):
        everything.field.add(
            name=f"wk_{name.lower()}",
            number=number,
            type=Field.TYPE_MESSAGE,
            type_name=f".google.protobuf.{name}",
            label=1,
        )
    names = ("timestamp", "duration", "wrappers")
    file.dependency.extend(f"google/protobuf/{name}.proto" for name in names)
    files = descriptor_pb2.FileDescriptorSet()
    for module in (timestamp_pb2, duration_pb2, wrappers_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    files.file.add().CopyFrom(file)
    return files


FILES = schema()
_POOL = descriptor_pool.DescriptorPool()
for _file in FILES.file:
    _POOL.Add(_file)
All: Callable[..., Any] = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("shop.v1.All"))
DESCRIPTOR = base64.b64encode(FILES.SerializeToString()).decode()
COLUMNS = {
    **{f"a_{name}": kind for name, (kind, _) in SCALARS.items()},
    **{f"many_{name}": f"{kind}[]" for name, (kind, _) in SCALARS.items()},
    "color": "VARCHAR",
    "leaf": "STRUCT(x INTEGER, y VARCHAR)",
    "leaves": "STRUCT(y VARCHAR, x INTEGER)[]",
    "maybe": "INTEGER",
    "either": "INTEGER",
    "other": "VARCHAR",
    "counts": "MAP(VARCHAR, BIGINT)",
}


def table(columns: str, bad_rows: str = "skip", message: str = "shop.v1.All") -> str:
    return (
        f"CREATE TABLE x ({columns}) WITH (topic = 't', format = 'protobuf', bad_rows = '{bad_rows}', "
        f"message = '{message}', descriptor = '{DESCRIPTOR}')"
    )


EVERYTHING = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())


def expected(message: Any) -> dict[str, Any]:
    """Returns the columns of a message as Python's class has them."""
    found: dict[str, Any] = {}
    for name in COLUMNS:
        value = getattr(message, name)
        if name in ("maybe", "either", "other", "leaf"):
            found[name] = None
            if message.HasField(name):
                found[name] = {"x": value.x, "y": value.y} if name == "leaf" else value
        elif name == "color":
            found[name] = {0: "RED", 1: "GREEN"}.get(value, str(value))
        elif name == "leaves":
            found[name] = [{"y": leaf.y, "x": leaf.x} for leaf in value]
        elif name == "counts":
            found[name] = sorted(value.items())
        else:
            found[name] = list(value) if name.startswith("many_") else value
    return found


def found_rows(values: list[bytes | None]) -> dict[int, dict[str, Any]]:
    rows = {}
    for offset, *row in rows_of(definition(table(EVERYTHING)), values):
        found = dict(zip(COLUMNS, row, strict=True))
        if found["counts"] is not None:
            found["counts"] = sorted(found["counts"])
        rows[offset] = found
    return rows


def random_message(rng: random.Random) -> Any:
    message = All()
    bounds = {"int32": 31, "int64": 63, "uint32": 32, "uint64": 64, "sint32": 31, "sint64": 63, "fixed32": 32,
              "fixed64": 64, "sfixed32": 31, "sfixed64": 63}  # fmt: skip

    def scalar(name: str) -> Any:
        if name in bounds:
            bits = rng.randrange(bounds[name] + 1)
            value = rng.randrange(1 << bits)
            return value if name.startswith(("u", "f")) else rng.choice([value, -value, -(1 << bounds[name])])
        return {
            "double": rng.choice([0.0, -1.5, 1e300]),
            "float": rng.choice([0.0, 0.5, -2.0]),
            "bool": rng.random() < 0.5,
            "string": rng.choice(["", "tea", "äß🜁", "x" * 200]),
            "bytes": rng.randbytes(rng.randrange(5)),
        }[name]

    for name in SCALARS:
        if rng.random() < 0.7:
            setattr(message, f"a_{name}", scalar(name))
        if rng.random() < 0.3:
            getattr(message, f"many_{name}").extend(scalar(name) for _ in range(rng.randrange(4)))
    if rng.random() < 0.5:
        message.color = rng.randrange(2)
        message.leaf.x = rng.randrange(100)
        message.leaf.deeper.deeper.y = "far"
    for _ in range(rng.randrange(3)):
        message.leaves.add(x=rng.randrange(100), y="y")
    if rng.random() < 0.5:
        message.maybe = rng.randrange(2)
        setattr(message, *rng.choice([("either", 0), ("other", "")]))
    for _ in range(rng.randrange(3)):
        message.counts[rng.choice(["a", "", "ä"])] = rng.randrange(1000)
    return message


def mutated(rng: random.Random, value: bytes) -> bytes:
    changed = bytearray(value)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                del changed[at : at + rng.randrange(9)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randrange(9))
            case 3:
                changed[at:at] = value[: rng.randrange(len(value) + 1)]
    return bytes(changed)


def check_messages(seed: int, count: int) -> None:
    rng = random.Random(seed)
    messages = [random_message(rng) for _ in range(count)]
    values: list[bytes | None] = [message.SerializeToString() for message in messages]
    assert found_rows(values) == {i: expected(message) for i, message in enumerate(messages)}, seed


def check_mutated(seed: int, count: int) -> None:
    """Bytes that Python's class takes give its values. Of the others some give a row here: fields that no column names
    are skipped, and not read."""
    rng = random.Random(seed)
    values = [mutated(rng, random_message(rng).SerializeToString()) for _ in range(count)]
    values += [rng.randbytes(rng.randrange(40)) for _ in range(count // 4)]
    found = found_rows(list(values))
    bad = 0
    for offset, value in enumerate(values):
        try:
            message = All.FromString(value)  # type: ignore[attr-defined]
        except DecodeError:
            bad += 1
            continue
        assert offset in found, (seed, value)
        row, theirs = found[offset], expected(message)
        # Python's class leaves out an entry of a map that has a field of another number or kind; the format does not.
        assert set(theirs.pop("counts")) <= set(row.pop("counts")), (seed, value)
        assert repr(row) == repr(theirs), (seed, value)
    assert bad > count // 20, "mutations that nothing refuses test nothing"


def test_all_kinds_of_fields() -> None:
    check_messages(1, 200)
    assert found_rows([b"", None]) == {0: expected(All()), 1: dict.fromkeys(COLUMNS)}


def test_mutated_values() -> None:
    check_mutated(1, 200)


# ---- what CREATE TABLE refuses


def refused(text: str) -> str:
    with pytest.raises(InvalidStatement) as error:
        parse(text)
    return str(error.value)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("a_in32 INTEGER", "column a_in32: message shop.v1.All has no field 'a_in32'; did you mean 'a_int32'?"),
        ("leaf INTEGER", "column leaf: the column has a type without fields, the schema a STRUCT"),
        ("leaf STRUCT(z INTEGER)", "column leaf.z: message shop.v1.Leaf has no field 'z'"),
        ("leaves STRUCT(x INTEGER)", "column leaves: the column has a STRUCT, the schema a list"),
        ("many_int32 INTEGER", "column many_int32: the column has a type without fields, the schema a list"),
        ("a_int32 INTEGER[]", "column a_int32: the column has a list, the schema a type without fields"),
        ("counts STRUCT(key VARCHAR)[]", "column counts: the column has a list, the schema a MAP"),
        ("counts MAP(VARCHAR, INTEGER[])", "column counts.value: the column has a list, the schema a type without"),
        (f"leaf {'STRUCT(deeper ' * 40}INTEGER{')' * 40}", "nested more than 32 levels deep"),
    ],
)
def test_columns_are_those_of_the_message(columns: str, said: str) -> None:
    assert said in refused(table(columns))


def test_the_schema_is_checked() -> None:
    assert "did you mean 'shop.v1.All'?" in refused(table("a INTEGER", message="shop.v1.Al"))
    start = "CREATE TABLE x (a_int32 INTEGER) WITH (topic = 't', format = 'protobuf'"
    assert "format protobuf needs descriptor = " in refused(f"{start}, message = 'a')")
    assert "format protobuf needs descriptor = " in refused(f"{start}, descriptor = 'a')")
    for descriptor in ("no base64", "AAAA", base64.b64encode(b"\xff\xff").decode(), DESCRIPTOR[:-8]):
        assert "descriptor is not" in refused(f"{start}, message = 'shop.v1.All', descriptor = '{descriptor}')")
    assert "format json has no option message" in refused("CREATE TABLE x (a INT) WITH (topic = 't', message = 'a')")
    edition = descriptor_pb2.FileDescriptorSet()
    edition.CopyFrom(FILES)
    edition.file[-1].syntax = "editions"
    text = base64.b64encode(edition.SerializeToString()).decode()
    assert "syntax 'editions' is not supported" in refused(f"{start}, message = 'shop.v1.All', descriptor = '{text}')")


def test_a_definition_is_read_again_from_its_text() -> None:
    first = definition(table("a_int32 INTEGER NOT NULL, k VARCHAR METADATA FROM 'key'"))
    assert definition(first.text) == first


# ---- values


def test_maps_have_the_last_value_of_a_key() -> None:
    once, twice = All(counts={"a": 1, "b": 2}), All(counts={"a": 3})
    values: list[bytes | None] = [once.SerializeToString() + twice.SerializeToString(), b"", once.SerializeToString()]
    x = definition(table("counts MAP(VARCHAR, BIGINT)"))
    found = [dict(row[1]) for row in rows_of(x, values)]
    assert found == [{"a": 3, "b": 2}, {}, {"a": 1, "b": 2}]
    value = bytes([0xC2, 0x03, 0x00])  # an entry without key and value
    assert rows_of(x, [value]) == [(0, [("", 0)])]
    with pytest.raises(StatementFailed):
        rows_of(definition(table("counts MAP(VARCHAR, TINYINT) NOT NULL", "fail")), [All().SerializeToString(), None])


def test_well_known_messages_are_values() -> None:
    message = All(a_int32=1)
    message.wk_timestamp.FromJsonString("2026-01-01T10:00:00.123456Z")
    message.wk_duration.seconds = 90
    message.wk_int64value.value = 0
    x = definition(table("wk_timestamp TIMESTAMP, wk_duration VARCHAR, wk_int64value BIGINT"))
    ((_, at, lasted, value), empty) = rows_of(x, [message.SerializeToString(), b""])
    assert (str(at), lasted, value) == ("2026-01-01 10:00:00.123456", "00:01:30", 0)
    assert empty == (1, None, None, None)


def test_a_value_that_does_not_fit_its_column_is_bad() -> None:
    values = [All(a_uint64=1).SerializeToString(), All(a_uint64=1 << 63).SerializeToString()]
    assert rows_of(definition(table("a_uint64 BIGINT")), values) == [(0, 1)]
    with pytest.raises(StatementFailed, match="t/0: the value at offset 1 does not fit the columns of table x"):
        rows_of(definition(table("a_uint64 BIGINT", bad_rows="fail")), values)


def test_a_bad_value_is_bad_alone() -> None:
    good = All(a_string="tea").SerializeToString()
    bad = All(a_string="tea", a_bytes=b"1234").SerializeToString()[:-1]
    x = definition(table("a_string VARCHAR NOT NULL, a_bytes BLOB"))
    values: list[bytes | None] = [good, bad, good, None, good.replace(b"tea", b"\xffea"), good, b"\xff"]
    assert [row[0] for row in rows_of(x, values)] == [0, 2, 5], "NOT NULL leaves out a null value, too"
    assert rows_of(x, [bad] * 100) == []
    assert rows_of(x, []) == []


def test_a_message_inside_of_itself_ends_where_the_columns_do() -> None:
    message = All()
    at = message.leaf
    for depth in range(90):  # Python's own class takes 100 levels
        at.x = depth
        at = at.deeper
    x = definition(table("leaf STRUCT(x INTEGER, deeper STRUCT(x INTEGER))"))
    assert rows_of(x, [message.SerializeToString()]) == [(0, {"x": 0, "deeper": {"x": 1}})]
    nested = b""
    for _ in range(20_000):
        size = len(nested)
        length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
        nested = b"\x1a" + length + nested
    leaf = bytes([0x9A, 0x03, len(nested) & 127 | 128, len(nested) >> 7 & 127 | 128, len(nested) >> 14]) + nested
    assert rows_of(x, [leaf]) == [(0, {"x": 0, "deeper": {"x": 0}})]


def test_memory_of_repeated_messages_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item of two bytes becomes a value in each column."""
    x = definition(table("leaves STRUCT(x INTEGER, y VARCHAR)[]"))
    empty = All()
    for _ in range(50):
        empty.leaves.add()
    values = [empty.SerializeToString(), All(a_int32=1).SerializeToString(), empty.SerializeToString()] * 5
    monkeypatch.setattr(protobuf, "EXPANDED_BYTES_MAX", 16 * 2 * 50)
    decoding.decoder_of.cache_clear()
    assert len(rows_of(x, list(values))) == 5, "the others are too large"
    monkeypatch.setattr(protobuf, "EXPANDED_BYTES_MAX", 16 * 2 * 100)
    decoding.decoder_of.cache_clear()
    assert len(rows_of(x, list(values))) == 15
    monkeypatch.setattr(decoding, "DECODED_BYTES_MAX", 1000)
    decoding.decoder_of.cache_clear()
    with pytest.raises(StatementLimit, match="bytes when decoded"):
        rows_of(x, list(values))
    monkeypatch.undo()
    decoding.decoder_of.cache_clear()


async def test_a_statement_reads_what_is_in_the_log(platform: World, start_sql: StartSql) -> None:
    await platform.create_topic("t")
    await platform.start_agent("a")
    await platform.grant("a", "t")
    values = [All(a_int32=i, a_string=f"s{i}", color=i % 2).SerializeToString() for i in range(300)]
    await platform.produce(values, "t")
    sql = await start_sql()
    await sql.run(table("a_int32 INTEGER, a_string VARCHAR, color VARCHAR", bad_rows="fail"))
    assert (await sql.run("SELECT a_string, color FROM x WHERE a_int32 = 5 AND _offset < 10")).rows == [("s5", "GREEN")]
    assert (await sql.run("SELECT sum(a_int32) FROM x")).value == sum(range(300))
    assert (await sql.run("SELECT count(*) FROM x")).value == 300
    assert (await sql.run("DESCRIBE x")).rows[0][:2] == ("a_int32", "INTEGER")
    with pytest.raises(InvalidStatement, match="a_string"):
        await sql.run("SELECT a_strin FROM x")
    await platform.produce([b"\xff"], "t")
    with pytest.raises(StatementFailed, match="t/0: the value at offset 300 does not fit the columns of table x"):
        await sql.run("SELECT sum(a_int32) FROM x")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_kinds_and_mutations_for_long(seed: int) -> None:
    check_messages(seed, 3_000)
    check_mutated(seed, 5_000)
