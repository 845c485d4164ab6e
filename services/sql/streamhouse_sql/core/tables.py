"""Declared tables: CREATE TABLE gives the values of a topic columns with types.

A definition is stored as its text and parsed again where it is used, so that it is readable wherever it lies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from shproto.errors import InvalidStatement
from sqlglot import exp

from streamhouse_sql.core import avro_schema, csv_rows, protobuf_schema
from streamhouse_sql.core.avro_schema import AvroSchema
from streamhouse_sql.core.columns import RECORD_COLUMNS
from streamhouse_sql.core.csv_rows import CsvOptions, csv_options, is_malformed, lines_of, text_of
from streamhouse_sql.core.dialect import StreamHouse
from streamhouse_sql.core.protobuf_schema import ProtobufSchema
from streamhouse_sql.core.quoting import literal
from streamhouse_sql.core.shapes import Shape, shape_of

FORMATS = ("json", "text", "csv", "avro", "protobuf")
# Decoded to Arrow before the engine; the others by SQL.
BINARY_FORMATS = ("avro", "protobuf")
# Fate of a record whose value does not parse, or does not fit its columns.
BAD_ROWS = ("fail", "skip")
# Options that one format has.
FORMAT_OPTIONS = {
    **dict.fromkeys(csv_rows.OPTIONS, "csv"),
    **dict.fromkeys(avro_schema.OPTIONS, "avro"),
    **dict.fromkeys(protobuf_schema.OPTIONS, "protobuf"),
}
COLUMNS_MAX = 1_000
# Names of METADATA columns: Kafka's connector for Flink calls the parts of a record so.
METADATA = {
    "key": "_key",
    "headers": "_headers",
    "partition": "_partition",
    "offset": "_offset",
    "timestamp": "_timestamp",
}
_RECORD_TYPES = {column.name: column.type for column in RECORD_COLUMNS}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*")
IDENTIFIER_CHARS_MAX = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TableColumn:
    """A column. Exactly one of these is where it comes from: the value's field of the same name (`is_field`), a part of
    the record (`metadata`, a column of columns.py), or an expression over the columns before it (`computed`)."""

    name: str
    type: str
    is_field: bool = False
    metadata: str = ""
    computed: str = ""
    not_null: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDefinition:
    """A declared table. `watermark`: (column, expression), or None. `primary_key`: columns; each combination of their
    values has one row, the newest in the order of (partition, offset). Empty: all records are rows."""

    name: str
    topic: str
    format: str
    bad_rows: str
    columns: tuple[TableColumn, ...]
    watermark: tuple[str, str] | None
    text: str
    primary_key: tuple[str, ...] = ()
    csv: CsvOptions | None = None
    schema: AvroSchema | ProtobufSchema | None = None

    def column(self, name: str) -> TableColumn | None:
        """Returns the column, or None; case does not matter."""
        return _named(self.columns, name)

    @property
    def fields(self) -> list[TableColumn]:
        """The columns that are fields of the value."""
        return [column for column in self.columns if column.is_field]


def _named(columns: Sequence[TableColumn], name: str) -> TableColumn | None:
    return next((column for column in columns if column.name.lower() == name.lower()), None)


def define(tree: exp.Create) -> TableDefinition:
    """Returns the definition of a CREATE TABLE. Raises InvalidStatement, with the name of the clause that is wrong or
    not supported."""
    _refuse_clauses(tree)
    schema = tree.this
    if not isinstance(schema, exp.Schema) or not isinstance(schema.this, exp.Table):
        raise InvalidStatement("CREATE TABLE needs columns: CREATE TABLE name (column type, …) WITH (topic = '…')")
    name = _table_name(schema.this)
    options = _options(tree)
    columns: list[TableColumn] = []
    watermark: exp.WatermarkColumnConstraint | None = None
    key: exp.PrimaryKey | None = None
    for part in schema.expressions:
        if isinstance(part, exp.WatermarkColumnConstraint):
            if watermark is not None:
                raise InvalidStatement("WATERMARK is given twice", clause="WATERMARK")
            watermark = part
        elif isinstance(part, exp.PrimaryKey):
            if key is not None:
                raise InvalidStatement("PRIMARY KEY is given twice", clause="PRIMARY KEY")
            key = part
        elif isinstance(part, exp.ColumnDef):
            columns.append(_column(part, columns))
        else:
            clause = part.sql(StreamHouse)
            raise InvalidStatement(f"{clause} is not supported in CREATE TABLE", clause=clause)
    _check_columns(columns, options["format"])
    definition = TableDefinition(
        name=name,
        topic=options["topic"],
        format=options["format"],
        bad_rows=options["bad_rows"],
        columns=tuple(columns),
        watermark=None if watermark is None else _watermark(watermark, columns),
        text=tree.sql(StreamHouse),
        primary_key=() if key is None else _primary_key(key, columns),
        csv=csv_options(options) if options["format"] == "csv" else None,
        schema=_schema(options),
    )
    if isinstance(definition.schema, AvroSchema):
        avro_schema.wanted(definition.schema, shapes_of(definition.fields))
    elif definition.schema is not None:
        protobuf_schema.project(definition.schema, shapes_of(definition.fields))
    return definition


def _schema(options: dict[str, str]) -> AvroSchema | ProtobufSchema | None:
    match options["format"]:
        case "avro":
            return avro_schema.avro_schema(options)
        case "protobuf":
            return protobuf_schema.protobuf_schema(options)
    return None


def _refuse_clauses(tree: exp.Create) -> None:
    for argument in tree.args:
        if tree.args[argument] and argument not in ("this", "kind", "exists", "replace", "properties"):
            clause = argument.rstrip("_").upper()
            raise InvalidStatement(f"{clause} is not supported in CREATE TABLE", clause=clause)
    if tree.args.get("replace"):
        raise InvalidStatement("CREATE OR REPLACE TABLE is not supported: DROP TABLE comes first", clause="OR REPLACE")


def _table_name(table: exp.Table) -> str:
    if table.catalog or (table.db and table.db.lower() != "public"):
        raise InvalidStatement(f"there is no schema {table.db!r}", clause=table.sql(StreamHouse))
    _check_name("table", table.name)
    return table.name


def _check_name(what: str, name: str) -> None:
    if len(name) > IDENTIFIER_CHARS_MAX or not _IDENTIFIER.fullmatch(name):
        raise InvalidStatement(
            f"{what} name {name[:IDENTIFIER_CHARS_MAX]!r} must be letters, digits, _ and $, the first a letter or _; "
            f"at most {IDENTIFIER_CHARS_MAX} characters"
        )


def _options(tree: exp.Create) -> dict[str, str]:
    """Returns the options of WITH, with defaults."""
    allowed: Mapping[str, Sequence[str] | None] = {
        "topic": None,
        "format": FORMATS,
        "bad_rows": BAD_ROWS,
        **dict.fromkeys(FORMAT_OPTIONS),
    }
    options = {"format": "json", "bad_rows": "fail"}
    given = tree.args.get("properties")
    for node in given.expressions if given else ():
        if isinstance(node, exp.FileFormatProperty):
            name, value = "format", node.this
        elif isinstance(node, exp.Property) and type(node) is exp.Property:
            name, value = str(node.this.name).lower(), node.args["value"]
        else:
            clause = node.sql(StreamHouse)
            raise InvalidStatement(f"{clause} is not supported in CREATE TABLE", clause=clause)
        if name not in allowed:
            raise InvalidStatement(f"WITH has no option {name!r}; it has {', '.join(allowed)}", clause=name)
        if not isinstance(value, exp.Literal) or not value.is_string:
            raise InvalidStatement(f"option {name} must be a text: {name} = '…'", clause=name)
        text, choices = value.name, allowed[name]
        if name == "bad_rows" and text.lower() == "dead_letter":
            raise InvalidStatement(
                "bad_rows = 'dead_letter' is not supported for bounded queries, which write nothing; "
                f"it must be one of {', '.join(BAD_ROWS)}",
                clause="dead_letter",
            )
        if choices is not None and text.lower() not in choices:
            raise InvalidStatement(f"{name} is {text!r}, must be one of {', '.join(choices)}", clause=name)
        options[name] = text if choices is None else text.lower()
    for name in options:
        if FORMAT_OPTIONS.get(name, options["format"]) != options["format"]:
            raise InvalidStatement(
                f"format {options['format']} has no option {name}: {FORMAT_OPTIONS[name]} has", clause=name
            )
    if not options.get("topic"):
        raise InvalidStatement("WITH needs the topic: WITH (topic = '…')", clause="topic")
    return options


def _column(node: exp.ColumnDef, before: Sequence[TableColumn]) -> TableColumn:
    name = node.name
    _check_name("column", name)
    if any(column.name.lower() == name.lower() for column in before):
        raise InvalidStatement(f"column {name} is given twice", clause=name)
    if name.lower() in _RECORD_TYPES:
        raise InvalidStatement(f"column {name} has the name of a part of the record", clause=name)
    kind = node.args.get("kind")
    type_ = "" if kind is None else kind.sql("duckdb")
    metadata = computed = ""
    not_null = False
    for constraint in node.args.get("constraints") or ():
        found = constraint.args.get("kind")
        if isinstance(found, exp.NotNullColumnConstraint) and not found.args.get("allow_null"):
            not_null = True
        elif isinstance(found, exp.ComputedColumnConstraint):
            computed = found.this.sql("duckdb")
        elif type(found).__name__ == "MetadataConstraint":
            metadata = _metadata(name, found)
            type_ = type_ or _RECORD_TYPES[metadata]
        else:
            clause = constraint.sql(StreamHouse)
            raise InvalidStatement(f"column {name}: {clause} is not supported", clause=clause)
    if not_null and (metadata or computed):
        raise InvalidStatement(f"column {name}: NOT NULL is supported for fields of the value", clause="NOT NULL")
    if not type_ and not computed:
        raise InvalidStatement(f"column {name} has no type", clause=name)
    return TableColumn(
        name=name,
        type=type_,
        is_field=not metadata and not computed,
        metadata=metadata,
        computed=computed,
        not_null=not_null,
    )


def _metadata(column: str, node: exp.Expr) -> str:
    name = str(node.this.name) if node.args.get("this") else column
    if name.lower() not in METADATA:
        raise InvalidStatement(
            f"column {column}: METADATA has no {name!r}; it has {', '.join(METADATA)}", clause=f"METADATA FROM '{name}'"
        )
    return METADATA[name.lower()]


def _check_columns(columns: Sequence[TableColumn], format_: str) -> None:
    if not columns:
        raise InvalidStatement("CREATE TABLE needs a column")
    if len(columns) > COLUMNS_MAX:
        raise InvalidStatement(f"a table has {len(columns)} columns, at most {COLUMNS_MAX} are allowed")
    fields = [column for column in columns if column.is_field]
    if format_ == "csv" and not fields:
        raise InvalidStatement("format csv needs a column for each field of a line", clause="format")
    if format_ == "text" and (len(fields) != 1 or fields[0].type not in ("TEXT", "VARCHAR")):
        raise InvalidStatement("format text needs exactly one column of the value, of type VARCHAR", clause="format")


def _primary_key(node: exp.PrimaryKey, columns: Sequence[TableColumn]) -> tuple[str, ...]:
    if node.args.get("options") != ["NOT ENFORCED"]:
        raise InvalidStatement(
            "PRIMARY KEY must be NOT ENFORCED: a topic takes any record, and the table shows the newest of each key",
            clause="PRIMARY KEY",
        )
    found: list[str] = []
    for part in node.expressions:
        column = _named(columns, part.name)
        if column is None:
            raise InvalidStatement(f"PRIMARY KEY: there is no column {part.name!r}", clause="PRIMARY KEY")
        if column.computed or column.metadata not in ("", "_key"):
            raise InvalidStatement(
                f"PRIMARY KEY: column {column.name} must be a field of the value or METADATA FROM 'key'",
                clause="PRIMARY KEY",
            )
        if column.name in found:
            raise InvalidStatement(f"PRIMARY KEY: column {column.name} is given twice", clause="PRIMARY KEY")
        found.append(column.name)
    return tuple(found)


def _watermark(node: exp.WatermarkColumnConstraint, columns: Sequence[TableColumn]) -> tuple[str, str]:
    name = node.this.name if node.this else ""
    column = next((column for column in columns if column.name.lower() == name.lower()), None)
    if column is None:
        raise InvalidStatement(f"WATERMARK FOR {name}: there is no such column", clause="WATERMARK")
    expression = node.args.get("expression")
    used = {part.name.lower() for part in expression.find_all(exp.Column)} if expression else set()
    is_delay = isinstance(expression, exp.Column) or (
        isinstance(expression, exp.Sub) and isinstance(expression.args["expression"], exp.Interval)
    )
    if expression is None or used != {column.name.lower()} or not is_delay:
        raise InvalidStatement(
            f"WATERMARK FOR {name} must be the column, or the column less an interval: "
            f"WATERMARK FOR {name} AS {name} - INTERVAL '5' SECOND",
            clause="WATERMARK",
        )
    return column.name, expression.sql("duckdb")


# ---- reading

# Names that no declared column has: they have blanks. BAD: of rows whose value could not be decoded before the engine.
BAD = "value is bad"
_ROW = '"row of the value"'
_IS_TOMBSTONE = '"value is null"'


def needed_columns(table: TableDefinition, named: Collection[str] | None) -> list[TableColumn]:
    """Returns the columns with these names (in small letters; None: all) and those that computed ones among them are
    made of, in the table's order."""
    wanted = {column.name.lower() for column in table.columns} if named is None else set(named)
    for column in reversed(table.columns):  # an expression names columns before it
        if column.name.lower() in wanted and column.computed:
            wanted |= {found.lower() for found in _NAMES.findall(column.computed)}
    return [column for column in table.columns if column.name.lower() in wanted]


