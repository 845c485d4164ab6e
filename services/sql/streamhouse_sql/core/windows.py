"""Windows over event time: TUMBLE, HOP, CUMULATE and SESSION as table functions.

Each call in a query's text is replaced by a subquery that adds `window_start`, `window_end` and `window_time` (the last
millisecond of the window) to the rows of its table; a row is in every window that has its event time, and in none
without one. Forms and borders are those of Flink SQL, windows are aligned to 1970-01-01 UTC:
https://nightlies.apache.org/flink/flink-docs-stable/docs/dev/table/sql/queries/window-tvf/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shproto.errors import InvalidStatement
from sqlglot import exp
from sqlglot.errors import SqlglotError, TokenError
from sqlglot.tokenizer_core import Token, TokenType

from streamhouse_sql.core.dialect import StreamHouse
from streamhouse_sql.core.quoting import quoted

# Arguments behind table and time column, by their names.
ARGUMENTS = {
    "TUMBLE": ("SIZE", "OFFSET"),
    "HOP": ("SLIDE", "SIZE", "OFFSET"),
    "CUMULATE": ("STEP", "SIZE", "OFFSET"),
    "SESSION": ("GAP",),
}
_OPTIONAL = {"OFFSET"}
# In the star of a subquery made here: it means no column that the query does not name.
ADDED = "columns of the window's table"
# Windows of a row: a HOP or CUMULATE of more would multiply the rows beyond any use.
WINDOWS_PER_ROW_MAX = 100_000
# Words and signs of a statement: its parser is Python, and takes about 20 us for each.
TOKENS_MAX = 20_000
_US = {
    "MICROSECOND": 1,
    "MILLISECOND": 1_000,
    "SECOND": 1_000_000,
    "MINUTE": 60_000_000,
    "HOUR": 3_600_000_000,
    "DAY": 86_400_000_000,
    "WEEK": 7 * 86_400_000_000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A call of a window function. Sizes in microseconds, by argument; `keys`: columns of PARTITION BY."""

    function: str
    table: str
    time: str
    sizes: dict[str, int]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expansion:
    """A text with subqueries in the place of its calls. `calls`: (start, end, length of the subquery) of each in the
    original text."""

    text: str
    original: str
    calls: tuple[tuple[int, int, int], ...] = ()

    def with_place(self, error: InvalidStatement) -> InvalidStatement:
        """Returns an error about the expanded text with its place in the original; a place inside of a subquery is
        that of its call."""
        if not self.calls or "line" not in error.details or "column" not in error.details:
            return error
        line, column = int(error.details["line"]), int(error.details["column"])
        at = self._original_at(sum(len(part) + 1 for part in self.text.split("\n")[: line - 1]) + column - 1)
        before = self.original[:at]
        place = {"line": before.count("\n") + 1, "column": at - before.rfind("\n")}
        message = str(error).replace(
            f"line {line}, column {column}: ", f"line {place['line']}, column {place['column']}: ", 1
        )
        others = {name: value for name, value in error.details.items() if name not in place}
        return InvalidStatement(message, retry_after_ms=0, **others, **place)

    def _original_at(self, at: int) -> int:
        longer = 0
        for start, end, length in self.calls:
            if at < start + longer:
                break
            if at < start + longer + length:
                return start
            longer += length - (end - start)
        return at - longer


def expanded(text: str) -> Expansion:
    """Returns the text with a subquery in the place of each window function. Raises InvalidStatement for a call that
    is not complete, or has sizes that do not fit."""
    try:
        tokens = StreamHouse().tokenize(text)
    except TokenError:
        return Expansion(text, text)  # a text without its end: the parser says so, with its place
    if len(tokens) > TOKENS_MAX:
        raise InvalidStatement(f"the statement has {len(tokens)} words and signs, at most {TOKENS_MAX} are allowed")
    return _replaced(text, [(start, end, _subquery(window)) for start, end, window in _windows(text, tokens)])


