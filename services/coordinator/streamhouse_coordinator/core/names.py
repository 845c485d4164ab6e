"""Checks names that users choose. Topics follow Kafka's rules, so that topics moved from Kafka keep their names.
Pure."""

import re

from shproto.errors import InvalidArgument
from shproto.limits import NAME_LENGTH_MAX

_TOPIC = re.compile(rf"[a-zA-Z0-9._-]{{1,{NAME_LENGTH_MAX}}}")
# Control characters of ASCII and Latin-1, line and paragraph separators, and marks that reverse the direction of text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def check_topic(name: str) -> None:
    """Checks that `name` is a legal topic name. Raises InvalidArgument."""
    if name in (".", "..") or not _TOPIC.fullmatch(name):
        raise InvalidArgument(
            f"topic {name[:300]!r} is not a legal name: 1 to {NAME_LENGTH_MAX} of a-z A-Z 0-9 . _ -, not '.' or '..'",
            field="topic",
            value=name[:300],
            limit=NAME_LENGTH_MAX,
        )


def check_text(field: str, value: str, length_max: int, *, empty: bool = False) -> None:
    """Checks that `value` has 1 (0 if `empty`) to `length_max` characters, none of them NUL. Raises InvalidArgument."""
    if (not value and not empty) or len(value) > length_max or "\0" in value:
        raise InvalidArgument(
            f"{field} must have {0 if empty else 1} to {length_max} characters and no NUL, got {len(value)}",
            field=field,
            value=value[:300],
            limit=length_max,
        )


def check_name(field: str, value: str, length_max: int, *, empty: bool = False) -> None:
    """Checks that `value` passes check_text() and stays on its line in logs, tables and terminals. Raises
    InvalidArgument."""
    check_text(field, value, length_max, empty=empty)
    if found := _CONTROL.search(value):
        raise InvalidArgument(
            f"{field} has the control character {found[0]!r} at {found.start()}: names are text on one line",
            field=field,
            value=value[:300],
            limit="no control characters",
        )


def check_number(field: str, value: int, least: int, most: int) -> None:
    """Checks that least <= value <= most. Raises InvalidArgument."""
    if not least <= value <= most:
        raise InvalidArgument(
            f"{field} must be from {least} to {most}, got {value}", field=field, value=value, limit=f"{least}..{most}"
        )
