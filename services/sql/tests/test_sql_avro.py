"""Avro: rows are those that fastavro reads, whatever the schema; bytes that it would not write give none."""

import io
import json
import random
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import fastavro
import pytest
from shproto.errors import InvalidStatement, StatementFailed
from streamhouse_sql import avro
from streamhouse_sql.core.avro_schema import DEPTH_MAX
from streamhouse_sql.core.statement import parse

from services.sql.tests.declared import definition, rows_of
from services.sql.tests.start_sql import StartSql
from tests.platform.read_world import World

pytestmark = pytest.mark.timeout(600)

TYPES = {
    "boolean": "BOOLEAN", "int": "INTEGER", "long": "BIGINT", "float": "FLOAT", "double": "DOUBLE", "bytes": "BLOB",
    "string": "VARCHAR",
}  # fmt: skip


def table(columns: str, schema: Any, bad_rows: str = "skip") -> str:
    text = json.dumps(schema).replace("'", "''")
    return f"CREATE TABLE x ({columns}) WITH (topic = 't', format = 'avro', bad_rows = '{bad_rows}', schema = '{text}')"


def record(*fields: tuple[str, Any], name: str = "R") -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": [{"name": field, "type": kind} for field, kind in fields]}


def written(schema: Any, value: Any) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), value)
    return out.getvalue()


# ---- schemas and values by chance


class Chance:
    """Makes schemas, their columns and values."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._names = 0

    def name(self) -> str:
        self._names += 1
        return f"n{self._names}"

    def record(self, depth: int) -> dict[str, Any]:
        fields = [(f"f{i}", self.type(depth + 1)) for i in range(self.rng.randrange(1, 6))]
        return record(*fields, name=self.name())

    def type(self, depth: int) -> Any:
        kinds = [*TYPES, "enum", "fixed", "null"]
        if depth < 4:
            kinds += ["record", "array", "map", "nullable", "union"] * 2
        match self.rng.choice(kinds):
            case "record":
                return self.record(depth)
            case "array":
                return {"type": "array", "items": self.not_null(depth)}
            case "map":
                return {"type": "map", "values": self.not_null(depth)}
            case "nullable":
                branches: list[Any] = ["null", self.in_union(depth)]
                self.rng.shuffle(branches)
                return branches
            case "union":
                return ["null", "long", "string", {"type": "array", "items": "long"}]
            case "enum":
                return {"type": "enum", "name": self.name(), "symbols": ["A", "B", "C"][: self.rng.randrange(1, 4)]}
            case "fixed":
                return {"type": "fixed", "name": self.name(), "size": self.rng.randrange(1, 20)}
            case kind:
                return kind

    def not_null(self, depth: int) -> Any:
        while _least(kind := self.type(depth + 1)) == 0:
            pass
        return kind

    def in_union(self, depth: int) -> Any:
        while isinstance(kind := self.not_null(depth), list):
            pass
        return kind

    def value(self, kind: Any) -> Any:
        rng = self.rng
        if isinstance(kind, list):
            return self.value(rng.choice(kind))
        name = kind if isinstance(kind, str) else kind["type"]
        match name:
            case "null":
                return None
            case "boolean":
                return rng.random() < 0.5
            case "int" | "long":
                bits = 31 if name == "int" else 63
                return rng.choice([rng.randrange(100), rng.randrange(1 << bits), -(1 << bits), (1 << bits) - 1])
            case "float" | "double":
                return rng.choice([0.0, -0.5, 2.0**100, float("inf")])
            case "bytes":
                return rng.randbytes(rng.randrange(6))
            case "fixed":
                return rng.randbytes(kind["size"])
            case "string":
                return rng.choice(["", "tea", "äß🜁", "x" * 300])
            case "enum":
                return rng.choice(kind["symbols"])
            case "array":
                return [self.value(kind["items"]) for _ in range(rng.choice([0, 0, 1, 2, 3, rng.randrange(60)]))]
            case "map":
                return {
                    rng.choice(["", "a", "ä", "long key"]): self.value(kind["values"]) for _ in range(rng.randrange(4))
                }
        return {field["name"]: self.value(field["type"]) for field in kind["fields"]}


def _least(kind: Any) -> int:
    if isinstance(kind, dict) and kind["type"] == "record":
        return sum(_least(field["type"]) for field in kind["fields"])
    return 0 if kind == "null" else 1


def column_type(kind: Any) -> str | None:
    """Returns the type of a column for a schema's type, None if it is none that a column may have."""
    if isinstance(kind, list):
        values = [part for part in kind if part != "null"]
        return column_type(values[0]) if len(values) == 1 else None
    name = kind if isinstance(kind, str) else kind["type"]
    match name:
        case "null":
            return None
        case "enum":
            return "VARCHAR"
        case "fixed":
            return "BLOB"
        case "array":
            return f"{inner}[]" if (inner := column_type(kind["items"])) else None
        case "map":
            return f"MAP(VARCHAR, {inner})" if (inner := column_type(kind["values"])) else None
        case "record":
            fields = [(field["name"], column_type(field["type"])) for field in kind["fields"]]
            kept = ", ".join(f"{field} {inner}" for field, inner in fields if inner)
            return f"STRUCT({kept})" if kept else None
    return TYPES[name]


