"""The type of the fixture that starts query services: settings as keywords, a started service back."""

from collections.abc import Awaitable, Callable

from streamhouse_query.wiring import QueryService

StartQuery = Callable[..., Awaitable[QueryService]]
