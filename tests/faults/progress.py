"""What a run prints while it runs: a line now and then. What the clients in its process log goes to a file instead."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

INTERVAL_S = 30.0
"""Often enough to see that it lives, rarely enough for a run of hours to fit a screen or two."""


@contextmanager
def clients_log(path: Path) -> Iterator[None]:
    """Everything logged in this process goes to `path`: thousands of lines of clients that meet faults as intended."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


def line(left_s: float | None, at_work: Iterable[str], counts: Mapping[str, int]) -> str:
    """`left_s`: of faults; None before them. `counts`: events of the history by type."""
    if left_s is None:
        left = "starting"
    elif left_s > 0:
        left = f"{int(left_s) // 60}:{int(left_s) % 60:02d} left"
    else:
        left = "healed, coming to rest"
    faults = ", ".join(sorted(at_work)) or "no fault"
    produced = f"{counts.get('Produce', 0)} operations, {counts.get('Produced', 0)} acknowledged"
    return f"{left}; {faults} at work; {produced}"


async def tell(ends_s: Callable[[], float | None], at_work: Iterable[str], counts: Mapping[str, int]) -> None:
    """Prints a line every INTERVAL_S until cancelled. `ends_s`: when the faults end, on time.monotonic()."""
    while True:
        await asyncio.sleep(INTERVAL_S)
        end = ends_s()
        print(line(None if end is None else end - time.monotonic(), at_work, counts), flush=True)