def as_column(kind: Any, value: Any) -> Any:
    """Returns a value as its column has it."""
    if value is None:
        return None
    if isinstance(kind, list):
        return as_column(next(part for part in kind if part != "null"), value)
    name = kind if isinstance(kind, str) else kind["type"]
    match name:
        case "array":
            return [as_column(kind["items"], item) for item in value]
        case "map":
            return sorted((key, as_column(kind["values"], item)) for key, item in value.items())
        case "record":
            fields = {field["name"]: field["type"] for field in kind["fields"]}
            return {field: as_column(part, value[field]) for field, part in fields.items() if column_type(part)}
    return value


def sorted_maps(kind: Any, value: Any) -> Any:
    """Returns a column's value with the entries of its maps in order."""
    if value is None:
        return None
    if isinstance(kind, list):
        return sorted_maps(next(part for part in kind if part != "null"), value)
    name = kind if isinstance(kind, str) else kind["type"]
    match name:
        case "array":
            return [sorted_maps(kind["items"], item) for item in value]
        case "map":
            return sorted((key, sorted_maps(kind["values"], item)) for key, item in value)
        case "record":
            fields = {field["name"]: field["type"] for field in kind["fields"]}
            return {field: sorted_maps(fields[field], item) for field, item in value.items()}
    return value


def found_rows(schema: Any, values: list[bytes]) -> dict[int, dict[str, Any]]:
    columns = {field["name"]: kind for field in schema["fields"] if (kind := column_type(field["type"]))}
    x = definition(table(", ".join(f"{name} {kind}" for name, kind in columns.items()), schema))
    kinds = {field["name"]: field["type"] for field in schema["fields"]}
    return {
        offset: {name: sorted_maps(kinds[name], value) for name, value in zip(columns, row, strict=True)}
        for offset, *row in rows_of(x, list(values))
    }


def with_a_column(chance: Chance) -> dict[str, Any]:
    while column_type(schema := chance.record(0)) is None:
        pass
    return schema


def check_values(seed: int, count: int) -> None:
    chance = Chance(seed)
    schema = with_a_column(chance)
    given = [chance.value(schema) for _ in range(count)]
    bodies = [written(schema, value) for value in given]
    parsed = fastavro.parse_schema(schema)
    expected = {
        i: as_column(schema, fastavro.schemaless_reader(io.BytesIO(body), parsed)) for i, body in enumerate(bodies)
    }
    assert repr(found_rows(schema, bodies)) == repr(expected), (seed, schema)


