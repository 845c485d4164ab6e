"""Fixtures of the client's tests: `platform` is a running fake, `address` its host:port."""

import pytest

from client.tests.fake_streamhouse import FakeStreamHouse


@pytest.fixture
async def platform():
    async with FakeStreamHouse() as fake:
        yield fake


@pytest.fixture
def address(platform):
    return platform.address
