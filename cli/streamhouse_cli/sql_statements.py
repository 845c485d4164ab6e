"""Cuts a text into SQL statements at its semicolons, and shows the place of an error in the text. Pure.

Semicolons inside of quotes, dollar quotes and comments are text, by the lexical rules that the SQL services have, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Whatever may hide a semicolon, and the semicolon itself.
_OPENING = re.compile(r"""--|/\*|(?<![\w$])[eE]'|'|"|(?<![\w$])\$(?:[A-Za-z_]\w*)?\$|;""")
_ESCAPED_END = re.compile(r"(?:[^'\\]|\\.|'')*+'", re.DOTALL)
_COMMENT_PART = re.compile(r"/\*|\*/")
# Of an excerpt: fits a terminal of 80 columns.
EXCERPT_CHARS_MAX = 76
_NAMES = {"'": "text", '"': "name", "/*": "comment"}


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement without its semicolon. `start`: index of its first character in `source`."""

    source: str
    start: int
    text: str

    def place(self, line: int = 1, column: int = 1) -> tuple[int, int]:
        """Returns line and column in the source, both from 1, of a place in the statement."""
        before = self.source[: self.start]
        first_line = before.count("\n") + 1
        if line == 1:
            column += self.start - (before.rfind("\n") + 1)
        return first_line + line - 1, column

    def excerpt(self, line: int, column: int) -> list[str]:
        """Returns the line of a place in the statement, and a line with a caret under the place."""
        return excerpt(self.source, *self.place(line, column))


class UnfinishedStatement(ValueError):
    """A quote or a comment has no end. line, column: where it begins, from 1."""

    def __init__(self, source: str, start: int, opening: str) -> None:
        self.line, self.column = Statement(source, start, "").place()
        kind = _NAMES.get(opening[-1:] if opening[:1] in "eE" else opening, "dollar quote")
        super().__init__(f"the {kind} that begins here has no end")


def split_statements(source: str) -> tuple[list[Statement], Statement | None]:
    """Returns the statements that a semicolon ends, and the statement behind the last semicolon, if there is any.
    Raises UnfinishedStatement."""
    found: list[Statement] = []
    at, begin, end = 0, -1, -1  # begin: of the current statement; -1: it has no character yet
    while True:
        opening = _OPENING.search(source, at)
        upto = len(source) if opening is None else opening.start()
        if plain := source[at:upto].strip():
            begin = source.index(plain, at) if begin < 0 else begin
            end = at + len(source[at:upto].rstrip())
        if opening is None:
            return found, Statement(source, begin, source[begin:end]) if begin >= 0 else None
        if opening[0] == ";":
            if begin >= 0:
                found.append(Statement(source, begin, source[begin:end]))
            at, begin = opening.end(), -1
            continue
        at = _end_of(source, opening)
        if opening[0] not in ("--", "/*"):
            begin, end = opening.start() if begin < 0 else begin, at


def statements_of(source: str) -> list[Statement]:
    """Returns all statements; the last needs no semicolon. Raises UnfinishedStatement."""
    found, rest = split_statements(source)
    return found if rest is None else [*found, rest]


def is_complete(source: str) -> bool:
    """Returns True if a semicolon ends the text, and with it the last statement if there is any."""
    try:
        found, rest = split_statements(source)
    except UnfinishedStatement:
        return False
    return rest is None and (bool(found) or source.rstrip().endswith(";"))


def _end_of(source: str, opening: re.Match[str]) -> int:
    """Returns the index behind the quote or comment that `opening` begins. Raises UnfinishedStatement."""
    mark, at = opening[0], opening.end()
    if mark == "--":
        return (source.find("\n", at) + 1) or len(source)
    if mark == "/*":
        depth = 1
        while depth and (part := _COMMENT_PART.search(source, at)):
            depth += 1 if part[0] == "/*" else -1
            at = part.end()
        end = at if not depth else 0
    elif mark[0] in "eE":
        found = _ESCAPED_END.match(source, at)
        end = 0 if found is None else found.end()
    else:  # a quote that is doubled ends, and begins again
        end = source.find(mark, at) + len(mark)
        end = 0 if end < at + len(mark) else end
    if not end:
        raise UnfinishedStatement(source, opening.start(), mark)
    return end


def excerpt(source: str, line: int, column: int) -> list[str]:
    """Returns a line of the source, cut around the column, and a line with a caret under the column; nothing for a
    place that is not in the source."""
    from rich.cells import cell_len

    lines = source.split("\n")
    if not 1 <= line <= len(lines) or column < 1:
        return []
    text = "".join(char if char.isprintable() else " " for char in lines[line - 1])
    index = min(column - 1, len(text))
    first = max(0, min(index - EXCERPT_CHARS_MAX // 2, len(text) - EXCERPT_CHARS_MAX))
    shown = text[first : first + EXCERPT_CHARS_MAX]
    before = "…" if first else ""
    after = "…" if first + EXCERPT_CHARS_MAX < len(text) else ""
    blank = " " * cell_len(before + text[first:index])
    return [f"{before}{shown}{after}".rstrip(), f"{blank}^"]