_NAMES = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*")


def record_columns_of(table: TableDefinition, columns: Sequence[TableColumn], hidden: Collection[str]) -> list[str]:
    """Returns the parts of the record that a scan decodes for these columns. `hidden`: those that a query names
    itself."""
    wanted = {*hidden, *(column.metadata for column in columns if column.metadata)}
    if checked_fields(table, columns) or table.csv or table.primary_key:  # a value of CSV may be several rows
        # The last two say where a bad value is.
        wanted |= {"_value_bytes" if decodes_in_arrow(table) else "_value", "_partition", "_offset"}
    wanted |= {_key_column(table, name).metadata for name in table.primary_key}
    if "_value" in wanted and _is_cast_here(table):
        wanted = wanted - {"_value"} | {"_value_bytes"}
    return [column.name for column in RECORD_COLUMNS if column.name in wanted]


def checked_fields(table: TableDefinition, columns: Sequence[TableColumn]) -> list[TableColumn]:
    """Returns the fields that are decoded and checked for these columns. A table that leaves bad rows out checks all of
    its fields, so that it has the same rows in every query, whatever columns the query names."""
    if table.bad_rows == "skip":
        return table.fields
    return [column for column in table.fields if column in columns or column.name in table.primary_key]


def decodes_in_arrow(table: TableDefinition) -> bool:
    """Returns True if the values are decoded to Arrow columns before the engine, under the names of `field_of`."""
    return table.format in BINARY_FORMATS


