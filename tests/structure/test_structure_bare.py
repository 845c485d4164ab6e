"""A plain `pip install .` brings few packages: the SDK and the command line load with them alone."""

import subprocess
import sys
import tomllib

import pytest
from shformat.errors import EXTRAS_OF_ONE_PACKAGE

from tests.bare import OURS, ROOT, bare, base_distributions

PATIENCE_S = 60
PACKAGES_MAX = 14  # with streamhouse itself; the built wheel is measured by .ci/install
IMPORT_ALL = """
import importlib, pkgutil, sys
import streamhouse, streamhouse_cli

for module in pkgutil.walk_packages(streamhouse.__path__, "streamhouse."):
    if not module.name.endswith(("__main__", ".spark")):  # whose classes are made of Spark's
        importlib.import_module(module.name)
importlib.import_module("streamhouse_cli.app")
print(*{name.partition(".")[0] for name in sys.modules})
"""
LOADED = "import sys, streamhouse, streamhouse_cli; print(*{name.partition('.')[0] for name in sys.modules})"


def loaded_by(command: list[str]) -> set[str]:
    """Returns the top-level modules, the standard library's excepted, that a program prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return {*done.stdout.split()} - sys.stdlib_module_names


def test_the_bare_wheel_requires_few_packages() -> None:
    assert 5 < len(base_distributions()) < PACKAGES_MAX


def test_the_sdk_and_the_command_line_load_with_the_base_dependencies_alone() -> None:
    loaded = loaded_by(bare(IMPORT_ALL))
    services = {name for name in OURS if name.startswith("streamhouse_")} - {"streamhouse_cli"}
    assert {"streamhouse", "grpc", "numpy", "click"} <= loaded
    assert not loaded & {*services, "shread", "shstore"}


def test_importing_them_loads_nothing_else() -> None:
    """Names of the SDK are loaded at their first use, and `streamhouse --help` answers at once."""
    assert loaded_by([sys.executable, "-c", LOADED]) >= {"streamhouse", "streamhouse_cli"}
    assert not loaded_by([sys.executable, "-c", LOADED]) & {"click", "google", "grpc", "numpy", "pydantic", "rich"}


@pytest.mark.parametrize("name", ["pydantic", "zstandard", "pyarrow", "opentelemetry.sdk", "streamhouse.nothing"])
def test_a_planted_import_of_another_package_is_seen(name: str) -> None:
    done = subprocess.run(bare(f"import {name}"), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1 and f"No module named '{name}'" in done.stderr


def test_everything_a_service_needs_comes_with_server() -> None:
    """`all` has every extra that users may want, those for a checkout excepted."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["all"] == ["streamhouse[arrow,server,sql,zstd]"]
    assert set(extras["zstd"]) <= set(extras["server"])
    assert "streamhouse[sql]" in extras["server"] and set(extras["arrow"]) <= set(extras["sql"])
    assert all(len(extras[name]) == 1 for name in EXTRAS_OF_ONE_PACKAGE)
    assert all("streamhouse[all]" in extras[name] for name in ("demo", "test"))
    assert extras.keys() == {"all", "arrow", "demo", "dev", "fuzz", "peers", "server", "spark", "sql", "test", "zstd"}
