"""An S3 server for tests in a process of its own, run by servers.py. Keeps its objects in memory.

argument: the port. Reads commands from standard input and repeats each when it is done: `up` listens, `down`
stops listening and keeps the objects, so that an outage can be played. Ends with its standard input.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from moto.s3.responses import S3Response
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class QuietHandler(WSGIRequestHandler):
    """No line per request."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def store_atomically() -> None:
    """Makes moto's conditional writes atomic, as S3's are: it looks for an object and stores one in two steps, and two
    of its threads that look first both store."""
    lock = threading.RLock()
    for name in ("put_object", "_key_response_post"):

        def locked(*arguments: Any, write: Any = getattr(S3Response, name)) -> Any:
            with lock:
                return write(*arguments)

        setattr(S3Response, name, locked)


class S3Server:
    def __init__(self, port: int) -> None:
        self._port = port
        self._app: Any = DomainDispatcherApplication(create_backend_app)

    def up(self) -> None:
        self._server = make_server("127.0.0.1", self._port, self._app, threaded=True, request_handler=QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.daemon = True
        self._thread.start()

    def down(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def main() -> None:
    store_atomically()
    server = S3Server(int(sys.argv[1]))
    commands = {"up": server.up, "down": server.down}
    for line in sys.stdin:
        commands[line.strip()]()
        sys.stdout.write(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
