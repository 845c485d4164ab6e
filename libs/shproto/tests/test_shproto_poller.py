"""gRPC's poller wakes every event loop of the process: what it then raises is no news."""

import asyncio
import logging

import pytest
from shproto.rpc import Connection
from shproto.services import CoordinatorClient
from shproto.v1 import coordinator_pb2


@pytest.fixture
async def loop():
    """The running loop, after a call on it; nobody listens there."""
    connection = Connection(["127.0.0.1:1"], timeout_ms=1_000)
    with pytest.raises(Exception, match="cannot connect to"):
        await CoordinatorClient(connection).get_status(coordinator_pb2.GetStatusRequest())
    yield asyncio.get_running_loop()
    await connection.close()


class PollerCompletionQueue:
    """Named as gRPC's, which asyncio names in what it logs."""

    def __init__(self, error):
        self._error = error

    def _handle_events(self):
        raise self._error


async def logged(loop, callback, caplog):
    loop.call_soon(callback)
    with caplog.at_level(logging.ERROR, "asyncio"):
        await asyncio.sleep(0.01)
    return caplog.text


@pytest.mark.parametrize("error", [BlockingIOError(11, "try again"), RuntimeError("Event loop is closed")])
async def test_what_the_poller_raises_is_not_logged(loop, caplog, error):
    assert await logged(loop, PollerCompletionQueue(error)._handle_events, caplog) == ""


@pytest.mark.parametrize("error", [RuntimeError("another"), MemoryError()])
async def test_other_errors_of_the_poller_are_logged(loop, caplog, error):
    assert "PollerCompletionQueue" in await logged(loop, PollerCompletionQueue(error)._handle_events, caplog)


async def test_errors_of_other_callbacks_are_logged(loop, caplog):
    def callback():
        raise BlockingIOError(11, "try again")

    assert "BlockingIOError" in await logged(loop, callback, caplog)


async def test_an_exception_handler_of_the_application_stays():
    seen = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["message"]))
    connection = Connection(["127.0.0.1:1"], timeout_ms=1_000)
    with pytest.raises(Exception, match="cannot connect to"):
        await CoordinatorClient(connection).get_status(coordinator_pb2.GetStatusRequest())
    asyncio.get_running_loop().call_exception_handler({"message": "mine"})
    await connection.close()
    assert seen == ["mine"]
