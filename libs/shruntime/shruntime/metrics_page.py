"""The page that Prometheus scrapes: a thread per request, a few at once, and none for a silent client.

Owns: the port, its threads. Does not own: the metrics.
Invariants: at most REQUESTS_MAX requests have a thread. Every request with a thread gives its place back at its end.
"""

import logging
import socket
import sys
import threading
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

log = logging.getLogger(__name__)

REQUESTS_MAX = 16
"""At once, each a thread and a descriptor; beyond that connections are closed. Two scrapers ask every few seconds."""

SILENCE_S_MAX = 10.0
"""A connection that sends no request for so long is closed."""


def serve_metrics(host: str, port: int) -> None:
    """Serves the default registry until the process ends. Raises OSError if it cannot listen on the address."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)

    class Server(_Server):
        address_family = found[0][0]

    server = make_server(host, port, make_wsgi_app(), Server, handler_class=_Handler)
    threading.Thread(target=server.serve_forever, name="metrics page", daemon=True).start()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any, **options: Any) -> None:
        self._room = threading.BoundedSemaphore(REQUESTS_MAX)
        super().__init__(*args, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started, which would have given the place back
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs defects, but not clients that were silent or have gone."""
        if not isinstance(sys.exception(), OSError):
            log.exception("the metrics page failed")


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S_MAX

    def log_message(self, format: str, *args: Any) -> None:
        """Logs no line per request."""
