"""A whole distributed StreamHouse: services as processes over real PostgreSQL, S3 and, if given, RabbitMQ and Redis."""

from collections.abc import Mapping
from pathlib import Path

from tests.integration.processes import ServiceProcess, free_ports

REPLICAS = 2
SERVICES = ("coordinator", "ingest", "query", "segmenter")


class Cluster:
    """Two coordinators, ingest agents, segmenters and query services. `start` returns when all are ready."""

    def __init__(self, common: Mapping[str, str], work_dir: Path, replicas: Mapping[str, int] | None = None) -> None:
        """`common`: the STREAMHOUSE_* variables of PostgreSQL, S3, RabbitMQ and Redis. `replicas`: of services that
        are not to run twice."""
        self._replicas = dict.fromkeys(SERVICES, REPLICAS) | dict(replicas or {})
        self._ports = iter(free_ports(sum(self._replicas.values())))
        self._work_dir = work_dir
        self.coordinators: dict[str, ServiceProcess] = {}
        self.services: dict[str, ServiceProcess] = {}
        self.addresses: dict[str, str] = {}
        for name in self._names("coordinator"):
            self._add("coordinator", name, common)
        self.bootstrap = ",".join(self.addresses.values())
        environ = {**common, "STREAMHOUSE_BOOTSTRAP": self.bootstrap}
        for name in self._names("ingest"):
            paths = {"STREAMHOUSE_WAL_DIR": str(work_dir / name), "STREAMHOUSE_AGENT_ID": name}
            self._add("ingest", name, environ | paths)
        for name in self._names("query"):
            self._add("query", name, environ | {"STREAMHOUSE_CACHE_DIR": str(work_dir / name)})
        for name in self._names("segmenter"):
            self._add("segmenter", name, environ | {"STREAMHOUSE_WORKER_ID": name})

    def _names(self, service: str) -> list[str]:
        return [f"{service}-{n + 1}" for n in range(self._replicas[service])]

    def _add(self, service: str, name: str, environ: Mapping[str, str]) -> None:
        listen = f"127.0.0.1:{next(self._ports)}"
        process = ServiceProcess(name, [service], {**environ, "STREAMHOUSE_LISTEN": listen}, self._work_dir)
        self.services[name] = process
        self.addresses[name] = listen

    async def start(self) -> None:
        for process in self.services.values():
            process.start()
        for name, process in self.services.items():
            await process.wait_serving(self.addresses[name])

    async def stop(self) -> dict[str, int]:
        """Stops everything, coordinators last (the others drain through them); exit codes by name."""
        order = sorted(
            self.services, key=lambda name: ("ingest", "query", "segmenter", "coordinator").index(name.split("-")[0])
        )
        return {name: await self.services[name].stop() for name in order if self.services[name].is_running()}

    def kill_all(self) -> None:
        for process in self.services.values():
            if process.is_running():
                process.kill()