def field_of(name: str) -> str:
    """Returns the Arrow column of a decoded field."""
    return f"field {name}"


def shapes_of(fields: Sequence[TableColumn]) -> list[tuple[str, Shape]]:
    """Returns names and shapes of fields."""
    return [(column.name, shape_of(column.type)) for column in fields]


def _key_column(table: TableDefinition, name: str) -> TableColumn:
    column = table.column(name)
    assert column is not None, "checked where the table was defined"
    return column


def _is_cast_here(table: TableDefinition) -> bool:
    """Returns True if the scan hands over the value's bytes: a text that is not UTF-8 would end the scan, and here its
    row is left out."""
    return table.bad_rows == "skip" and not decodes_in_arrow(table) and bool(table.fields or table.primary_key)


def select_of(
    table: TableDefinition,
    scan: str,
    columns: Sequence[TableColumn],
    hidden: Collection[str],
    *,
    is_upsert: bool = True,
) -> str:
    """Returns the SQL of a subquery with these columns of the table, and the hidden parts of the record, over a scan of
    the topic.

    A field that the value does not have is NULL. A value that is not of the table's format, or has a field that does
    not fit its column, is bad: it fails the query with its place, or leaves its row out, as `bad_rows` says. A null
    value has NULL in all columns. `is_upsert` False: a table with a primary key has all of its rows, as one without.
    """
    fields = checked_fields(table, columns)
    is_upsert = is_upsert and bool(table.primary_key)
    values = [f'{value_of(table, column)} AS "{column.name}"' for column in fields]
    names = {column.name for column in fields}
    for column in table.columns:
        if column.metadata and (column in columns or (is_upsert and column.name in table.primary_key)):
            values.append(f'CAST("{column.metadata}" AS {column.type}) AS "{column.name}"')
            names.add(column.name)
    outer = [f'"{name}"' for name in hidden]
    for column in columns:
        if column.computed:
            expression = f"CAST({column.computed} AS {column.type})" if column.type else column.computed
            outer.append(f'{expression} AS "{column.name}"')
        else:
            outer.append(f'"{column.name}"')
    if not outer:
        outer.append("1 AS one")  # count(*)
    bad = bad_of(table, fields)
    where = "" if bad == "false" else f" WHERE {_unless(table, bad)}"
    rows = relation_of(table, scan, fields, is_numbered=is_upsert)
    if is_upsert:
        value = '"_value_bytes"' if decodes_in_arrow(table) else '"_value"'
        values.append(f"{value} IS NULL AS {_IS_TOMBSTONE}")
    if values:
        rows = f"(SELECT *, {', '.join(values)} FROM {rows}{where})"
        where = ""
    if is_upsert:
        key = ", ".join(f'"{name}"' for name in table.primary_key)
        order = f'"_partition" DESC, "_offset" DESC{f", {csv_rows.NUMBER} DESC" if table.csv else ""}'
        newest = f"row_number() OVER (PARTITION BY {key} ORDER BY {order}) = 1"
        rows, where = f"(SELECT * FROM {rows} QUALIFY {newest})", f" WHERE NOT {_IS_TOMBSTONE}"
    return f"SELECT {', '.join(outer)} FROM {rows}{where}"