def check_mutated(seed: int, count: int) -> int:
    """Returns the number of values that were bad. A row is what fastavro reads of all of the bytes; a value that it
    reads and writes again with the same bytes gives a row."""
    chance = Chance(seed)
    schema = with_a_column(chance)
    parsed = fastavro.parse_schema(schema)
    bodies = [mutated(chance.rng, written(schema, chance.value(schema))) for _ in range(count)]
    bodies += [chance.rng.randbytes(chance.rng.randrange(30)) for _ in range(count // 4)]
    found = found_rows(schema, bodies)
    for offset, body in enumerate(bodies):
        source = io.BytesIO(body)
        try:
            value = fastavro.schemaless_reader(source, parsed)
            is_whole = source.tell() == len(body)
            again = written(schema, value) if is_whole else b""
        except UnicodeDecodeError:  # perhaps in a field without a column, which is skipped here
            continue
        except Exception:  # noqa: BLE001 - of many kinds
            assert offset not in found, (seed, schema, body)
            continue
        assert is_whole or offset not in found, (seed, schema, body)
        if again == body and fastavro.validate(value, parsed, raise_errors=False):  # which sees an int that is none
            assert offset in found, (seed, schema, body)
        if offset in found:
            assert repr(found[offset]) == repr(as_column(schema, value)), (seed, schema, body)
    return len(bodies) - len(found)


def mutated(rng: random.Random, body: bytes) -> bytes:
    changed = bytearray(body)
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                del changed[at : at + rng.randrange(1, 9)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randrange(1, 4))
            case 3:
                changed[at:at] = b"\xff" * rng.randrange(1, 11)
    return bytes(changed)


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_those_that_fastavro_reads(seed: int) -> None:
    check_values(seed, 40)


def test_mutated_values() -> None:
    assert sum(check_mutated(seed, 40) for seed in range(20)) > 200


# ---- values that have their own rules


def test_logical_types() -> None:
    def of(kind: str, logical: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "logicalType": logical, **more}

    kinds: dict[str, tuple[Any, str, Any, str]] = {
        "d": (of("int", "date"), "DATE", date(2026, 1, 2), "2026-01-02"),
        "tm": (of("int", "time-millis"), "TIME", time(1, 2, 3, 4000), "01:02:03.004"),
        "tu": (of("long", "time-micros"), "TIME", time(1, 2, 3, 4), "01:02:03.000004"),
        "zm": (of("long", "timestamp-millis"), "TIMESTAMP", datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02 03:00:00"),
        "zu": (of("long", "timestamp-micros"), "TIMESTAMP", datetime(1969, 1, 2, 3, tzinfo=UTC), "1969-01-02 03:00:00"),
        "zn": (of("long", "timestamp-nanos"), "TIMESTAMP", 1_000_001_999, "1970-01-01 00:00:01.000001"),
        "lm": (of("long", "local-timestamp-millis"), "TIMESTAMP", 1_500, "1970-01-01 00:00:01.5"),
        "nb": (of("bytes", "decimal", precision=10, scale=2), "DECIMAL(10, 2)", Decimal("-1.25"), "-1.25"),
        "nf": (of("fixed", "decimal", name="F", size=9, precision=20), "HUGEINT", Decimal(-(2**60)), str(-(2**60))),
        "id": (of("string", "uuid"), "UUID", "6f0cd3d4-0000-4000-8000-000000000001",
               "6f0cd3d4-0000-4000-8000-000000000001"),
        "un": (of("int", "no such type"), "INTEGER", 5, "5"),
    }  # fmt: skip
    schema = record(*((name, kind) for name, (kind, _, _, _) in kinds.items()))
    body = written(schema, {name: value for name, (_, _, value, _) in kinds.items()})
    columns = ", ".join(f"{name} {kind}" for name, (_, kind, _, _) in kinds.items())
    computed = ", ".join(f"{name}_text AS {name}::VARCHAR" for name in kinds)
    ((_, *row),) = rows_of(definition(table(f"{columns}, {computed}", schema)), [body])
    assert dict(zip(kinds, row[len(kinds) :], strict=True)) == {name: shown for name, (*_, shown) in kinds.items()}


def test_what_a_column_or_its_type_does_not_hold_is_bad() -> None:
    schema = record(("at", {"type": "long", "logicalType": "timestamp-millis"}), ("n", "long"))
    good = written(schema, {"at": 1000, "n": 5})
    beyond = b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01" + b"\x0a"
    large = written(schema, {"at": 1000, "n": 1 << 40})
    x = table("at TIMESTAMP, n INTEGER", schema)
    assert [row[0] for row in rows_of(definition(x), [good, beyond, large, good, None])] == [0, 3, 4]
    with pytest.raises(StatementFailed, match="t/0: the value at offset 1 does not fit the columns of table x"):
        rows_of(definition(table("n INTEGER", schema, "fail")), [good, large])
    decimal = record(("n", {"type": "bytes", "logicalType": "decimal", "precision": 38}))
    sizes = [b"\x00", b"\x20" + b"\x7f" * 16, b"\x22" + b"\0" * 17, b"\x20" + b"\0" * 15 + b"\x07"]
    assert [row[0] for row in rows_of(definition(table("n DECIMAL(38, 0)", decimal)), list(sizes))] == [3]


def test_a_key_that_comes_twice_has_its_last_value() -> None:
    schema = record(("m", {"type": "map", "values": "long"}))
    twice = b"\x04\x02a\x02\x02b\x04\x02\x02a\x06\x00"
    x = definition(table("m MAP(VARCHAR, BIGINT)", schema))
    assert [dict(row[1]) for row in rows_of(x, [twice, b"\x00", twice])] == [{"b": 2, "a": 3}, {}, {"b": 2, "a": 3}]


def test_blocks_with_their_size_are_read() -> None:
    """Writers may give a block's bytes before it, with a negative number of items."""
    schema = record(("l", {"type": "array", "items": "string"}))
    x = definition(table("l VARCHAR[]", schema))
    body = b"\x03\x08\x02a\x02b\x02\x02c\x00"
    assert [row[1] for row in rows_of(x, [body] * 40)] == [["a", "b", "c"]] * 40
    assert [row[1] for row in rows_of(x, [body])] == [["a", "b", "c"]], "by the loop for a few values"


def tree() -> Any:
    return record(("v", "long"), ("left", ["null", "R"]), ("more", {"type": "array", "items": "R"}))


def nested(depth: int) -> bytes:
    """Returns a tree of `depth` nodes, each to the left of the other."""
    return b"\x02\x02" * depth + b"\x02\x00" + b"\x00" * (depth + 1)


@pytest.mark.parametrize("copies", [1, avro.VECTOR_MIN + 1])
def test_a_type_inside_of_itself(copies: int) -> None:
    """Also where the loop for a few values reads it; what is deeper than the limit is bad."""
    x = definition(table("v BIGINT, left STRUCT(v BIGINT, left STRUCT(v BIGINT))", tree()))
    bodies = [nested(depth) for depth in (0, 1, 10, 30, 5_000)] * copies
    assert all(fastavro.schemaless_reader(io.BytesIO(body), fastavro.parse_schema(tree())) for body in bodies[:4])
    found = [row[0] % 5 for row in rows_of(x, bodies)]  # type: ignore[arg-type]
    assert found == [0, 1, 2, 3] * copies
    wide = b"\x02\x00\x04" + nested(1) * 2 + b"\x00"
    assert rows_of(x, [wide] * copies)[0][1:] == (1, None)
    deep = b"\x02\x00\x02" * 5_000 + b"\x02\x00\x00" + b"\x00" * 5_000
    assert rows_of(x, [deep] * copies) == []


def test_a_number_of_items_is_no_more_than_the_bytes() -> None:
    schema = record(("l", {"type": "array", "items": "string"}), ("m", {"type": "map", "values": "long"}))
    x = definition(table("l VARCHAR[], m MAP(VARCHAR, BIGINT)", schema))
    huge = b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    least = b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00"
    for body in (huge, b"\x00" + huge, least, b"\x00" + least, b"\x02" + huge, b"\x02" + least, b"\xff" * 11, b""):
        assert rows_of(x, [body]) == [] and rows_of(x, [body] * 40) == [], body


# ---- what CREATE TABLE refuses


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("crrier VARCHAR", "column crrier: R has no field 'crrier'; did you mean 'carrier'?"),
        ("carrier VARCHAR[]", "column carrier: the column has a list, the schema a type without fields"),
        ("many VARCHAR", "column many: the column has a type without fields, the schema a list"),
        ("either VARCHAR", "column either: a union of null, long, string is not supported as a column"),
        ("nothing VARCHAR", "column nothing: null is not supported as a column"),
        ("inner STRUCT(b INTEGER)", "column inner.b: I has no field 'b'"),
    ],
)
def test_columns_are_those_of_the_record(columns: str, said: str) -> None:
    schema = record(
        ("carrier", "string"),
        ("many", {"type": "array", "items": "long"}),
        ("either", ["null", "long", "string"]),
        ("nothing", "null"),
        ("inner", record(("a", "int"), name="I")),
    )
    with pytest.raises(InvalidStatement) as error:
        parse(table(columns, schema))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("string", "schema is string, must be a record"),
        ({"type": "record", "name": "R"}, "record R has no fields"),
        ({"type": "record", "fields": []}, "has no name"),
        (record(("a", "nope")), "there is no type 'nope'"),
        (record(("a", "int"), ("A", "int")), "field A of R is there twice"),
        (record(("a", record(("b", "int")))), "type 'R' is defined twice"),
        (record(("a", ["int", ["null"]])), "a union needs types that are no unions"),
        (record(("a", [])), "a union needs types"),
        (record(("a", {"type": "array"})), "a array has no items"),
        (record(("a", {"type": "array", "items": "null"})), "an array of null is not supported: its items have no"),
        (record(("a", {"type": "array", "items": record(name="E")})), "an array of E is not supported"),
        (record(("a", {"type": "fixed", "name": "F", "size": 0})), "size of F is 0, must be 1 to"),
        (record(("a", {"type": "enum", "name": "E", "symbols": []})), "enum E has no symbols"),
        (record(("a", 5)), "5 is no type"),
        (record(), ""),
    ],
)
def test_the_schema_is_checked(schema: Any, said: str) -> None:
    with pytest.raises(InvalidStatement) as error:
        parse(table("a VARCHAR", schema))
    assert said in str(error.value)


