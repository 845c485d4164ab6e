"""Fixtures of the client's tests: `platform` is a running fake, `address` its host:port; `server` a fake that runs in
another thread, for plain code."""

import asyncio
import threading

import pytest

from client.tests.fake_streamhouse import FakeStreamHouse


@pytest.fixture
async def platform():
    async with FakeStreamHouse() as fake:
        yield fake


@pytest.fixture
def address(platform):
    return platform.address


@pytest.fixture
def server():
    """A fake that runs in another thread, as a server would."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make():
        fake = FakeStreamHouse()
        await fake.server.start()
        return fake

    fake = asyncio.run_coroutine_threadsafe(make(), loop).result()
    yield fake
    asyncio.run_coroutine_threadsafe(fake.server.stop(0), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