def relation_of(table: TableDefinition, scan: str, fields: Sequence[TableColumn], *, is_numbered: bool = False) -> str:
    """Returns the SQL of a relation of all rows of a scan, bad ones included, in which `value_of` and `bad_of` have
    their meaning. `is_numbered`: several rows of a record have their places in it."""
    if _is_cast_here(table):
        scan = f'(SELECT *, TRY(decode("_value_bytes")) AS "_value" FROM {scan})'
    if table.csv is not None:
        places = {column.name: place for place, column in enumerate(table.fields)}
        texts = [(places[column.name], column.name) for column in fields]
        return lines_of(table.csv, scan, texts, is_numbered=is_numbered)
    if table.format == "json" and fields:
        shape = literal(json.dumps({column.name: column.type for column in fields}))
        row = f'CASE WHEN json_valid("_value") THEN json_transform("_value", {shape}) END AS {_ROW}'
        return f"(SELECT *, {row} FROM {scan})"
    return scan


def value_of(table: TableDefinition, column: TableColumn) -> str:
    """Returns the SQL of a field's value in `relation_of`; NULL where the value does not fit its column."""
    if table.format == "text":
        return '"_value"'
    if table.csv is not None:
        return f"TRY_CAST({text_of(column.name)} AS {column.type})"
    if decodes_in_arrow(table):
        return f'TRY_CAST("{field_of(column.name)}" AS {column.type})'
    return f'{_ROW}."{column.name}"'


