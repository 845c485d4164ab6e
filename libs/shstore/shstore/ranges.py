"""Byte arithmetic shared by the stores: the range of a get, the split of a body into upload parts. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shstore.errors import RangeBeyondEnd, StoreInvalid


def check_range(at: int, size_bytes: int | None) -> None:
    """Refuses a negative position or size with StoreInvalid."""
    if at < 0:
        raise StoreInvalid(f"at is {at}, but a byte position is not negative")
    if size_bytes is not None and size_bytes < 0:
        raise StoreInvalid(f"size_bytes is {size_bytes}, but a size is not negative")


def resolve_range(key: str, *, at: int, size_bytes: int | None, object_size_bytes: int, get_bytes_max: int) -> int:
    """Returns the number of bytes that a get of this range yields, checked before anything is allocated.

    Raises RangeBeyondEnd, or StoreInvalid if the number is above `get_bytes_max`.
    """
    wanted = object_size_bytes - at if size_bytes is None else size_bytes
    if wanted < 0 or at + wanted > object_size_bytes:
        raise RangeBeyondEnd(key, at=at, size_bytes=size_bytes, object_size_bytes=object_size_bytes)
    if wanted > get_bytes_max:
        raise StoreInvalid(f"get of {wanted} bytes of {key!r} is over get_bytes_max = {get_bytes_max}")
    return wanted


def byte_views(parts: Sequence[bytes | memoryview]) -> tuple[list[memoryview], int]:
    """Returns the non-empty parts as flat byte views, without a copy, and their total size in bytes."""
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    return views, sum(len(view) for view in views)


def split_views(views: Sequence[memoryview], part_bytes: int) -> Iterator[list[memoryview]]:
    """Yields the views regrouped into upload parts of exactly `part_bytes` each (the last part shorter), without a
    copy."""
    part: list[memoryview] = []
    room = part_bytes
    for whole in views:
        view = whole
        while len(view) >= room:
            part.append(view[:room])
            yield part
            view, part, room = view[room:], [], part_bytes
        if len(view):
            part.append(view)
            room -= len(view)
    if part:
        yield part
