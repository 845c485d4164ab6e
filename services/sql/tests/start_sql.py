"""A SQL service under test, and the results of its statements."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from shproto.v1 import sql_pb2
from shread.engine import ReadEngine
from streamhouse_sql.service import SqlService
from streamhouse_sql.wiring import SqlParts


@dataclass(slots=True)
class Result:
    """`responses`: number of messages; `stats`: of the last one."""

    schema: pa.Schema | None = None
    batches: list[pa.RecordBatch] = field(default_factory=list)
    responses: int = 0
    stats: sql_pb2.ExecuteStats = field(default_factory=sql_pb2.ExecuteStats)

    def add(self, response: sql_pb2.ExecuteResponse) -> None:
        assert not self.stats.elapsed_ms and not self.stats.rows, "nothing comes behind the counts"
        with pa.ipc.open_stream(response.arrow_stream) as reader:
            assert self.schema is None or reader.schema == self.schema, "a result has one schema"
            self.schema = reader.schema
            self.batches += list(reader)
        self.responses += 1
        self.stats.CopyFrom(response.stats)

    @property
    def names(self) -> list[str]:
        assert self.schema is not None
        return list(self.schema.names)

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        return [
            row for batch in self.batches for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
        ]

    @property
    def value(self) -> Any:
        """The value of a result that has one row and one column."""
        ((value,),) = self.rows
        return value


class Sql:
    """`engine`: what the service reads by. `service`: its inside, for what is left of statements."""

    def __init__(self, parts: SqlParts, engine: ReadEngine) -> None:
        self.parts = parts
        self.engine = engine
        self.service: SqlService = parts._service

    async def run(self, text: str, timeout_ms: int = 0) -> Result:
        """Returns the result of a statement, once all of it is there."""
        result = Result()
        async with aclosing(self.responses(text, timeout_ms)) as responses:
            async for response in responses:
                result.add(response)
        assert result.stats.rows == len(result.rows)
        return result

    def responses(self, text: str, timeout_ms: int = 0) -> Any:
        return self.parts.api.execute(sql_pb2.ExecuteRequest(statement=text, timeout_ms=timeout_ms))

    def start(self, text: str, timeout_ms: int = 0) -> asyncio.Task[Result]:
        return asyncio.create_task(self.run(text, timeout_ms))

    def left(self) -> list[str]:
        """Returns all that is left of statements: runs, tasks, turns, files."""
        found = [f"run {run}" for run in (*self.service.runs, *self.service.live.runs)]
        found += [
            task.get_name()
            for task in asyncio.all_tasks()
            if task.get_name().startswith("sql ") and task.get_name() != "sql session"
        ]
        if self.service._slots._value != self.service._settings.sql_statements_max:
            found.append("a turn")
        directory = self.service._settings.sql_temp_dir
        found += [str(path) for path in directory.rglob("*")] if directory.exists() else []
        return found


StartSql = Callable[..., Awaitable[Sql]]
