"""Settings of the embedded platform; those of the five services apply as well."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from shruntime.memory import MIB, MemoryShare
from shruntime.settings import CommonSettings
from shruntime.urls import address, address_or_empty, url_of


class EmbeddedSettings(CommonSettings):
    service: ClassVar[str] = "serve"

    listen: Annotated[str, AfterValidator(address)] = Field(
        "127.0.0.1:7070", description="host:port that all services listen on"
    )
    data_dir: Path = Field(Path("streamhouse-data"), description="directory that holds everything; made when missing")
    pg_dsn: Annotated[str, AfterValidator(url_of("postgresql", "postgres"))] = Field(
        "", repr=False, description="an external PostgreSQL; empty: the embedded one below data_dir"
    )
    pg_shared_buffers_bytes: int = Field(
        default_factory=MemoryShare(part=32, least=16 * MIB, most=64 * MIB),
        ge=MIB,
        le=1 << 40,
        description="bytes of the embedded PostgreSQL's page cache; its tables fit many times over",
    )
    pg_bin_dir: str = Field("", description="directory with initdb and postgres; empty: the installed wheel, then PATH")
    sql_prometheus_listen: Annotated[str, AfterValidator(address_or_empty)] = Field(
        "", description="host:port that serves /metrics of SQL, which runs in a process of its own; empty: off"
    )
