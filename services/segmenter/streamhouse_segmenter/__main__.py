"""`python -m streamhouse_segmenter`: the segmenter as a process of its own.

nameko runs on eventlet, the rest on asyncio. Eventlet's asyncio hub lets both share one event loop; it has to be
chosen and the standard library patched before anything else is imported. Threads stay real: they do the CPU work.
"""

import os
import sys
import warnings

from shruntime import signals


def main() -> int:
    """Returns exit code 0 after a clean stop, 1 if the settings or their targets cannot be used."""
    signals.handle_from_the_start(survives_hangups=True)  # the imports take a second
    os.umask(0o077)
    os.environ["EVENTLET_HUB"] = "asyncio"
    # nameko needs it, and an operator of a segmenter cannot change that.
    warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
    import eventlet

    eventlet.monkey_patch(thread=False)
    from eventlet.asyncio import spawn_for_awaitable
    from shruntime.server import ListenError
    from shruntime.settings import SettingsError
    from shruntime.text import escaped
    from shstore import StoreError

    from streamhouse_segmenter.settings import SegmenterSettings
    from streamhouse_segmenter.wiring import run

    _know_all_settings()

    async def serve() -> str:
        # An error must not pass through the green thread: eventlet would print it with a trace of its own.
        try:
            await run(SegmenterSettings.load())
        except (SettingsError, StoreError, ListenError) as error:
            return f"error: {escaped(str(error))}\n"
        return ""

    refusal: str = spawn_for_awaitable(serve()).wait()
    sys.stderr.write(refusal)
    return 1 if refusal else 0


def _know_all_settings() -> None:
    """Registers the settings of all services: a file and a set of variables may serve all of them, so another
    service's name is not a mistake."""
    import importlib
    import importlib.util

    for package in ("streamhouse_ingest", "streamhouse_query", "streamhouse_coordinator", "streamhouse_embedded"):
        if importlib.util.find_spec(package):
            importlib.import_module(f"{package}.settings")


if __name__ == "__main__":
    raise SystemExit(main())
