"""Whole clusters for the benches: services as processes over an embedded PostgreSQL, with nothing left afterwards."""

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

from streamhouse_embedded.postgres import EmbeddedPostgres

from tests.integration.cluster import Cluster
from tests.integration.processes import free_ports

# Of every wait for a state of the cluster; nothing measured depends on it.
PATIENCE_S = 300.0
ResultT = TypeVar("ResultT")


@contextmanager
def new_folder(parent: Path | None = None) -> Iterator[Path]:
    """A directory that is removed afterwards. Others may enter it: PostgreSQL does not run as root."""
    with tempfile.TemporaryDirectory(prefix="streamhouse-bench-", dir=parent) as text:
        folder = Path(text)
        folder.chmod(0o755)
        yield folder


@asynccontextmanager
async def postgres_running(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """PostgreSQL on TCP, with its data below `folder`. `postgres_dsn` finds its address."""
    server = EmbeddedPostgres(folder / "postgres", port=free_ports(1)[0])
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def cluster_running(
    replicas: Mapping[str, int], common: Mapping[str, str], parent: Path | None = None
) -> AsyncIterator[tuple[Cluster, EmbeddedPostgres, str]]:
    """A cluster that serves, its PostgreSQL and the DSN of that. `common`: STREAMHOUSE_* variables, the object store's
    among them (a directory where they name none). Stopped in order unless the body fails; everything is removed."""
    with new_folder(parent) as folder:
        async with postgres_running(folder) as postgres:
            dsn = await postgres.start()
            environ = {
                "STREAMHOUSE_PG_DSN": dsn,
                "STREAMHOUSE_LOG_LEVEL": "WARNING",
                **({} if "STREAMHOUSE_S3_ENDPOINT" in common else {"STREAMHOUSE_STORE_DIR": str(folder / "objects")}),
                **common,
            }
            cluster = Cluster(environ, folder, replicas)
            try:
                await cluster.start()
                yield cluster, postgres, dsn
                await stop_in_order(cluster)
            finally:
                cluster.kill_all()


async def stop_in_order(cluster: Cluster) -> None:
    """Also processes that are stopped by SIGSTOP."""
    for process in cluster.services.values():
        if process.is_running():
            process.send_signal(signal.SIGCONT)
    await cluster.stop()


async def until(
    ask: Callable[[], Awaitable[ResultT]], met: Callable[[ResultT], bool], what: str, interval_s: float = 0.1
) -> ResultT:
    """The first answer that is met. Raises TimeoutError after PATIENCE_S."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not met(answer := await ask()):
                await asyncio.sleep(interval_s)
            return answer
    except TimeoutError:
        raise TimeoutError(f"after {PATIENCE_S:.0f} s still not: {what}") from None
