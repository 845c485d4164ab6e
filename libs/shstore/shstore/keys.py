"""Rules for keys: the same for every store, so that data can move between stores. Pure.

A key is '/'-separated components, stored by LocalStore as directories, so '..' must never pass.
"""

from __future__ import annotations

import re

from shstore.errors import KeyInvalid

PREFIX_BYTES_MAX = 256
"""Longest configured store prefix. With KEY_BYTES_MAX and a slash between them: S3's limit of 1024."""

KEY_BYTES_MAX = 767
"""Longest key in UTF-8. Ours are under 400: a topic name of 249, numbers and a random id."""

COMPONENT_BYTES_MAX = 255
"""Longest file name on Linux file systems (NAME_MAX)."""

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ufffe\uffff]")
"""Control characters and non-characters: not representable in the XML that S3 lists and deletes keys with."""


def check_key(key: str) -> str:
    """Returns `key` if it may name an object; raises KeyInvalid with the reason."""
    if not key:
        raise KeyInvalid(key, "is empty")
    _check_text(key, KEY_BYTES_MAX)
    for component in key.split("/"):
        _check_component(key, component)
    return key


def is_key(key: str) -> bool:
    """True if `key` may name an object. A bucket may also hold objects of other programs, under names that put
    refuses."""
    try:
        check_key(key)
    except KeyInvalid:
        return False
    return True


def check_prefix(prefix: str) -> str:
    """Returns `prefix` if keys can start with it (the last component may be cut anywhere, or be empty)."""
    _check_text(prefix, KEY_BYTES_MAX)
    *whole, last = prefix.split("/")
    for component in whole:
        _check_component(prefix, component)
    if last == "..":
        raise KeyInvalid(prefix, "contains the component '..'")
    return prefix


def _check_text(key: str, bytes_max: int) -> None:
    try:
        size_bytes = len(key.encode())
    except UnicodeEncodeError:
        raise KeyInvalid(key, "is not valid Unicode (lone surrogate)") from None
    if size_bytes > bytes_max:
        raise KeyInvalid(key, f"has {size_bytes} bytes, more than the limit of {bytes_max}")
    if found := _UNPRINTABLE.search(key):
        raise KeyInvalid(key, f"contains the unprintable character U+{ord(found[0]):04X}")


def _check_component(key: str, component: str) -> None:
    if not component:
        raise KeyInvalid(key, "has an empty component ('/' at an end, or '//')")
    if component in (".", ".."):
        raise KeyInvalid(key, f"contains the component {component!r}")
    size_bytes = len(component.encode())
    if size_bytes > COMPONENT_BYTES_MAX:
        raise KeyInvalid(key, f"has a component of {size_bytes} bytes, over the limit of {COMPONENT_BYTES_MAX}")
