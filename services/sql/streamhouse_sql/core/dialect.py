"""The language: DuckDB's SQL, with the words of streaming engines that it does not have.

Queries are computed in DuckDB's own dialect. The additions here are for parsing, and for writing again what was
parsed: definitions are stored as text, and the check that nothing was dropped compares texts. Words and forms are those
of Flink SQL and RisingWave:
https://nightlies.apache.org/flink/flink-docs-stable/docs/dev/table/sql/create/#create-table
"""

from __future__ import annotations

from typing import ClassVar

from sqlglot import exp
from sqlglot.dialects.duckdb import DuckDB
from sqlglot.generators.duckdb import DuckDBGenerator
from sqlglot.parsers.duckdb import DuckDBParser
from sqlglot.tokenizer_core import TokenType


class MetadataConstraint(exp.Expression, exp.ColumnConstraintKind):
    """METADATA [FROM 'name']: the column is a part of the record beside its value."""

    arg_types: ClassVar[dict[str, bool]] = {"this": False}


def _watermark(parser: StreamHouseParser) -> exp.Expr:
    """Returns the node of WATERMARK FOR column AS expression."""
    return parser.expression(
        exp.WatermarkColumnConstraint(
            this=parser._match(TokenType.FOR) and parser._parse_column(),
            expression=parser._match(TokenType.ALIAS) and parser._parse_disjunction(),
        )
    )


def _metadata(parser: StreamHouseParser) -> exp.Expr:
    """Returns the node of METADATA [FROM 'name']."""
    return parser.expression(MetadataConstraint(this=parser._match(TokenType.FROM) and parser._parse_string()))


class StreamHouseParser(DuckDBParser):
    """Parser of the additions."""

    CONSTRAINT_PARSERS: ClassVar = {**DuckDBParser.CONSTRAINT_PARSERS, "WATERMARK": _watermark, "METADATA": _metadata}
    SCHEMA_UNNAMED_CONSTRAINTS: ClassVar = {*DuckDBParser.SCHEMA_UNNAMED_CONSTRAINTS, "WATERMARK"}


class StreamHouseGenerator(DuckDBGenerator):
    """Writes the additions."""

    TRANSFORMS: ClassVar = {
        **DuckDBGenerator.TRANSFORMS,
        MetadataConstraint: lambda self, node: "METADATA" + (f" FROM {self.sql(node, 'this')}" if node.this else ""),
        # sqlglot takes `format` for a property of its own, and would write FORMAT 'json'.
        exp.FileFormatProperty: lambda self, node: f"format={self.sql(node, 'this')}",
    }
    # DuckDB has no properties of tables, and its generator leaves them out without a word.
    PROPERTIES_LOCATION: ClassVar = {
        **DuckDBGenerator.PROPERTIES_LOCATION,
        exp.Property: exp.Properties.Location.POST_WITH,
        exp.FileFormatProperty: exp.Properties.Location.POST_WITH,
        exp.MaterializedProperty: exp.Properties.Location.POST_CREATE,
    }


class StreamHouse(DuckDB):
    """The dialect."""

    Parser = StreamHouseParser
    Generator = StreamHouseGenerator


class VerbatimParser(StreamHouseParser):
    """Parser that keeps functions under the names that the text gives them."""

    FUNCTIONS: ClassVar = {}
    FUNCTION_PARSERS: ClassVar = {
        name: StreamHouseParser.FUNCTION_PARSERS[name] for name in ("CAST", "TRY_CAST", "EXTRACT", "SUBSTRING", "TRIM")
    }


class Verbatim(StreamHouse):
    """The dialect of continuous queries, whose expressions are written again from their tree: what sqlglot knows about
    functions of other dialects, and paths of JSON, would change them."""

    Parser = VerbatimParser
    Generator = StreamHouseGenerator

    def to_json_path(self, path: exp.Expr | None) -> exp.Expr | None:
        """Returns the path as it is."""
        return path