def bad_of(table: TableDefinition, fields: Sequence[TableColumn]) -> str:
    """Returns a condition over `relation_of`, never NULL: the row is bad, as the format, its columns or the key see it;
    'false' where none is."""
    reasons = []
    if _is_cast_here(table):
        reasons.append('("_value" IS NULL AND "_value_bytes" IS NOT NULL)')
    if table.csv is not None:
        reasons.append(is_malformed(table.csv, len(table.fields)))
        for column in fields:
            text, value = text_of(column.name), value_of(table, column)
            if column.type not in ("TEXT", "VARCHAR"):
                reasons.append(f"({text} IS NOT NULL AND {value} IS NULL)")
    elif decodes_in_arrow(table) and fields:
        reasons.append(f'"{BAD}"')
        for column in fields:
            reasons.append(f'("{field_of(column.name)}" IS NOT NULL AND {value_of(table, column)} IS NULL)')
    elif table.format == "json" and fields:
        reasons.append(_is_bad_json(fields))
    for column in fields:
        if column.not_null and table.format != "json":
            reasons.append(f"{value_of(table, column)} IS NULL")
    for name in table.primary_key:
        column = _key_column(table, name)
        key = value_of(table, column) if column.is_field else f'"{column.metadata}"'
        reasons.append(f"{key} IS NULL")
    return " OR ".join(reasons) or "false"


