"""CSV: lines become rows as RFC 4180 reads them, and a bad one touches no other record."""

import csv
import io
import random

import pytest
from shproto.errors import InvalidStatement, StatementFailed
from streamhouse_sql.core.statement import parse

from services.sql.tests.declared import definition, rows_of

pytestmark = pytest.mark.timeout(300)

OPTIONS = [(",", '"', ""), (";", "'", "NULL"), ("\t", "", "-"), ("ä", "|", "n/a")]


def table(columns: str, options: str = "", bad_rows: str = "skip") -> str:
    return f"CREATE TABLE x ({columns}) WITH (topic = 't', format = 'csv', bad_rows = '{bad_rows}'{options})"


def with_options(delimiter: str, quote: str, null_text: str) -> str:
    quoted = [text.replace("'", "''") for text in (delimiter, quote, null_text)]
    return ", delimiter = '{}', quote = '{}', null_text = '{}'".format(*quoted)


def lines_of(value: str, delimiter: str, quote: str, null_text: str) -> list[list[str | None] | None]:
    """Returns the fields of each line of a value, one character after the other: each quote opens or closes, what is
    open holds delimiters and line ends. None for a line with a quote that RFC 4180 does not allow."""
    raw: list[list[str]] = [[""]]
    is_open = False
    at = 0
    while at < len(value):
        sign = value[at]
        is_open ^= bool(quote) and sign == quote
        if not is_open and sign == delimiter:
            raw[-1].append("")
        elif not is_open and (sign == "\n" or value.startswith("\r\n", at)):
            raw.append([""])
            at += sign == "\r"
        else:
            raw[-1][-1] += sign
        at += 1
    if len(raw) > 1 and raw[-1] == [""]:
        raw.pop()
    return [fields_of(line, quote, null_text) for line in raw]


def fields_of(line: list[str], quote: str, null_text: str) -> list[str | None] | None:
    fields: list[str | None] = []
    for field in line:
        if not quote or quote not in field:
            fields.append(None if field == null_text else field)
        elif len(field) > 1 and field[0] == field[-1] == quote and quote not in field[1:-1].replace(quote * 2, ""):
            fields.append(field[1:-1].replace(quote * 2, quote))
        else:
            return None
    return fields


def reference(value: bytes, columns: int, options: tuple[str, str, str]) -> list[tuple[str | None, ...]]:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return []
    return [tuple(line) for line in lines_of(text, *options) if line is not None and len(line) == columns]


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ("1,a", [(1, "a")]),
        ('1,"a"', [(1, "a")]),
        ('1,"a,b ""c"""', [(1, 'a,b "c"')]),
        ("1,a\n2,b", [(1, "a"), (2, "b")]),
        ("1,a\r\n2,b\r\n", [(1, "a"), (2, "b")]),
        ('1,"a\nb"\n2,c', [(1, "a\nb"), (2, "c")]),
        ('1,"a"\n2,c', [(1, "a"), (2, "c")]),
        ("1,", [(1, None)]),
        ('1,""', [(1, "")]),
        (",a", [(None, "a")]),
        (" 1 , a ", [(1, " a ")]),
        ("1,a\n\n", []),
        ("1", []),
        ("1,a,b", []),
        ("x,a", []),
        ("99999999999,a", []),
        ('1,"a', []),
        ('1,a"b', []),
        ('1,"a"b', []),
        ('1, "a"', []),
        ('"', []),
        ("", []),
        ("\n", []),
    ],
)
def test_lines_of_a_value(value: str, rows: list[tuple[object, ...]]) -> None:
    x = definition(table("a INTEGER, b VARCHAR"))
    found = [row[1:] for row in rows_of(x, [value.encode()])]
    if value == "1,a\n\n":
        rows = [(1, "a")]  # the empty line is bad, not the one before it
    assert found == rows
    if not rows or value == "1,a\n\n":
        with pytest.raises(StatementFailed, match="t/0: the value at offset 0 does not fit the columns of table x"):
            rows_of(definition(table("a INTEGER, b VARCHAR", bad_rows="fail")), [value.encode()])


def test_a_bad_record_touches_no_other() -> None:
    x = definition(table("a INTEGER, b VARCHAR"))
    values = [b"1,a", b'2,"b', b"3,c", b"4,\xff", b"5,e", None, b'6,"f"']
    assert rows_of(x, values) == [(0, 1, "a"), (2, 3, "c"), (4, 5, "e"), (5, None, None), (6, 6, "f")]