def with_placeholders(text: str) -> tuple[Expansion, dict[str, Window]]:
    """Returns the text with a name in the place of each window function, and the windows by these names. Raises
    InvalidStatement as `expanded` does."""
    calls = _windows(text, StreamHouse().tokenize(text))
    names = [f"window {number}" for number in range(len(calls))]
    edits = [(start, end, f'"{name}"') for name, (start, end, _) in zip(names, calls, strict=True)]
    return _replaced(text, edits), {name: window for name, (_, _, window) in zip(names, calls, strict=True)}


def _windows(text: str, tokens: Sequence[Token]) -> list[tuple[int, int, Window]]:
    """Returns (start, end, window) of the calls in a text."""
    found = []
    for first, last in _calls(tokens):
        call = tokens[first : last + 1]
        found.append((call[0].start, call[-1].end + 1, _window(call, text)))
    return found


def _replaced(text: str, edits: Sequence[tuple[int, int, str]]) -> Expansion:
    parts, at = [], 0
    for start, end, written in edits:
        parts += [text[at:start], written]
        at = end
    calls = tuple((start, end, len(written)) for start, end, written in edits)
    return Expansion("".join([*parts, text[at:]]), text, calls)


def _calls(tokens: Sequence[Token]) -> list[tuple[int, int]]:
    """Returns (first, last) positions of the calls of window functions, TABLE( … ) around them included."""
    found = []
    for position, (token, following) in enumerate(pairwise(tokens)):
        if token.text.upper() not in ARGUMENTS or following.token_type is not TokenType.L_PAREN:
            continue
        before = tokens[position - 1] if position else None
        if token.token_type is TokenType.IDENTIFIER or (before and before.token_type is TokenType.DOT):
            continue  # a quoted name, or a function of some schema
        first, last = position, _closing(tokens, position + 1)
        wrapped = position > 1 and before is not None and before.token_type is TokenType.L_PAREN
        if wrapped and tokens[position - 2].text.upper() == "TABLE":
            first, last = position - 2, last + 1
            if last >= len(tokens) or tokens[last].token_type is not TokenType.R_PAREN:
                raise InvalidStatement("TABLE( is not closed", clause="TABLE")
        elif before is None or before.token_type not in (TokenType.FROM, TokenType.JOIN, TokenType.COMMA):
            continue  # a function of a value: TUMBLE of older dialects in GROUP BY is an unknown function there
        found.append((first, last))
    return found


def _closing(tokens: Sequence[Token], opening: int) -> int:
    depth = 0
    for position in range(opening, len(tokens)):
        depth += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(tokens[position].token_type, 0)
        if depth == 0:
            return position
    raise InvalidStatement(f"{tokens[opening - 1].text.upper()}( is not closed")


def _window(call: Sequence[Token], text: str) -> Window:
    start = next(i for i, token in enumerate(call) if token.text.upper() in ARGUMENTS)
    function = call[start].text.upper()
    arguments = _joined(_arguments(call[start + 2 : _closing(call, start + 1)]))
    names = ("DATA", "TIMECOL", *ARGUMENTS[function])
    given: dict[str, Sequence[Token]] = {}
    for position, argument in enumerate(arguments):
        name = names[position] if position < len(names) else ""
        if len(argument) > 2 and argument[1].token_type in (TokenType.FARROW, TokenType.DARROW):
            name, argument = argument[0].text.upper(), argument[2:]
        if name not in names or name in given:
            what = "given twice" if name in given else "no argument of it"
            raise InvalidStatement(f"{function}: {name or _text(argument, text)} is {what}", clause=function)
        given[name] = argument
    missing = [name for name in names if name not in given and name not in _OPTIONAL]
    if missing:
        raise InvalidStatement(
            f"{function} needs {', '.join(missing)}: {function}(TABLE name, DESCRIPTOR(time column), "
            f"{', '.join(name for name in names[2:] if name not in _OPTIONAL)})",
            clause=function,
        )
    table, keys = _table(function, given["DATA"], text)
    if keys and function != "SESSION":
        raise InvalidStatement(f"{function}: PARTITION BY is not supported; SESSION has it", clause="PARTITION BY")
    sizes = {name: microseconds(function, name, _text(given[name], text)) for name in names[2:] if name in given}
    _check_sizes(function, sizes)
    return Window(function=function, table=table, time=_time(function, given["TIMECOL"]), sizes=sizes, keys=keys)


