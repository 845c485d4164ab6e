"""Which object keys may hold segments. Nothing else in the store is the coordinator's to register or to have deleted:
not its backups, not the history mark, not what others keep in the bucket."""

from shproto.errors import InvalidArgument
from shstore import KeyInvalid
from shstore.keys import KEY_BYTES_MAX, check_key

SEGMENT_PREFIXES = ("data/", "mixed/")


def flaw_of_key(key: str) -> str:
    """Returns why `key` cannot be the one of an object with segments, for people; empty if it can."""
    try:
        check_key(key)
    except KeyInvalid as error:
        return error.reason
    return "" if key.startswith(SEGMENT_PREFIXES) else f"does not begin with {' or '.join(SEGMENT_PREFIXES)}"


def check_segment_key(field: str, key: str) -> None:
    """Refuses a key that cannot hold segments: a row with it would have a backup deleted, or stop every sweep at the
    store's refusal. Raises InvalidArgument."""
    if flaw := flaw_of_key(key):
        raise InvalidArgument(f"object key {key[:200]!r} {flaw}", field=field, value=key[:200], limit=KEY_BYTES_MAX)
