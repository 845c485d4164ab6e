"""`python -m streamhouse_segmenter`: the segmenter as a process of its own.

nameko runs on eventlet, the rest on asyncio. Eventlet's asyncio hub lets both share one event loop; it has to be
chosen and the standard library patched before anything else is imported. Threads stay real: they do the CPU work.
"""

import os
import sys


def main() -> int:
    """Exit code 0 after a clean stop, 2 when the settings or what they name cannot be used."""
    os.environ["EVENTLET_HUB"] = "asyncio"
    import eventlet

    eventlet.monkey_patch(thread=False)
    from eventlet.asyncio import spawn_for_awaitable
    from shruntime.server import ListenError
    from shruntime.settings import SettingsError
    from shstore import StoreError

    from streamhouse_segmenter.settings import SegmenterSettings
    from streamhouse_segmenter.wiring import run

    try:
        spawn_for_awaitable(run(SegmenterSettings.load())).wait()
    except (SettingsError, StoreError, ListenError) as error:
        sys.stderr.write(f"segmenter: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