def _arguments(tokens: Sequence[Token]) -> list[Sequence[Token]]:
    """Returns the tokens between commas, parentheses respected."""
    found: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(token.token_type, 0)
        if token.token_type is TokenType.COMMA and depth == 0:
            found.append([])
        else:
            found[-1].append(token)
    return [argument for argument in found if argument]


def _joined(arguments: list[Sequence[Token]]) -> list[Sequence[Token]]:
    """Returns the arguments with the columns of PARTITION BY a, b in the argument of the table."""
    time = next((i for i, argument in enumerate(arguments) if argument[0].text.upper() == "DESCRIPTOR"), 0)
    if time < 2 or not any(token.text.upper().startswith("PARTITION") for token in arguments[0]):
        return arguments
    return [[token for argument in arguments[:time] for token in argument], *arguments[time:]]


def _text(tokens: Sequence[Token], text: str) -> str:
    return text[tokens[0].start : tokens[-1].end + 1]


def _table(function: str, tokens: Sequence[Token], text: str) -> tuple[str, tuple[str, ...]]:
    if tokens[0].text.upper() == "TABLE":
        tokens = tokens[1:]
    by = next((i for i, (a, b) in enumerate(pairwise(tokens)) if (a.text + b.text).upper() == "PARTITIONBY"), None)
    joined = next((i for i, token in enumerate(tokens) if token.text.upper() == "PARTITION BY"), None)
    if joined is not None:
        name, keys = tokens[:joined], tokens[joined + 1 :]
    elif by is not None:
        name, keys = tokens[:by], tokens[by + 2 :]
    else:
        name, keys = tokens, []
    if not name:
        raise InvalidStatement(f"{function} needs a table: {function}(TABLE name, …)", clause=function)
    written = _text(name, text)
    if name[0].token_type is TokenType.L_PAREN and not written.startswith("("):
        raise InvalidStatement(f"{function}: {written} is no table", clause=function)
    return written, tuple(quoted(token.text) for token in keys if token.token_type is not TokenType.COMMA)


def _time(function: str, tokens: Sequence[Token]) -> str:
    if tokens[0].text.upper() == "DESCRIPTOR":
        tokens = tokens[2:-1]
    if len(tokens) != 1:
        raise InvalidStatement(f"{function} needs one time column: DESCRIPTOR(column)", clause="DESCRIPTOR")
    # `at` and others are words of DuckDB's, and are columns here.
    return quoted(tokens[0].text)


def microseconds(function: str, name: str, text: str) -> int:
    """Returns the length of an interval of fixed length. Raises InvalidStatement."""
    try:
        node: exp.Expr = exp.maybe_parse(text, dialect=StreamHouse)
    except SqlglotError as error:
        raise InvalidStatement(f"{function}: {name} is {text}, must be an INTERVAL", clause=name) from error
    if isinstance(node, exp.Interval) and node.this is not None and node.args.get("unit") is not None:
        unit = node.args["unit"].name.upper().removesuffix("S")
        try:
            count = int(node.this.name)
        except ValueError:
            count = 0
        if unit in _US and (count > 0 or (name == "OFFSET" and count == 0)):
            return count * _US[unit]
    raise InvalidStatement(
        f"{function}: {name} is {text}, must be an INTERVAL of a whole number of "
        f"{', '.join(unit.lower() + 's' for unit in _US)}, such as INTERVAL '10' SECOND",
        clause=name,
    )


