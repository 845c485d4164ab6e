"""Fixtures of the client's tests: `platform` is a running fake, `address` its host:port."""

import importlib.util
import sys
from pathlib import Path

import pytest

# importlib import mode puts no test directory on sys.path: load the helper by its path, once.
_SPEC = importlib.util.spec_from_file_location("fake_streamhouse", Path(__file__).with_name("fake_streamhouse.py"))
assert _SPEC is not None and _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules.setdefault("fake_streamhouse", _MODULE)
_SPEC.loader.exec_module(_MODULE)


@pytest.fixture
async def platform():
    async with _MODULE.FakeStreamHouse() as fake:
        yield fake


@pytest.fixture
def address(platform):
    return platform.address
