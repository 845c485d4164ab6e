"""Every source of chance and of time that the services use, from one seed."""

import gc
import os
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


class _Seeded(random.Random):
    """`random.Random()` without a seed, made deterministic."""

    source: random.Random

    def __init__(self, seed: Any = None) -> None:
        super().__init__(self.source.getrandbits(64) if seed is None else seed)


@contextmanager
def seeded(seed: int) -> Iterator[random.Random]:
    """Within: random.Random(), random.SystemRandom, the random module's functions, os.urandom and uuid4 follow `seed`.

    The garbage collector is off, because it finalizes when it likes; `time.time_ns` must not be used at all.
    """
    source = random.Random(f"streamhouse {seed}")
    kept = random.getstate()
    random.seed(source.getrandbits(64))
    kind = type("Random", (_Seeded,), {"source": source})
    gc.disable()
    try:
        with (
            mock.patch.object(random, "Random", kind),
            mock.patch.object(random, "_urandom", source.randbytes),
            mock.patch.object(os, "urandom", source.randbytes),
            mock.patch.object(uuid, "uuid4", lambda: uuid.UUID(int=source.getrandbits(128), version=4)),
            mock.patch.object(time, "time_ns", _no_time),
        ):
            yield source
    finally:
        random.setstate(kept)
        gc.enable()


def _no_time() -> int:
    raise AssertionError("the machine's clock was read in a simulation")
