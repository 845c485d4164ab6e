"""Lines of CSV as rows, by SQL: RFC 4180 without a header, a record's value is a line or several.

Each part is an expression over DuckDB's own functions of text, so that no value passes Python. A value without quotes
is only split; one with quotes is cut at them first, so that a delimiter or line end between two quotes is text. What
RFC 4180 does not allow (a quote inside of a field without quotes, one that is not closed, a line with more or fewer
fields) makes a line bad, and never touches the next record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shproto.errors import InvalidStatement

from streamhouse_sql.core.quoting import literal

# Names that no declared column has: they have blanks.
LINES, LINE, NUMBER, FIELDS = '"lines of the value"', '"line of the value"', '"number of the line"', '"fields of it"'
# In place of the delimiters and line ends that are outside of quotes. A line that has one of them itself has other
# fields, and is the producer's own.
_DELIMITER, _LINE_END = "'\x1ffield\x1f'", "'\x1fline\x1f'"
OPTIONS = ("delimiter", "quote", "null_text")
NULL_TEXT_CHARS_MAX = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvOptions:
    """Signs of a line. `quote` empty: a quote is text. A field without quotes that is `null_text` is NULL."""

    delimiter: str = ","
    quote: str = '"'
    null_text: str = ""


def csv_options(given: dict[str, str]) -> CsvOptions:
    """Returns the options of WITH. Raises InvalidStatement."""
    options = CsvOptions(
        delimiter={"\\t": "\t"}.get(given.get("delimiter", ","), given.get("delimiter", ",")),
        quote=given.get("quote", '"'),
        null_text=given.get("null_text", ""),
    )
    if len(options.delimiter) != 1 or options.delimiter in "\r\n\x1f":
        raise InvalidStatement(
            f"delimiter is {options.delimiter[:10]!r}, must be one character (\\t is a tab) and no line end",
            clause="delimiter",
        )
    if len(options.quote) > 1 or (options.quote and options.quote in "\r\n\x1f"):
        raise InvalidStatement(
            f"quote is {options.quote[:10]!r}, must be one character and no line end, or empty", clause="quote"
        )
    if options.quote == options.delimiter:
        raise InvalidStatement(f"quote and delimiter are both {options.quote!r}", clause="quote")
    if len(options.null_text) > NULL_TEXT_CHARS_MAX or any(
        sign and sign in options.null_text for sign in (options.delimiter, options.quote, "\r", "\n")
    ):
        raise InvalidStatement(
            f"null_text must have at most {NULL_TEXT_CHARS_MAX} characters, without delimiter, quote and line ends",
            clause="null_text",
        )
    return options


def lines_of(options: CsvOptions, scan: str, fields: Sequence[tuple[int, str]], *, is_numbered: bool = False) -> str:
    """Returns the SQL of a subquery: a row for each line of each value of the scan, with the texts of these fields
    (place in the line from 0, name) as columns. A null value is one row, and all of its texts are NULL. `is_numbered`:
    with the number of the line in its value, from 1."""
    newline, quote, delimiter = "chr(10)", literal(options.quote), literal(options.delimiter)
    plain = f'replace("_value", chr(13) || {newline}, {newline})'
    # A line end behind the last line begins no other.
    plain = f'CASE WHEN ends_with("_value", {newline}) THEN left({plain}, -1) ELSE {plain} END'
    lines = f'WHEN contains("_value", {newline}) THEN string_split({plain}, {newline}) ELSE ["_value"]'
    split = f"string_split({LINE}, {delimiter})"
    if options.quote:
        outside = f"replace(replace(x, chr(13) || {newline}, {_LINE_END}), {newline}, {_LINE_END})"
        outside = f"replace({outside}, {delimiter}, {_DELIMITER})"
        cut = f'string_split("_value", {quote})'
        marked = f"list_transform({cut}, lambda x, i: CASE WHEN i % 2 = 1 THEN {outside} ELSE x END)"
        marked = f"regexp_replace(array_to_string({marked}, {quote}), {_LINE_END[:-1]}$', '')"
        lines = f'WHEN contains("_value", {quote}) THEN string_split({marked}, {_LINE_END}) {lines}'
        split = f'CASE WHEN contains("_value", {quote}) THEN string_split({LINE}, {_DELIMITER}) ELSE {split} END'
    lines = f'CASE WHEN "_value" IS NULL THEN [NULL] {lines} END'
    if is_numbered:
        rows = f"SELECT *, unnest({LINES}) AS {LINE}, generate_subscripts({LINES}, 1) AS {NUMBER} "
        rows += f"FROM (SELECT *, {lines} AS {LINES} FROM {scan})"
    else:
        rows = f"SELECT *, unnest({lines}) AS {LINE} FROM {scan}"
    texts = "".join(f", {_text(options, place)} AS {text_of(name)}" for place, name in fields)
    return f"(SELECT *{texts} FROM (SELECT *, {split} AS {FIELDS} FROM ({rows})))"


def text_of(name: str) -> str:
    """Returns the column of `lines_of` that has a field's text."""
    return f'"text of {name}"'


def is_malformed(options: CsvOptions, fields: int) -> str:
    """Returns a condition over `lines_of`: the line has not this number of fields, or quotes that RFC 4180 does not
    allow."""
    if not options.quote:
        return f"coalesce(len({FIELDS}) <> {fields}, false)"
    quote = literal(options.quote)
    inside = f"replace({_without_quotes('f')}, {quote} || {quote}, '')"
    closed = f"starts_with(f, {quote}) AND ends_with(f, {quote}) AND length(f) > 1 AND NOT contains({inside}, {quote})"
    wrong = f"list_filter({FIELDS}, lambda f: contains(f, {quote}) AND NOT ({closed}))"
    # CASE, since OR would compute the lambda for all lines.
    return (
        f"CASE WHEN len({FIELDS}) <> {fields} THEN true "
        f"WHEN contains({LINE}, {quote}) THEN len({wrong}) > 0 ELSE false END"
    )


def _text(options: CsvOptions, place: int) -> str:
    field = f"{FIELDS}[{place + 1}]"
    text = f"CASE WHEN {field} = {literal(options.null_text)} THEN NULL"
    if options.quote:
        quote = literal(options.quote)
        text += f" WHEN starts_with({field}, {quote}) THEN "
        text += f"replace({_without_quotes(field)}, {quote} || {quote}, {quote})"
    return f"{text} ELSE {field} END"


def _without_quotes(field: str) -> str:
    return f"left(right({field}, -1), -1)"
