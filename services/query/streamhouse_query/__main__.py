"""`python -m streamhouse_query`: the query service as a process of its own."""

import asyncio
import sys

from shruntime.server import ListenError
from shruntime.settings import SettingsError
from shstore import StoreError

from streamhouse_query.chunk_reader import CacheDirError
from streamhouse_query.settings import QuerySettings
from streamhouse_query.wiring import run


def main() -> int:
    """Exit code 0 after a clean stop, 2 when the settings or what they name cannot be used."""
    try:
        asyncio.run(run(QuerySettings.load()))
    except (SettingsError, StoreError, CacheDirError, ListenError) as error:
        sys.stderr.write(f"query: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
