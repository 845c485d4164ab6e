"""Stands in for a service where only its process counts: healthy at once, ends on SIGTERM, and does what it is asked.

arguments: where its health is served (host:port), and a file that will hold the port where it takes expressions of
Python, one a line, and answers each with its value, or with the number of the OSError it failed with.
"""

import asyncio
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc

__all__ = ["os", "time"]  # for the expressions


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        try:
            value = eval(line)
        except OSError as error:
            value = error.errno
        writer.write(f"{value}\n".encode())
    writer.close()


async def main(listen: str, port_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    server.add_insecure_port(listen)
    questions = await asyncio.start_server(answer, "127.0.0.1", 0)
    port_path.with_suffix(".new").write_text(str(questions.sockets[0].getsockname()[1]))
    port_path.with_suffix(".new").replace(port_path)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server.start()
    await stopped.wait()
    server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
