"""A Kafka broker on this machine: KRaft, controller and broker in one process, on free ports."""

import contextlib
import shutil
import signal
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path

from bench.peers import Peer
from tests.integration.processes import free_ports

JARS = Path(__file__).with_name("kafka") / "jars"
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
HEAP = "-Xmx1g"  # bin/kafka-server-start.sh says -Xmx1G -Xms1G


class KafkaBroker(Peer):
    """`flush_each`: fsync before each acknowledgement (`log.flush.interval.messages=1`); Kafka's default leaves that to
    the page cache."""

    system = "kafka"

    def __init__(self, work_dir: Path, *, flush_each: bool) -> None:
        self._work_dir = work_dir
        self._flush_each = flush_each
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        port, controller = free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self._work_dir.mkdir(parents=True)
        properties = self._work_dir / "server.properties"
        properties.write_text(self._properties(port, controller))
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self._java("kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(properties)).check_returncode()
        with (self._work_dir / "kafka.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command("kafka.Kafka", str(properties)), stdout=log, stderr=log, start_new_session=True
            )
        self._wait()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _properties(self, port: int, controller: int) -> str:
        lines = [
            "process.roles=broker,controller",
            "node.id=1",
            f"controller.quorum.voters=1@127.0.0.1:{controller}",
            f"listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
            f"advertised.listeners=PLAINTEXT://127.0.0.1:{port}",
            "controller.listener.names=CONTROLLER",
            f"log.dirs={self._work_dir / 'data'}",
            "offsets.topic.replication.factor=1",
            "transaction.state.log.replication.factor=1",
            "transaction.state.log.min.isr=1",
            "group.initial.rebalance.delay.ms=0",
        ]
        if self._flush_each:
            lines.append("log.flush.interval.messages=1")
        return "\n".join(lines) + "\n"

    def _command(self, name: str, *arguments: str) -> list[str]:
        java = shutil.which("java")
        if java is None or not JARS.is_dir():
            raise SystemExit(
                "Kafka needs Java 17 and its jars: "
                f"mvn -f {JARS.parent}/pom.xml dependency:copy-dependencies -DoutputDirectory=jars"
            )
        return [java, HEAP, "-XX:+UseG1GC", "-cp", f"{JARS}/*", name, *arguments]

    def _java(self, name: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self._command(name, *arguments), check=False, stdout=subprocess.DEVNULL)

    def _wait(self) -> None:
        host, _, port = self.address.rpartition(":")
        end_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end_s:
            if self._process is None or self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                return
            time.sleep(0.1)
        raise SystemExit(f"Kafka does not start: see {self._work_dir / 'kafka.log'}")
