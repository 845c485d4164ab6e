"""Statements in the words of an engine that is made to scale out: Flink, RisingWave or Spark.

A statement is parsed as if it were to run here, then written for the target from its tree. Each kind of node has to be
on the list of those that are known to mean the same there; any other, and each clause that the target lacks, is an
error that names it. The text is parsed again in the target's dialect and has to hold every node that went in, since a
generator drops a node that it does not know without a word. Differences that cannot be written are notes: comments in
front of the statement.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import sqlglot
from shproto.errors import InvalidStatement
from sqlglot import exp, transforms
from sqlglot.dialects.dialect import Dialect
from sqlglot.dialects.risingwave import RisingWave
from sqlglot.dialects.spark import Spark
from sqlglot.errors import ErrorLevel, SqlglotError, TokenError
from sqlglot.generator import Generator
from sqlglot.generators.risingwave import RisingWaveGenerator
from sqlglot.generators.spark import SparkGenerator
from sqlglot.tokenizer_core import TokenType
from sqlglot.tokens import Tokenizer

from streamhouse_sql.core.columns import COLUMN_NAMES
from streamhouse_sql.core.continuous.statements import ContinuousQuery, parse_job_statement, without_emit
from streamhouse_sql.core.dialect import StreamHouse
from streamhouse_sql.core.quoting import literal
from streamhouse_sql.core.statement import CreateTable, DropTable, one_tree, parse
from streamhouse_sql.core.tables import TableColumn, TableDefinition
from streamhouse_sql.core.windows import Window, with_placeholders

TARGETS = ("flink", "risingwave", "spark")
# Addresses that a target reads from if none are given: Flink and RisingWave by Kafka's protocol, Spark by ours.
SERVERS = {"flink": "localhost:9092", "risingwave": "localhost:9092", "spark": "127.0.0.1:7070"}
NAMES = {"flink": "Flink", "risingwave": "RisingWave", "spark": "Spark"}
_ALL = frozenset(TARGETS)
_FLINK_SPARK = frozenset({"flink", "spark"})
_RISINGWAVE_SPARK = frozenset({"risingwave", "spark"})
_SPARK = frozenset({"spark"})

# Nodes, and the targets in which they mean the same. Others are refused.
_KNOWN: Mapping[type[exp.Expr], frozenset[str]] = {
    **dict.fromkeys(
        (
            exp.Select, exp.From, exp.Table, exp.TableAlias, exp.Column, exp.Identifier, exp.Star, exp.Alias, exp.Where,
            exp.Group, exp.Having, exp.Order, exp.Ordered, exp.Limit, exp.Distinct, exp.Union, exp.CTE, exp.With,
            exp.Subquery, exp.Join, exp.Literal, exp.Boolean, exp.Null, exp.And, exp.Or, exp.Not, exp.EQ, exp.NEQ,
            exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Is, exp.In, exp.Between, exp.Like, exp.Add, exp.Sub, exp.Mul, exp.Div,
            exp.Mod, exp.Neg, exp.Paren, exp.DPipe, exp.Case, exp.If, exp.Cast, exp.DataType, exp.DataTypeParam,
            exp.Interval, exp.Var, exp.Count, exp.Sum, exp.Avg, exp.Min, exp.Max, exp.Coalesce, exp.Nullif, exp.Abs,
            exp.Upper, exp.Lower, exp.Round, exp.Floor, exp.Ceil, exp.Filter, exp.Window, exp.WindowSpec, exp.RowNumber,
            exp.Rank, exp.DenseRank, exp.Lag, exp.Lead, exp.NullSafeEQ, exp.NullSafeNEQ, exp.Extract, exp.Trim,
            exp.Substring, exp.Length, exp.JSONExtractScalar, exp.JSONPath, exp.JSONPathRoot, exp.JSONPathKey,
            exp.Qualify, exp.Exists, exp.CurrentTimestamp, exp.Unnest,
        ),
        _ALL,
    ),
    exp.Version: frozenset({"flink", "risingwave"}),
    exp.TryCast: _FLINK_SPARK,
    exp.ApproxDistinct: _ALL,
    exp.TimestampTrunc: _RISINGWAVE_SPARK,
    exp.ArgMax: _SPARK,
    exp.ArgMin: _SPARK,
    exp.ApproxQuantile: _SPARK,
}  # fmt: skip
# Arguments of a node beside those that its text always has, which a target lacks.
_EXTRACTED = {"YEAR", "MONTH", "DAY", "HOUR", "MINUTE", "SECOND"}
# Nodes that a target writes as others.
_WRITTEN_AS: Mapping[type[exp.Expr], tuple[type[exp.Expr], ...]] = {
    exp.Paren: (),
    exp.Qualify: (),
    exp.JSONPath: (),
    exp.JSONPathRoot: (),
    exp.JSONPathKey: (),
    exp.Var: (),
    exp.DataType: (),
    exp.DataTypeParam: (),
    exp.Unnest: (exp.Unnest, exp.Explode),
    exp.Table: (exp.Table, exp.Lateral),
    exp.Join: (exp.Join, exp.Lateral),
    exp.JSONExtractScalar: (exp.JSONExtractScalar, exp.JSONValue, exp.Anonymous),
    exp.ApproxDistinct: (exp.ApproxDistinct, exp.Anonymous),
    exp.DateTrunc: (exp.DateTrunc, exp.TimestampTrunc),
    exp.TimestampTrunc: (exp.DateTrunc, exp.TimestampTrunc),
    exp.Length: (exp.Length, exp.Anonymous),
    exp.CurrentTimestamp: (exp.CurrentTimestamp, exp.Anonymous),
    exp.Cast: (exp.Cast, exp.TryCast),
    exp.Version: (),
    exp.Literal: (),  # counted by their values
    exp.Identifier: (),
}
# Types by target, of those that are not the same in all; None: the target has none.
_TYPES: Mapping[str, Mapping[str, str | None]] = {
    "flink": {
        "TEXT": "STRING", "VARCHAR": "STRING", "JSON": "STRING", "UUID": "STRING", "INT": "INT", "DOUBLE": "DOUBLE",
        "BLOB": "BYTES", "VARBINARY": "BYTES", "TIMESTAMP": "TIMESTAMP(3)", "TIMESTAMPNTZ": "TIMESTAMP(3)",
        "TIMESTAMPTZ": "TIMESTAMP_LTZ(3)", "TIME": "TIME", "INT128": "DECIMAL(38, 0)", "UBIGINT": "DECIMAL(20, 0)",
        "UINT": "BIGINT", "USMALLINT": "INT", "UTINYINT": "SMALLINT",
    },
    "risingwave": {
        "TEXT": "VARCHAR", "VARCHAR": "VARCHAR", "JSON": "JSONB", "UUID": "VARCHAR", "INT": "INT",
        "DOUBLE": "DOUBLE PRECISION", "FLOAT": "REAL", "BLOB": "BYTEA", "VARBINARY": "BYTEA", "TIMESTAMP": "TIMESTAMP",
        "TIMESTAMPNTZ": "TIMESTAMP", "TIMESTAMPTZ": "TIMESTAMPTZ", "TIME": "TIME", "TINYINT": "SMALLINT",
        "INT128": "NUMERIC", "UBIGINT": "NUMERIC", "UINT": "BIGINT", "USMALLINT": "INT", "UTINYINT": "SMALLINT",
        "DECIMAL": "NUMERIC",
    },
    "spark": {
        "TEXT": "STRING", "VARCHAR": "STRING", "JSON": "STRING", "UUID": "STRING", "INT": "INT", "DOUBLE": "DOUBLE",
        "BLOB": "BINARY", "VARBINARY": "BINARY", "TIMESTAMP": "TIMESTAMP_NTZ", "TIMESTAMPNTZ": "TIMESTAMP_NTZ",
        "TIMESTAMPTZ": "TIMESTAMP", "TIME": None, "INT128": "DECIMAL(38, 0)", "UBIGINT": "DECIMAL(20, 0)",
        "UINT": "BIGINT", "USMALLINT": "INT", "UTINYINT": "SMALLINT",
    },
}  # fmt: skip
_SAME_TYPES = {"BOOLEAN", "TINYINT", "SMALLINT", "BIGINT", "FLOAT", "DATE", "DECIMAL"}
_MODES = {"fail": "FAILFAST", "skip": "PERMISSIVE"}
_UNITS = (("DAY", 86_400_000_000), ("HOUR", 3_600_000_000), ("MINUTE", 60_000_000), ("SECOND", 1_000_000))


# Arguments of nodes that all targets have; others are clauses.
_ARGUMENTS: Mapping[type[exp.Expr], set[str]] = {
    exp.Group: {"expressions"},
    exp.Distinct: {"expressions"},
    exp.With: {"expressions"},
    exp.Union: {"this", "expression", "distinct", "with_", "order", "limit"},
    exp.Star: set(),
    exp.Limit: {"this", "expression"},
}
_CLAUSES = {
    "all": "GROUP BY ALL", "cube": "CUBE", "rollup": "ROLLUP", "grouping_sets": "GROUPING SETS",
    "totals": "WITH TOTALS", "on": "DISTINCT ON", "recursive": "WITH RECURSIVE", "by_name": "UNION BY NAME",
    "except_": "* EXCLUDE", "replace": "* REPLACE", "rename": "* RENAME", "ilike": "* LIKE",
}  # fmt: skip
_NO_SCHEMAS = {
    "flink": "it makes Avro's schema of the columns, and takes a Java class for Protocol Buffers",
    "risingwave": "it takes a schema from a registry or a file that its servers read",
    "spark": "from_avro and from_protobuf come with packages of their own",
}
_TRANSLATED = "CREATE TABLE, CREATE MATERIALIZED VIEW, CREATE SINK, INSERT INTO … SELECT and SELECT are translated"


@dataclass(frozen=True, slots=True)
class Translated:
    """A statement of the target. `notes`: where it differs from ours."""

    text: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "".join(f"-- {note}\n" for note in self.notes) + f"{self.text};\n"


def translate(text: str, target: str, *, servers: str = "") -> list[Translated]:
    """Returns the statements of a text, separated by semicolons, for a target. `servers`: addresses that the target
    reads from; empty: SERVERS. Raises InvalidStatement, with line and column in the whole text where they are known."""
    if target not in TARGETS:
        raise InvalidStatement(f"target is {target!r}, must be one of {', '.join(TARGETS)}", clause=target)
    translator = _Translator(target, servers or SERVERS[target])
    return [found for statement in _statements(text) for found in translator.statement(statement)]


def _statements(text: str) -> Iterator[str]:
    """Yields the statements, each with line ends in place of what is before it: places in errors stay those of the
    text."""
    try:
        tokens = StreamHouse().tokenize(text)
    except TokenError:
        parse(text)  # says where a text or name has no end
        raise InvalidStatement("a text or name has no end") from None
    start = 0
    for token in [*tokens, None]:
        if token is not None and token.token_type is not TokenType.SEMICOLON:
            continue
        end = len(text) if token is None else token.start
        if any(start <= other.start < end for other in tokens if other.token_type is not TokenType.SEMICOLON):
            yield "".join(sign if sign == "\n" else " " for sign in text[:start]) + text[start:end]
        start = end + 1


class _Translator:
    """Translates statements one after the other; knows the tables and views of those before."""

    def __init__(self, target: str, servers: str) -> None:
        self._target = target
        self._servers = servers
        self._tables: dict[str, TableDefinition] = {}
        self._views: dict[str, str] = {}

    @property
    def _name(self) -> str:
        return NAMES[self._target]

    def statement(self, text: str) -> list[Translated]:
        job = parse_job_statement(text)
        is_live = isinstance(job, ContinuousQuery) and job.kind == "live"  # a SELECT, with or without EMIT
        if isinstance(job, ContinuousQuery) and not is_live:
            return self._continuous(job)
        if job is not None and not is_live:
            raise self._lacks(_first_words(text), _TRANSLATED)
        tokens = StreamHouse().tokenize(text)
        emit, kept = without_emit(tokens)
        if tokens[0].text.upper() in ("SELECT", "WITH", "FROM", "VALUES") or tokens[0].token_type is TokenType.L_PAREN:
            query, notes = self._query(text[: kept[-1].end + 1], emit)
            return [Translated(query, notes)]
        statement = parse(text)
        if isinstance(statement, CreateTable):
            return self._create_table(statement)
        if isinstance(statement, DropTable):
            raise self._lacks("DROP TABLE", _TRANSLATED)
        raise self._lacks(_first_words(text), _TRANSLATED)

    def _lacks(self, what: str, why: str = "") -> InvalidStatement:
        return InvalidStatement(f"{what} is not supported for {self._target}{f': {why}' if why else ''}", clause=what)

    # ---- queries

    def _continuous(self, job: ContinuousQuery) -> list[Translated]:
        query, notes = self._query(job.expansion.original, job.emit)
        name = self._quoted(job.name) if job.name else ""
        if job.options:
            raise self._lacks(f"WITH ({', '.join(job.options)})")
        if job.kind == "view":
            self._views[job.name.lower()] = job.name
            if self._target == "risingwave":
                exists = "IF NOT EXISTS " if job.if_not_exists else ""
                return [Translated(f"CREATE MATERIALIZED VIEW {exists}{name} AS\n{query}", notes)]
            if self._target == "flink":
                exists = "IF NOT EXISTS " if job.if_not_exists else ""
                notes = (
                    *notes,
                    f"{job.name} is computed where it is read: INSERT INTO a table of yours SELECT from it",
                )
                return [Translated(f"CREATE VIEW {exists}{name} AS\n{query}", notes)]
            notes = (*notes, f'{job.name} is computed where it is read: spark.table("{job.name}").writeStream')
            return [Translated(f"CREATE OR REPLACE TEMPORARY VIEW {name} AS\n{query}", notes)]
        if self._target == "spark":
            what = "CREATE SINK" if job.kind == "sink" else "INSERT INTO"
            raise self._lacks(what, "its SQL starts no streaming query; write the SELECT with writeStream")
        target = self._tables.get(job.target.lower())
        columns = f" ({', '.join(self._quoted(column) for column in job.columns)})" if job.columns else ""
        if self._target == "flink":
            if target is None:
                raise self._undeclared(job.target)
            return [Translated(f"INSERT INTO {self._quoted(target.name)}{columns}\n{query}", notes)]
        if columns:
            raise self._lacks(f"INSERT INTO {job.target} ({', '.join(job.columns)})", "name the columns in the SELECT")
        topic = target.topic if target is not None else job.target
        if target is not None and target.format != "json":
            raise self._lacks(f"writing format {target.format}")
        sink = self._quoted(job.name or f"into_{job.target}")
        options = {"connector": "kafka", "topic": topic, "properties.bootstrap.server": self._servers}
        encode = "FORMAT PLAIN ENCODE JSON"
        return [Translated(f"CREATE SINK {sink} AS\n{query}\n{_with(options, quoted=False)}\n{encode}", notes)]

    def _query(self, text: str, emit: str | None) -> tuple[str, tuple[str, ...]]:
        """Returns the query for the target, and the notes about it."""
        expansion, windows = with_placeholders(text)
        try:
            tree = one_tree(expansion.text, StreamHouse)
            if not isinstance(tree, exp.Query):
                raise self._lacks(tree.key.upper())
            self._check_names(tree, windows)
            tree = self._spelled(_without_alias_references(tree))
            written = self._written(tree)
        except InvalidStatement as error:
            raise expansion.with_place(error) from error.__cause__
        notes: list[str] = []
        for name, window in windows.items():
            written = written.replace(self._quoted(name), self._window(window))
        if emit == "on window close":
            if not windows:
                raise InvalidStatement("EMIT ON WINDOW CLOSE needs a window function", clause="EMIT")
            if self._target == "risingwave":
                written += "\nEMIT ON WINDOW CLOSE"
            elif self._target == "spark":
                notes.append('EMIT ON WINDOW CLOSE is outputMode("append") of the query that writes this')
        elif emit == "changes":
            if self._target == "spark":
                notes.append('EMIT CHANGES is outputMode("update") of the query that writes this')
            elif self._target == "flink" and windows:
                notes.append("EMIT CHANGES: Flink gives out a window once, when it is over")
        return written, tuple(notes)

    def _check_names(self, tree: exp.Query, windows: Mapping[str, Window]) -> None:
        ctes = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
        for table in tree.find_all(exp.Table):
            if not isinstance(table.this, exp.Identifier):
                continue
            name = table.name.lower()
            if table.name not in windows and name not in ctes | self._tables.keys() | self._views.keys():
                raise self._undeclared(table.name)
        for window in windows.values():
            if window.table.startswith("("):
                raise self._lacks(
                    f"{window.function} over a query", "give the query a name with CREATE MATERIALIZED VIEW"
                )
            if _unquoted(window.table).lower() not in self._tables.keys() | self._views.keys() | ctes:
                raise self._undeclared(_unquoted(window.table))
        for column in tree.find_all(exp.Column):
            if column.name.lower() in COLUMN_NAMES:
                raise InvalidStatement(
                    f"{column.name} is not there in {self._name}: declare it as a METADATA column", clause=column.name
                )

    def _undeclared(self, name: str) -> InvalidStatement:
        known = [*(table.name for table in self._tables.values()), *self._views.values()]
        nearest = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return InvalidStatement(
            f"{name!r} is not declared: its CREATE TABLE or view has to stand before it{hint}", name=name
        )

    def _spelled(self, tree: exp.Query) -> exp.Query:
        """Returns the tree with names in the letters of their declaration: a quoted name has them."""
        spelled = {column.name.lower(): column.name for table in self._tables.values() for column in table.columns}
        tables = {name: table.name for name, table in self._tables.items()} | self._views
        for column in tree.find_all(exp.Column):
            column.this.set("this", spelled.get(column.name.lower(), column.name))
        for table in tree.find_all(exp.Table):
            if isinstance(table.this, exp.Identifier):
                table.this.set("this", tables.get(table.name.lower(), table.name))
        return tree

    def _written(self, tree: exp.Expr) -> str:
        """Returns the text of a tree. Raises InvalidStatement for a node that the target does not have."""
        for node in tree.walk():
            try:
                self._check(node)
            except InvalidStatement as error:
                raise _with_place(error, node) from None
        dialect = _DIALECTS[self._target]
        try:
            written = tree.sql(dialect, identify=True, pretty=True, unsupported_level=ErrorLevel.RAISE, comments=False)
            again = sqlglot.parse_one(written, dialect=dialect)
        except SqlglotError as error:
            raise InvalidStatement(f"the statement cannot be written for {self._name}: {error}") from error
        missing = _missing(tree, again)
        if missing:
            raise InvalidStatement(f"the statement cannot be written for {self._name}: it would lose {missing}")
        return written

    def _check(self, node: exp.Expr) -> None:
        allowed = _KNOWN.get(type(node), frozenset())
        is_proctime = isinstance(node, exp.Anonymous) and node.name.upper() == "PROCTIME"
        if is_proctime and self._target == "risingwave" and isinstance(node.parent, exp.Version):
            return
        if self._target not in allowed:
            raise self._lacks("FOR SYSTEM_TIME AS OF" if isinstance(node, exp.Version) else _shown(node))
        if isinstance(node, exp.Join) and (node.method or node.kind.upper() in ("SEMI", "ANTI", "POSITIONAL")):
            raise self._lacks(f"{(node.method or node.kind).upper()} JOIN")
        for kind, arguments in _ARGUMENTS.items():
            found = next((name for name in node.args if node.args[name] and name not in arguments), None)
            if isinstance(node, kind) and found is not None:
                raise self._lacks(_CLAUSES.get(found, f"{node.key.upper()} {found.strip('_').upper()}"))
        select = node.parent_select
        if isinstance(node, exp.Qualify) and select and any(isinstance(item, exp.Star) for item in select.expressions):
            raise self._lacks("QUALIFY beside *", "name the columns")
        if isinstance(node, exp.Round) and node.args.get("decimals") and self._target == "risingwave":
            raise self._lacks(_shown(node), "it rounds a DOUBLE to whole numbers")
        if isinstance(node, exp.Extract) and node.name.upper() not in _EXTRACTED:
            raise self._lacks(f"EXTRACT({node.name.upper()})")
        if isinstance(node, exp.Version) and self._target == "risingwave":
            time = node.args.get("expression")
            if not (isinstance(time, exp.Anonymous) and time.name.upper() == "PROCTIME"):
                raise self._lacks(
                    "FOR SYSTEM_TIME AS OF the time of an event", "it has FOR SYSTEM_TIME AS OF PROCTIME()"
                )
        if isinstance(node, exp.DataType) and not isinstance(node.parent, exp.DataType):
            self._type(node)
        if isinstance(node, exp.Interval) and self._target == "flink" and len(node.name) > 2:
            raise self._lacks(_shown(node), "its intervals have two digits")

    # ---- windows

    def _window(self, window: Window) -> str:
        if window.function not in {"flink": ("TUMBLE", "HOP", "CUMULATE", "SESSION")}.get(
            self._target, ("TUMBLE", "HOP")
        ):
            raise self._lacks(window.function)
        table = _unquoted(window.table)
        definition = self._tables.get(table.lower())
        name = self._quoted(definition.name if definition is not None else self._views.get(table.lower(), table))
        time = _unquoted(window.time)
        if definition is not None and (column := definition.column(time)) is not None:
            time = column.name
        sizes = window.sizes
        if self._target == "flink":
            keys = ", ".join(self._quoted(_unquoted(key)) for key in window.keys)
            by = f" PARTITION BY {keys}" if keys else ""
            lengths = ", ".join(_flink_interval(size) for size in sizes.values())
            return f"TABLE({window.function}(TABLE {name}{by}, DESCRIPTOR({self._quoted(time)}), {lengths}))"
        if self._target == "risingwave":
            lengths = ", ".join(f"INTERVAL '{_length(size)}'" for size in sizes.values())
            return f"{window.function}({name}, {self._quoted(time)}, {lengths})"
        size, slide = sizes["SIZE"], sizes.get("SLIDE", sizes["SIZE"])
        offset = sizes.get("OFFSET", 0) % slide  # Spark takes none that is longer
        lengths = ", ".join(f"'{_length(part)}'" for part in (size, slide, offset))
        columns = "*"
        if definition is not None:
            columns = ", ".join(self._quoted(column.name) for column in definition.columns)
        bounds = "`window`.`start` AS `window_start`, `window`.`end` AS `window_end`"
        last = "`window`.`end` - INTERVAL '0.001' SECOND AS `window_time`"
        rows = f"SELECT *, WINDOW({self._quoted(time)}, {lengths}) AS `window` FROM {name}"
        return f"(SELECT {columns}, {bounds}, {last} FROM ({rows}))"

    # ---- tables

    def _create_table(self, statement: CreateTable) -> list[Translated]:
        table = statement.definition
        self._tables[table.name.lower()] = table
        if table.format in ("avro", "protobuf"):
            raise self._lacks(f"format {table.format}", _NO_SCHEMAS[self._target])
        made = {"flink": self._flink_table, "risingwave": self._risingwave_table, "spark": self._spark_table}
        return made[self._target](table, statement.if_not_exists)

    def _flink_table(self, table: TableDefinition, if_not_exists: bool) -> list[Translated]:
        lines, keys = [], []
        for column in table.columns:
            name = self._quoted(column.name)
            if column.computed:
                lines.append(f"{name} AS {self._expression(column.computed)}")
            elif column.metadata == "_key":
                keys.append(column)
                lines.append(f"{name} {self._column_type(column)}")
            elif column.metadata == "_headers":
                raise self._lacks("METADATA FROM 'headers'", "it is a MAP there")
            elif column.metadata:
                virtual = "" if column.metadata == "_timestamp" else " VIRTUAL"
                source = column.metadata.removeprefix("_")
                lines.append(f"{name} {self._column_type(column)} METADATA FROM '{source}'{virtual}")
            else:
                lines.append(f"{name} {self._column_type(column)}{' NOT NULL' if column.not_null else ''}")
        if table.watermark is not None:
            time, expression = table.watermark
            lines.append(f"WATERMARK FOR {self._quoted(time)} AS {self._expression(expression)}")
        options = {"connector": "kafka", "topic": table.topic, "properties.bootstrap.servers": self._servers}
        value, notes = _flink_format(table)
        if len(keys) > 1 or any(column.type not in ("TEXT", "VARCHAR", "BLOB") for column in keys):
            raise self._lacks("METADATA FROM 'key' of several columns, or of another type than VARCHAR and BLOB")
        if table.primary_key:
            if table.primary_key != tuple(column.name for column in keys):
                raise self._lacks("PRIMARY KEY of fields of the value", "upsert-kafka takes METADATA FROM 'key'")
            lines.append(f"PRIMARY KEY ({', '.join(self._quoted(name) for name in table.primary_key)}) NOT ENFORCED")
            options["connector"] = "upsert-kafka"
            options |= {"key.format": "raw"} | {f"value.{name}": value[name] for name in value}
            options["value.fields-include"] = "EXCEPT_KEY"
        elif keys:
            options["scan.startup.mode"] = "earliest-offset"
            options |= {"key.format": "raw", "key.fields": keys[0].name}
            options |= {f"value.{name}": value[name] for name in value}
            options["value.fields-include"] = "EXCEPT_KEY"
        else:
            options |= {"scan.startup.mode": "earliest-offset"} | value
        exists = "IF NOT EXISTS " if if_not_exists else ""
        text = f"CREATE TABLE {exists}{self._quoted(table.name)} (\n  " + ",\n  ".join(lines)
        return [Translated(f"{text}\n) {_with(options, quoted=True)}", notes)]

    def _risingwave_table(self, table: TableDefinition, if_not_exists: bool) -> list[Translated]:
        lines, include, shown = [], [], []
        is_plain = True
        for column in table.columns:
            name = self._quoted(column.name)
            if column.computed:
                shown.append(f"{self._expression(column.computed)} AS {name}")
                is_plain = False
            elif column.metadata == "_headers":
                raise self._lacks("METADATA FROM 'headers'")
            elif column.metadata:
                part = column.metadata.removeprefix("_")
                if part == "timestamp" and column.type in ("TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE"):
                    include.append(f"INCLUDE TIMESTAMP AS {name}")
                    shown.append(name)
                    continue
                is_plain = False
                include.append(f"INCLUDE {part.upper()} AS {self._quoted(f'_rw_{part}')}")
                raw = self._quoted(f"_rw_{part}")
                value = f"CONVERT_FROM({raw}, 'utf8')" if part == "key" and column.type != "BLOB" else raw
                shown.append(f"CAST({value} AS {self._column_type(column)}) AS {name}")
            else:
                lines.append(f"{name} {self._column_type(column)}{' NOT NULL' if column.not_null else ''}")
                shown.append(name)
        notes: tuple[str, ...] = ()
        if table.bad_rows == "fail":
            notes = ("bad_rows = 'fail': RisingWave writes bad rows to its log, and leaves them out",)
        encode, shown, lines = self._risingwave_format(table, shown, lines)
        is_plain = is_plain and table.format != "text"
        kind, upsert = "SOURCE", "PLAIN"
        if table.primary_key:
            kind = "TABLE"
            columns = [table.column(name) for name in table.primary_key]
            names = [column.name if column and column.is_field else "_rw_key" for column in columns]
            upsert = "UPSERT" if "_rw_key" in names else "PLAIN"
            if upsert == "UPSERT" and len(names) > 1:
                raise self._lacks("PRIMARY KEY of the record's key and fields of the value")
            lines.append(f"PRIMARY KEY ({', '.join(self._quoted(name) for name in names)})")
        if table.watermark is not None:
            time, expression = table.watermark
            lines.append(f"WATERMARK FOR {self._quoted(time)} AS {self._expression(expression)}")
        exists = "IF NOT EXISTS " if if_not_exists else ""
        source = table.name if is_plain else f"{table.name}_records"
        options = {
            "connector": "kafka",
            "topic": table.topic,
            "properties.bootstrap.server": self._servers,
            "scan.startup.mode": "earliest",
        }
        text = f"CREATE {kind} {exists}{self._quoted(source)} (\n  " + ",\n  ".join(lines) + "\n)"
        text = "\n".join([text, *dict.fromkeys(include), _with(options, quoted=False)])
        made = [Translated(f"{text}\nFORMAT {upsert} ENCODE {encode}", notes)]
        if not is_plain:
            view = f"CREATE VIEW {exists}{self._quoted(table.name)} AS"
            made.append(Translated(f"{view}\nSELECT {', '.join(shown)} FROM {self._quoted(source)}"))
        return made

    def _risingwave_format(
        self, table: TableDefinition, shown: list[str], lines: list[str]
    ) -> tuple[str, list[str], list[str]]:
        if table.format == "json":
            return "JSON", shown, lines
        if table.format == "csv":
            assert table.csv is not None
            if table.csv.quote != '"' or table.csv.null_text:
                raise self._lacks("quote and null_text of format csv")
            return f"CSV (without_header = 'true', delimiter = {literal(table.csv.delimiter)})", shown, lines
        field_ = self._quoted(table.fields[0].name)
        text = f"CONVERT_FROM({self._quoted('_rw_value')}, 'utf8') AS {field_}"
        shown = [text if column == field_ else column for column in shown]
        return "BYTES", shown, [f"{self._quoted('_rw_value')} BYTEA"]

    def _spark_table(self, table: TableDefinition, if_not_exists: bool) -> list[Translated]:
        notes = []
        if table.primary_key:
            raise self._lacks("PRIMARY KEY", "it keeps no newest row of a key")
        if if_not_exists:
            raise self._lacks("CREATE TABLE IF NOT EXISTS", "tables become temporary views")
        if table.watermark is not None:
            notes.append(f"WATERMARK FOR {table.watermark[0]} AS {table.watermark[1]}: withWatermark of its reader")
        if table.bad_rows == "fail":
            notes.append("bad_rows = 'fail': a bad row ends the query, which does not name its offset")
        else:
            notes.append("bad_rows = 'skip': a bad row has NULL in all of its fields")
        text, row, mode = "CAST(`value` AS STRING)", "`row of the value`", _MODES[table.bad_rows]
        schema = literal(", ".join(f"{self._quoted(field.name)} {self._column_type(field)}" for field in table.fields))
        parsed = ""
        if table.format == "json" and table.fields:
            parsed = f", FROM_JSON({text}, {schema}, MAP('mode', '{mode}')) AS {row}"
        elif table.csv is not None:
            notes.append("format csv: a record is a single line")
            csv = table.csv
            options = {"mode": mode, "sep": csv.delimiter, "quote": csv.quote, "nullValue": csv.null_text}
            # A backslash begins an escape in Spark's texts.
            given = ", ".join(f"'{name}', {literal(value)}" for name, value in options.items()).replace("\\", "\\\\")
            parsed = f", FROM_CSV({text}, {schema}, MAP({given})) AS {row}"
        inner, outer = [], []
        for column in table.columns:
            name = self._quoted(column.name)
            if column.computed:
                outer.append(f"{self._expression(column.computed)} AS {name}")
                continue
            outer.append(name)
            if column.metadata == "_headers":
                raise self._lacks("METADATA FROM 'headers'", "its names are called key there")
            if column.metadata:
                part = self._quoted(column.metadata.removeprefix("_"))
                inner.append(f"CAST({part} AS {self._column_type(column)}) AS {name}")
            else:
                inner.append(f"{text if table.format == 'text' else f'{row}.{name}'} AS {name}")
        records = self._quoted(f"{table.name}_records")
        given = f"bootstrap {literal(self._servers)}, topic {literal(table.topic)}"
        rows = f"SELECT *{parsed} FROM {records}"
        required = [f"{self._quoted(column.name)} IS NOT NULL" for column in table.fields if column.not_null]
        where = f"\nWHERE {' AND '.join(required)}" if required else ""
        view = f"CREATE OR REPLACE TEMPORARY VIEW {self._quoted(table.name)} AS\nSELECT {', '.join(outer)}"
        return [
            Translated(f"CREATE OR REPLACE TEMPORARY VIEW {records} USING streamhouse OPTIONS ({given})"),
            Translated(f"{view}\nFROM (\n  SELECT {', '.join(inner)}\n  FROM ({rows})\n){where}", tuple(notes)),
        ]

    # ---- parts

    def _quoted(self, name: str) -> str:
        mark = '"' if self._target == "risingwave" else "`"
        return mark + name.replace(mark, mark * 2) + mark

    def _expression(self, text: str) -> str:
        """Returns an expression of a declaration for the target."""
        tree = one_tree(f"SELECT {text}", StreamHouse)
        assert isinstance(tree, exp.Select)
        return " ".join(self._written(self._spelled(tree)).split()).removeprefix("SELECT ")

    def _column_type(self, column: TableColumn) -> str:
        return self._type(exp.DataType.build(column.type, dialect="duckdb"))

    def _type(self, kind: exp.DataType) -> str:
        """Returns a type for the target. Raises InvalidStatement for one that it does not have."""
        name = kind.this.name
        parts = kind.expressions
        is_spark, is_flink = self._target == "spark", self._target == "flink"
        if name in ("ARRAY", "LIST") and parts:
            inner = self._type(parts[0])
            return f"ARRAY<{inner}>" if is_flink or is_spark else f"{inner}[]"
        if name == "MAP" and len(parts) == 2:
            key, value = self._type(parts[0]), self._type(parts[1])
            return f"MAP<{key}, {value}>" if is_flink or is_spark else f"MAP({key}, {value})"
        if name == "STRUCT":
            sign = ": " if is_spark else " "
            fields = ", ".join(f"{self._quoted(part.name)}{sign}{self._type(part.args['kind'])}" for part in parts)
            return f"ROW<{fields}>" if is_flink else f"STRUCT<{fields}>"
        found = _TYPES[self._target].get(name, name if name in _SAME_TYPES else None)
        if found is None:
            raise self._lacks(f"type {kind.sql('duckdb')}")
        if name == "DECIMAL" and parts:
            return f"{found}({', '.join(part.name for part in parts)})"
        return found


# ---- checks of the text


def _without_alias_references(tree: exp.Query) -> exp.Query:
    """Returns the tree with expressions where WHERE, GROUP BY and HAVING name a column of the result, or its place,
    which not all targets take."""
    tree = tree.copy()
    for select in tree.find_all(exp.Select):
        aliases = {
            item.alias.lower(): item.this
            for item in select.expressions
            if isinstance(item, exp.Alias) and item.this.find(exp.Window) is None
        }
        for clause in ("where", "group", "having"):
            part = select.args.get(clause)
            for node in list(part.find_all(exp.Column, exp.Literal)) if part is not None else ():
                if isinstance(node, exp.Column) and not node.table and node.name.lower() in aliases:
                    value = aliases[node.name.lower()]
                    if value.name.lower() != node.name.lower() or not isinstance(value, exp.Column):
                        node.replace(exp.paren(value.copy()) if isinstance(value, exp.Binary) else value.copy())
                elif (
                    isinstance(node, exp.Literal) and clause == "group" and node.parent is part and node.name.isdigit()
                ):
                    place = int(node.name) - 1
                    if place < len(select.expressions):
                        node.replace(select.expressions[place].unalias().copy())
    return tree


def _missing(tree: exp.Expr, again: exp.Expr) -> str:
    """Returns the first node of a tree that the tree of its text does not have as often; empty: none is missing."""
    before, after = Counter(type(node) for node in tree.walk()), Counter(type(node) for node in again.walk())
    for kind, count in before.items():
        others = _WRITTEN_AS.get(kind, (kind,))
        if others and sum(after[other] for other in others) < count:
            return kind.key.upper()
    wanted, found = Counter(_leaves(tree)), Counter(_leaves(again))
    missing = wanted - found
    return repr(next(iter(missing))[1]) if missing else ""


def _leaves(tree: exp.Expr) -> Iterator[tuple[str, str]]:
    """Yields names and constants."""
    for node in tree.walk():
        if isinstance(node, exp.Identifier):
            yield "name", node.name.lower()
        elif isinstance(node, exp.Literal) and not isinstance(node.parent, exp.Interval | exp.JSONExtractScalar):
            yield "constant", node.name


def _flink_format(table: TableDefinition) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns the options of a format, and notes."""
    is_skipped = "true" if table.bad_rows == "skip" else "false"
    match table.format:
        case "json":
            return {
                "format": "json",
                "json.ignore-parse-errors": is_skipped,
                "json.timestamp-format.standard": "ISO-8601",
            }, ()
        case "csv":
            assert table.csv is not None
            options = {
                "format": "csv",
                "csv.ignore-parse-errors": is_skipped,
                "csv.field-delimiter": table.csv.delimiter,
            }
            if table.csv.quote:
                options["csv.quote-character"] = table.csv.quote
            else:
                options["csv.disable-quote-character"] = "true"
            options["csv.null-literal"] = table.csv.null_text
            return options, ("format csv: a record is a single line in Flink",)
    return {"format": "raw"}, ()


