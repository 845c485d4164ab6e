from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """The services that requests are given to, ended after the last test."""
    from tests.fuzz.rpc import shell

    shell().start()
    yield
    shell().close()
