"""StreamHouse as a peer."""

from pathlib import Path

from streamhouse_cli.serve_process import ServeProcess

from bench.peers import Peer


class StreamHouseServer(ServeProcess, Peer):
    """`streamhouse serve`: the whole platform with its PostgreSQL, on one data directory."""

    system = "streamhouse"

    def __init__(self, work_dir: Path) -> None:
        super().__init__(work_dir / "data", work_dir / "serve.log", {"STREAMHOUSE_LOG_LEVEL": "WARNING"})
        work_dir.mkdir(parents=True)
