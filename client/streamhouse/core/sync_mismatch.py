"""Errors for a class of the asynchronous client in plain code, and for a class of streamhouse.sync with `async`. Pure.

Type checkers see none of these methods, and so still refuse such uses.
"""

from typing import TYPE_CHECKING, NoReturn

PLAIN = "is asynchronous: use `async {keyword}`, or in plain code streamhouse.sync.{name}"
ASYNCHRONOUS = "is for plain code: use `{keyword}` without `async`, or the asynchronous streamhouse.{name}"


class AsyncContext:
    """Base of classes that are left with `await`: `with` raises a TypeError that says so."""

    __slots__ = ()
    if not TYPE_CHECKING:

        def __enter__(self) -> NoReturn:
            raise _wrong(self, PLAIN, "with")

        def __exit__(self, *error: object) -> None:
            """Does nothing: `with` looks for both methods before it calls one."""


class AsyncIteration:
    """Base of classes that `async for` goes through: `for` raises a TypeError that says so."""

    __slots__ = ()
    if not TYPE_CHECKING:

        def __iter__(self) -> NoReturn:
            raise _wrong(self, PLAIN, "for")


class PlainContext:
    """Base of classes for plain code: `async with` raises a TypeError that says so."""

    __slots__ = ()
    if not TYPE_CHECKING:

        async def __aenter__(self) -> NoReturn:
            raise _wrong(self, ASYNCHRONOUS, "with")

        async def __aexit__(self, *error: object) -> None:
            """Does nothing: `async with` looks for both methods before it calls one."""


class PlainIteration:
    """Base of classes that `for` goes through: `async for` raises a TypeError that says so."""

    __slots__ = ()
    if not TYPE_CHECKING:

        def __aiter__(self) -> NoReturn:
            raise _wrong(self, ASYNCHRONOUS, "for")


def _wrong(used: object, text: str, keyword: str) -> TypeError:
    name = type(used).__name__
    client = {"BatchIterator": "Consumer", "SqlResult": "Sql"}.get(name, name)
    return TypeError(f"{name} {text.format(keyword=keyword, name=client)}")