def test_the_schema_is_json_and_not_too_deep() -> None:
    start = "CREATE TABLE x (a INT) WITH (topic = 't', format = 'avro'"
    kind: Any = "int"
    for _ in range(DEPTH_MAX + 1):
        kind = {"type": "array", "items": kind}
    for schema, said in (("{", "schema is no JSON"), ("[" * 100_000, "schema is no JSON"), ("", "format avro needs")):
        with pytest.raises(InvalidStatement, match=said):
            parse(f"{start}, schema = '{schema}')")
    with pytest.raises(InvalidStatement, match="nested more than 64 levels deep"):
        parse(table("a INTEGER", record(("a", kind))))


def test_a_definition_is_read_again_from_its_text() -> None:
    first = definition(table("v BIGINT NOT NULL, k VARCHAR METADATA FROM 'key'", tree()))
    assert definition(first.text) == first


async def test_a_statement_reads_what_is_in_the_log(platform: World, start_sql: StartSql) -> None:
    await platform.create_topic("t")
    await platform.start_agent("a")
    await platform.grant("a", "t")
    schema = record(("n", "long"), ("s", ["null", "string"]), ("l", {"type": "array", "items": "long"}))
    values = [{"n": i, "s": f"it's {i}" if i % 2 else None, "l": [i, i]} for i in range(300)]
    await platform.produce([written(schema, value) for value in values], "t")
    sql = await start_sql()
    await sql.run(table("n BIGINT, s VARCHAR, l BIGINT[], o BIGINT METADATA FROM 'offset'", schema, "fail"))
    assert (await sql.run("SELECT s, l FROM x WHERE n = 5 AND _offset < 10")).rows == [("it's 5", [5, 5])]
    assert (await sql.run("SELECT sum(n) FROM x WHERE s IS NULL")).value == sum(range(0, 300, 2))
    assert (await sql.run("SELECT count(*) FROM x")).value == 300
    with pytest.raises(InvalidStatement, match="n"):
        await sql.run("SELECT nn FROM x")
    await platform.produce([b"\xff"], "t")
    with pytest.raises(StatementFailed, match="t/0: the value at offset 300 does not fit the columns of table x"):
        await sql.run("SELECT sum(n) FROM x")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 112))
def test_rows_are_those_that_fastavro_reads_for_long(seed: int) -> None:
    for at in range(5):
        check_values(seed * 100 + at, 200)
        check_mutated(seed * 100 + at, 300)
