"""Settings of the embedded platform; those of the four services apply as well."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from shruntime.settings import CommonSettings


class EmbeddedSettings(CommonSettings):
    service: ClassVar[str] = "serve"

    listen: str = Field("127.0.0.1:7070", description="host:port that all services listen on")
    data_dir: Path = Field(Path("streamhouse-data"), description="directory that holds everything; made when missing")
    pg_dsn: str = Field("", description="an external PostgreSQL; empty: the embedded one below data_dir")
    pg_bin_dir: str = Field("", description="directory with initdb and postgres; empty: the installed wheel, then PATH")
