"""S3 servers in their own processes, once per session, and a fresh bucket per test."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import botocore.session
import pytest
from shstore import StoreOptions

from tests.integration.servers import Server, versitygw_server

# Prints the port it found, and ends with its standard input: it cannot outlive the tests.
MOTO = """
import sys
from moto.server import ThreadedMotoServer
from tests.integration.moto_process import store_atomically
store_atomically()
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="session", autouse=True)
def shared_service_models() -> Iterator[None]:
    """Reads the descriptions of S3's API once for all stores: they are 85 % of what a new client costs, 0.15 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
        yield


@contextmanager
def moto_endpoint(environment: dict[str, str] | None = None) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[3],  # `tests` is found from there
    )
    assert process.stdin and process.stdout
    with process.stdin, process.stdout:
        port = process.stdout.readline().strip()
        assert port, "the moto server did not start"
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()
        process.wait(timeout=10)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    with moto_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def strict_s3() -> Iterator[StoreOptions]:
    """A bucket on a server that refuses access keys it does not know, which is any from now on."""
    # The count of requests before checking begins covers the one that creates the bucket.
    with moto_endpoint({**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "1"}) as endpoint:
        create_bucket(endpoint, "bucket")
        yield StoreOptions(kind="s3", endpoint=endpoint, bucket="bucket", access_key="AKIAWRONG", secret_key="s")


def create_bucket(endpoint: str, bucket: str, access_key: str = "test", secret_key: str = "test") -> None:
    s3 = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
    )
    s3.create_bucket(Bucket=bucket)
    s3.close()


@pytest.fixture
def s3_settings(s3_endpoint: str) -> StoreOptions:
    return new_bucket(s3_endpoint, "test", "test")


@pytest.fixture(scope="session")
def versitygw() -> Iterator[Server]:
    server = versitygw_server()
    yield server
    server.close()


@pytest.fixture
def versitygw_settings(versitygw: Server) -> StoreOptions:
    keys = (versitygw.settings[f"STREAMHOUSE_S3_{name}_KEY"] for name in ("ACCESS", "SECRET"))
    return new_bucket(versitygw.url, *keys)


def new_bucket(endpoint: str, access_key: str, secret_key: str) -> StoreOptions:
    """The settings of a bucket made now; 5 MiB, S3's least, begin a multipart upload."""
    settings = StoreOptions(
        kind="s3",
        endpoint=endpoint,
        bucket=f"test-{uuid.uuid4().hex}",
        prefix="cluster-a",
        access_key=access_key,
        secret_key=secret_key,
        multipart_threshold_bytes=5 * 1024 * 1024,
        multipart_part_bytes=5 * 1024 * 1024,
    )
    create_bucket(endpoint, settings.bucket, access_key, secret_key)
    return settings
