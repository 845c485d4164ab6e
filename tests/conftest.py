"""A `streamhouse serve` that all tests of examples and pages share: each uses topics of its own."""

from collections.abc import Iterator

import pytest
from streamhouse_cli.serve_process import ServeProcess


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Returns the address of the platform."""
    folder = tmp_path_factory.mktemp("serve")
    # Segments within a second, so that what is read comes from both ends of the platform.
    with ServeProcess(folder / "data", folder / "serve.log", {"STREAMHOUSE_SEAL_AGE_MS": "500"}) as process:
        yield process.address