def _with(options: Mapping[str, str], *, quoted: bool) -> str:
    """Returns the clause WITH, the names of its options as texts or as they are."""
    mark = "'" if quoted else ""
    lines = ",\n  ".join(f"{mark}{name}{mark} = {literal(value)}" for name, value in options.items())
    return f"WITH (\n  {lines}\n)"


def _with_place(error: InvalidStatement, node: exp.Expr) -> InvalidStatement:
    """Returns an error about a node with the place of the first name in it."""
    for part in node.walk():
        line, end = part.meta.get("line"), part.meta.get("col")
        if isinstance(line, int) and isinstance(end, int):
            column = max(1, end - (part.meta.get("end", 0) - part.meta.get("start", 0)))
            details = {name: value for name, value in error.details.items() if name not in ("line", "column")}
            return InvalidStatement(
                f"line {line}, column {column}: {error}", retry_after_ms=0, line=line, column=column, **details
            )
    return error


def _shown(node: exp.Expr) -> str:
    """Returns the beginning of a node's text."""
    text = node.sql(StreamHouse)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _first_words(text: str) -> str:
    """Returns the words in front of a statement that say which it is."""
    words = [token.text.upper() for token in StreamHouse().tokenize(text)[:3]]
    words = words[: 3 if "MATERIALIZED" in words else 2]
    return " ".join(words) if words[0] in ("CREATE", "DROP", "ALTER", "SHOW", "INSERT") else words[0]


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def _unit(size_us: int) -> tuple[str, str]:
    """Returns number and unit of a length."""
    if size_us == 0:
        return "0", "SECOND"
    for unit, unit_us in _UNITS:
        if size_us % unit_us == 0:
            return str(size_us // unit_us), unit
    return f"{size_us / 1_000_000:.6f}".rstrip("0"), "SECOND"


def _length(size_us: int) -> str:
    number, unit = _unit(size_us)
    return f"{number} {unit.lower()}{'' if number == '1' else 's'}"


def _flink_interval(size_us: int) -> str:
    number, unit = _unit(size_us)
    digits = len(number.partition(".")[0])
    precision = f"({digits})" if digits > 2 else ""  # two digits if it says nothing
    return f"INTERVAL '{number}' {unit}{precision}"


# ---- dialects


def _types_of(target: str) -> dict[type[exp.Expr], Any]:
    """Returns how types are written for a target."""
    return {exp.DataType: lambda self, node: _Translator(target, "")._type(node)}


_AS_OF: dict[type[exp.Expr], Any] = {
    exp.Version: lambda self, node: f"FOR SYSTEM_TIME AS OF {self.sql(node, 'expression')}"
}
_APPROXIMATE: dict[type[exp.Expr], Any] = {
    exp.ApproxDistinct: lambda self, node: self.func("APPROX_COUNT_DISTINCT", node.this)
}


class _FlinkTokenizer(Tokenizer):
    IDENTIFIERS: ClassVar = ["`"]


class _FlinkGenerator(Generator):
    TRY_SUPPORTED = True
    TRANSFORMS: ClassVar = {
        **Generator.TRANSFORMS,
        **_types_of("flink"),
        **_AS_OF,
        **_APPROXIMATE,
        exp.Select: transforms.preprocess([transforms.eliminate_qualify]),
        exp.JSONExtractScalar: lambda self, node: self.func(
            "JSON_VALUE", node.this, exp.Literal.string(node.expression.sql(StreamHouse).strip("'"))
        ),
        exp.Length: lambda self, node: self.func("CHAR_LENGTH", node.this),
        exp.CurrentTimestamp: lambda self, node: "CURRENT_TIMESTAMP",
        exp.NullSafeEQ: lambda self, node: self.binary(node, "IS NOT DISTINCT FROM"),
        exp.NullSafeNEQ: lambda self, node: self.binary(node, "IS DISTINCT FROM"),
    }


class Flink(Dialect):
    """Flink SQL, which sqlglot does not have, as far as statements are written for it."""

    TYPED_DIVISION = True
    NULL_ORDERING = "nulls_are_small"
    Tokenizer = _FlinkTokenizer
    Generator = _FlinkGenerator


class _RisingWaveGenerator(RisingWaveGenerator):
    TRANSFORMS: ClassVar = {
        **RisingWaveGenerator.TRANSFORMS,
        **_types_of("risingwave"),
        **_AS_OF,
        **_APPROXIMATE,
        exp.JSONExtractScalar: lambda self, node: self.func(
            "JSONB_EXTRACT_PATH_TEXT",
            exp.cast(node.this, exp.DataType.build("JSON")),
            *(exp.Literal.string(key.name) for key in node.expression.find_all(exp.JSONPathKey)),
        ),
    }


class _RisingWave(RisingWave):
    Generator = _RisingWaveGenerator


class _SparkGenerator(SparkGenerator):
    TRANSFORMS: ClassVar = {**SparkGenerator.TRANSFORMS, **_types_of("spark")}


class _Spark(Spark):
    Generator = _SparkGenerator


_DIALECTS: Mapping[str, type[Dialect]] = {"flink": Flink, "risingwave": _RisingWave, "spark": _Spark}