def _check_sizes(function: str, sizes: dict[str, int]) -> None:
    step = sizes.get("SLIDE") or sizes.get("STEP")
    if step is None:
        return
    name = "SLIDE" if "SLIDE" in sizes else "STEP"
    if sizes["SIZE"] % step or sizes["SIZE"] < step:
        raise InvalidStatement(f"{function}: SIZE must be a multiple of {name}", clause=name)
    if sizes["SIZE"] // step > WINDOWS_PER_ROW_MAX:
        raise InvalidStatement(
            f"{function}: a row would be in {sizes['SIZE'] // step} windows, at most {WINDOWS_PER_ROW_MAX} are allowed",
            clause=name,
        )


# ---- SQL


def _subquery(window: Window) -> str:
    star = f"* /* {ADDED} */"
    if window.function == "SESSION":
        return _session(window, star)
    size = window.sizes["SIZE"]
    step = window.sizes.get("SLIDE") or window.sizes.get("STEP") or size
    source = f"FROM {window.table} WHERE {window.time} IS NOT NULL"
    if window.function == "TUMBLE":
        start = _aligned(window.time, size, window.sizes.get("OFFSET", 0))
        return (
            f"(SELECT {star}, {start} AS window_start, {_after('window_start', size)} AS window_end, {_TIME} {source})"
        )
    slide = _aligned(window.time, step, window.sizes.get("OFFSET", 0))
    if window.function == "HOP":
        # The window that began last has the row, and so have those before it that have not ended.
        first = f"({slide} - to_microseconds({size - step}))"
        series = f"generate_series({first}, {slide}, to_microseconds({step}))"
        inner = f"SELECT {star}, unnest({series}) AS window_start {source}"
        return f"(SELECT {star}, {_after('window_start', size)} AS window_end, {_TIME} FROM ({inner}))"
    base = _aligned(window.time, size, window.sizes.get("OFFSET", 0))
    ends = f"generate_series({_after(slide, step)}, {_after(base, size)}, to_microseconds({step}))"
    return f"(SELECT {star}, {base} AS window_start, unnest({ends}) AS window_end, {_TIME} {source})"


_TIME = "window_end - to_milliseconds(1) AS window_time"


def _aligned(time: str, size_us: int, offset_us: int) -> str:
    """Returns SQL of the last border at or before a time: multiples of the size since 1970, plus the offset."""
    since = f"(epoch_us({time}) - {offset_us % size_us})"
    return f"({time} - to_microseconds((({since} % {size_us}) + {size_us}) % {size_us}))"


def _after(time: str, size_us: int) -> str:
    return f"({time} + to_microseconds({size_us}))"


def _session(window: Window, star: str) -> str:
    """Returns the subquery of SESSION: a session goes on as long as each row comes no more than the gap after the row
    before it."""
    gap, time = window.sizes["GAP"], window.time
    keys = f"PARTITION BY {', '.join(window.keys)} " if window.keys else ""
    begins = (
        f"CASE WHEN epoch_us({time}) - epoch_us(lag({time}) OVER ({keys}ORDER BY {time})) <= {gap} THEN 0 ELSE 1 END"
    )
    first = f"SELECT {star}, {begins} AS session_begins FROM {window.table} WHERE {time} IS NOT NULL"
    # All rows of the same time are of the same session: RANGE, the default frame, counts them together.
    second = f"SELECT {star}, sum(session_begins) OVER ({keys}ORDER BY {time}) AS session_number FROM ({first})"
    of_session = f"OVER (PARTITION BY {', '.join([*window.keys, 'session_number'])})"
    third = (
        f"SELECT {star}, min({time}) {of_session} AS window_start, "
        f"{_after(f'max({time}) {of_session}', gap)} AS window_end FROM ({second})"
    )
    return f"(SELECT * EXCLUDE (session_begins, session_number) /* {ADDED} */, {_TIME} FROM ({third}))"
