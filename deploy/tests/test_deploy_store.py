"""The S3 server of the compose file, run with the command that the file gives it."""

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from shstore.open import configured_store
from shstore.settings import StoreSettings

from deploy.tests.test_deploy_compose import OURS, SERVICES, environ_of
from tests.integration.processes import free_ports

SERVICE = SERVICES["versitygw"]
PATIENCE_S = 60


def program() -> str | None:
    """$VERSITYGW, on PATH, or where `go install` puts it."""
    installed = Path(os.environ.get("GOBIN") or Path.home() / "go" / "bin", "versitygw")
    return os.environ.get("VERSITYGW") or shutil.which("versitygw") or (str(installed) if installed.exists() else None)


def has_extended_attributes(directory: Path) -> bool:
    try:
        os.setxattr(directory, "user.streamhouse", b"1")
    except OSError:
        return False
    return True


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The server on a directory in place of the volume, and a free port in place of the container's."""
    found = program()
    if found is None:
        pytest.skip("no versitygw at $VERSITYGW, on PATH or in Go's bin")
    if not has_extended_attributes(tmp_path):
        pytest.skip(
            "the file system of the temporary directory has no extended attributes, which Docker's volumes have"
        )
    (mount,) = SERVICE["volumes"]
    bucket = tmp_path / mount.partition(":")[2].lstrip("/")
    bucket.mkdir(parents=True)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    replaced = {":9000": address, str(Path("/") / bucket.parent.relative_to(tmp_path)): str(bucket.parent)}
    command = [replaced.pop(word, word) for word in SERVICE["command"]]
    assert replaced == {}, "port and directory are in the command"
    log = tmp_path / "versitygw.log"
    with log.open("wb") as output:
        environ = os.environ | environ_of(SERVICE)
        process = subprocess.Popen([found, *command], env=environ, stdout=output, stderr=output)
    try:
        wait_until_healthy(address, process, log)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """As the health check of the container: a GET of its URL."""
    url = SERVICE["healthcheck"]["test"][-1].replace("127.0.0.1:9000", address)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


@pytest.mark.integration
async def test_the_bucket_is_there_and_takes_objects(endpoint: str, tmp_path: Path) -> None:
    environ = environ_of(OURS["query-1"]) | {"STREAMHOUSE_S3_ENDPOINT": endpoint}
    known = StoreSettings.model_fields
    settings = {name: value for name, value in environ.items() if name.removeprefix("STREAMHOUSE_").lower() in known}
    store = configured_store(StoreSettings.load(settings))
    try:
        await store.wait_until_usable()
        small, large = b"small", os.urandom(20 << 20)  # above s3_multipart_threshold_bytes
        await store.put("data/small", [small])
        await store.put("data/large", [large])
        assert await store.get("data/small") == small
        assert await store.get("data/large") == large
        await store.delete(["data/small"])
        assert [entry.key async for entry in store.list("data/")] == ["data/large"]
    finally:
        await store.close()


def test_its_image_is_the_version_that_ci_tests() -> None:
    installs = (Path(__file__).resolve().parents[2] / ".ci" / "run").read_text()
    assert f"versitygw@{SERVICE['image'].rpartition(':')[2]}" in installs