def test_types_nulls_and_not_null() -> None:
    x = definition(
        table(
            "i BIGINT NOT NULL, d DECIMAL(6, 2), t TIMESTAMP, b BOOLEAN, l INTEGER[], twice AS i * 2, "
            "o BIGINT METADATA FROM 'offset'",
            ", null_text = 'NULL'",
        )
    )
    found = rows_of(
        x, [b'1,2.50,2026-01-01 10:00:00,true,"[1, 2]"', b"NULL,1,NULL,NULL,NULL", b"2,NULL,NULL,NULL,NULL"]
    )
    assert [(str(row[2]), str(row[3]), *row[4:]) for row in found] == [
        ("2.50", "2026-01-01 10:00:00", True, [1, 2], 2, 0),
        ("None", "None", None, None, 4, 2),
    ]


def test_a_statement_counts_the_lines() -> None:
    """Also one that names no column."""
    x = definition(table("a INTEGER, o BIGINT METADATA FROM 'offset'", bad_rows="fail"))
    assert [row[2] for row in rows_of(x, [b"1\n2", b"3"])] == [0, 0, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (", delimiter = ''", "delimiter is '', must be one character"),
        (", delimiter = '||'", "must be one character"),
        (", delimiter = '\n'", "no line end"),
        (", quote = '\"\"'", "quote is"),
        (", quote = ','", "quote and delimiter are both ','"),
        (", null_text = 'a,b'", "null_text must have"),
        (f", null_text = '{'x' * 101}'", "at most 100 characters"),
        (", null_text = 5", "option null_text must be a text"),
        (", bad_rows = 'dead_letter'", "bad_rows = 'dead_letter' is not supported for bounded queries"),
    ],
)
def test_options_are_checked(options: str, said: str) -> None:
    with pytest.raises(InvalidStatement) as error:
        parse(f"CREATE TABLE x (a INTEGER) WITH (topic = 't', format = 'csv'{options})")
    assert said in str(error.value)


def test_options_belong_to_the_format() -> None:
    with pytest.raises(InvalidStatement, match="format json has no option delimiter: csv has"):
        parse("CREATE TABLE x (a INTEGER) WITH (topic = 't', delimiter = ';')")
    with pytest.raises(InvalidStatement, match="format csv needs a column"):
        parse("CREATE TABLE x (k VARCHAR METADATA FROM 'key') WITH (topic = 't', format = 'csv')")


# ---- against readers of single records


def random_text(rng: random.Random, options: tuple[str, str, str]) -> str:
    signs = ["a", "ß", "🜁", " ", "1", "\r", *options, options[1] * 2, "\n", "\r\n", options[0]]
    return "".join(rng.choice(signs) for _ in range(rng.randrange(12)))


def check_against_the_reference(seed: int, values: int) -> None:
    rng = random.Random(seed)
    for options in OPTIONS:
        columns = rng.randrange(1, 4)
        x = definition(table(", ".join(f"c{i} VARCHAR" for i in range(columns)), with_options(*options)))
        given = [random_text(rng, options).encode() for _ in range(values)]
        given += [bytes(rng.choices(range(256), k=rng.randrange(20))) for _ in range(values // 10)]
        found: dict[int, list[tuple[str | None, ...]]] = {}
        for row in rows_of(x, given):
            found.setdefault(row[0], []).append(row[1:])
        for offset, value in enumerate(given):
            assert found.get(offset, []) == reference(value, columns, options), (seed, options, value)


def check_against_the_csv_module(seed: int, values: int) -> None:
    rng = random.Random(seed)
    x = definition(table("a VARCHAR, b VARCHAR, c VARCHAR"))
    given, expected = [], []
    for offset in range(values):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator=rng.choice(["\n", "\r\n"]), quoting=rng.choice([0, 1]))
        for _ in range(rng.randrange(1, 3)):
            fields = [random_text(rng, (",", '"', "")).replace("\r", "") for _ in range(3)]
            writer.writerow(fields)
        given.append(out.getvalue().encode())
        for line in csv.reader(io.StringIO(out.getvalue(), newline="")):
            expected.append((offset, *line))
    assert [(row[0], *(text or "" for text in row[1:])) for row in rows_of(x, given)] == expected, seed


def test_rows_are_those_of_a_reader_of_single_characters() -> None:
    check_against_the_reference(1, 300)


def test_rows_are_those_of_the_csv_module() -> None:
    check_against_the_csv_module(1, 300)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 22))
def test_rows_are_those_of_other_readers_for_long(seed: int) -> None:
    check_against_the_reference(seed, 5_000)
    check_against_the_csv_module(seed, 5_000)
