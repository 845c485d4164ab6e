"""`python -m streamhouse_sql CHANNEL [LISTENER]`: the SQL service as a child process of `streamhouse serve`.

CHANNEL and LISTENER are descriptors that the parent has left open. The parent writes its settings to the channel, a
line of JSON; this process answers with a line, the address of its gRPC server, once it serves. The end of the channel
is the end of the parent: the service then stops, too. LISTENER is the socket of PostgreSQL's clients.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time

from shruntime import signals

# A stop that takes longer than shutdown_timeout_ms hangs: without its parent nobody else would end the process.
GRACE_S = 10.0


def main() -> int:
    """Returns exit code 0 after a clean stop, 1 if the service cannot start or go on."""
    signals.handle_from_the_start(survives_hangups=True)  # the imports take a second
    os.umask(0o077)  # spill files hold records, which other users must not read
    channel = socket.socket(fileno=int(sys.argv[1]))
    listener = socket.socket(fileno=int(sys.argv[2])) if len(sys.argv) > 2 else None
    import uvloop
    from shread.chunk_reader import CacheDirError
    from shruntime.server import ListenError
    from shruntime.settings import SettingsError
    from shruntime.text import escaped
    from shstore import StoreError

    from streamhouse_sql.settings import SqlSettings
    from streamhouse_sql.wiring import run

    # Behind the imports: the parent starts this process first of all, before it knows its own address.
    line = _first_line(channel)
    if line is None:
        return 1  # the parent has ended

    settings = SqlSettings.model_validate_json(line)
    ended = threading.Thread(target=_end_with_parent, args=(channel, settings.shutdown_timeout_ms), daemon=True)
    ended.start()

    def report(address: str) -> None:
        with contextlib.suppress(OSError):  # the parent has ended, and the thread stops the service
            channel.sendall(f"{address}\n".encode())

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(settings, listener=listener, on_serving=report))
    except (SettingsError, StoreError, ListenError, CacheDirError) as error:
        sys.stderr.write(f"error: the process of SQL: {escaped(str(error))}\n")
        return 1
    return 0


def _first_line(channel: socket.socket) -> bytes | None:
    """Returns the first line that the parent writes; None if the parent ends before."""
    line = b""
    while not line.endswith(b"\n"):
        piece = channel.recv(64 * 1024)
        if not piece:
            return None
        line += piece
    return line


def _end_with_parent(channel: socket.socket, shutdown_timeout_ms: int) -> None:
    """Waits for the end of the parent, then stops this process: gently, and by force if that takes too long."""
    with contextlib.suppress(OSError):
        while channel.recv(1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(shutdown_timeout_ms / 1000 + GRACE_S)
    signals.end_at_once(1)


if __name__ == "__main__":
    raise SystemExit(main())