def _is_bad_json(fields: Sequence[TableColumn]) -> str:
    """Returns a condition that is true for bad values. The costly part of it, which looks into the JSON a second time,
    is only computed for rows that have a NULL."""
    doubtful = " OR ".join(f'{_ROW}."{column.name}" IS NULL' for column in fields)
    unfit = " OR ".join(f'({_ROW}."{column.name}" IS NULL AND {_has_field(column)})' for column in fields)
    required = [column for column in fields if column.not_null]
    missing = "".join(f' OR {_ROW}."{column.name}" IS NULL' for column in required)
    return (
        f'CASE WHEN "_value" IS NULL THEN {"true" if required else "false"} WHEN {_ROW} IS NULL THEN true '
        f"WHEN {doubtful} THEN coalesce(json_type(\"_value\") <> 'OBJECT' OR {unfit}{missing}, true) ELSE false END"
    )


def _unless(table: TableDefinition, bad: str) -> str:
    """Returns a condition that is false for a bad row, or ends the query with its place, as the table says."""
    if table.bad_rows == "skip":
        return f"NOT ({bad})"
    place = f'{literal(f"{table.topic}/")} || "_partition" || \': the value at offset \' || "_offset"'
    return f"CASE WHEN {bad} THEN error({place} || ' does not fit the columns of table {table.name}') ELSE true END"


def _has_field(column: TableColumn) -> str:
    """Returns a condition: the value has the field, and it is not null."""
    path = literal(f"$.{json.dumps(column.name)}")
    return f"coalesce(json_type(\"_value\", {path}), 'NULL') <> 'NULL'"
