"""One server of each kind for all integration tests. A test that stops one finds it started again for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.integration import servers
from tests.integration.servers import Server

_in_use: list[Server] = []


def _kept(make: Callable[[], Server]) -> Iterator[Server]:
    server = make()
    _in_use.append(server)
    yield server
    _in_use.remove(server)
    server.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    yield from _kept(servers.postgres_server)


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    yield from _kept(servers.s3_server)


@pytest.fixture(scope="session")
def versitygw() -> Iterator[Server]:
    yield from _kept(servers.versitygw_server)


@pytest.fixture
def storage(postgres: Server, s3: Server) -> dict[str, str]:
    """The STREAMHOUSE_* variables of a database and a bucket that no other test uses."""
    return servers.own_storage(postgres, s3)


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[Server]:
    yield from _kept(servers.rabbitmq_server)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server]:
    yield from _kept(servers.redis_server)


@pytest.fixture(autouse=True)
def _servers_run_again() -> None:
    """A test that failed during an outage it made does not fail the others."""
    for server in _in_use:
        if not server.is_running:
            server.start()
