"""Checks which object keys may hold segments. The coordinator registers and deletes no other objects of the store:
neither its backups, nor the history mark, nor foreign objects in the bucket."""

from shproto.errors import InvalidArgument
from shstore import KeyInvalid
from shstore.keys import KEY_BYTES_MAX, check_key

SEGMENT_PREFIXES = ("data/", "mixed/")


def flaw_of_key(key: str) -> str:
    """Returns the reason, for people, for which `key` cannot be the key of an object with segments; empty if it can."""
    try:
        check_key(key)
    except KeyInvalid as error:
        return error.reason
    return "" if key.startswith(SEGMENT_PREFIXES) else f"does not begin with {' or '.join(SEGMENT_PREFIXES)}"


def check_segment_key(field: str, key: str) -> None:
    """Checks that `key` may hold segments: a row with another key would have a backup deleted, or stop every sweep at
    the store's refusal. Raises InvalidArgument."""
    if flaw := flaw_of_key(key):
        raise InvalidArgument(f"object key {key[:200]!r} {flaw}", field=field, value=key[:200], limit=KEY_BYTES_MAX)
