"""Datetimes as milliseconds since 1970-01-01 UTC, by one rule for writing and for lookups."""

from datetime import UTC, datetime, timedelta

from shproto.errors import InvalidArgument

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def ms_of(field: str, moment: datetime) -> int:
    """Returns the millisecond in which `moment` lies, rounded down, so that a lookup by a datetime finds the record
    written with the same datetime.

    Raises InvalidArgument for a datetime without a time zone: local time depends on the machine that runs the program.
    """
    if moment.utcoffset() is None:
        raise InvalidArgument(
            f"{field} is {moment!r}, a datetime without a time zone: give it one, as in datetime.now(UTC)",
            field=field,
            value=moment,
            limit="with tzinfo",
        )
    return (moment - _EPOCH) // _MILLISECOND
