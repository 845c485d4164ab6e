"""Start of a consumer: `earliest`, `latest`, an offset, a point in time, or the last records."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import click

from streamhouse_cli.options import Text

# The years 1 to 9999, the range of `datetime`.
TIMESTAMP_MS_MIN, TIMESTAMP_MS_MAX = -62_135_596_800_000, 253_402_300_799_999
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class PositionOption:
    """Value of an option. `at` is the offset, the timestamp in ms, or the number of records; otherwise 0."""

    kind: Literal["earliest", "latest", "offset", "timestamp", "last"]
    at: int = 0

    @property
    def start(self) -> Literal["earliest", "latest"] | int | datetime:
        """Argument `start` of `Consumer`."""
        if self.kind in ("earliest", "latest"):
            return self.kind
        return -self.at if self.kind == "last" else self.exact

    @property
    def exact(self) -> int | datetime:
        """The offset, or the time as datetime; only for these two kinds."""
        assert self.kind in ("offset", "timestamp"), "nothing has to be looked up but a time"
        return self.at if self.kind == "offset" else _EPOCH + timedelta(milliseconds=self.at)


def parse_position(text: str, *, takes_last: bool = False, takes_ends: bool = True) -> PositionOption:
    """Returns the position that `text` names. Digits alone are an offset; `@` and digits are ms since 1970; with
    `takes_last` a minus sign and digits are a number of records before the end; with `takes_ends` there are `earliest`
    and `latest`; anything else has to be ISO 8601, in UTC if without an offset. Raises ValueError."""
    from shformat.limits import INT64_MAX

    if takes_ends and text == "earliest":
        return PositionOption("earliest")
    if takes_ends and text == "latest":
        return PositionOption("latest")
    if text.isascii() and text.isdigit():
        return PositionOption("offset", _bounded(text, 0, INT64_MAX))
    if takes_last and text[:1] == "-" and text[1:].isascii() and text[1:].isdigit():
        return PositionOption("last", _bounded(text[1:], 1, INT64_MAX))
    if text.startswith("@"):
        digits = text[1:].removeprefix("-")
        if not (digits.isascii() and digits.isdigit()):
            raise ValueError(f"{text!r}: after @ come milliseconds since 1970, as in @1700000000000")
        return PositionOption("timestamp", _bounded(text[1:], TIMESTAMP_MS_MIN, TIMESTAMP_MS_MAX))
    return PositionOption("timestamp", _iso_ms(text, takes_last, takes_ends))


def _bounded(digits: str, low: int, high: int) -> int:
    # No 64-bit number has more than 20 digits; Python refuses to read very long ones.
    if len(digits) > 20 or not low <= int(digits) <= high:
        raise ValueError(f"{digits} is beyond the limit, must be {low} to {high}")
    return int(digits)


def _iso_ms(text: str, takes_last: bool, takes_ends: bool) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is none of {'earliest, latest, ' if takes_ends else ''}an offset (42), "
            f"{'the last records of each partition (-5), ' if takes_last else ''}"
            "ms since 1970 (@1700000000000), a time (2013-01-31T12:00:00Z)"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    from streamhouse.core.times import ms_of  # here: --help need not wait for this import

    return ms_of("position", moment)


class PositionType(click.ParamType[PositionOption]):
    """parse_position as a click type."""

    name = "position"

    def __init__(self, *, takes_last: bool = False, takes_ends: bool = True) -> None:
        self._takes_last = takes_last
        self._takes_ends = takes_ends

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PositionOption:
        if isinstance(value, PositionOption):
            return value
        value = Text().convert(value, param, ctx)
        try:
            return parse_position(value, takes_last=self._takes_last, takes_ends=self._takes_ends)
        except ValueError as error:
            self.fail(str(error), param, ctx)
